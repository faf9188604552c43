"""The layout in which bitsandbytes stores 4-bit weights, both ways. P is a weight's name:

    P                                      packed, uint8 or the same bytes viewed as another type
    P.absmax  P.quant_map                  scales (uint8 where nested) and the table of 16
    P.nested_absmax  P.nested_quant_map    where the scales are quantised themselves
    P.quant_state.bitsandbytes__nf4        the rest, as JSON in UTF-8 bytes (or __fp4)

Decided per weight by which keys are there: what a folder's config.json says about skipped modules may not hold.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer.bases.tensor_files import StoredTensor
from veneer.errors import CorruptFileError
from veneer.kernels.nf4 import Nested
from veneer.quant.nf4 import BLOCK_SIZES, BOOKS, BookName, Packed

_STATE = ".quant_state.bitsandbytes__"
_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_NEXT = "Download the model again; if it stays, ask its author."
_MOST_AXES = 8
_MOST_NESTED_BLOCK = 2**20  # bitsandbytes writes 256
_MOST_OFFSET = 3e38  # what float32 holds


@dataclass(frozen=True)
class StoredPacked:
    """A weight that lies packed in its files; `[...]` reads it. `.to` is what transformers calls afterwards."""

    name: str
    book: BookName
    parts: Mapping[str, StoredTensor]
    state: Mapping[str, Any]

    @property
    def dtype(self) -> torch.dtype:
        return _TYPES[self.state["dtype"]]

    def __getitem__(self, everything: Any) -> "Moving":
        raw = {key: tensor[...] for key, tensor in self.parts.items()}
        nested = None
        if "nested_absmax" in raw:
            nested = Nested(
                raw["nested_quant_map"],
                raw["nested_absmax"],
                int(self.state["nested_blocksize"]),
                float(self.state["nested_offset"]),
            )
        packed = raw[""].reshape(-1).view(torch.uint8)
        return Moving(
            Packed(
                self.book,
                packed,
                raw["absmax"],
                raw["quant_map"],
                int(self.state["blocksize"]),
                tuple(self.state["shape"]),
                self.dtype,
                nested,
            )
        )

    def get_dtype(self) -> str:
        return "U8"

    def get_shape(self) -> list[int]:
        return list(self.state["shape"])


@dataclass(frozen=True)
class Moving:
    """A packed weight between its file and the model; it follows to a device and keeps its types."""

    weight: Packed

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Moving":
        w, nested = self.weight, self.weight.nested
        if nested is not None:
            nested = Nested(nested.table.to(device), nested.scales.to(device), nested.block, nested.offset)
        tensors = (w.packed.to(device), w.absmax.to(device), w.table.to(device))
        return Moving(Packed(w.book, *tensors, w.block, w.shape, w.dtype, nested))


def stored_weights(tensors: Mapping[str, StoredTensor]) -> dict[str, Any]:
    """The weights of a folder: dense ones as they are, packed ones with all their parts as one.

    Raises CorruptFileError with every packed weight whose parts do not belong together.
    """
    states = {key.split(_STATE)[0]: key for key in tensors if _STATE in key}
    weights: dict[str, Any] = {}
    taken: set[str] = set()
    faults: list[str] = []
    for name, key in states.items():
        parts = {part: tensors[f"{name}.{part}"] for part in _PARTS if f"{name}.{part}" in tensors}
        if name in tensors:
            parts[""] = tensors[name]
        taken |= {key, name, *(f"{name}.{part}" for part in parts if part)}
        try:
            state = _read_state(tensors[key])
            wrong = _faults(key.split(_STATE)[1], state, parts)
        except RecursionError:
            wrong = ["its state is nested too deep"]
        except (ValueError, OSError) as fault:
            wrong = [str(fault)]
        if wrong:
            faults += [f"{name}: {line}" for line in wrong]
            continue
        weights[name] = StoredPacked(name, key.split(_STATE)[1], parts, state)  # type: ignore[arg-type]
    if faults:
        raise CorruptFileError("packed weights in the files cannot be read", faults[:20], _NEXT)
    return weights | {name: tensor for name, tensor in tensors.items() if name not in taken}


def stored_book(folder: Path, tensors: Mapping[str, StoredTensor]) -> tuple[BookName, torch.dtype] | None:
    """(format, type of the weights before they were packed) of a folder's tensors; None: none is packed."""
    if not any(_STATE in name for name in tensors):
        return None
    packed = [weight for weight in stored_weights(tensors).values() if isinstance(weight, StoredPacked)]
    if len(books := {weight.book for weight in packed}) > 1:
        raise CorruptFileError(f"{folder} mixes {' and '.join(sorted(books))}", [], _NEXT)
    return packed[0].book, packed[0].dtype


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
    # An integer may be too large for a float, and one too large for C would come out there as another number.
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
    kinds = {"absmax": "U8" if nested else "F32", "quant_map": "F32", "nested_absmax": "F32", "nested_quant_map": "F32"}
    for part, size in sizes.items():
        if parts[part].bytes != size or (part and parts[part].kind != kinds[part]):
            name = part or "weight"
            wrong.append(f"{name} has {parts[part].bytes:,} bytes of {parts[part].kind}, not {size:,}")
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
        state |= {"nested_blocksize": nested.block, "nested_dtype": "float32", "nested_offset": nested.offset}
    text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return {name + key: tensor for key, tensor in (tensors | {f"{_STATE}{weight.book}": text}).items()}
