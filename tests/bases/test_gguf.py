"""A .gguf file becomes the model it was made from, to the bit where it can, or is refused by
name."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.support.models.tiny_gguf import LLAMA3, tiny, write_gguf
from tests.support.tiny import tiny_tokenizer
from veneer.bases import kept
from veneer.bases.compute import DTYPES, DtypeName
from veneer.bases.gguf.convert import convert, dense_model, read_header
from veneer.bases.kept import blocks_folder, converted_folder
from veneer.errors import CorruptFileError, DoesNotFitError, SourceError, VeneerError
from veneer.files.hashes import file_hash
from veneer.models.load import load_base

IDS = torch.randint(0, 256, (2, 90), generator=torch.Generator().manual_seed(0))
TEXT = "  It's 12345 o'clock, naïve café 👩‍🚀\n\n\tx = f(3)  "


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize(
    ("family", "architecture"),
    [("llama", "llama"), ("llama_untied", "llama"), ("qwen2", "qwen2"), ("qwen3", "qwen3")],
)
def test_the_weights_come_back_to_the_bit(family: str, architecture: str, tmp_path: Path) -> None:
    # A head size that the hidden size does not give away.
    model = tiny(family, **{"llama_untied": {"head_dim": 16}}.get(family, {}))
    base = load_base(str(write_gguf(tmp_path / "m.gguf", model, architecture)))
    assert type(base.model) is type(model)
    assert torch.equal(base.model(IDS).logits, model(IDS).logits)
    assert base.config.rms_norm_eps == 1e-5
    assert base.config.tie_word_embeddings == model.config.tie_word_embeddings
    assert base.fingerprint() == load_base(base.name_or_path).fingerprint()


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (gguf.GGMLQuantizationType.F32, torch.float32),
        (gguf.GGMLQuantizationType.F16, torch.float16),
        (gguf.GGMLQuantizationType.BF16, torch.bfloat16),
        (gguf.GGMLQuantizationType.Q8_0, torch.bfloat16),
        (gguf.GGMLQuantizationType.Q4_1, torch.bfloat16),
    ],
)
def test_float_files_keep_their_dtype_and_quantised_ones_become_bf16(
    kind: gguf.GGMLQuantizationType, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = tiny("llama")
    base = load_base(
        str(write_gguf(tmp_path / "m.gguf", model, "llama", kind=kind)), dtype="stored"
    )
    assert base.dtype == dtype
    weight = model.model.layers[1].mlp.down_proj.weight
    rounded = torch.from_numpy(gguf.dequantize(gguf.quantize(weight.numpy(), kind), kind)).to(dtype)
    assert torch.equal(base.model.model.layers[1].mlp.down_proj.weight, rounded)


F16, BF16, F32 = (gguf.GGMLQuantizationType[name] for name in ("F16", "BF16", "F32"))


@pytest.mark.parametrize(
    ("kind", "kinds", "dtype"),
    [
        (
            F16,
            {"attn_output": F32},
            torch.float16,
        ),  # GPT-2's positions and routers of experts are f32 in f16 files
        (BF16, {"attn_output": F32}, torch.bfloat16),
        (F32, {"attn_output": F16}, torch.float32),
        (F16, {"attn_output": BF16}, torch.float32),  # neither holds the other
        (F16, {"attn_output": gguf.GGMLQuantizationType.Q8_0}, torch.bfloat16),
    ],
)
def test_a_file_has_the_type_of_most_of_its_matrices(
    kind: gguf.GGMLQuantizationType,
    kinds: dict[str, gguf.GGMLQuantizationType],
    dtype: torch.dtype,
    tmp_path: Path,
) -> None:
    model = tiny("llama")
    again = dense_model(
        read_header(write_gguf(tmp_path / "m.gguf", model, "llama", kind=kind, kinds=kinds))
    )
    assert {parameter.dtype for parameter in again.parameters()} == {dtype}
    weight = model.model.layers[1].mlp.down_proj.weight
    stored = torch.from_numpy(gguf.dequantize(gguf.quantize(weight.numpy(), kind), kind))
    assert torch.equal(again.model.layers[1].mlp.down_proj.weight, stored.to(dtype))


@pytest.mark.parametrize(
    ("kind", "dtype", "most"),
    [
        (F16, "float16", 2**-11),
        (BF16, "bfloat16", 2**-8),
        (gguf.GGMLQuantizationType.Q8_0, "bfloat16", 2**-8),
    ],
)
def test_f32_norms_are_rounded_to_the_files_type_as_transformers_rounds_them(
    kind: gguf.GGMLQuantizationType, dtype: DtypeName, most: float, tmp_path: Path
) -> None:
    model = tiny("llama")
    norm = model.model.layers[1].input_layernorm.weight
    norm.data = 1 + torch.rand(norm.shape, generator=torch.Generator().manual_seed(3)) / 3
    path = write_gguf(tmp_path / "m.gguf", model, "llama", kind=kind)
    stored = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.1.attn_norm.weight")
    assert stored.tensor_type == F32 and torch.equal(torch.from_numpy(stored.data.copy()), norm)
    rounded = norm.to(DTYPES[dtype])
    assert 0 < float(((rounded.float() - norm) / norm).abs().max()) <= most
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=DTYPES[dtype]
    )
    bases = {asked: load_base(str(path), dtype=asked) for asked in ("stored", dtype, "float32")}
    for held in (theirs, *(base.model for base in bases.values())):
        assert torch.equal(held.model.layers[1].input_layernorm.weight.float(), rounded.float())
    assert bases["float32"].dtype == torch.float32
    assert bases["float32"].identity == bases["stored"].identity


def test_a_value_that_the_files_type_cannot_hold_is_refused_by_name(tmp_path: Path) -> None:
    model = tiny("llama")
    model.model.layers[1].self_attn.o_proj.weight[3, 2] = 70000.0
    path = write_gguf(tmp_path / "m.gguf", model, "llama", kind=F16, kinds={"attn_output": F32})
    with pytest.raises(
        SourceError, match=r"blk\.1\.attn_output\.weight: a value is too large for f16"
    ):
        load_base(str(path))


def test_llama_3s_rope_scaling_is_found_again(tmp_path: Path) -> None:
    model = tiny("llama", rope_parameters=LLAMA3, head_dim=64, max_position_embeddings=16384)
    base = load_base(str(write_gguf(tmp_path / "m.gguf", model, "llama")))
    assert base.config.rope_parameters == LLAMA3
    assert torch.equal(base.model(IDS).logits, model(IDS).logits)
    plain = tiny(
        "llama",
        rope_parameters={"rope_theta": 500000.0},
        head_dim=64,
        max_position_embeddings=16384,
    )
    assert not torch.allclose(plain(IDS).logits, model(IDS).logits, atol=1e-3)


def test_the_tokenizer_the_template_and_the_stop_tokens_are_rebuilt(tmp_path: Path) -> None:
    ours = load_base(str(write_gguf(tmp_path / "m.gguf", tiny("llama"), "llama", pre="smollm")))
    original = tiny_tokenizer()
    chat = [{"role": "user", "content": TEXT}, {"role": "assistant", "content": "é"}]
    rendered = ours.tokenizer.apply_chat_template(chat, tokenize=False)
    assert rendered == original.apply_chat_template(chat, tokenize=False)
    assert ours.tokenizer(rendered)["input_ids"] == original(rendered)["input_ids"]
    assert ours.tokenizer(" t")["input_ids"] == [259]
    assert ours.tokenizer.decode(ours.tokenizer(TEXT)["input_ids"]) == TEXT
    assert ours.tokenizer.eos_token == "<|endoftext|>"
    assert ours.tokenizer.model_max_length == 1024
    assert ours.model.generation_config.eos_token_id == [
        257,
        258,
    ]  # the template's end of turn, and eos
    stored = json.loads((Path(ours.name_or_path) / "generation_config.json").read_text())
    assert stored["eos_token_id"] == [257, 258]


@pytest.mark.parametrize("eos", ["<|im_end|>", "<|endoftext|>"])
def test_an_answer_ends_at_the_end_of_a_turn_and_of_a_text_whichever_the_file_names(
    tmp_path: Path, eos: str
) -> None:
    """As in llama.cpp, and in the generation_config.json of such models beside safetensors."""
    ours = load_base(str(write_gguf(tmp_path / "m.gguf", tiny("llama"), "llama", eos=eos)))
    assert ours.tokenizer.eos_token == eos
    assert ours.model.generation_config.eos_token_id == [257, 258]


def test_an_answer_ends_at_the_tokens_that_the_header_names(tmp_path: Path) -> None:
    named = {"tokenizer.ggml.eot_token_id": 65, "tokenizer.ggml.eom_token_id": 66}
    ours = load_base(str(write_gguf(tmp_path / "m.gguf", tiny("llama"), "llama", extra=named)))
    assert ours.model.generation_config.eos_token_id == [65, 66, 257, 258]


@pytest.mark.parametrize(
    ("pre", "digits", "word"),
    [
        ("gpt-2", ["Ġ1", "2"], ["q", "z"]),
        ("smollm", ["Ġ", "1", "2"], ["q", "z"]),
        ("qwen2", ["Ġ", "1", "2"], ["q", "z"]),
        ("llama-bpe", ["Ġ", "1", "2"], ["qz"]),
    ],
)
def test_text_is_cut_as_the_models_own_tokenizer_cuts_it(
    pre: str, digits: list[str], word: list[str], tmp_path: Path
) -> None:
    tokenizer = load_base(
        str(write_gguf(tmp_path / "m.gguf", tiny("llama"), "llama", pre=pre))
    ).tokenizer
    assert tokenizer.tokenize(" 12") == digits
    assert tokenizer.tokenize("qz") == word


def test_the_second_load_reads_the_folder_of_the_first(cache: Path, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny("llama"), "llama")
    first = load_base(str(path))
    folder = Path(first.name_or_path)
    assert folder == converted_folder(file_hash(path))
    assert [child.name for child in (cache / "gguf").iterdir()] == [folder.name]
    written = (folder / "model.safetensors").stat().st_mtime_ns
    renamed = path.rename(tmp_path / "another name.gguf")
    assert load_base(str(renamed)).name_or_path == first.name_or_path
    assert (folder / "model.safetensors").stat().st_mtime_ns == written


def test_a_converted_folder_that_was_changed_is_converted_again(
    cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny("llama"), "llama")
    folder = convert(path, "5" * 64)
    written = {file.name: file.read_bytes() for file in folder.iterdir()}
    for name in ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json"):
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)
        caplog.clear()
        assert convert(path, "5" * 64) == folder
        assert f"{name} changed" in caplog.text
        assert {file.name: file.read_bytes() for file in folder.iterdir()} == written
    (folder / "tokenizer_config.json").unlink()
    convert(path, "5" * 64)
    assert {file.name for file in folder.iterdir()} == set(written)
    assert [child.name for child in (cache / "gguf").iterdir()] == [folder.name]


@pytest.mark.parametrize("package", ["gguf", "transformers"])
def test_a_folder_that_another_version_converted_is_not_used(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = converted_folder("5" * 64), blocks_folder("5" * 64)
    own = kept.version
    monkeypatch.setattr(
        kept, "version", lambda name: f"{own(name)}{'.1' if name == package else ''}"
    )
    assert converted_folder("5" * 64) != folders[0] and blocks_folder("5" * 64) != folders[1]


def test_what_lies_beside_the_file_is_not_read(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny("llama"), "llama")
    for name in (
        "config.json",
        "tokenizer_config.json",
        "tokenizer.json",
        "generation_config.json",
    ):
        (tmp_path / name).write_text('{"model_type": "bert", "tokenizer_class": "BertTokenizer"}')
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/else"}')
    assert torch.equal(load_base(str(path)).model(IDS).logits, tiny("llama")(IDS).logits)


def test_what_would_not_be_faithful_is_refused_with_every_reason(
    cache: Path, tmp_path: Path
) -> None:
    path = write_gguf(
        tmp_path / "m.gguf", tiny("llama"), "granite", pre="klingon", extra={"split.count": 3}
    )
    with pytest.raises(SourceError) as raised:
        load_base(str(path))
    text = str(raised.value)
    for word in (
        "architecture granite: not among llama",
        "klingon",
        "one of 3 parts",
        "safetensors",
    ):
        assert word in text
    assert len(raised.value.faults) == 3
    assert not list(cache.rglob("config.json"))


@pytest.mark.parametrize("leave_out", ["layers.1.mlp.up_proj", "model.norm"])
def test_a_file_that_lacks_a_weight_is_refused(leave_out: str, cache: Path, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny("llama"), "llama", leave_out=leave_out)
    with pytest.raises(SourceError, match=leave_out):
        load_base(str(path))
    assert not list(cache.rglob("config.json"))


def test_a_weight_that_has_no_place_in_the_model_is_refused(tmp_path: Path) -> None:
    model = tiny("llama", num_hidden_layers=3)
    path = tmp_path / "m.gguf"
    extra = {"llama.block_count": 2}
    with pytest.raises(SourceError, match=r"blk\.2\.attn_q\.weight is not in the model"):
        load_base(str(write_gguf(path, model, "llama", extra=extra)))


@pytest.mark.parametrize("share", [0.0, 0.001, 0.05, 0.2, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused_and_leaves_nothing_behind(
    share: float, cache: Path, tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny("llama"), "llama")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(VeneerError) as raised:
        load_base(str(path))
    assert isinstance(raised.value, CorruptFileError)
    assert "m.gguf" in str(raised.value)
    assert not list(cache.rglob("*")) or not list((cache / "gguf").iterdir())


def test_a_full_disk_is_exit_code_3_and_leaves_nothing_behind(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny("llama"), "llama")

    def full(fault: Exception) -> Callable[..., None]:
        def save(_: object, folder: Path) -> None:
            folder.mkdir()
            (folder / "config.json").write_text("{}")
            raise fault

        return save

    for fault in (
        OSError(errno.ENOSPC, "No space left"),
        SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        ),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(PreTrainedModel, "save_pretrained", full(fault))
            with pytest.raises(DoesNotFitError, match="is full") as raised:
                load_base(str(path))
        assert raised.value.exit_code == 3
        assert not list((cache / "gguf").iterdir())
    assert load_base(str(path)).dtype == torch.float32


def test_conversion_says_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny("qwen2"), "qwen2")
    capfd.readouterr()
    load_base(str(path))
    assert capfd.readouterr() == ("", "")
