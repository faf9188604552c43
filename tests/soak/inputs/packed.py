"""Folders whose weights another program packed, changed in a place or two, and a command that reads
one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.soak.inputs.odd import as_json, mutated, odd, torn
from tests.support.models.packed_folders import (
    write_awq,
    write_compressed,
    write_fp8,
    write_gptq,
    write_mxfp4,
)
from tests.support.tiny import save_tiny
from veneer.bases.packed.bnb_files import file_tensors
from veneer.quant.nf4 import quantize


def write_bnb(folder: Path) -> None:
    """As bitsandbytes writes it, with scales that are packed too."""
    weights = load_file(folder / "model.safetensors")
    for name in [name for name in weights if name.endswith("_proj.weight")]:
        packed = file_tensors(name, quantize(weights.pop(name), name=name))
        # Tables are the same tensor.
        weights |= {key: tensor.clone() for key, tensor in packed.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config))


LAYOUTS: dict[str, tuple[str, Any]] = {
    "fp8": ("llama", write_fp8),
    "fp8-experts": ("mixtral", write_fp8),
    "compressed": ("llama", write_compressed),
    "gptq": ("llama", write_gptq),
    "gptq-order": ("llama", lambda folder: write_gptq(folder, act_order=True)),
    "gptq-experts": ("qwen3_moe", write_gptq),
    "awq": ("llama", write_awq),
    "mxfp4": ("gpt_oss", write_mxfp4),
    "bnb": ("llama", write_bnb),
}
PARTS = """
    .qweight .qzeros .scales .g_idx .weight_scale .weight_scale_inv _blocks _scales .absmax
    .quant_map .nested_absmax
    .nested_quant_map .quant_state.bitsandbytes__nf4 .weight .input_scale .bias
""".split()
WORDS = """
    quant_method bits group_size desc_act sym checkpoint_format pack_dtype lm_head zero_point
    version w_bit q_group_size
    weight_block_size fmt expert_dtype activation_scheme config_groups format num_bits type
    strategy block_structure
    targets weights sparsity_config modules_to_not_convert load_in_4bit fp8 mxfp4 gptq awq
    compressed-tensors gptq_v2
    bitsandbytes float-quantized
""".split()
WIDTHS = [
    -1,
    0,
    1,
    2,
    3,
    8,
    20,
    32,
    48,
    128,
    2**20,
    2**20 + 1,
    2**31,
    2**62,
    2**63,
    2**64,
    10**30,
    20.0,
    True,
    "16",
]
TYPES = [
    *(
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.float64,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
    )
]
TYPES += [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]
VALUES = [
    float("nan"),
    float("inf"),
    -float("inf"),
    0,
    -1,
    1,
    255,
    2**31 - 1,
    -(2**31),
    3e38,
    1e-45,
    7,
]


def make_packed(folder: Path) -> None:
    """A folder of each layout; small ones."""
    for name, (family, write) in LAYOUTS.items():
        write(save_tiny(folder / name, family, torch.bfloat16))


def spoil(random: Random, folder: Path) -> None:
    """Its settings, its tensors or the bytes of their file, as one that others wrote may be."""
    what = random.random()
    if what < 0.35:
        spoil_settings(random, folder / "config.json")
    if what > 0.25:
        file = folder / "model.safetensors"
        if what > 0.97:
            data = file.read_bytes()
            length = 8 + int.from_bytes(data[:8], "little")
            file.write_bytes(torn(random, data[:length]) + data[length:])
            return
        weights = load_file(file)
        for _ in range(random.choice([1, 1, 2])):
            spoil_tensors(random, weights)
        save_file(
            {name: weight.contiguous() for name, weight in weights.items()},
            file,
            metadata={"format": "pt"},
        )


def spoil_settings(random: Random, file: Path) -> None:
    config = json.loads(file.read_text())
    settings, what = config["quantization_config"], random.random()
    widths: Any = random.choice(WIDTHS)
    pair = [random.choice(WIDTHS), random.choice(WIDTHS)]
    if what < 0.3:
        config["quantization_config"] = mutated(random, settings, WORDS)
    elif what < 0.5:
        settings[random.choice(["group_size", "q_group_size", "bits", "weight_block_size"])] = (
            widths
        )
    elif what < 0.7:
        settings["weight_block_size"] = random.choice([pair, pair, widths, [*pair, 1]])
    elif what < 0.8:
        weights = {
            "num_bits": 8,
            "type": "float",
            "block_structure": random.choice([pair, pair, widths, odd(random)]),
        }
        settings["config_groups"] = random.choice(
            [{"a": {"weights": weights}}, {"a": weights}, {"a": odd(random)}]
        )
    elif what < 0.9:
        settings[random.choice(WORDS)] = random.choice([*WORDS, odd(random)])
    else:
        config = mutated(random, config, WORDS)
    file.write_bytes(as_json(random, config))


def spoil_tensors(random: Random, weights: dict[str, Tensor]) -> None:
    """One tensor, mostly a part of a packed weight, gone, of another type, shape, name or with
    other values."""
    parts = sorted(
        name for name in weights if any(name.endswith(part) for part in PARTS if part != ".weight")
    )
    parts += sorted(
        name
        for name, weight in weights.items()
        if weight.dtype == torch.float8_e4m3fn or "proj" in name
    )
    if not parts:
        return
    name = random.choice(sorted(weights)) if random.random() < 0.1 else random.choice(parts)
    tensor, what = weights[name], random.random()
    if what < 0.1:
        del weights[name]
    elif what < 0.25:
        weights[name] = change_type(random, tensor)
    elif what < 0.5:
        weights[name] = change_shape(random, tensor)
    elif what < 0.7:
        weights[name] = change_values(random, tensor)
    elif what < 0.85:
        stem = next((name.removesuffix(part) for part in PARTS if name.endswith(part)), name)
        weights[stem + random.choice(PARTS)] = random.choice(
            [tensor, change_shape(random, tensor)]
        ).clone()
    else:
        other = random.choice(sorted(weights))
        weights[name], weights[other] = weights[other], tensor


def change_type(random: Random, tensor: Tensor) -> Tensor:
    if random.random() < 0.3 and tensor.dim():
        return tensor.contiguous().view(torch.uint8)
    return tensor.float().nan_to_num(0, 0, 0).to(random.choice(TYPES))


def change_shape(random: Random, tensor: Tensor) -> Tensor:
    ways = [
        tensor.flatten(),
        tensor.unsqueeze(0),
        tensor.unsqueeze(-1),
        tensor.reshape(-1)[:1],
        tensor.reshape(-1)[:1].view(()) if tensor.numel() else tensor,
        tensor.reshape(-1)[:0],
    ]
    if tensor.dim():
        ways += [
            tensor[:0],
            tensor[:1],
            tensor[:-1],
            tensor[..., :0],
            tensor[..., :-1],
            tensor[..., :1],
        ]
        ways += [
            torch.cat([tensor, tensor]),
            torch.cat([tensor, tensor], -1),
            tensor.transpose(0, -1),
        ]
        ways += [tensor.reshape(1, -1), tensor.reshape(-1, 1)]
    return random.choice(ways).clone()


def change_values(random: Random, tensor: Tensor) -> Tensor:
    """One value, or all, among those that its type can hold; or any bits."""
    flat = tensor.clone().reshape(-1)
    if not flat.numel():
        return tensor
    if random.random() < 0.3:
        raw = flat.view(torch.uint8)
        raw[random.randrange(len(raw))] = random.randrange(256)
        return flat.view(tensor.shape)
    value: float = random.choice(VALUES)
    if tensor.dtype.is_floating_point:
        new = torch.tensor(value).to(tensor.dtype)
    else:
        whole = int(value) if abs(value) < 2**62 else 2**31 - 1
        new = torch.tensor(whole).to(tensor.dtype)
    if random.random() < 0.2:
        flat.copy_(new.expand_as(flat))
    else:
        flat[random.randrange(len(flat))] = new
    return flat.view(tensor.shape)


def packed_folders(random: Random, folder: Path, world: Path) -> list[str]:
    name = random.choice(sorted(LAYOUTS))
    base = Path(shutil.copytree(world / "packed" / name, folder / "base"))
    for file in (base, *base.iterdir()):
        file.chmod(0o755 if file.is_dir() else 0o644)
    spoil(random, base)
    few, out = world / "few.jsonl", folder / "out"
    lines = [
        f"generate --base {base} --max-new-tokens 2 hello",
        f"plan --base {base} --data {few} --batch 1 --length 16",
        f"evaluate --base {base} --data {few} --metrics exact_match --max-new-tokens 2",
        f"data check {few} --base {base} --length 64",
        f"train --base {base} --data {few} --out {out} --steps 1 --batch 2 --set length=64 --quiet",
        f"quantize {base} --out {out}",
        f"lint {world}/a --for peft --base {base}",
        f"merge --base {base} --adapter {world}/a --into dequantised --force-base --out {out}",
    ]
    return random.choice(lines).split()
