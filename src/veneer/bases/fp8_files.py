"""8-bit floating weights in files. P is a linear layer's path:

    P.weight                F8_E4M3 (O, I)
    P.weight_scale_inv      scales of blocks of `weight_block_size`, or a single one      (DeepSeek, Qwen3, Mistral)
    P.weight_scale          (O, 1), a single one, or one a block                          (compressed-tensors)

Decided per weight by which keys are there. Scales of activations are not read: inputs stay as they are.
Sources: transformers, integrations/finegrained_fp8.py; compressed-tensors, compressors/naive_quantized.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from veneer.bases.moving import Waiting
from veneer.bases.tensor_files import StoredTensor
from veneer.quant.fp8 import FP8, first_nan

_SCALES = ("weight_scale_inv", "weight_scale")
_FLOATS = ("F32", "BF16", "F16")
_MOST_BLOCK = 2**20
_READ = {"fmt": "e4m3", "expert_dtype": "fp8"}


def unread_fp8(settings: Mapping[str, Any]) -> list[str]:
    """Of quantization_config, quant_method fp8."""
    others = [(name, settings.get(name) or read) for name, read in _READ.items()]
    faults = [f"{name} {str(said)[:40]!r}: {_READ[name]} is read" for name, said in others if said != _READ[name]]
    return [*faults, *_block_faults(settings.get("weight_block_size"))]


def unread_compressed(settings: Mapping[str, Any]) -> list[str]:
    """Of quantization_config, quant_method compressed-tensors."""
    if settings.get("format") != "float-quantized":
        return [f"format {settings.get('format')!r}"]
    faults = [f"{name} is set" for name in ("sparsity_config", "transform_config") if settings.get(name)]
    groups = settings.get("config_groups")
    for name, group in groups.items() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict) or (weights.get("num_bits"), weights.get("type")) != (8, "float"):
            faults.append(f"config_groups.{name}: weights {str(weights)[:60]}")
        else:
            faults += _block_faults(weights.get("block_structure"))
    return faults


def _block_faults(block: Any) -> list[str]:
    if block is None or (isinstance(block, list) and len(block) == 2 and all(map(_is_width, block))):
        return []
    return [f"blocks of {str(block)[:60]}: not two numbers from 1 to {_MOST_BLOCK:,}"]


def _is_width(value: Any) -> bool:
    return type(value) is int and 1 <= value <= _MOST_BLOCK


def _blocks(settings: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    groups = settings.get("config_groups")
    weights = [each["weights"] for each in groups.values()] if isinstance(groups, dict) else []
    for block in (settings.get("weight_block_size"), *(each.get("block_structure") for each in weights)):
        if block is not None:
            yield block[0], block[1]


def fp8_weights(
    tensors: Mapping[str, StoredTensor], settings: Mapping[str, Any]
) -> tuple[dict[str, Waiting], set[str], list[str]]:
    """(by name, the tensors they are made of, what does not belong together)."""
    found: dict[str, Waiting] = {}
    taken: set[str] = set()
    faults: list[str] = []
    for name, weight in tensors.items():
        if not name.endswith(".weight") or not weight.kind.startswith("F8"):
            continue
        path = name.removesuffix(".weight")
        taken.add(name)
        keys = [f"{path}.{key}" for key in _SCALES if f"{path}.{key}" in tensors]
        if weight.kind != "F8_E4M3" or len(weight.shape) != 2:
            faults.append(f"{name} is {weight.kind} of shape {weight.shape}: F8_E4M3 of two axes is read")
        elif len(keys) != 1:
            faults.append(f"{name} is in 8 bits and has {len(keys) or 'no'} scales: {' or '.join(_SCALES)} beside it")
        else:
            taken.add(keys[0])
            scale = tensors[keys[0]]
            block = _block(weight.shape, scale.shape, settings)
            if block is None or scale.kind not in _FLOATS:
                faults.append(
                    f"{keys[0]} is {scale.kind} of shape {scale.shape}, for a weight of shape {weight.shape} and "
                    f"blocks of {list(_blocks(settings)) or 'no size'}"
                )
            else:
                found[name] = _waiting(name, weight, scale, block)
    return found, taken, faults


def _block(weight: tuple[int, ...], scale: tuple[int, ...], settings: Mapping[str, Any]) -> tuple[int, int] | None:
    O, I = weight
    for rows, columns in _blocks(settings):
        if scale == (-(-O // rows), -(-I // columns)):
            return rows, columns
    if scale == (O, 1):
        return 1, I
    return (O, I) if scale in ((), (1,), (1, 1)) else None


def _waiting(name: str, weight: StoredTensor, scale: StoredTensor, block: tuple[int, int]) -> Waiting:
    O, I = weight.shape
    rows, columns = -(-O // block[0]), -(-I // block[1])

    def read() -> FP8:
        scales = scale[...].to(torch.float32).view(rows, columns)
        return FP8(tensors={"": weight[...].view(torch.uint8), "scale": scales}, block=block)

    def wrong(read: FP8) -> list[str]:
        values = [] if (place := first_nan(read.tensors[""])) is None else [f"the value at {place} is no number"]
        scales = [] if read.tensors["scale"].isfinite().all() else ["a scale is not finite"]
        return values + scales

    return Waiting(name, "fp8", (O, I), O * I + 4 * rows * columns, read, wrong)
