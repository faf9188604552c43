"""8-bit floating weights in files. P is a linear layer's path:

    P.weight                F8_E4M3 (O, I)
    P.weight_scale_inv      scales of blocks of `weight_block_size`, or a single one      (DeepSeek,
                            Qwen3, Mistral)
    P.weight_scale          (O, 1), a single one, or one a block
                            (compressed-tensors)

Decided per weight by which keys are there. Scales of activations are not read: inputs stay as they
are. Sources: transformers, integrations/finegrained_fp8.py; compressed-tensors,
compressors/naive_quantized.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from veneer.bases.folder.tensor_files import StoredTensor
from veneer.bases.packed.moving import Waiting
from veneer.quant.fp8 import FP8, MOST_VALUE, first_nan

_SCALES = ("weight_scale_inv", "weight_scale")
_FLOATS = ("F32", "BF16", "F16")
_MOST_BLOCK = 2**20
_MOST_GROUPS = 100
_READ = {"fmt": "e4m3", "expert_dtype": "fp8"}


def unread_fp8(settings: Mapping[str, Any]) -> list[str]:
    """Of quantization_config, quant_method fp8."""
    others = [(name, settings.get(name) or read) for name, read in _READ.items()]
    faults = [
        f"{name} {str(said)[:40]!r}: {_READ[name]} is read"
        for name, said in others
        if said != _READ[name]
    ]
    return [*faults, *_block_faults(settings.get("weight_block_size"))]


def unread_compressed(settings: Mapping[str, Any]) -> list[str]:
    """Of quantization_config, quant_method compressed-tensors."""
    if settings.get("format") != "float-quantized":
        return [f"format {settings.get('format')!r}"]
    faults = [
        f"{name} is set" for name in ("sparsity_config", "transform_config") if settings.get(name)
    ]
    groups = settings.get("config_groups") or {}
    if not isinstance(groups, dict) or len(groups) > _MOST_GROUPS:
        return [
            *faults,
            f"config_groups is no mapping of at most {_MOST_GROUPS} groups: {str(groups)[:60]}",
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
    """Rows and columns that have a scale, as settings say it in which unread_fp8 finds nothing."""
    return [settings.get("weight_block_size")]


def blocks_compressed(settings: Mapping[str, Any]) -> list[list[int] | None]:
    """The same of unread_compressed."""
    return [
        each["weights"].get("block_structure")
        for each in (settings.get("config_groups") or {}).values()
    ]


def fp8_weights(
    tensors: Mapping[str, StoredTensor],
    settings: Mapping[str, Any],
    *,
    blocks: Callable[[Mapping[str, Any]], list[list[int] | None]],
) -> tuple[dict[str, Waiting], set[str], list[str]]:
    """(by name, the tensors they are made of, what does not belong together)."""
    found: dict[str, Waiting] = {}
    taken: set[str] = set()
    faults: list[str] = []
    sizes = {(each[0], each[1]) for each in blocks(settings) if each is not None}
    for name, weight in tensors.items():
        if not name.endswith(".weight"):
            continue
        path = name.removesuffix(".weight")
        keys = [f"{path}.{key}" for key in _SCALES if f"{path}.{key}" in tensors]
        if not weight.kind.startswith("F8"):
            faults += [f"{name} is {weight.kind} and {key} beside it is for 8 bits" for key in keys]
            continue
        taken |= {name, *keys}
        if weight.kind != "F8_E4M3" or len(weight.shape) != 2 or 0 in weight.shape:
            faults.append(
                f"{name} is {weight.kind} of shape {weight.shape}: F8_E4M3 of two axes is read"
            )
        elif len(keys) != 1:
            faults.append(
                f"{name} is in 8 bits and has {len(keys) or 'no'} scales: {' or '.join(_SCALES)}"
                " beside it"
            )
        else:
            scale = tensors[keys[0]]
            fitting = _fitting(weight.shape, scale.shape, sizes)
            if len(fitting) != 1 or scale.kind not in _FLOATS:
                faults.append(
                    f"{keys[0]} is {scale.kind} of shape {scale.shape}, for a weight of shape"
                    f" {weight.shape} and blocks of {sorted(sizes) or 'no size'}, of which"
                    f" {len(fitting)} fit"
                )
            else:
                found[name] = _waiting(name, weight, scale, fitting.pop())
    return found, taken, faults


def _fitting(
    weight: tuple[int, ...], scale: tuple[int, ...], sizes: set[tuple[int, int]]
) -> set[tuple[int, int]]:
    """The blocks of a weight that such scales can be for, none larger than the weight."""
    O, I = weight
    if scale in ((), (1,), (1, 1)):
        return {(O, I)}
    fit = {
        (min(rows, O), min(columns, I))
        for rows, columns in sizes
        if scale == (-(-O // rows), -(-I // columns))
    }
    return fit | ({(1, I)} if scale == (O, 1) else set())


def _waiting(
    name: str, weight: StoredTensor, scale: StoredTensor, block: tuple[int, int]
) -> Waiting:
    O, I = weight.shape
    rows, columns = -(-O // block[0]), -(-I // block[1])

    def read() -> FP8:
        scales = scale[...].to(torch.float32).view(rows, columns)
        return FP8(tensors={"": weight[...].view(torch.uint8), "scale": scales}, block=block)

    def wrong(read: FP8) -> list[str]:
        values = (
            []
            if (place := first_nan(read.tensors[""])) is None
            else [f"the value at {place} is no number"]
        )
        most = read.tensors["scale"] * MOST_VALUE
        scales = (
            []
            if most.isfinite().all()
            else ["a scale is not finite, or makes the largest value infinite"]
        )
        return values + scales

    return Waiting(name, "fp8", (O, I), O * I + 4 * rows * columns, read, wrong)
