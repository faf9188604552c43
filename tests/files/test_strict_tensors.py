"""The strict reader: what the format allows is read, everything else is refused, and quickly."""

import json
import random
import struct
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from veneer.errors import CorruptFileError, RefusedError, SourceError, UnsafeFileError
from veneer.files import strict_tensors
from veneer.files.nesting import MAX_JSON_DEPTH
from veneer.files.strict_json import read_json, read_model_json
from veneer.files.strict_tensors import MAX_HEADER_BYTES, read_header, read_tensor_file

SMALL = save(
    {
        "base_model.model.q_proj.lora_A.weight": torch.arange(8.0).reshape(2, 4),
        "base_model.model.q_proj.lora_B.weight": torch.ones(3, 2),
        "base_model.model.lm_head.weight": torch.full((2, 2), 0.5, dtype=torch.bfloat16),
    },
    metadata={"format": "pt"},
)


def file_of(header: object, data: bytes = b"", path: Path | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype="F32", shape=(1,), begin=0, end=4) -> dict[str, object]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.fixture
def read(tmp_path):
    def read_bytes(data: bytes):
        (tmp_path / "t.safetensors").write_bytes(data)
        return read_tensor_file(tmp_path / "t.safetensors")[0]

    return read_bytes


def test_what_the_library_wrote_is_read_to_the_bit(read):
    expected = load(SMALL)
    found = read(SMALL)
    assert found.keys() == expected.keys()
    assert all(
        torch.equal(found[k], expected[k]) and found[k].dtype == expected[k].dtype for k in found
    )


def test_a_file_without_metadata_is_read(read):
    assert torch.equal(
        read(file_of({"a": entry()}, struct.pack("<f", 2.5)))["a"], torch.tensor([2.5])
    )


def test_a_file_cut_at_any_byte_is_refused(read):
    for length in range(len(SMALL)):
        with pytest.raises(CorruptFileError):
            read(SMALL[:length])


def test_a_file_with_bytes_added_at_its_end_is_refused(read):
    with pytest.raises(CorruptFileError, match="the file at"):
        read(SMALL + b"\0")


@pytest.mark.parametrize(
    ("header", "data", "error", "words"),
    [
        (
            b'{"a":'
            + json.dumps(entry()).encode()
            + b',"a":'
            + json.dumps(entry()).encode()
            + b"}",
            b"0123",
            CorruptFileError,
            "duplicate",
        ),
        ({"a": entry(), "b": entry(begin=8, end=12)}, bytes(12), CorruptFileError, "hole"),
        ({"a": entry(), "b": entry(begin=2, end=6)}, bytes(6), CorruptFileError, "overlaps"),
        ({"a": entry(), "b": entry()}, bytes(4), CorruptFileError, "overlaps"),
        ({"a": entry(shape=(2,))}, bytes(4), CorruptFileError, "takes 8 bytes"),
        ({"a": entry(begin=4, end=0)}, bytes(4), CorruptFileError, "begin and an end"),
        ({"a": entry(begin=-4, end=0)}, bytes(4), CorruptFileError, "begin and an end"),
        ({"a": entry(end=2**64)}, bytes(4), CorruptFileError, "begin and an end"),
        ({"a": entry(shape=(2**40, 2**40))}, bytes(4), CorruptFileError, "takes"),
        ({"a": entry(shape=(True,))}, bytes(4), CorruptFileError, "shape"),
        ({"a": entry(shape=(1.0,))}, bytes(4), CorruptFileError, "shape"),
        ({"a": entry(shape=[1] * 9)}, bytes(4), CorruptFileError, "shape"),
        ({"a": entry(shape=(0, 4), end=0)}, b"", CorruptFileError, "not gathered"),
        ({"a": {"dtype": "F32", "shape": [1]}}, bytes(4), CorruptFileError, "not {dtype"),
        ({"a": {**entry(), "x": 1}}, bytes(4), CorruptFileError, "not {dtype"),
        ({"a": 5}, bytes(4), CorruptFileError, "not {dtype"),
        ({"__metadata__": {"format": 3}}, b"", CorruptFileError, "__metadata__"),
        ({"a": entry(dtype="I64", end=8)}, bytes(8), UnsafeFileError, "dtype 'I64'"),
        ({"a": entry(dtype=["F32"])}, bytes(4), UnsafeFileError, "dtype"),
        ({"../../a": entry()}, bytes(4), UnsafeFileError, "not a name"),
        ({"a..b": entry()}, bytes(4), UnsafeFileError, "not a name"),
        ({"": entry()}, bytes(4), UnsafeFileError, "not a name"),
        ({"a\nb": entry()}, bytes(4), UnsafeFileError, "not a name"),
        ({"a" * 501: entry()}, bytes(4), UnsafeFileError, "not a name"),
        (
            {f"t{i}": entry(begin=4 * i, end=4 * i + 4) for i in range(10_001)},
            bytes(40_004),
            UnsafeFileError,
            "10,001 tensors",
        ),
        (b"[" * 50_000, b"", CorruptFileError, "header"),
        (b"{" + b'"a":[' * 50_000, b"", UnsafeFileError, "deeper"),
        (b"[]", b"", CorruptFileError, "header"),
        (b"{\xff}", b"", CorruptFileError, "not valid JSON"),
    ],
)
def test_a_header_the_format_does_not_allow_is_refused(read, header, data, error, words):
    with pytest.raises(error, match=words):
        read(file_of(header, data))


def test_a_header_longer_than_the_limit_is_refused_unread(read):
    with pytest.raises(UnsafeFileError, match="the limit is"):
        read(struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{")
    with pytest.raises(UnsafeFileError, match="the limit is"):
        read(struct.pack("<Q", 2**64 - 1) + b"{")


def test_what_lies_exactly_at_a_limit_is_read(read, monkeypatch):
    one = file_of({"a" * 500: entry(shape=[1] * 8)}, struct.pack("<f", 2.5))
    assert read(one)["a" * 500].shape == (1,) * 8
    three = file_of(
        {name: entry(begin=4 * n, end=4 * n + 4) for n, name in enumerate("abc")}, bytes(12)
    )
    (header_bytes,) = struct.unpack("<Q", three[:8])
    for name, limit in (("MAX_TENSORS", 3), ("MAX_HEADER_BYTES", header_bytes)):
        monkeypatch.setattr(strict_tensors, name, limit)
        assert list(read(three)) == ["a", "b", "c"]
        monkeypatch.setattr(strict_tensors, name, limit - 1)
        with pytest.raises(UnsafeFileError, match="the limit is"):
            read(three)
        monkeypatch.setattr(strict_tensors, name, limit)


def test_values_at_offsets_that_are_no_multiple_of_their_size_are_read(read):
    halves = struct.pack("<e", 1.5), struct.pack("<f", 2.5), struct.pack("<d", 3.5)
    header = {
        "a": entry("F16", end=2),
        "b": entry(begin=2, end=6),
        "c": entry("F64", begin=6, end=14),
    }
    assert [float(t) for t in read(file_of(header, b"".join(halves))).values()] == [1.5, 2.5, 3.5]


def test_where_faults_are_is_said_in_bytes(read):
    header = {"a": entry(), "b": entry(begin=2, end=6), "c": entry(begin=9, end=13)}
    with pytest.raises(CorruptFileError) as caught:
        read(file_of(header, bytes(13)))
    assert caught.value.faults == [
        "b: begins at 2, expected 4: overlaps the one before it",
        "c: begins at 9, expected 6: leaves a hole before it",
    ]
    with pytest.raises(CorruptFileError) as caught:
        read(file_of({"a": entry()}, bytes(7)))
    assert caught.value.faults == ["the tensors end at byte 4 of the data, the file at 7"]
    with pytest.raises(CorruptFileError, match="has 7 bytes: too short"):
        read(bytes(7))
    with pytest.raises(UnsafeFileError) as caught:
        read(file_of({"/" + "a" * 100: entry(), "b": 1}, bytes(4)))
    assert caught.value.faults == [
        f"{'/' + 'a' * 79!r} is not a name of a tensor",
        "b: not {dtype, shape, data_offsets}",
    ]


def test_every_fault_of_a_file_is_told_at_once(read):
    with pytest.raises(CorruptFileError) as caught:
        read(file_of({"a": entry(shape=(3,)), "b": entry(begin=9, end=13), "c": 1}, bytes(20)))
    assert len(caught.value.faults) == 3


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_that_are_not_finite_are_refused_by_name(read, bad, dtype):
    with pytest.raises(CorruptFileError, match=r"lora_A: 1 of 4 values"):
        read(save({"x.lora_A": torch.tensor([0, bad, 1, 2], dtype=dtype), "y": torch.ones(2)}))


def test_a_missing_file_is_an_error_of_the_input(tmp_path):
    with pytest.raises(SourceError, match="No such file"):
        read_header(tmp_path / "no.safetensors")


def test_mutated_files_are_accepted_only_if_the_library_accepts_them(read):
    """Ours may be stricter than the library, never laxer, and fails in no other way than by
    refusing."""
    chance = random.Random(0)
    accepted = 0
    for _ in range(1500):
        data = bytearray(SMALL)
        for _ in range(chance.choice([1, 1, 2, 8])):
            position = chance.randrange(len(data))
            match chance.randrange(4):
                case 0:
                    data[position] ^= 1 << chance.randrange(8)
                case 1:
                    data[position] = chance.choice(b'0123456789{}[]",:FB\\\0')
                case 2:
                    del data[position : position + chance.randrange(1, 9)]
                case 3:
                    data[position:position] = data[: chance.randrange(1, 9)]
        try:
            tensors = read(bytes(data))
        except RefusedError:
            continue
        accepted += 1
        reference = load(bytes(data))
        assert tensors.keys() == reference.keys()
        assert all(torch.equal(tensors[name], reference[name]) for name in tensors)
    assert 50 < accepted < 1450, "mutations must hit both sides"


def test_the_library_refuses_what_we_call_damaged_too():
    """The oracle is alive: it rejects a truncation, so the test above compares with something."""
    with pytest.raises(SafetensorError):
        load(SMALL[:-1])


@pytest.fixture
def parse(tmp_path):
    def parse_text(text: str | bytes):
        (tmp_path / "c.json").write_bytes(text.encode() if isinstance(text, str) else text)
        return read_json(tmp_path / "c.json")

    return parse_text


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ('{"r": 1, "r": 2}', CorruptFileError, "duplicate"),
        ('{"a": {"r": 1, "r": 2}}', CorruptFileError, "duplicate"),
        ('{"alpha": NaN}', CorruptFileError, "NaN"),
        ('{"alpha": -Infinity}', CorruptFileError, "-Infinity"),
        ('{"alpha": 1e999}', CorruptFileError, "too large"),
        ('{"r": ' + "9" * 100_000 + "}", CorruptFileError, "not valid JSON"),
        ('{"a": "\\ud800"}', CorruptFileError, "surrogate"),
        ('{"a": ["x", ["\\u0000"]]}', CorruptFileError, "NUL"),
        ('{"\\udc00": 1}', CorruptFileError, "surrogate"),
        ('\ufeff{"a": 1}', CorruptFileError, "not valid JSON"),
        (b'{"a": "\xff"}', CorruptFileError, "not valid JSON"),
        ("[1]", CorruptFileError, "a JSON list"),
        ("", CorruptFileError, "not valid JSON"),
        ('{"a": 1} x', CorruptFileError, "not valid JSON"),
        (
            '{"a": ' * (MAX_JSON_DEPTH + 1) + "1" + "}" * (MAX_JSON_DEPTH + 1),
            UnsafeFileError,
            "deeper",
        ),
        ('{"a": ' + "[" * 1_000_000, UnsafeFileError, "deeper"),
        ('{"a": "' + "x" * 5_000_000 + '"}', UnsafeFileError, "more than"),
    ],
)
def test_json_beyond_the_limits_is_refused(parse, text, error, words):
    with pytest.raises(error, match=words):
        parse(text)


def test_json_within_the_limits_is_read(parse):
    text = '{"a": "[[[[\\"{{{\\ud83d\\ude00", "b": {"r": [1, 2.5e-3, null, true]}}'
    assert parse(text) == json.loads(text)


def test_a_models_config_may_hold_infinity_and_a_key_twice_but_no_depth(tmp_path):
    """time_step_limit of Mamba 2's published configs is (0, Infinity); transformers takes the later
    of two."""
    path = tmp_path / "config.json"
    path.write_text('{"time_step_limit": [0.0, Infinity], "use_cache": false, "use_cache": true}')
    assert read_model_json(path) == {"time_step_limit": [0.0, float("inf")], "use_cache": True}
    for text in ("[1]", '{"a": 1} x', '{"a": ' + "[" * 100_000, '{"a": "\xff"}'.encode("latin-1")):
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(CorruptFileError, match="config"):
            read_model_json(path)


def test_hostile_text_takes_no_longer_than_its_size_warrants(parse):
    begin = time.perf_counter()
    for text in ('{"a": ' + '"\\' * 1_500_000, "[" + '"' * 3_000_001, '{"a": "' + "\\" * 3_000_001):
        with pytest.raises(RefusedError):
            parse(text)
    assert time.perf_counter() - begin < 5
