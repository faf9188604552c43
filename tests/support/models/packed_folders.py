"""Folders whose weights other programs packed: tiny models, rounded and laid out as those programs
do it, number by number and on their own: nothing here is the product's code.

Each function rewrites a folder that save_tiny wrote, and returns the dense weights that it now
stands for.
"""

import json
import re

import torch
from safetensors.torch import load_file, save_file

LINEAR = re.compile(r".*(_proj|\.w[123]|c_attn|c_proj|c_fc)\.weight")
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def _rewritten(folder, settings, pack, names=LINEAR):
    """pack(name, weight) -> (tensors, decoded)."""
    weights = load_file(folder / "model.safetensors")
    dense = {}
    for name in [name for name in weights if names.fullmatch(name)]:
        tensors, dense[name] = pack(name, weights.pop(name))
        weights |= tensors
    assert dense
    save_file(
        {n: t.contiguous() for n, t in weights.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config))
    return dense


def write_fp8(folder, block=(20, 24), names=LINEAR):
    """As DeepSeek and Qwen3: scales of blocks, those at the ends cut short."""

    def pack(name, weight):
        O, I = weight.shape
        rows, columns = -(-O // block[0]), -(-I // block[1])
        scale, values = torch.empty(rows, columns), torch.empty(O, I, dtype=torch.float8_e4m3fn)
        decoded = torch.empty(O, I)
        for r in range(rows):
            for c in range(columns):
                part = (
                    slice(r * block[0], (r + 1) * block[0]),
                    slice(c * block[1], (c + 1) * block[1]),
                )
                scale[r, c] = weight[part].float().abs().max() / 448
                values[part] = (weight[part].float() / scale[r, c]).to(torch.float8_e4m3fn)
                decoded[part] = values[part].float() * scale[r, c]
        return {name: values, f"{name}_scale_inv": scale}, decoded

    settings = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "weight_block_size": list(block),
    }
    return _rewritten(folder, settings, pack, names)


def write_compressed(folder, strategy="channel"):
    """As compressed-tensors' float-quantized: a scale for each row, or for each weight."""

    def pack(name, weight):
        most = (
            weight.float().abs().amax(1, keepdim=True)
            if strategy == "channel"
            else weight.float().abs().max()[None]
        )
        scale = (most / 448).to(torch.bfloat16)
        values = (weight.float() / scale.float()).to(torch.float8_e4m3fn)
        found = {
            name: values,
            f"{name}_scale": scale,
            f"{name.removesuffix('weight')}input_scale": torch.ones(1),
        }
        return found, values.float() * scale.float()

    weights = {
        "num_bits": 8,
        "type": "float",
        "strategy": strategy,
        "symmetric": True,
        "dynamic": False,
    }
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}
    settings = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": groups,
    }
    return _rewritten(folder, settings, pack)


def _int4(weight, group, symmetric, order=None):
    """(codes, scales float16, zeros, group of each column, decoded): columns in `order` are cut
    into groups."""
    O, I = weight.shape
    order = torch.arange(I) if order is None else order
    groups = torch.empty(I, dtype=torch.int64)
    groups[order] = torch.arange(I) // group
    scales, zeros = (
        torch.empty(O, -(-I // group), dtype=torch.float16),
        torch.zeros(O, -(-I // group)),
    )
    for g in range(scales.shape[1]):
        part = weight[:, groups == g].float()
        if symmetric:
            scales[:, g], zeros[:, g] = part.abs().amax(1) / 7.5, 8
        else:
            low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
            scales[:, g] = (high - low) / 15
            zeros[:, g] = (-low / scales[:, g].float()).round().clamp(1, 15)
    codes = (weight.float() / scales.float()[:, groups] + zeros[:, groups]).round().clamp(0, 15)
    decoded = (codes - zeros[:, groups]) * scales.float()[:, groups]
    return codes.long(), scales, zeros.long(), groups, decoded


def _words(rows):
    """(N, 8 W) numbers of 4 bits -> (N, W) int32, the first of eight in the lowest bits."""
    shifts = torch.arange(0, 32, 4)
    words = (rows.unflatten(-1, (-1, 8)) << shifts).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def write_gptq(folder, group=16, symmetric=False, act_order=False, layout="gptq", names=LINEAR):
    """Every weight (O, I), Conv1D's turned, as AutoGPTQ and GPTQModel write it."""

    def pack(name, weight):
        turned = re.search("c_", name) is not None
        weight = weight.T if turned else weight
        order = (
            torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(3))
            if act_order
            else None
        )
        codes, scales, zeros, groups, decoded = _int4(weight, group, symmetric, order)
        path = name.removesuffix(".weight")
        stored = zeros.T - 1 if layout == "gptq" else zeros.T
        return {
            f"{path}.qweight": _words(codes).T,
            f"{path}.qzeros": _words(stored),
            f"{path}.scales": scales.T,
            f"{path}.g_idx": groups.to(torch.int32),
        }, decoded.T if turned else decoded

    settings = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": group,
        "desc_act": act_order,
        "sym": symmetric,
    }
    return _rewritten(
        folder, settings | {"checkpoint_format": layout, "lm_head": False}, pack, re.compile(names)
    )


def write_awq(folder, group=16):
    """As AutoAWQ's gemm: rows 0, 2, 4, 6, 1, 3, 5, 7 of eight in a word, columns one after the
    other."""

    def pack(name, weight):
        codes, scales, zeros, _, decoded = _int4(weight, group, False)
        path, order = name.removesuffix(".weight"), torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
        qweight, qzeros = (
            _words(each.T.unflatten(-1, (-1, 8))[..., order].flatten(1)) for each in (codes, zeros)
        )
        return {
            f"{path}.qweight": qweight,
            f"{path}.qzeros": qzeros,
            f"{path}.scales": scales.T,
        }, decoded

    settings = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group,
        "zero_point": True,
        "version": "gemm",
    }
    return _rewritten(folder, settings, pack)


def write_mxfp4(folder):
    """As gpt-oss: the experts alone, (E, I, O) in the model and (E, O, I) here."""

    def pack(name, weight):
        blocks = weight.float().transpose(1, 2).unflatten(-1, (-1, 32))
        exponents = blocks.abs().amax(-1).clamp(min=2.0**-60).log2().floor() - 2
        scaled = blocks / 2.0 ** exponents.unsqueeze(-1)
        codes = (scaled.abs().unsqueeze(-1) - E2M1).abs().argmin(-1)
        decoded = E2M1[codes] * scaled.sign() * 2.0 ** exponents.unsqueeze(-1)
        codes = codes + 8 * (scaled < 0)
        pairs = (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)
        found = {f"{name}_blocks": pairs, f"{name}_scales": (exponents + 127).to(torch.uint8)}
        return found, decoded.flatten(-2).transpose(1, 2)

    settings = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"],
    }
    return _rewritten(folder, settings, pack, re.compile(r".*experts\.(gate_up|down)_proj"))


WRITERS = {"fp8": write_fp8, "gptq": write_gptq, "awq": write_awq, "mxfp4": write_mxfp4}
