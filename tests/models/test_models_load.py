"""From a folder to a Base: exact weights, nothing trained, no code run, and every damage refused by
name."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, T5Config, xLSTMConfig
from transformers.utils import logging

from tests.support.tiny import FAMILIES, save_tiny, tiny_base, tiny_model, tiny_tokenizer
from veneer.errors import (
    ConfigError,
    CorruptFileError,
    DoesNotFitError,
    SourceError,
    UnsafeFileError,
    VeneerError,
)
from veneer.models import load
from veneer.models.load import load_base

IDS = torch.tensor([[5, 80, 99, 7, 250, 31, 31, 80, 12, 0, 77, 140]])


def edit_config(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def edit_weights(folder: Path, **changes: torch.Tensor | None) -> Path:
    weights = load_file(folder / "model.safetensors")
    for name, tensor in changes.items():
        weights.pop(name.replace("__", "."), None)
        if tensor is not None:
            weights[name.replace("__", ".")] = tensor
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def refusal(kind: type[VeneerError], folder: Path) -> str:
    with pytest.raises(kind) as raised:
        load_base(str(folder))
    assert type(raised.value) is kind
    assert raised.value.next_step
    return str(raised.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_loads_frozen_and_gives_the_outputs_it_was_saved_with(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    base = load_base(str(save_tiny(tmp_path, family, dtype)), dtype="stored")
    assert torch.equal(base.model(IDS).logits, tiny_model(family, dtype)(IDS).logits)
    assert base.dtype == dtype
    assert base.device == torch.device("cpu")
    assert not base.model.training
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert base.config._attn_implementation in ("sdpa", "eager")
    assert base.name_or_path == str(tmp_path.resolve())
    assert base.revision is None


def test_weights_keep_their_dtype_whatever_the_config_says(tmp_path: Path) -> None:
    folder = edit_config(
        save_tiny(tmp_path, "llama", torch.bfloat16), dtype="float32", torch_dtype="float32"
    )
    assert load_base(str(folder), dtype="stored").dtype == torch.bfloat16
    assert load_base(str(folder), dtype="float32").dtype == torch.float32
    assert load_base(str(folder), dtype="float16").dtype == torch.float16


def test_an_unknown_dtype_or_device_is_refused_before_anything_is_read() -> None:
    with pytest.raises(ConfigError, match="bfloat16, float16"):
        load_base("nowhere", dtype="bf16")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="gpu0"):
        load_base("nowhere", device="gpu0")


def test_code_that_comes_with_a_model_is_never_run(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "llama")
    marker = tmp_path / "code was run"
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: ...\n")
    names = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
    edit_config(folder, auto_map=dict.fromkeys(names, "evil.Evil"))
    tokenizer_config = folder / "tokenizer_config.json"
    tokenizer_config.write_text(
        json.dumps(
            {
                **json.loads(tokenizer_config.read_text()),
                "auto_map": {"AutoTokenizer": [None, "evil.Evil"]},
            }
        )
    )
    try:
        base = load_base(str(folder))
        assert type(base.model).__module__.startswith("transformers.")
    except VeneerError:
        pass  # refusing is as good
    assert not marker.exists()
    edit_config(folder, model_type="evil")
    text = refusal(UnsafeFileError, folder)
    assert "evil.Evil" in text
    assert "never run" in text
    assert not marker.exists()


def test_a_config_cannot_name_attention_or_files_to_fetch(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, "llama")
    original = (folder / "config.json").read_text()
    for field, value in {
        "_attn_implementation": "someone/kernel",
        "attn_implementation": {"": "someone/kernel:f"},
        "_attn_implementation_internal": "someone/kernel",
        "text_config": {"_attn_implementation": "someone/kernel"},
        "experts_implementation": "someone/kernel",
        "transformers_weights": "../other.safetensors",
        "fusion_config": {"a": True},
    }.items():
        (folder / "config.json").write_text(original)
        edit_config(folder, **{field: value})
        assert field in refusal(UnsafeFileError, folder)
    (folder / "config.json").write_text(original)
    assert (
        load_base(
            str(edit_config(folder, _attn_implementation="eager"))
        ).config._attn_implementation
        == "sdpa"
    )


def test_what_is_no_causal_language_model_is_refused_by_its_name(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "a", "llama")
    T5Config(architectures=["T5ForConditionalGeneration"]).save_pretrained(folder)
    assert "encoder-decoder: T5ForConditionalGeneration" in refusal(SourceError, folder)
    folder = edit_config(
        save_tiny(tmp_path / "b", "llama"), architectures=["LlamaForSequenceClassification"]
    )
    assert "LlamaForSequenceClassification" in refusal(SourceError, folder)
    edit_config(folder, model_type="vit", architectures=["ViTModel"])
    assert "ViTModel" in refusal(SourceError, folder)
    edit_config(folder, model_type="llama9", architectures=["Llama9ForCausalLM"])
    text = refusal(SourceError, folder)
    assert "'llama9'" in text
    assert "upgrade transformers" in text


def test_quantised_weights_are_refused_by_the_name_of_their_method(tmp_path: Path) -> None:
    folder = edit_config(
        save_tiny(tmp_path, "llama"), quantization_config={"quant_method": "hqq", "bits": 4}
    )
    assert "hqq" in refusal(SourceError, folder)


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.01, 0.5, 0.999])
def test_truncated_weights_are_refused_with_the_file_named(share: float, tmp_path: Path) -> None:
    path = save_tiny(tmp_path, "llama") / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    assert "model.safetensors" in refusal(CorruptFileError, tmp_path)


def test_missing_misshapen_and_left_over_weights_are_listed_all_at_once(tmp_path: Path) -> None:
    folder = edit_weights(
        save_tiny(tmp_path, "llama_untied"),
        lm_head__weight=None,
        model__norm__weight=None,
        model__layers__0__mlp__up_proj__weight=torch.zeros(3, 5),
        model__layers__2__mlp__up_proj__weight=torch.zeros(48, 32),
    )
    text = refusal(CorruptFileError, folder)
    assert "missing    lm_head.weight" in text
    assert "missing    model.norm.weight" in text
    assert (
        "misshapen  model.layers.0.mlp.up_proj.weight: (3, 5) in the file, (48, 32) in the model"
        in text
    )
    assert "left over  model.layers.2.mlp.up_proj.weight" in text


def test_buffers_of_older_checkpoints_do_no_harm(tmp_path: Path) -> None:
    folder = edit_weights(
        save_tiny(tmp_path, "gpt2"),
        transformer__h__0__attn__masked_bias=torch.tensor(-1e4),
        vision__w=torch.ones(2),
    )
    assert torch.equal(load_base(str(folder)).model(IDS).logits, tiny_model("gpt2")(IDS).logits)


def test_a_tied_head_needs_no_weight_of_its_own(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, "llama")
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    model = load_base(str(folder)).model
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_a_folder_without_a_tokenizer_or_with_a_foreign_one_is_refused(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "a", "llama")
    (folder / "tokenizer.json").unlink()
    assert "no tokenizer" in refusal(SourceError, folder)
    (folder / "tokenizer.json").write_text("{}")
    refusal(CorruptFileError, folder)
    folder = save_tiny(
        tmp_path / "b", "llama", vocab_size=100, bos_token_id=1, eos_token_id=2, pad_token_id=3
    )
    assert "256 tokens, the model has embeddings for 100" in refusal(CorruptFileError, folder)


def test_a_config_that_is_not_json_or_nonsense_is_refused(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, "llama")
    for content in (
        "",
        "[]",
        "{",
        "[" * 100_000,
        "\x00\xff",
        '{"model_type": "llama", "hidden_size": "wide"}',
    ):
        (folder / "config.json").write_text(content)
        with pytest.raises(VeneerError) as raised:
            load_base(str(folder))
        assert raised.value.exit_code in (2, 4)


def test_loading_leaves_no_global_state_changed(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, "llama")
    logging.set_verbosity_info()
    logging.enable_progress_bar()
    filters, default = list(warnings.filters), torch.get_default_dtype()
    try:
        load_base(str(folder), dtype="bfloat16")
        edit_weights(folder, model__norm__weight=None)
        refusal(CorruptFileError, folder)
        assert logging.get_verbosity() == logging.INFO
        assert logging.is_progress_bar_enabled()
        assert warnings.filters == filters
        assert torch.get_default_dtype() == default
        assert torch.is_grad_enabled()
    finally:
        logging.set_verbosity_warning()


def test_loading_says_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = save_tiny(tmp_path, "gemma2")
    capfd.readouterr()
    load_base(str(folder))
    assert capfd.readouterr() == ("", "")


def test_running_out_of_memory_is_exit_code_3(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny(tmp_path, "llama")

    def full(*_: object) -> None:
        raise RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"
            " bytes"
        )

    monkeypatch.setattr(load, "build_dense", full)
    with pytest.raises(DoesNotFitError, match="GiB") as raised:
        load_base(str(folder))
    assert raised.value.exit_code == 3


def test_the_token_that_ends_a_turn_stops_an_answer_though_the_model_names_another(
    tmp_path: Path,
) -> None:
    folder = save_tiny(tmp_path, "llama")
    tokenizer = tiny_tokenizer()
    turn, document = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": document}))
    assert load_base(str(folder)).model.generation_config.eos_token_id == [turn, document]


def xlstm(folder: Path, **settings: Any) -> Path:
    config = xLSTMConfig(vocab_size=272, hidden_size=32, num_blocks=2, num_heads=2, **settings)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_a_model_whose_cache_is_broken_loads_as_its_forward_without_one_works(
    tmp_path: Path,
) -> None:
    base = load_base(str(xlstm(tmp_path)))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with pytest.raises(ValueError, match="wrong shape"):
        theirs(IDS)
    assert torch.equal(base.model(IDS, use_cache=False).logits, theirs(IDS, use_cache=False).logits)
    assert base.paths.read_past is None and base.read_past == frozenset()


def test_a_model_whose_forward_fails_is_not_called_damaged(tmp_path: Path) -> None:
    text = refusal(
        SourceError, xlstm(tmp_path, mode="train")
    )  # which takes whole chunks of 64 tokens alone
    assert "xLSTMForCausalLM fails on a text of three tokens" in text
    assert "3 is not divisible by chunk size 64" in text and "Download" not in text


def test_tiny_base_is_what_load_base_gives(tmp_path: Path) -> None:
    loaded, made = load_base(str(save_tiny(tmp_path, "qwen3"))), tiny_base("qwen3")
    assert loaded.fingerprint() == made.fingerprint()
    assert loaded.tokenizer.chat_template == made.tokenizer.chat_template
    shutil.rmtree(tmp_path)  # nothing is read from the folder later
    assert torch.equal(loaded.model(IDS).logits, made.model(IDS).logits)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_experts_stored_one_by_one_are_read_as_transformers_reads_them_and_held_once(
    family: str, dtype: Any, tmp_path: Path
) -> None:
    folder = save_tiny(tmp_path, family)
    (folder / "generation_config.json").write_text(json.dumps({"max_length": 77}))
    assert any(".experts.1." in name for name in load_file(folder / "model.safetensors"))
    loaded = load_base(str(folder), dtype=dtype)
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert (
            str(folder) not in maps.read_text()
        )  # mapped pages would hold the experts beside their stack
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=loaded.dtype)
    ours = loaded.model.state_dict()
    assert ours.keys() == theirs.state_dict().keys()
    for name, weight in theirs.state_dict().items():
        assert weight.dtype == ours[name].dtype and torch.equal(weight, ours[name]), name
    assert torch.equal(loaded.model(IDS).logits, theirs.eval()(IDS).logits)
    assert loaded.model.generation_config.max_length == 77
    loaded.model.save_pretrained(tmp_path / "again")
    theirs.save_pretrained(tmp_path / "theirs")
    again, wanted = (
        load_file(tmp_path / name / "model.safetensors") for name in ("again", "theirs")
    )
    assert again.keys() == wanted.keys() and all(
        torch.equal(again[name], wanted[name]) for name in wanted
    )
