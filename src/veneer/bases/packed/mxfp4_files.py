"""Reads gpt-oss's MXFP4 experts. P is the dense parameter's name (mlp.experts.gate_up_proj):

P_blocks    U8 (E, O, I / 32, 16)    two values a byte, the first in the low half
P_scales    U8 (E, O, I / 32)        exponents, 127 too large

Source: transformers, integrations/mxfp4.py (convert_moe_packed_tensors).
"""

from collections.abc import Mapping
from typing import Any

from veneer.bases.folder.tensor_files import StoredTensor
from veneer.bases.packed.moving import StoredPackedWeight
from veneer.quant.mxfp4 import GROUP, MOST_EXPONENT, MXFP4, high_first


def unread_mxfp4(settings: Mapping[str, Any]) -> list[str]:
    return []


def mxfp4_weights(
    tensors: Mapping[str, StoredTensor], settings: Mapping[str, Any]
) -> tuple[dict[str, StoredPackedWeight], set[str], list[str]]:
    """Reads MXFP4 weights; returns what fp8_weights returns."""
    weights: dict[str, StoredPackedWeight] = {}
    used: set[str] = set()
    faults: list[str] = []
    for key, blocks in tensors.items():
        if not key.endswith("_blocks"):
            continue
        name = key.removesuffix("_blocks")
        scales = tensors.get(f"{name}_scales")
        used |= {key, f"{name}_scales"}
        if scales is None:
            faults.append(f"{name}_scales is missing beside {key}")
        elif (
            len(blocks.shape) != 4
            or 0 in blocks.shape
            or blocks.shape != (*scales.shape, GROUP // 2)
            or {blocks.kind, scales.kind} != {"U8"}
        ):
            faults.append(
                f"{key} is {blocks.kind} of shape {blocks.shape}, {name}_scales {scales.kind} of"
                f" shape {scales.shape}: not U8 of (E, O, groups, {GROUP // 2}) and of (E, O,"
                " groups)"
            )
        else:
            weights[name] = _stored_weight(name, blocks, scales)
    return weights, used, faults


def _stored_weight(name: str, blocks: StoredTensor, scales: StoredTensor) -> StoredPackedWeight:
    E, O, groups = scales.shape

    def read() -> MXFP4:
        return MXFP4(tensors={"": high_first(blocks[...]).view(E, O, -1), "exponents": scales[...]})

    def value_faults(weight: MXFP4) -> list[str]:
        most = int(weight.tensors["exponents"].max())
        return (
            [f"an exponent of {most}, at most {MOST_EXPONENT} is finite"]
            if most > MOST_EXPONENT
            else []
        )

    return StoredPackedWeight(
        name, "mxfp4", (E, groups * GROUP, O), blocks.bytes + scales.bytes, read, value_faults
    )
