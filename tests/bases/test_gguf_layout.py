"""What a .gguf file announces is held against its size before anybody believes it."""

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from tests.support.models.tiny_gguf import tiny, write_gguf
from veneer.bases.gguf.convert import read_header
from veneer.bases.gguf.layout import LayoutError, check_layout
from veneer.errors import CorruptFileError

TEXT, ARRAY, UINT32 = 8, 9, 4


def header(tensors: int = 0, keys: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys)


def text(value: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(value) if length is None else length) + value


def key(name: bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def array(kind: int, count: int, values: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + values


def tensor(
    name: bytes = b"t", shape: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0
) -> bytes:
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + sizes + struct.pack("<IQ", kind, offset)


def padded(head: bytes, data: bytes = b"", alignment: int = 32) -> bytes:
    return head + bytes(-len(head) % alignment) + data


@pytest.fixture
def check(tmp_path: Path):
    def check_bytes(content: bytes) -> None:
        (tmp_path / "m.gguf").write_bytes(content)
        check_layout(tmp_path / "m.gguf")

    return check_bytes


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "too short"),
        (b"GGUF" + bytes(19), "too short"),
        (b"FUGG" + bytes(20), "begin with GGUF"),
        (header(version=1), "version 1"),
        (header(version=3 << 24), "big-endian"),
        (header(tensors=2**50), "tensors are announced"),
        (header(keys=2**64 - 1), "keys are announced"),
        (header(keys=1) + text(b"k" * 9, 2**63), "name of a key of"),
        (header(keys=1) + text(b"k" * 20, 2**15), "bytes are announced"),
        # the 49 bytes that never returned
        (header(keys=1) + key(b"k", ARRAY, array(0, 2**50)), "elements of 'k' are announced"),
        (
            header(keys=1) + key(b"k", ARRAY, array(TEXT, 2**40, bytes(64))),
            "elements of 'k' are announced",
        ),
        (header(keys=1) + key(b"k", ARRAY, array(TEXT, 1, text(b"x", 2**62))), "element of 'k' of"),
        (header(keys=1) + key(b"k", ARRAY, array(ARRAY, 1, array(0, 1, b"x"))), "array of arrays"),
        (header(keys=1) + key(b"k", 13, bytes(16)), "type 13"),
        (header(keys=1) + key(b"k", TEXT, text(b"x", 2**40)), "the value of 'k' of"),
        (header(keys=2) + 2 * key(b"k", UINT32, bytes(4)), "duplicate key"),
        (header(keys=1) + key(b"general.alignment", UINT32, struct.pack("<I", 0)), "power of two"),
        (header(keys=1) + key(b"general.alignment", UINT32, struct.pack("<I", 24)), "power of two"),
        (header(keys=1) + key(b"general.alignment", TEXT, text(b"32")), "power of two"),
        (header(tensors=1) + tensor(shape=(1,) * 5), "5 dimensions"),
        (header(tensors=1) + tensor(shape=()) + bytes(8), "0 dimensions"),
        (header(tensors=1) + tensor(shape=(4, 0)), "shape"),
        (header(tensors=1) + tensor(shape=(48,), kind=2), "blocks hold 32 values"),
        (header(tensors=1) + tensor(kind=4), "type 4"),
        (header(tensors=1) + tensor(kind=10**9), "type 1000000000"),
        (padded(header(tensors=1) + tensor(), bytes(15)), "ends at byte"),
        (padded(header(tensors=1) + tensor(shape=(2**32, 2**32)), bytes(64)), "ends at byte"),
        (padded(header(tensors=1) + tensor(shape=(2**63, 2)), bytes(64)), "ends at byte"),
        (padded(header(tensors=1) + tensor(offset=2**64 - 32), bytes(64)), "ends at byte"),
        (padded(header(tensors=2) + tensor(b"a") + tensor(b"b"), bytes(64)), "overlaps another"),
        (padded(header(tensors=2) + tensor() + tensor(offset=32), bytes(64)), "duplicate tensor"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_header_announces_and_the_file_cannot_hold_is_refused(check, content, says):
    with pytest.raises(LayoutError, match=says):
        check(content)


def test_the_user_reads_of_it_as_of_any_damaged_file(tmp_path):
    content = header(keys=1) + key(b"k", ARRAY, array(0, 2**50))
    assert len(content) == 49
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(CorruptFileError, match="1,125,899,906,842,624 elements of 'k'") as raised:
        read_header(tmp_path / "m.gguf")
    assert raised.value.next_step


@pytest.mark.parametrize("kind", [gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.Q4_1])
def test_what_the_gguf_package_writes_passes_whole_and_cut_at_any_byte_does_not(kind, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", tiny("llama"), "llama", kind=kind)
    check_layout(path)
    content = path.read_bytes()
    reader = gguf.GGUFReader(path)
    end = max(tensor.data_offset + tensor.n_bytes for tensor in reader.tensors)
    places = np.unique(np.geomspace(1, end - 1, 300).astype(int))
    for place in places:
        path.write_bytes(content[:place])
        with pytest.raises(LayoutError):
            check_layout(path)


def test_another_alignment_moves_the_data(check):
    aligned = key(b"general.alignment", UINT32, struct.pack("<I", 256))
    check(padded(header(1, 1) + aligned + tensor(), bytes(16), 256))
    with pytest.raises(LayoutError, match="ends at byte"):
        check(padded(header(1, 1) + aligned + tensor(), bytes(16), 32))
