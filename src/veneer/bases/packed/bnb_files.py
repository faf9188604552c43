"""Reads and writes bitsandbytes' layout of 4-bit weights. P is a weight's name:

P                                      packed, uint8 or the same bytes viewed as another type
P.absmax  P.quant_map                  scales (uint8 where nested) and the table of 16
P.nested_absmax  P.nested_quant_map    where the scales are quantised themselves
P.quant_state.bitsandbytes__nf4        the rest, as JSON in UTF-8 bytes (or __fp4)

Each weight is read by the keys that are present, because config.json may be wrong about skipped
modules.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from veneer.bases.folder.tensor_files import StoredTensor
from veneer.bases.packed.moving import StoredPackedWeight
from veneer.kernels.packed.nf4 import NestedScales
from veneer.quant.nf4 import BLOCK_SIZES, BOOKS, BookName, Packed

_STATE = ".quant_state.bitsandbytes__"
_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_MOST_AXES = 8
_MOST_NESTED_BLOCK = 2**20  # bitsandbytes writes 256
_MOST_OFFSET = 3e38  # what float32 holds


def is_bnb(tensors: Mapping[str, StoredTensor]) -> bool:
    """Whether any tensor belongs to a weight that bitsandbytes packed."""
    return any(_STATE in name for name in tensors)


def bnb_weights(
    tensors: Mapping[str, StoredTensor], settings: Mapping[str, Any]
) -> tuple[dict[str, StoredPackedWeight], set[str], list[str]]:
    """Reads 4-bit weights; returns what fp8_weights (fp8_files.py) returns. settings are not
    read."""
    weights: dict[str, StoredPackedWeight] = {}
    used: set[str] = set()
    faults: list[str] = []
    for key in [key for key in tensors if _STATE in key]:
        name, book = key.split(_STATE)[0], key.split(_STATE)[1]
        parts = {part: tensors[f"{name}.{part}"] for part in _PARTS if f"{name}.{part}" in tensors}
        if name in tensors:
            parts[""] = tensors[name]
        used |= {key, name, *(f"{name}.{part}" for part in parts if part)}
        try:
            state = _read_state(tensors[key])
            weight_faults = _faults(book, state, parts)
        except RecursionError:
            weight_faults = ["its state is nested too deeply"]
        except (ValueError, OSError) as fault:
            weight_faults = [str(fault)]
        if weight_faults:
            faults += [f"{name}: {line}" for line in weight_faults]
        else:
            weights[name] = _stored_weight(name, book, parts, state)  # type: ignore[arg-type]
    return weights, used, faults


def _stored_weight(
    name: str, book: BookName, parts: Mapping[str, StoredTensor], state: Mapping[str, Any]
) -> StoredPackedWeight:
    shape, dtype = tuple(state["shape"]), _TYPES[state["dtype"]]

    def read() -> Packed:
        raw = {key: tensor[...] for key, tensor in parts.items()}
        nested = None
        if "nested_absmax" in raw:
            block, offset = int(state["nested_blocksize"]), float(state["nested_offset"])
            nested = NestedScales(raw["nested_quant_map"], raw["nested_absmax"], block, offset)
        packed = raw[""].reshape(-1).view(torch.uint8)
        return Packed(
            book,
            packed,
            raw["absmax"],
            raw["quant_map"],
            int(state["blocksize"]),
            shape,
            dtype,
            nested,
        )

    return StoredPackedWeight(
        name, book, shape, sum(part.bytes for part in parts.values()), read, before=dtype
    )


def _read_state(stored: StoredTensor) -> dict[str, Any]:
    if stored.kind != "U8" or stored.bytes > 1 << 16:
        raise ValueError(f"its state is {stored.kind} of {stored.bytes} bytes")
    value = json.loads(bytes(stored[...].numpy()).decode("utf-8"))
    if not isinstance(value, dict):
        raise ValueError("its state is not a JSON object")
    return value


def _faults(book: str, state: Mapping[str, Any], parts: Mapping[str, StoredTensor]) -> list[str]:
    nested = "nested_absmax" in parts
    needed = {"", "absmax", "quant_map"} | ({"nested_quant_map"} if nested else set())
    faults = [f"part {part or 'weight'} is missing" for part in sorted(needed - parts.keys())]
    known_keys = {"quant_type", "blocksize", "dtype", "shape"}
    known_keys |= {"nested_blocksize", "nested_dtype", "nested_offset"} if nested else set()
    faults += [
        f"its state lacks {key}" for key in sorted(known_keys - {"nested_dtype"} - state.keys())
    ]
    faults += [
        f"its state holds {key}, which is unknown" for key in sorted(state.keys() - known_keys)
    ]
    if faults:
        return faults
    shape, block, offset = state["shape"], state["blocksize"], state.get("nested_offset", 0.0)
    if book not in BOOKS or state["quant_type"] != book:
        faults.append(f"quant_type {state['quant_type']!r} under {book!r}")
    if type(block) is not int or block not in BLOCK_SIZES:
        faults.append(f"block size {block!r}")
    if not isinstance(state["dtype"], str) or state["dtype"] not in _TYPES:
        faults.append(f"type {state['dtype']!r}")
    if not (isinstance(shape, list) and 0 < len(shape) <= _MOST_AXES and all(map(_is_size, shape))):
        faults.append(f"shape {shape!r}")
    # An integer may be too large for a float, and one too large for C would become another number.
    nested_block = state.get("nested_blocksize", 1)
    if not (
        _is_size(nested_block)
        and nested_block <= _MOST_NESTED_BLOCK
        and nested_block & (nested_block - 1) == 0
    ):
        faults.append(f"nested block size {nested_block!r}")
    if type(offset) not in (int, float) or not abs(offset) <= _MOST_OFFSET:
        faults.append(f"nested offset {offset!r}")
    if faults:
        return [line[:200] for line in faults]
    count = math.prod(shape)
    blocks = -(-count // block)
    sizes = {"": (count + 1) // 2, "absmax": blocks * (1 if nested else 4), "quant_map": 64}
    if nested:
        sizes |= {"nested_absmax": -(-blocks // nested_block) * 4, "nested_quant_map": 1024}
    expected_kinds = {
        "absmax": "U8" if nested else "F32",
        "quant_map": "F32",
        "nested_absmax": "F32",
        "nested_quant_map": "F32",
    }
    for part, size in sizes.items():
        if parts[part].bytes != size or (part and parts[part].kind != expected_kinds[part]):
            name = part or "weight"
            faults.append(
                f"{name} has {parts[part].bytes:,} bytes of {parts[part].kind}, not {size:,}"
            )
    return faults


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**40


def file_tensors(name: str, weight: Packed) -> dict[str, Tensor]:
    """Converts a packed weight to the tensors of its files, with full keys."""
    state: dict[str, Any] = {
        "quant_type": weight.book,
        "blocksize": weight.block,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "shape": list(weight.shape),
    }
    tensors = {"": weight.packed.view(-1, 1), ".absmax": weight.absmax, ".quant_map": weight.table}
    if (nested := weight.nested) is not None:
        tensors |= {".nested_absmax": nested.scales, ".nested_quant_map": nested.table}
        state |= {
            "nested_blocksize": nested.block,
            "nested_dtype": "float32",
            "nested_offset": nested.offset,
        }
    text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return {
        name + key: tensor for key, tensor in (tensors | {f"{_STATE}{weight.book}": text}).items()
    }
