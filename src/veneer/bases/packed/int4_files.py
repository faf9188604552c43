"""Reads GPTQ's and AWQ's 4-bit weights. P is a linear layer's path, G its groups of columns:

                GPTQ                                       AWQ, version gemm
P.qweight   I32 (I / 8, O): eight columns a word       I32 (I, O / 8): eight rows a word
P.qzeros    I32 (G, O / 8): eight rows a word          the same
P.scales    F16 (G, O)                                 the same
P.g_idx     I32 (I): the group of each column          absent

GPTQ's words hold their first number in the lowest 4 bits. Its first format stores each zero minus
one, subtracted from the words as a whole (checkpoint_format gptq; gptq_v2 stores it as it is).
AWQ's words hold rows 0 2 4 6 1 3 5 7. Sources: GPTQModel, gptqmodel/utils/model.py
(convert_gptq_v1_to_v2_format_module) and nn_modules/qlinear/torch.py; AutoAWQ,
awq/utils/packing_utils.py and awq/modules/linear/gemm.py.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from veneer.bases.folder.tensor_files import StoredTensor
from veneer.bases.packed.moving import StoredPackedWeight
from veneer.quant.config import Quantize
from veneer.quant.int4 import MOST_VALUE, Int4, packed_columns

_EIGHT_ONES = 0x11111111
_LESS_ONE = {"gptq": _EIGHT_ONES, "gptq_v2": 0}
"""checkpoint_format -> amount to add to each word of zeros."""
_MOST_GROUP = 2**20


@dataclass(frozen=True)
class Int4Layout:
    """How a format stores its words.

    sides: shape of qweight -> (O, I); codes: words -> codes of Int4; order: rows in a word of
    zeros; missing: settings -> amount to add to such a word
    """

    format: Quantize
    sides: Callable[[tuple[int, ...]], tuple[int, int]]
    codes: Callable[[Tensor], Tensor]
    order: tuple[int, ...]
    missing: Callable[[Mapping[str, Any]], int]


def _unpack_columns(words_RO: Tensor) -> Tensor:
    """Reorders (I / 8, O) words of eight columns to (O, I / 2) bytes of two columns."""
    R, O = words_RO.shape
    return words_RO.contiguous().view(torch.uint8).view(R, O, 4).transpose(0, 1).reshape(O, 4 * R)


def _unpack_rows(words: Tensor, order: tuple[int, ...]) -> Tensor:
    """Unpacks (N, O / 8) words of eight rows to (O, N) uint8. order: row of each 4 bits, lowest
    first"""
    count = len(words)
    eight = words.contiguous().view(torch.uint8).view(count, -1, 4)
    numbers = torch.stack([eight & 15, eight >> 4], dim=-1).view(count, -1, 8)
    return numbers[..., torch.argsort(torch.tensor(order))].reshape(count, -1).T.contiguous()


_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
GPTQ = Int4Layout(
    "gptq",
    lambda shape: (shape[1], 8 * shape[0]),
    _unpack_columns,
    tuple(range(8)),
    lambda settings: _LESS_ONE[settings.get("checkpoint_format", "gptq")],
)
AWQ = Int4Layout(
    "awq",
    lambda shape: (8 * shape[1], shape[0]),
    lambda words: packed_columns(_unpack_rows(words, _AWQ_ORDER)),
    _AWQ_ORDER,
    lambda settings: 0,
)


def unread_gptq(settings: Mapping[str, Any]) -> list[str]:
    faults = _common_unread(settings)
    if (version := str(settings.get("checkpoint_format", "gptq"))) not in _LESS_ONE:
        faults.append(
            f"checkpoint_format {version[:40]!r}: {' and '.join(_LESS_ONE)} are supported"
        )
    if settings.get("pack_dtype", "int32") not in ("int32", "torch.int32"):
        faults.append(f"pack_dtype {settings['pack_dtype']!r}: only int32 is supported")
    return faults


def unread_awq(settings: Mapping[str, Any]) -> list[str]:
    faults = _common_unread(settings)
    version = settings.get("version", settings.get("format", "gemm"))
    if not isinstance(version, str) or version.lower() != "gemm":
        faults.append(f"version {version!r}: only gemm is supported")
    return faults


def _common_unread(settings: Mapping[str, Any]) -> list[str]:
    bits, width = settings.get("bits", settings.get("w_bit", 4)), _group_width(settings)
    faults = (
        [] if bits == 4 and type(bits) is int else [f"{str(bits)[:20]} bits: only 4 are supported"]
    )
    if type(width) is not int or not (width == -1 or 2 <= width <= _MOST_GROUP):
        faults.append(
            f"group_size {str(width)[:40]}: not -1, nor a number from 2 to {_MOST_GROUP:,}"
        )
    return faults


def _group_width(settings: Mapping[str, Any]) -> Any:
    return settings.get("group_size", settings.get("q_group_size", 128))


def int4_weights(
    tensors: Mapping[str, StoredTensor], settings: Mapping[str, Any], *, layout: Int4Layout
) -> tuple[dict[str, StoredPackedWeight], set[str], list[str]]:
    """Reads 4-bit weights; returns what fp8_weights returns."""
    weights: dict[str, StoredPackedWeight] = {}
    used: set[str] = set()
    faults: list[str] = []
    for key in tensors:
        if not key.endswith(".qweight"):
            continue
        path = key.removesuffix(".qweight")
        parts = {
            part: tensors[n]
            for part in ("qweight", "qzeros", "scales", "g_idx")
            if (n := f"{path}.{part}") in tensors
        }
        used |= {f"{path}.{part}" for part in parts}
        if part_faults := _part_faults(parts, settings, layout):
            faults += [f"{path}: {line}" for line in part_faults]
        else:
            weights[f"{path}.weight"] = _stored_weight(f"{path}.weight", parts, settings, layout)
    return weights, used, faults


def _part_faults(
    parts: Mapping[str, StoredTensor], settings: Mapping[str, Any], layout: Int4Layout
) -> list[str]:
    if missing := [part for part in ("qzeros", "scales") if part not in parts]:
        return [f"{part} is missing" for part in missing]
    if len(parts["qweight"].shape) != 2 or 0 in parts["qweight"].shape:
        return [f"qweight of shape {parts['qweight'].shape}: it must have two axes"]
    O, I = layout.sides(parts["qweight"].shape)
    width = _group_width(settings) if _group_width(settings) != -1 else I
    groups = -(-I // width)
    needed = {
        "qweight": parts["qweight"].shape,
        "qzeros": (groups, O // 8),
        "scales": (groups, O),
        "g_idx": (I,),
    }
    kinds = {"scales": ("F16", "BF16", "F32")}
    faults = []
    for part, stored in parts.items():
        allowed = kinds.get(part, ("I32",))
        if stored.shape != needed[part] or stored.kind not in allowed:
            faults.append(
                f"{part} is {stored.kind} of shape {stored.shape}; {' or '.join(allowed)} of shape"
                f" {needed[part]} for {O} rows of {I} in groups of {width}"
            )
    if O % 8 or I % 2:
        faults.append(f"{O} rows of {I} columns: they must be multiples of 8 and 2")
    return faults


def _stored_weight(
    name: str, parts: Mapping[str, StoredTensor], settings: Mapping[str, Any], layout: Int4Layout
) -> StoredPackedWeight:
    O, I = layout.sides(parts["qweight"].shape)
    width = _group_width(settings) if _group_width(settings) != -1 else I

    def read() -> Int4:
        words = parts["qzeros"][...] + layout.missing(settings)
        stored = {
            "": layout.codes(parts["qweight"][...]),
            "scales": parts["scales"][...].T.contiguous(),
        }
        stored["zeros"] = _unpack_rows(words, layout.order)
        if "g_idx" in parts:
            group_of_column = parts["g_idx"][...]
            if not torch.equal(group_of_column, torch.arange(I, dtype=torch.int32) // width):
                stored["groups"] = group_of_column
        return Int4(format=layout.format, tensors=stored, width=width)

    size = (
        O * I // 2 + parts["scales"].bytes + parts["scales"].bytes // parts["scales"].dtype.itemsize
    )
    if "g_idx" in parts and settings.get("desc_act"):
        size += 4 * I
    return StoredPackedWeight(
        name,
        layout.format,
        (O, I),
        size,
        read,
        partial(_value_faults, groups=parts["scales"].shape[0]),
    )


def _value_faults(weight: Int4, *, groups: int) -> list[str]:
    most = weight.tensors["scales"].float() * MOST_VALUE
    faults = (
        []
        if most.isfinite().all()
        else ["a scale is not finite, or makes the largest value infinite"]
    )
    if (groups_of_columns := weight.tensors.get("groups")) is not None and not (
        int(groups_of_columns.min()) >= 0 and int(groups_of_columns.max()) < groups
    ):
        faults.append(
            f"g_idx names groups from {int(groups_of_columns.min())} to"
            f" {int(groups_of_columns.max())}, there are {groups}"
        )
    return faults
