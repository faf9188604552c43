"""The layout in which bitsandbytes stores 4-bit weights, both ways. P is a weight's name:

    P                                      packed, uint8 or the same bytes viewed as another type
    P.absmax  P.quant_map                  scales (uint8 where nested) and the table of 16
    P.nested_absmax  P.nested_quant_map    where the scales are quantised themselves
    P.quant_state.bitsandbytes__nf4        the rest, as JSON in UTF-8 bytes (or __fp4)

Decided per weight by which keys are there: what a folder's config.json says about skipped modules
may not hold.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from veneer.bases.folder.tensor_files import StoredTensor
from veneer.bases.packed.moving import Waiting
from veneer.kernels.packed.nf4 import NestedScales
from veneer.quant.nf4 import BLOCK_SIZES, BOOKS, BookName, Packed

_STATE = ".quant_state.bitsandbytes__"
_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_MOST_AXES = 8
_MOST_NESTED_BLOCK = 2**20  # bitsandbytes writes 256
_MOST_OFFSET = 3e38  # what float32 holds


def is_bnb(tensors: Mapping[str, StoredTensor]) -> bool:
    return any(_STATE in name for name in tensors)


def bnb_weights(
    tensors: Mapping[str, StoredTensor], settings: Mapping[str, Any]
) -> tuple[dict[str, Waiting], set[str], list[str]]:
    """As fp8_weights (fp8_files.py); settings are not read."""
    found: dict[str, Waiting] = {}
    taken: set[str] = set()
    faults: list[str] = []
    for key in [key for key in tensors if _STATE in key]:
        name, book = key.split(_STATE)[0], key.split(_STATE)[1]
        parts = {part: tensors[f"{name}.{part}"] for part in _PARTS if f"{name}.{part}" in tensors}
        if name in tensors:
            parts[""] = tensors[name]
        taken |= {key, name, *(f"{name}.{part}" for part in parts if part)}
        try:
            state = _read_state(tensors[key])
            wrong = _faults(book, state, parts)
        except RecursionError:
            wrong = ["its state is nested too deep"]
        except (ValueError, OSError) as fault:
            wrong = [str(fault)]
        if wrong:
            faults += [f"{name}: {line}" for line in wrong]
        else:
            found[name] = _waiting(name, book, parts, state)  # type: ignore[arg-type]
    return found, taken, faults


def _waiting(
    name: str, book: BookName, parts: Mapping[str, StoredTensor], state: Mapping[str, Any]
) -> Waiting:
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

    return Waiting(
        name, book, shape, sum(part.bytes for part in parts.values()), read, before=dtype
    )


def _read_state(stored: StoredTensor) -> dict[str, Any]:
    if stored.kind != "U8" or stored.bytes > 1 << 16:
        raise ValueError(f"its state is {stored.kind} of {stored.bytes} bytes")
    value = json.loads(bytes(stored[...].numpy()).decode("utf-8"))
    if not isinstance(value, dict):
        raise ValueError("its state is no JSON object")
    return value


def _faults(book: str, state: Mapping[str, Any], parts: Mapping[str, StoredTensor]) -> list[str]:
    nested = "nested_absmax" in parts
    needed = {"", "absmax", "quant_map"} | ({"nested_quant_map"} if nested else set())
    wrong = [f"part {part or 'weight'} is missing" for part in sorted(needed - parts.keys())]
    known = {"quant_type", "blocksize", "dtype", "shape"}
    known |= {"nested_blocksize", "nested_dtype", "nested_offset"} if nested else set()
    wrong += [f"its state lacks {key}" for key in sorted(known - {"nested_dtype"} - state.keys())]
    wrong += [f"its state holds {key}, which is unknown" for key in sorted(state.keys() - known)]
    if wrong:
        return wrong
    shape, block, offset = state["shape"], state["blocksize"], state.get("nested_offset", 0.0)
    if book not in BOOKS or state["quant_type"] != book:
        wrong.append(f"quant_type {state['quant_type']!r} under {book!r}")
    if type(block) is not int or block not in BLOCK_SIZES:
        wrong.append(f"block size {block!r}")
    if not isinstance(state["dtype"], str) or state["dtype"] not in _TYPES:
        wrong.append(f"type {state['dtype']!r}")
    if not (isinstance(shape, list) and 0 < len(shape) <= _MOST_AXES and all(map(_is_size, shape))):
        wrong.append(f"shape {shape!r}")
    # An integer may be too large for a float, and one too large for C would come out there as
    # another number.
    outer = state.get("nested_blocksize", 1)
    if not (_is_size(outer) and outer <= _MOST_NESTED_BLOCK and outer & (outer - 1) == 0):
        wrong.append(f"nested block size {outer!r}")
    if type(offset) not in (int, float) or not abs(offset) <= _MOST_OFFSET:
        wrong.append(f"nested offset {offset!r}")
    if wrong:
        return [line[:200] for line in wrong]
    count = math.prod(shape)
    blocks = -(-count // block)
    sizes = {"": (count + 1) // 2, "absmax": blocks * (1 if nested else 4), "quant_map": 64}
    if nested:
        sizes |= {"nested_absmax": -(-blocks // outer) * 4, "nested_quant_map": 1024}
    kinds = {
        "absmax": "U8" if nested else "F32",
        "quant_map": "F32",
        "nested_absmax": "F32",
        "nested_quant_map": "F32",
    }
    for part, size in sizes.items():
        if parts[part].bytes != size or (part and parts[part].kind != kinds[part]):
            name = part or "weight"
            wrong.append(
                f"{name} has {parts[part].bytes:,} bytes of {parts[part].kind}, not {size:,}"
            )
    return wrong


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**40


def file_tensors(name: str, weight: Packed) -> dict[str, Tensor]:
    """A packed weight as the files hold it, keys in full."""
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
