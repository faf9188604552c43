"""Files that a stranger wrote: whatever is in them, a base is read, or an error says what is wrong
with them.

Each round changes a good file in one place or two: a field of another kind or size, a byte, a
length, an offset. What is read must then compute; anything but a base or a VeneerError fails, and
so does a process that dies.
"""

from __future__ import annotations

import copy
import json
import random
import shutil
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.soak.counts import rounds
from tests.soak.inputs.packed import LAYOUTS, make_packed, spoil
from tests.support.models.tiny_gguf import tiny, write_gguf
from tests.support.tiny import save_tiny
from veneer.bases.gguf.convert import read_header
from veneer.bases.packed.bnb_files import file_tensors
from veneer.data.template.template import ChatTemplate
from veneer.errors import CorruptFileError, InputError, RefusedError
from veneer.models.load import load_base
from veneer.quant.config import Quantize
from veneer.quant.nf4 import quantize

VALUES: list[Any] = [
    *(
        "wide",
        "",
        -1,
        0,
        1,
        1.5,
        -5,
        3,
        63,
        20_000,
        2**31,
        2**32,
        2**40,
        2**63,
        2**64,
        10**30,
        10**400,
        1e308,
    ),
    *(
        float("nan"),
        float("inf"),
        None,
        True,
        False,
        [],
        [1],
        ["a"],
        [[]],
        {},
        {"a": 1},
        [10**9] * 3,
        "\ud800",
        "a" * 5000,
    ),
]
SETTINGS = ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json")
FAMILIES = ("llama", "gemma2", "gpt2", "mixtral", "qwen3")


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every field of nested JSON."""
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def with_value(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    changed = copy.deepcopy(value)
    at = changed
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = new
    return changed


def spoiled_bytes(content: bytes, rng: random.Random, most: int) -> bytes:
    """One to three changes in the first `most` bytes: a bit, a byte, eight bytes of a number, a
    cut, a stretch twice."""
    raw = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(min(len(raw), most)) if raw else 0
        way = rng.randrange(6)
        if way == 0 and raw:
            raw[at] ^= 1 << rng.randrange(8)
        elif way == 1 and raw:
            raw[at] = rng.randrange(256)
        elif way == 2:
            raw[at : at + 8] = struct.pack(
                "<Q", rng.choice([0, 1, 2**31, 2**32, 2**50, 2**63, 2**64 - 1, len(raw)])
            )
        elif way == 3:
            raw[at : at + 4] = struct.pack("<I", rng.choice([0, 1, 9, 13, 2**31, 2**32 - 1]))
        elif way == 4:
            del raw[at : at + rng.randint(1, 40)]
        else:
            raw[at:at] = raw[at : at + rng.randint(1, 40)]
    return bytes(raw)


def read(source: Path, quantize: Quantize | None = None) -> bool:
    """Whether a base came out; it then computes, and its template renders or is refused."""
    try:
        base = load_base(str(source), quantize=quantize)
        with torch.no_grad():
            logits = base.model(torch.tensor([[1, 2, 3, 4]])).logits
            one = base.model(
                torch.tensor([[7]])
            ).logits  # other products than those of several rows
        assert torch.isfinite(logits).all() and torch.isfinite(one).all()
        if base.tokenizer.chat_template:
            ChatTemplate(base.tokenizer).render([{"role": "user", "content": "hi"}])
    except (InputError, RefusedError) as fault:
        assert 0 < len(str(fault)) < 20_000
        return False
    return True


def test_settings_of_any_kind_and_size_are_read_or_refused(tmp_path: Path) -> None:
    folders = {family: save_tiny(tmp_path / family, family) for family in FAMILIES}
    came_out = refused = 0
    for number in rounds("settings", ci=120):
        rng = random.Random(f"settings {number}")
        folder = folders[FAMILIES[number % len(FAMILIES)]]
        file = folder / SETTINGS[rng.choice([0, 0, 0, 1, 2, 3])]
        good = file.read_text()
        value = json.loads(good)
        try:
            for path in rng.sample(list(places(value)), rng.choice([1, 1, 2])):
                with suppress(
                    KeyError, IndexError, TypeError
                ):  # the first change took the second one's place away
                    value = with_value(value, path, rng.choice(VALUES))
            file.write_text(json.dumps(value))
            came_out += read(folder)
            refused += 1
        finally:
            file.write_text(good)
    assert 0 < came_out < refused


def test_weight_files_with_spoiled_headers_are_read_or_refused(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, "llama")
    file = folder / "model.safetensors"
    good = file.read_bytes()
    header = 8 + struct.unpack("<Q", good[:8])[0]
    for number in rounds("headers", ci=60):
        rng = random.Random(f"headers {number}")
        file.write_bytes(spoiled_bytes(good, rng, header))
        read(folder)
    file.write_bytes(good)
    assert read(folder)


def test_states_of_packed_weights_of_any_kind_are_read_or_refused(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, "llama", torch.bfloat16)
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    packed = file_tensors(name, quantize(weights.pop(name), name=name))
    key = next(key for key in packed if "quant_state" in key)
    state = json.loads(bytes(packed[key].numpy()))
    for number in rounds("states", ci=60):
        rng = random.Random(f"states {number}")
        value = with_value(state, rng.choice(list(places(state))), rng.choice(VALUES))
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        tensors = weights | packed | {key: text}
        if rng.random() < 0.3:
            part = rng.choice([part for part in packed if part != key])
            tensors[part] = rng.choice(
                [packed[part][:-1], packed[part].flatten().view(torch.uint8), packed[part].float()]
            )
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        read(folder)


def test_folders_that_others_packed_are_read_or_refused(tmp_path: Path) -> None:
    make_packed(tmp_path / "good")
    came_out = refused = 0
    for number in rounds("packed", ci=60):
        rng = random.Random(number)
        folder = shutil.copytree(
            tmp_path / "good" / rng.choice(sorted(LAYOUTS)), tmp_path / "changed"
        )
        spoil(rng, folder)
        try:
            if read(folder):
                came_out += 1
            else:
                refused += 1
        except BaseException:
            print(f"number {number}")
            raise
        shutil.rmtree(folder)
    assert 0 < came_out < refused


@pytest.mark.parametrize("kind", [gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.Q4_0])
def test_spoiled_gguf_headers_are_read_or_refused(kind: Any, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny("llama"), "llama", kind=kind)
    good = path.read_bytes()
    header = min(tensor.data_offset for tensor in gguf.GGUFReader(path).tensors)
    for number in rounds("gguf", ci=150):
        rng = random.Random(f"gguf {number}")
        path.write_bytes(spoiled_bytes(good, rng, header))
        try:
            read_header(path)
        except (InputError, RefusedError) as fault:
            assert 0 < len(str(fault)) < 20_000


def test_spoiled_gguf_files_become_a_base_or_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "cache"))
    path = write_gguf(
        tmp_path / "m.gguf", tiny("llama"), "llama", kind=gguf.GGMLQuantizationType.Q4_0
    )
    good = path.read_bytes()
    fields = [field.offset for field in gguf.GGUFReader(path).fields.values()]
    for number in rounds("gguf_bases", ci=25):
        rng = random.Random(f"gguf_bases {number}")
        raw = bytearray(good)
        at = rng.choice(fields)  # a key's name, type or value
        at += rng.randrange(8, 60)
        raw[at : at + 4] = struct.pack(
            "<I", rng.choice([0, 1, 2, 3, 7, 100, 2**20, 2**31, 2**32 - 1])
        )
        path.write_bytes(raw)
        read(path, rng.choice([None, "gguf"]))


def test_layers_that_the_files_do_not_hold_are_refused_before_they_are_built(
    tmp_path: Path,
) -> None:
    folder = save_tiny(tmp_path, "llama")
    config = json.loads((folder / "config.json").read_text())
    for layers in (20_000, 10**12, 0, -1):
        (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
        with pytest.raises(
            CorruptFileError, match=f"num_hidden_layers: {layers} is not a number from 1 to"
        ):
            load_base(str(folder))
