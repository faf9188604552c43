"""Folders that other programs quantised, damaged or in a way that is not read: refused by name,
with both sides."""

import json

import pytest
import torch

from tests.bases.test_stored_formats import configure, edit, folder_of
from tests.support.models.packed import packed_modules
from tests.support.models.packed_folders import (
    write_awq,
    write_compressed,
    write_fp8,
    write_gptq,
    write_mxfp4,
)
from tests.support.tiny import save_tiny
from veneer.errors import CorruptFileError, SourceError
from veneer.models.load import load_base

UNREAD = {
    "3 bits": (write_gptq, {"bits": 3}, "3 bits: only 4 are supported"),
    "bits of text": (write_gptq, {"bits": "4"}, "bits: only 4 are supported"),
    "marlin": (write_gptq, {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
    "words of 64 bits": (write_gptq, {"pack_dtype": "int64"}, "pack_dtype 'int64'"),
    "group 0": (write_gptq, {"group_size": 0}, "group_size 0"),
    "group 2^63": (write_awq, {"group_size": 2**63}, "group_size 9223372036854775808"),
    "gemv": (write_awq, {"version": "gemv"}, "version 'gemv'"),
    "8-bit awq": (write_awq, {"bits": 8}, "8 bits: only 4 are supported"),
    "e5m2": (write_fp8, {"fmt": "e5m2"}, "fmt 'e5m2'"),
    "fp4 experts": (write_fp8, {"expert_dtype": "fp4"}, "expert_dtype 'fp4'"),
    "block": (write_fp8, {"weight_block_size": [0, 128]}, "blocks of [0, 128]"),
    "blocks": (write_fp8, {"weight_block_size": [128, 128, 1]}, "blocks of [128, 128, 1]"),
    "compressed, int4": (write_compressed, {"format": "pack-quantized"}, "format 'pack-quantized'"),
    "compressed, groups": (
        write_compressed,
        {"config_groups": {"a": {"weights": {"num_bits": 4}}}},
        "config_groups.a",
    ),
    "compressed, no groups": (
        write_compressed,
        {"config_groups": 7},
        "config_groups is not a mapping",
    ),
    "compressed, many": (
        write_compressed,
        {"config_groups": {str(n): {} for n in range(101)}},
        "at most 100 groups",
    ),
    "compressed, turned": (
        write_compressed,
        {"transform_config": {"r1": 1}},
        "transform_config is set",
    ),
    "another": (write_fp8, {"quant_method": "hqq"}, "hqq"),
}


@pytest.mark.parametrize(("write", "settings", "says"), UNREAD.values(), ids=UNREAD)
def test_what_is_not_read_is_refused_by_name(write, settings, says, tmp_path):
    folder, _ = folder_of(tmp_path, "llama", write)
    configure(folder, **settings)
    with pytest.raises(SourceError, match="not supported") as raised:
        load_base(str(folder))
    assert says in str(raised.value)


UP = "model.layers.1.mlp.up_proj"
EXPERTS = "model.layers.1.mlp.experts.down_proj"


def _nan(weights):
    weights[f"{UP}.weight"].view(torch.uint8)[7, 5] = 0xFF


DAMAGED = {
    "gptq, no zeros": (write_gptq, lambda w: w.pop(f"{UP}.qzeros"), f"{UP}: qzeros is missing"),
    "gptq, fewer groups": (
        write_gptq,
        lambda w: _cut(w, f"{UP}.scales"),
        "scales is F16 of shape (1, 48); F16",
    ),
    "gptq, words": (write_gptq, lambda w: _as(w, f"{UP}.qweight", torch.int64), "qweight is I64"),
    "gptq, order": (
        write_gptq,
        lambda w: _set(w, f"{UP}.g_idx", 2),
        "g_idx names groups from 0 to 2, there are 2",
    ),
    "gptq, order below": (
        write_gptq,
        lambda w: _set(w, f"{UP}.g_idx", -1),
        "groups from -1 to 1, there are 2",
    ),
    "gptq, scale": (
        write_gptq,
        lambda w: _set(w, f"{UP}.scales", float("inf")),
        "a scale is not finite",
    ),
    "gptq, another shape": (
        write_gptq,
        lambda w: _half(w, UP),
        "(24, 32) in the file, (48, 32) in the model",
    ),
    "gptq, gone": (write_gptq, lambda w: _gone(w, UP), f"missing    {UP}.weight"),
    "awq, zeros": (
        write_awq,
        lambda w: _cut(w, f"{UP}.qzeros"),
        "qzeros is I32 of shape (1, 6); I32 of shape (2, 6)",
    ),
    "fp8, no scale": (write_fp8, lambda w: w.pop(f"{UP}.weight_scale_inv"), "has no scales"),
    "fp8, fewer blocks": (
        write_fp8,
        lambda w: _cut(w, f"{UP}.weight_scale_inv"),
        "of shape (1, 2), for a weight",
    ),
    "fp8, scale": (
        write_fp8,
        lambda w: _set(w, f"{UP}.weight_scale_inv", float("nan")),
        "a scale is not finite",
    ),
    "fp8, value": (write_fp8, _nan, "the value at [7, 5] is NaN"),
    "fp8, of nothing": (
        write_fp8,
        lambda w: _cut(w, f"{UP}.weight", 0),
        "F8_E4M3 of shape (0, 32)",
    ),
    "fp8, a large scale": (
        write_fp8,
        lambda w: _set(w, f"{UP}.weight_scale_inv", 1e36),
        "largest value infinite",
    ),
    "fp8, one dense": (
        write_fp8,
        lambda w: _as(w, f"{UP}.weight", torch.bfloat16),
        "weight_scale_inv beside it",
    ),
    "gptq, of nothing": (
        write_gptq,
        lambda w: _cut(w, f"{UP}.qweight", 0),
        "qweight of shape (0, 48)",
    ),
    "gptq, large scales": (write_gptq, lambda w: _float(w, f"{UP}.scales", 1e38), "value infinite"),
    "gptq, dense too": (
        write_gptq,
        lambda w: w.update({f"{UP}.weight": torch.ones(48, 32)}),
        "both packed and dense",
    ),
    "mxfp4, of nothing": (
        write_mxfp4,
        lambda w: _none(w, EXPERTS),
        f"{EXPERTS}_blocks is U8 of shape (0, 32, 2, 16)",
    ),
    "mxfp4, no scales": (
        write_mxfp4,
        lambda w: w.pop(f"{EXPERTS}_scales"),
        f"{EXPERTS}_scales is missing",
    ),
    "mxfp4, fewer": (
        write_mxfp4,
        lambda w: _cut(w, f"{EXPERTS}_scales"),
        "_scales U8 of shape (1, 32, 2)",
    ),
    "mxfp4, exponent": (
        write_mxfp4,
        lambda w: _set(w, f"{EXPERTS}_scales", 255),
        "an exponent of 255, at most 252",
    ),
}


def _cut(weights, name, rows=1):
    weights[name] = weights[name][:rows].clone()


def _float(weights, name, value):
    weights[name] = torch.full_like(weights[name], value, dtype=torch.float32)


def _none(weights, path):
    for part in ("blocks", "scales"):
        _cut(weights, f"{path}_{part}", 0)


def _as(weights, name, dtype):
    weights[name] = weights[name].to(dtype)


def _set(weights, name, value):
    weights[name].view(-1)[-1] = value


def _half(weights, path):
    for part in ("qweight", "scales", "qzeros"):
        own = weights[f"{path}.{part}"]
        weights[f"{path}.{part}"] = own[:, : own.shape[1] // 2].clone()


def _gone(weights, path):
    for name in [name for name in weights if name.startswith(path)]:
        del weights[name]


@pytest.mark.parametrize(("write", "change", "says"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_files_are_refused_with_both_sides(write, change, says, tmp_path):
    folder, _ = folder_of(tmp_path, "gpt_oss" if write is write_mxfp4 else "llama", write)
    edit(folder, change)
    with pytest.raises(CorruptFileError) as raised:
        load_base(str(folder))
    assert says in str(raised.value)


@pytest.mark.parametrize("write", [write_fp8, write_compressed])
def test_settings_of_another_method_are_not_looked_at(write, tmp_path):
    folder, _ = folder_of(tmp_path, "llama", write)
    before = load_base(str(folder), device="cpu").fingerprint()
    others = {"config_groups": {"a": 1}} if write is write_fp8 else {"weight_block_size": [0, "x"]}
    configure(folder, **others)
    assert load_base(str(folder), device="cpu").fingerprint() == before


def test_blocks_larger_than_a_weight_are_of_its_size(tmp_path):
    """A row of scales may not become as many rows as the settings announce, in memory."""
    folder, dense = folder_of(tmp_path, "llama", lambda f: write_fp8(f, (2**20, 1)))
    base = load_base(str(folder), dtype="float32", device="cpu")
    for path, module in packed_modules(base.model).items():
        assert module.packed().block[0] == module.packed().shape[0]
        torch.testing.assert_close(module.dense_weight(torch.float32), dense[f"{path}.weight"])


def test_scales_that_fit_two_sizes_of_blocks_are_refused(tmp_path):
    folder, _ = folder_of(tmp_path, "llama", write_compressed)
    group = {"num_bits": 8, "type": "float"}
    sizes = {
        name: {"weights": group | {"block_structure": [rows, 16]}}
        for name, rows in (("a", 17), ("b", 20))
    }
    configure(folder, config_groups=sizes)
    edit(folder, lambda w: w.update({f"{UP}.weight_scale": torch.ones(3, 2)}))
    with pytest.raises(
        CorruptFileError, match=r"blocks of \[\(17, 16\), \(20, 16\)\], of which 2 fit"
    ):
        load_base(str(folder))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_packed_weights_that_no_setting_speaks_of_are_refused(dtype, tmp_path):
    """Taken as they are they would be other numbers than those that they stand for."""
    folder = save_tiny(tmp_path / "base", "llama", torch.bfloat16)
    edit(folder, lambda w: _as(w, f"{UP}.weight", dtype))
    with pytest.raises(SourceError, match=r"config\.json does not say how") as raised:
        load_base(str(folder))
    assert f"{UP}.weight is" in str(raised.value)


def test_experts_of_different_orders_are_refused_by_name(tmp_path):
    folder, _ = folder_of(tmp_path, "qwen3_moe", lambda f: write_gptq(f, act_order=True))
    edit(
        folder,
        lambda w: w["model.layers.0.mlp.experts.0.up_proj.g_idx"].copy_(torch.arange(32) // 16),
    )
    with pytest.raises(
        CorruptFileError,
        match=r"experts\.gate_up_proj: of weights that the model holds as one, some",
    ):
        load_base(str(folder))


@pytest.mark.parametrize("settings", [7, [1], "fp8", [["quant_method", "fp8"]]])
def test_settings_that_are_no_mapping_are_refused_by_name(settings, tmp_path):
    folder = save_tiny(tmp_path / "base", "llama")
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CorruptFileError, match=r"quantization_config in .* not a mapping"):
        load_base(str(folder))
