"""A .gguf file's blocks as the base: the same weights, the same training, nothing rounded a second
time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from torch import nn

from tests.support.models.tiny_gguf import LLAMA3, tiny, write_gguf
from tests.support.tiny import save_tiny
from veneer import api
from veneer.adapters.attach import attach
from veneer.adapters.config import LoRA
from veneer.bases.names.sources import locate_blocks
from veneer.errors import ConfigError, CorruptFileError, SourceError, VeneerError
from veneer.files.atomic import write_manifest
from veneer.kernels.packed.gguf import FORMATS
from veneer.models.frozen_base import FrozenBase
from veneer.models.load import load_base
from veneer.models.step import prepare
from veneer.quant.gguf_linear import GGUFLinear
from veneer.training.config import RunConfig
from veneer.training.output.records import read_records
from veneer.training.output.screen import QuietScreen

IDS = torch.randint(0, 256, (2, 90), generator=torch.Generator().manual_seed(0))
WIDE = {"hidden_size": 256, "head_dim": 64}  # a row of 256 values is one block of the K types


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def both(path: Path) -> tuple[FrozenBase, FrozenBase]:
    """Converted and as blocks, both in bf16: in float32 blocks are decoded without its rounding."""
    dense, blocks = (
        load_base(str(path), dtype="stored", quantize=quantize) for quantize in (None, "gguf")
    )
    return dense, blocks


def packed(base: FrozenBase) -> dict[str, GGUFLinear]:
    return {path: m for path, m in base.model.named_modules() if isinstance(m, GGUFLinear)}


def step(base: FrozenBase, **settings: object) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of one step of a LoRA adapter that is not at its start."""
    config = LoRA(rank=4, alpha=6, **settings)
    attachment = attach(base.model, config, name="a", routing=base.routing, head=base.model.lm_head)
    generator = torch.Generator().manual_seed(7)
    for layer in attachment.layers.values():
        layer.B.data = torch.randn(layer.B.shape, generator=generator) * 0.02
    base.routing.active = (("a", 1.0),)
    loss = base.model(IDS, labels=IDS).loss
    loss.backward()
    gradients = {name: value.grad for name, value in attachment.parameters().items()}
    base.detach("a")
    base.routing.active = ()
    return loss.detach(), gradients


@pytest.mark.parametrize("kind", list(FORMATS))
def test_training_on_the_blocks_is_training_on_their_values_to_the_bit(
    kind: str, tmp_path: Path
) -> None:
    model = tiny("llama", **WIDE) if kind.endswith("_K") else tiny("llama", head_dim=16)
    if kind.endswith("_K"):
        model = tiny("llama", hidden_size=256, head_dim=64, intermediate_size=512)
    path = write_gguf(tmp_path / "m.gguf", model, "llama", kind=gguf.GGMLQuantizationType[kind])
    dense, blocks = both(path)
    assert len(packed(blocks)) == 14
    for name, module in packed(blocks).items():
        assert module.kind == kind
        assert torch.equal(
            module.dense_weight(torch.bfloat16), dense.model.get_submodule(name).weight
        )
    assert torch.equal(blocks.model(IDS).logits, dense.model(IDS).logits)
    for settings in (
        {},
        {"targets": ["q_proj"], "layers": [0]},
    ):  # the gradient also passes plain layers
        (loss, gradients), (expected, theirs) = step(blocks, **settings), step(dense, **settings)
        assert torch.equal(loss, expected)
        assert gradients.keys() == theirs.keys()
        assert all(torch.equal(gradients[name], theirs[name]) for name in gradients)
    assert torch.equal(blocks.model(IDS).logits, dense.model(IDS).logits)


@pytest.mark.parametrize("kind", ["Q4_1", "Q4_K"])
def test_a_whole_run_on_the_blocks_leaves_the_adapter_of_a_run_on_their_values(
    kind: str, tmp_path: Path
) -> None:
    """With all that a step has and a single product has not: shared prompts, fused layers,
    clipping, the optimiser."""
    model = tiny("llama", hidden_size=256, head_dim=64, intermediate_size=512)
    path = write_gguf(tmp_path / "m.gguf", model, "llama", kind=gguf.GGMLQuantizationType[kind])
    said = [{"role": "user", "content": "an instruction that all rows share"}]
    rows = [
        [*said, {"role": "assistant", "content": f"answer {n}, {n * 7 * 'x'}"}] for n in range(12)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"messages": r}) + "\n" for r in rows))
    found: dict[Any, Any] = {}
    for quantize in (None, "gguf"):
        config = RunConfig.model_validate(
            {
                "base": str(path),
                "quantize": quantize,
                "out": str(tmp_path / f"run-{quantize}"),
                "steps": 4,
                "batch": 3,
                "dtype": "bfloat16",
                "data": {"train": str(tmp_path / "rows.jsonl"), "validation_share": 0.0},
                "method": {"name": "lora", "rank": 3, "alpha": 5.0},
                "learning_rate": 1e-2,
            }
        )
        summary = api.train_run(config, resume=False, screen=QuietScreen())
        losses = [
            r["loss"]
            for r in read_records(Path(config.out) / "metrics.jsonl")
            if r["kind"] == "step"
        ]
        found[quantize] = losses, summary["adapter_sha256"]
        assert len(set(losses)) == 4
    assert found["gguf"] == found[None]


@pytest.mark.parametrize(
    ("family", "architecture", "overrides"),
    [
        ("llama_untied", "llama", {"head_dim": 16}),
        ("qwen2", "qwen2", {}),
        ("qwen3", "qwen3", {"head_dim": 16}),
        (
            "llama",
            "llama",
            {"rope_parameters": LLAMA3, "head_dim": 64, "max_position_embeddings": 16384},
        ),
    ],
)
def test_every_family_answers_as_its_converted_file_does(
    family: str, architecture: str, overrides: dict[str, object], tmp_path: Path
) -> None:
    model = tiny(family, **overrides)
    kind = gguf.GGMLQuantizationType.Q4_1
    dense, blocks = both(write_gguf(tmp_path / "m.gguf", model, architecture, kind=kind))
    assert packed(blocks)
    assert torch.equal(blocks.model(IDS).logits, dense.model(IDS).logits)
    assert blocks.dtype == dense.dtype == torch.bfloat16
    where = {"_name_or_path"}
    assert {k: v for k, v in blocks.config.to_dict().items() if k not in where} == {
        k: v for k, v in dense.config.to_dict().items() if k not in where
    }
    assert blocks.tokenizer.get_vocab() == dense.tokenizer.get_vocab()
    assert blocks.model.generation_config.eos_token_id == dense.model.generation_config.eos_token_id
    assert blocks.model.lm_head.weight.dtype == torch.bfloat16
    assert prepare(blocks.model).packed


def test_in_float32_the_values_are_those_of_the_file_exactly(tmp_path: Path) -> None:
    kind = gguf.GGMLQuantizationType.Q4_1
    model = tiny("qwen2")
    path = write_gguf(tmp_path / "m.gguf", model, "qwen2", kind=kind)
    base = load_base(str(path), dtype="float32", quantize="gguf")
    written = model.model.layers[1].mlp.down_proj.weight.numpy()
    exact = torch.from_numpy(gguf.dequantize(gguf.quantize(written, kind), kind))
    assert torch.equal(
        packed(base)["model.layers.1.mlp.down_proj"].dense_weight(torch.float32), exact
    )
    assert not torch.equal(exact, exact.bfloat16().float())


def test_one_token_is_multiplied_straight_from_the_blocks(tmp_path: Path) -> None:
    path = write_gguf(
        tmp_path / "m.gguf", tiny("qwen2"), "qwen2", kind=gguf.GGMLQuantizationType.Q8_0
    )
    base = load_base(str(path), dtype="float32", quantize="gguf")
    layer = packed(base)["model.layers.0.self_attn.q_proj"]
    x = torch.randn(1, 1, layer.in_features)
    expected = nn.functional.linear(x, layer.dense_weight(torch.float32), layer.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_the_blocks_are_the_file_and_nothing_is_saved_for_backward(tmp_path: Path) -> None:
    kind = gguf.GGMLQuantizationType.Q4_1
    path = write_gguf(tmp_path / "m.gguf", tiny("qwen2"), "qwen2", kind=kind)
    base = load_base(str(path), quantize="gguf")
    weights = [layer.weight for layer in packed(base).values()]
    assert len({w.untyped_storage().data_ptr() for w in weights}) == 1  # one mapping, no copies
    assert weights[0].untyped_storage().nbytes() == path.stat().st_size
    layer, saved = packed(base)["model.layers.0.mlp.up_proj"], []
    x = torch.randn(20, layer.in_features, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = layer(x)
    assert not saved
    y.sum().backward()
    expected = torch.ones_like(y) @ layer.dense_weight(torch.bfloat16)
    assert torch.equal(x.grad, expected)
    assert not any(p.requires_grad for p in base.model.parameters())


def test_the_fingerprint_says_that_the_weights_are_held_otherwise(tmp_path: Path) -> None:
    path = write_gguf(
        tmp_path / "m.gguf", tiny("llama"), "llama", kind=gguf.GGMLQuantizationType.Q4_1
    )
    dense, blocks = both(path)
    assert blocks.fingerprint() == load_base(str(path), quantize="gguf").fingerprint()
    assert blocks.fingerprint() != dense.fingerprint()
    assert blocks.fingerprint().num_parameters == dense.fingerprint().num_parameters
    assert any("gguf" in line for line in blocks.fingerprint().differences(dense.fingerprint()))
    assert blocks.name_or_path == str(path)
    assert blocks.quantize == "gguf"


def test_the_second_load_reads_the_first_ones_folder_wherever_the_file_lies(tmp_path: Path) -> None:
    path = write_gguf(
        tmp_path / "m.gguf", tiny("llama"), "llama", kind=gguf.GGMLQuantizationType.Q4_0
    )
    first = locate_blocks(str(path))
    moved = path.rename(tmp_path / "other.gguf")
    second = locate_blocks(str(moved))
    assert (second.folder, second.file) == (first.folder, moved)
    assert load_base(str(moved), quantize="gguf").model(IDS).logits.isfinite().all()


def test_a_list_of_blocks_that_leads_out_of_the_file_is_refused(tmp_path: Path) -> None:
    path = write_gguf(
        tmp_path / "m.gguf", tiny("llama"), "llama", kind=gguf.GGMLQuantizationType.Q4_0
    )
    table = locate_blocks(str(path)).folder / "blocks.json"
    layers = json.loads(table.read_text())
    for change in (
        {"offset": path.stat().st_size - 5},
        {"rows": 10**9},
        {"kind": "Q9_9"},
        {"offset": -1},
    ):
        table.write_text(json.dumps({p: {**layer, **change} for p, layer in layers.items()}))
        write_manifest(table.parent)
        with pytest.raises(CorruptFileError, match="outside"):
            load_base(str(path), quantize="gguf")


def test_only_gguf_files_have_blocks(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    for source in (str(folder), "someone/something"):
        with pytest.raises((SourceError, ConfigError), match="quantize gguf") as raised:
            load_base(source, quantize="gguf")
        assert "nf4" in str(raised.value)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (gguf.GGMLQuantizationType.F16, ["no layer is stored in blocks"]),
        (gguf.GGMLQuantizationType.TQ2_0, ["14 layers are stored as TQ2_0", "Q4_K"]),
    ],
)
def test_files_whose_layers_cannot_be_held_are_refused(
    kind: gguf.GGMLQuantizationType, words: list[str], cache: Path, tmp_path: Path
) -> None:
    model = tiny("llama", hidden_size=256, head_dim=64, intermediate_size=512)
    path = write_gguf(tmp_path / "m.gguf", model, "llama", kind=kind)
    with pytest.raises(SourceError) as raised:
        load_base(str(path), quantize="gguf")
    assert all(word in str(raised.value) for word in [*words, "Remove quantize"])
    assert not list(cache.rglob("blocks.json"))


@pytest.mark.parametrize("leave_out", ["layers.1.mlp.up_proj", "model.norm"])
def test_a_file_that_lacks_a_weight_is_refused(leave_out: str, tmp_path: Path) -> None:
    path = write_gguf(
        tmp_path / "m.gguf",
        tiny("llama"),
        "llama",
        kind=gguf.GGMLQuantizationType.Q4_0,
        leave_out=leave_out,
    )
    with pytest.raises(SourceError, match=leave_out):
        load_base(str(path), quantize="gguf")


@pytest.mark.parametrize("quantize", [None, "gguf"])
def test_a_header_that_no_model_can_be_built_from_is_an_error_either_way(
    quantize, tmp_path: Path
) -> None:
    path = write_gguf(
        tmp_path / "m.gguf", tiny("llama"), "llama", kind=gguf.GGMLQuantizationType.Q4_0
    )
    raw = bytearray(path.read_bytes())
    field = gguf.GGUFReader(path).fields["llama.attention.head_count_kv"]
    at = field.offset + sum(part.nbytes for part in field.parts[:-1])
    raw[at : at + 4] = bytes(4)
    path.write_bytes(raw)
    with pytest.raises(VeneerError) as caught:
        load_base(str(path), quantize=quantize)
    assert caught.value.next_step


def test_a_scale_that_is_no_number_is_refused_by_name(tmp_path: Path) -> None:
    model = tiny("llama")
    model.model.layers[1].self_attn.v_proj.weight[5, 3] = float("nan")
    path = write_gguf(tmp_path / "m.gguf", model, "llama", kind=gguf.GGMLQuantizationType.Q8_0)
    with pytest.raises(SourceError, match=r"blk.1.attn_v.weight: the scale of row 5, block 0"):
        load_base(str(path), quantize="gguf")
