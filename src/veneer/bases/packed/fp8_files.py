"""Reads 8-bit floating point weights. P is a linear layer's path:

P.weight                F8_E4M3 (O, I)
P.weight_scale_inv      scales of blocks of `weight_block_size`, or a single one      (DeepSeek,
                        Qwen3, Mistral)
P.weight_scale          (O, 1), a single one, or one a block
                        (compressed-tensors)

Each weight is read by the keys that are present. Scales of activations are not read: inputs stay as
they are. Sources: transformers, integrations/finegrained_fp8.py; compressed-tensors,
compressors/naive_quantized.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from veneer.bases.folder.tensor_files import StoredTensor
from veneer.bases.packed.moving import StoredPackedWeight
from veneer.quant.fp8 import FP8, MOST_VALUE, first_nan

_SCALES = ("weight_scale_inv", "weight_scale")
_FLOATS = ("F32", "BF16", "F16")
_MOST_BLOCK = 2**20
_MOST_GROUPS = 100
_SUPPORTED = {"fmt": "e4m3", "expert_dtype": "fp8"}


def unread_fp8(settings: Mapping[str, Any]) -> list[str]:
    """Reports unsupported settings of quant_method fp8."""
    values = [(name, settings.get(name) or supported) for name, supported in _SUPPORTED.items()]
    faults = [
        f"{name} {str(value)[:40]!r}: only {_SUPPORTED[name]} is supported"
        for name, value in values
        if value != _SUPPORTED[name]
    ]
    return [*faults, *_block_faults(settings.get("weight_block_size"))]


def unread_compressed(settings: Mapping[str, Any]) -> list[str]:
    """Reports unsupported settings of quant_method compressed-tensors."""
    if settings.get("format") != "float-quantized":
        return [f"format {settings.get('format')!r}"]
    faults = [
        f"{name} is set" for name in ("sparsity_config", "transform_config") if settings.get(name)
    ]
    groups = settings.get("config_groups") or {}
    if not isinstance(groups, dict) or len(groups) > _MOST_GROUPS:
        return [
            *faults,
            f"config_groups is not a mapping of at most {_MOST_GROUPS} groups: {str(groups)[:60]}",
        ]
    for name, group in groups.items():
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict) or (weights.get("num_bits"), weights.get("type")) != (
            8,
            "float",
        ):
            faults.append(f"config_groups.{name}: weights {str(weights)[:60]}")
        else:
            faults += _block_faults(weights.get("block_structure"))
    return faults


def _block_faults(block: Any) -> list[str]:
    if block is None or (
        isinstance(block, list) and len(block) == 2 and all(map(_is_width, block))
    ):
        return []
    return [f"blocks of {str(block)[:60]}: not two numbers from 1 to {_MOST_BLOCK:,}"]


def _is_width(value: Any) -> bool:
    return type(value) is int and 1 <= value <= _MOST_BLOCK


def blocks_fp8(settings: Mapping[str, Any]) -> list[list[int] | None]:
    """Returns the rows and columns that share a scale; for settings that unread_fp8 accepts."""
    return [settings.get("weight_block_size")]


def blocks_compressed(settings: Mapping[str, Any]) -> list[list[int] | None]:
    """Returns the rows and columns that share a scale; for settings that unread_compressed
    accepts."""
    return [
        group["weights"].get("block_structure")
        for group in (settings.get("config_groups") or {}).values()
    ]


def fp8_weights(
    tensors: Mapping[str, StoredTensor],
    settings: Mapping[str, Any],
    *,
    blocks: Callable[[Mapping[str, Any]], list[list[int] | None]],
) -> tuple[dict[str, StoredPackedWeight], set[str], list[str]]:
    """Reads 8-bit weights. Returns them by name, the names of the tensors they use, and faults."""
    weights: dict[str, StoredPackedWeight] = {}
    used: set[str] = set()
    faults: list[str] = []
    sizes = {(block[0], block[1]) for block in blocks(settings) if block is not None}
    for name, weight in tensors.items():
        if not name.endswith(".weight"):
            continue
        path = name.removesuffix(".weight")
        keys = [f"{path}.{key}" for key in _SCALES if f"{path}.{key}" in tensors]
        if not weight.kind.startswith("F8"):
            faults += [f"{name} is {weight.kind} and {key} beside it is for 8 bits" for key in keys]
            continue
        used |= {name, *keys}
        if weight.kind != "F8_E4M3" or len(weight.shape) != 2 or 0 in weight.shape:
            faults.append(
                f"{name} is {weight.kind} of shape {weight.shape}; only F8_E4M3 of two axes is"
                " supported"
            )
        elif len(keys) != 1:
            faults.append(
                f"{name} is in 8 bits and has {len(keys) or 'no'} scales: {' or '.join(_SCALES)}"
                " beside it"
            )
        else:
            scale = tensors[keys[0]]
            matching = _matching_blocks(weight.shape, scale.shape, sizes)
            if len(matching) != 1 or scale.kind not in _FLOATS:
                faults.append(
                    f"{keys[0]} is {scale.kind} of shape {scale.shape}, for a weight of shape"
                    f" {weight.shape} and blocks of {sorted(sizes) or 'no size'}, of which"
                    f" {len(matching)} fit"
                )
            else:
                weights[name] = _stored_weight(name, weight, scale, matching.pop())
    return weights, used, faults


def _matching_blocks(
    weight: tuple[int, ...], scale: tuple[int, ...], sizes: set[tuple[int, int]]
) -> set[tuple[int, int]]:
    """Returns the block sizes that explain such scales, none larger than the weight."""
    O, I = weight
    if scale in ((), (1,), (1, 1)):
        return {(O, I)}
    matching = {
        (min(rows, O), min(columns, I))
        for rows, columns in sizes
        if scale == (-(-O // rows), -(-I // columns))
    }
    return matching | ({(1, I)} if scale == (O, 1) else set())


def _stored_weight(
    name: str, weight: StoredTensor, scale: StoredTensor, block: tuple[int, int]
) -> StoredPackedWeight:
    O, I = weight.shape
    rows, columns = -(-O // block[0]), -(-I // block[1])

    def read() -> FP8:
        scales = scale[...].to(torch.float32).view(rows, columns)
        return FP8(tensors={"": weight[...].view(torch.uint8), "scale": scales}, block=block)

    def value_faults(stored: FP8) -> list[str]:
        values = (
            []
            if (position := first_nan(stored.tensors[""])) is None
            else [f"the value at {position} is NaN"]
        )
        most = stored.tensors["scale"] * MOST_VALUE
        scales = (
            []
            if most.isfinite().all()
            else ["a scale is not finite, or makes the largest value infinite"]
        )
        return values + scales

    return StoredPackedWeight(name, "fp8", (O, I), O * I + 4 * rows * columns, read, value_faults)
