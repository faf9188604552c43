"""Checks the layout of a .gguf file before any library follows what its header announces.

A header of 49 bytes can announce 2^50 elements, and a reader that believes it never returns. So
every length, count and offset is compared with the bytes of the file. The only result is whether
the file may be read.

magic, version, number of tensors, number of keys
keys     name, type, value; an array: type, count, values
tensors  name, dimensions, type, offset; then the data, each tensor within the file, none in
         another's bytes

Source of the format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import math
import mmap
import struct
from pathlib import Path

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

VERSIONS = (2, 3)
MOST_KEYS = 2**16
MOST_TENSORS = 2**17
MOST_ELEMENTS = 2**22
"""Limit for all arrays together: readers make an object of each element. The largest vocabularies
have a third of it."""
MOST_NAME_BYTES = 2**16 - 1
MOST_TEXT_BYTES = 2**24
MOST_DIMENSIONS = 4

_NUMBERS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Type of a value -> its bytes."""
_TEXT, _ARRAY, _UINT32 = 8, 9, 4


class LayoutError(Exception):
    """The file announces something that it does not hold."""


def check_layout(path: Path) -> None:
    """Raises LayoutError for the first impossible announcement, OSError if the file cannot
    be read."""
    with path.open("rb") as file:
        if file.seek(0, 2) < 24:
            raise LayoutError("too short for a header")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            _HeaderReader(mapped).check()


class _HeaderReader:
    """Reads the header. at: next byte; elements: of arrays so far"""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.size = data, len(data)
        self.at = self.elements = 0

    def check(self) -> None:
        if self.take(4) != b"GGUF":
            raise LayoutError("it does not begin with GGUF")
        if (version := self.number("<I")) not in VERSIONS:
            raise LayoutError(
                f"version {version}, known are {VERSIONS}; files for big-endian machines are not"
                " read"
            )
        num_tensors = self.count("tensors", MOST_TENSORS, least_bytes=24)
        num_keys = self.count("keys", MOST_KEYS, least_bytes=13)
        alignment, keys = 32, set()
        for _ in range(num_keys):
            keys.add(key := self.text("the name of a key", MOST_NAME_BYTES))
            if (new_alignment := self.value(key)) is not None:
                alignment = new_alignment
        if len(keys) < num_keys:
            raise LayoutError("duplicate key")
        tensors = [self.tensor() for _ in range(num_tensors)]
        if len({name for name, _, _ in tensors}) < num_tensors:
            raise LayoutError("duplicate tensor")
        start = -(-self.at // alignment) * alignment
        position = 0
        for name, offset, length in sorted(tensors, key=lambda tensor: tensor[1]):
            if offset < position:
                raise LayoutError(f"tensor {_format_name(name)} overlaps another")
            position = offset + length
            if start + position > self.size:
                ends = f"ends at byte {start + position:,}, the file at {self.size:,}"
                raise LayoutError(f"tensor {_format_name(name)} {ends}")

    def take(self, count: int) -> bytes:
        if count > self.size - self.at:
            raise LayoutError(
                f"{count:,} bytes are announced at {self.at:,}, the file ends at {self.size:,}"
            )
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, form: str) -> int:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def count(self, what: str, most: int, *, least_bytes: int) -> int:
        """Reads a number of things that take at least `least_bytes` each."""
        announced = self.number("<Q")
        if announced > min(most, (self.size - self.at) // least_bytes):
            raise LayoutError(
                f"{announced:,} {what} are announced in {self.size:,} bytes; at most {most:,}"
                " are read"
            )
        return announced

    def text(self, what: str, most: int) -> bytes:
        if (length := self.number("<Q")) > most:
            raise LayoutError(f"{what} of {length:,} bytes is announced; the limit is {most:,}")
        return self.take(length)

    def value(self, key: bytes) -> int | None:
        """Skips a key's value. Returns it if the key is the alignment."""
        kind = self.number("<I")
        if key == b"general.alignment":
            alignment = self.number("<I") if kind == _UINT32 else 0
            if alignment == 0 or alignment & (alignment - 1):
                raise LayoutError("general.alignment is not a power of two")
            return alignment
        if kind == _TEXT:
            self.text(f"the value of {_format_name(key)}", MOST_TEXT_BYTES)
        elif kind == _ARRAY:
            self.array(_format_name(key))
        else:
            self.take(self.width(kind, _format_name(key)))
        return None

    def array(self, key: str) -> None:
        kind = self.number("<I")
        width = 8 if kind == _TEXT else self.width(kind, key)
        count = self.count(f"elements of {key}", MOST_ELEMENTS - self.elements, least_bytes=width)
        self.elements += count
        if kind != _TEXT:
            self.at += count * width
            return
        for _ in range(count):
            self.text(f"an element of {key}", MOST_TEXT_BYTES)

    def width(self, kind: int, key: str) -> int:
        if kind not in _NUMBERS:
            raise LayoutError(f"{key} is of type {kind}, which is unknown, or an array of arrays")
        return _NUMBERS[kind]

    def tensor(self) -> tuple[bytes, int, int]:
        """Reads an entry: (name, offset from the start of the data, bytes)."""
        name = self.text("the name of a tensor", MOST_NAME_BYTES)
        if not 0 < (dimensions := self.number("<I")) <= MOST_DIMENSIONS:
            raise LayoutError(f"tensor {_format_name(name)} has {dimensions:,} dimensions")
        shape = [self.number("<Q") for _ in range(dimensions)]
        kind, offset = self.number("<I"), self.number("<Q")
        try:
            values, width = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        except (ValueError, KeyError):
            raise LayoutError(
                f"tensor {_format_name(name)} is of type {kind}, which is unknown"
            ) from None
        if not all(shape) or shape[0] % values:
            raise LayoutError(
                f"tensor {_format_name(name)} has shape {shape}, its blocks hold {values} values"
            )
        return name, offset, math.prod(shape) // values * width


def _format_name(name: bytes) -> str:
    return repr(name[:60].decode("utf-8", "replace"))
