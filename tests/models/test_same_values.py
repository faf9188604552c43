"""What was found of a model itself is taken for the same bytes, class and config alone
(execution/proofs/same_values.py)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import veneer
from tests.support.sharding import absent_processes
from tests.support.tiny import save_tiny
from veneer.decoding import proof
from veneer.decoding.engine import decode_step_of
from veneer.decoding.generate import generate
from veneer.decoding.proof import decodes_packed
from veneer.errors import CorruptFileError
from veneer.execution import decode_step
from veneer.execution.attention import NAME
from veneer.execution.proofs import same_values
from veneer.files import remembered as memory
from veneer.models import frozen_base, load

ASKED = {
    (load, "check_finite"): "finite",
    (frozen_base, "prepare"): "paths",
    (frozen_base, "weights_read_past"): "past",
    (proof, "prove_decoding"): "decoding",
    (decode_step, "read_and_continued"): "by parts",
}


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """What was asked of a model rather than remembered, while this process remembers as a command
    does."""
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(memory, "_enabled", True)
    memory.surroundings.cache_clear()
    found: set[str] = set()

    def noted(name: str, real: Any) -> Any:
        return lambda *given, **named: found.add(name) or real(*given, **named)

    for (module, function), name in ASKED.items():
        monkeypatch.setattr(module, function, noted(name, getattr(module, function)))
    yield found
    memory.surroundings.cache_clear()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "base", dtype=torch.bfloat16)


def used(folder: Path, **how: Any) -> tuple[Any, ...]:
    """All that is found of a base, and an answer by it."""
    base = veneer.load(str(folder), **{"dtype": "bfloat16", **how})
    found = base.paths, base.read_past, decodes_packed(base)
    way = generate(base, [[5, 6, 7], [5, 6, 9, 1]], max_new_tokens=6)
    return *found, decode_step_of(base).not_by_parts, base.config._attn_implementation, way


def test_a_second_process_takes_what_the_first_found_of_the_same_bytes(
    folder: Path, asked: set[str]
) -> None:
    first = used(folder)
    assert asked == set(ASKED.values()) and first[4] == NAME and first[3] is None
    asked.clear()
    assert used(folder) == first
    assert not asked


def test_a_base_that_only_answers_is_put_onto_the_same_attention(
    folder: Path, asked: set[str]
) -> None:
    for _ in range(2):
        base = veneer.load(str(folder), dtype="bfloat16")
        assert decodes_packed(base) and base.config._attn_implementation == NAME


def changed(folder: Path, to: Path, edit: Any) -> Path:
    """A copy whose weights were edited."""
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    tensors = load_file(to / "model.safetensors")
    edit(tensors)
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


def test_one_bit_of_one_weight_is_another_base(
    folder: Path, tmp_path: Path, asked: set[str]
) -> None:
    used(folder)
    for number, name in enumerate(
        ("model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight")
    ):
        asked.clear()

        def flip(tensors: dict[str, torch.Tensor], name: str = name) -> None:
            tensors[name].view(torch.int16).view(-1)[-1] ^= 1

        used(changed(folder, tmp_path / str(number), flip))
        assert asked == set(ASKED.values())


def test_a_damaged_file_is_refused_beside_a_sound_one_that_is_remembered(
    folder: Path, tmp_path: Path, asked: set[str]
) -> None:
    used(folder)

    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"][3] = float("nan")

    damaged = changed(folder, tmp_path / "damaged", damage)
    for _ in range(2):
        with pytest.raises(CorruptFileError, match="finite"):
            veneer.load(str(damaged), dtype="bfloat16")


def test_another_config_type_format_class_or_number_of_threads_is_asked_anew(
    folder: Path, tmp_path: Path, asked: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    used(folder)
    other = changed(folder, tmp_path / "theta", lambda tensors: None)
    text = (other / "config.json").read_text()
    assert '"rms_norm_eps": 1e-06' in text
    (other / "config.json").write_text(
        text.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 2e-06')
    )
    for how in ({"folder": other}, {"dtype": "float32"}, {"quantize": "nf4"}):
        asked.clear()
        used(**{"folder": folder, **how})
        assert asked == set(ASKED.values()), how
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    asked.clear()
    try:
        used(folder)
    finally:
        torch.set_num_threads(threads)
    assert asked == set(ASKED.values())
    for name, value in (("is_known", lambda kind: False), ("MOST_BYTES", 100)):
        with monkeypatch.context() as patch:
            patch.setattr(same_values, name, value)
            asked.clear()
            used(folder)
            assert asked == set(ASKED.values()), name


def test_values_that_were_changed_since_are_asked_anew(folder: Path, asked: set[str]) -> None:
    """In place, moved elsewhere, or exchanged."""

    def write(layer: nn.Linear) -> None:
        with torch.no_grad():
            layer.weight[0, 0] += 1

    def move(layer: nn.Linear) -> None:
        layer.weight.data = layer.weight.data + 1

    def exchange(layer: nn.Linear) -> None:
        layer.weight = nn.Parameter(layer.weight.detach() + 1, requires_grad=False)

    used(folder)
    for change in (write, move, exchange):
        base = veneer.load(str(folder), dtype="bfloat16")
        assert same_values.snapshot_digest(base.model) is not None
        change(base.model.get_submodule("model.layers.0.mlp.up_proj"))
        asked.clear()
        assert same_values.snapshot_digest(base.model) is None
        assert base.paths and base.read_past == frozenset() and decodes_packed(base)
        assert asked == {"paths", "past", "decoding"}, change


def test_no_base_is_hashed_where_nothing_is_remembered(
    folder: Path, asked: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    memory._enabled = False  # the fixture puts it back
    base = veneer.load(str(folder))
    assert same_values.snapshot_digest(base.model) is None


def test_the_digest_tells_every_tensor_by_name_type_shape_and_bytes() -> None:
    own = {"a": torch.zeros(4), "b": torch.ones(4)}
    same = same_values.digest(own)
    assert same_values.digest({"b": own["b"], "a": own["a"].clone()}) == same
    others = [
        {"a": own["b"], "b": own["a"]},
        {"a": own["a"].view(2, 2), "b": own["b"]},
        {"a": own["a"].to(torch.int32), "b": own["b"]},
        {"a": own["a"], "c": own["b"]},
        {"a": own["a"]},
        {"a": own["a"], "b": torch.tensor([1, 1, 1, 1 + 2**-23])},
    ]
    assert len({same, *map(same_values.digest, others)}) == len(others) + 1


def test_a_base_in_shards_is_not_hashed(folder: Path, asked: set[str]) -> None:
    """Its values are not all here."""
    assert (
        same_values.snapshot_digest(load.load_base(str(folder), dtype="bfloat16").model) is not None
    )
    with absent_processes(2) as sharding:
        base = load.load_base(str(folder), dtype="bfloat16", sharding=sharding)
        assert same_values.snapshot_digest(base.model) is None
