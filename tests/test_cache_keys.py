"""Each test changes the inputs of one kind of remembered result, one at a time; docs/caches.md
names the test."""

from __future__ import annotations

import copy
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.helpers import fill, filled_lora
from tests.support.tiny import save_tiny, tiny_base, tiny_model, tiny_tokenizer
from veneer import demo
from veneer.adapters.config import LoRA
from veneer.adapters.preamble import Preamble
from veneer.bases.kept import blocks_folder, converted_folder
from veneer.bases.loading import from_config
from veneer.bases.names import hub
from veneer.comparison import environment
from veneer.comparison.execute import JobRunner
from veneer.comparison.jobs import Outcome
from veneer.comparison.plan import Candidate, Comparison
from veneer.data import large
from veneer.data.encoder import RowRules
from veneer.data.examples import Capacity
from veneer.data.files import downloads
from veneer.data.split import BY_COUNT, BY_THRESHOLD
from veneer.data.template.template import ChatTemplate
from veneer.errors import SourceError
from veneer.execution.proofs import same_values
from veneer.execution.proofs.structure import remember_proof
from veneer.files import remembered as memory
from veneer.formats.adapter import manifest_for, write_adapter
from veneer.plan import machine
from veneer.plan.simulation import remembered
from veneer.plan.simulation.step_counts import Step
from veneer.plan.simulation.tracker import Work
from veneer.plan.workload import synthetic_rows
from veneer.training.config import DataConfig, RunConfig, StartFrom
from veneer.training.output.records import process_memory_bytes

CPU = torch.device("cpu")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(memory, "_enabled", True)
    memory.surroundings.cache_clear()
    yield tmp_path / "cache"
    memory.surroundings.cache_clear()


@pytest.fixture
def more_threads() -> Iterator[Callable[[], None]]:
    threads = torch.get_num_threads()
    yield lambda: torch.set_num_threads(threads + 1)
    torch.set_num_threads(threads)


def surroundings() -> str | None:
    memory.surroundings.cache_clear()
    return memory.surroundings()


def test_the_machine_and_python_are_part_of_every_key(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = surroundings()
    assert first is not None and surroundings() == first
    information = memory.processor()
    changes: list[tuple[Any, str, Any]] = [
        (memory, "processor", lambda: {**information, "model name": "another"}),
        (memory, "processor", lambda: {**information, "flags": "fewer"}),
        (os, "cpu_count", lambda: 999),
        (platform, "machine", lambda: "another"),
        (platform, "release", lambda: "another"),
        (sys, "version", "another"),
    ]
    hashes = {first}
    for owner, name, value in changes:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            hashes.add(surroundings())
    assert len(hashes) == 1 + len(changes)


@pytest.mark.parametrize("kind", ["structure", "loops", "parts"])
def test_a_proof_is_made_again_for_another_number_of_threads(
    cache: Path, more_threads: Callable[[], None], kind: str
) -> None:
    model, calls = tiny_model("llama"), []

    def prove() -> bool:
        calls.append(1)
        return True

    for expected in (1, 1, 2):
        if expected == 2:
            more_threads()
        remember_proof(kind, type(model), model.config, bool, prove)
        assert len(calls) == expected


def test_values_are_known_with_their_attention_and_with_buffers(cache: Path) -> None:
    model = tiny_model("llama")
    before = same_values.class_key(model)
    other = copy.deepcopy(model)
    other.set_attn_implementation("eager")
    assert same_values.class_key(other) != before

    hashes = []
    for change in (0.0, 1.0):
        other = copy.deepcopy(model)
        other.get_buffer("model.rotary_emb.inv_freq").add_(change)
        same_values.snapshot_values(other)
        noted = same_values.snapshot_digest(other)
        assert noted is not None
        hashes.append(noted[0])
        other.get_buffer("model.rotary_emb.inv_freq").add_(1)
        assert same_values.snapshot_digest(other) is None
    assert hashes[0] != hashes[1]


def test_a_dry_run_depends_on_the_number_of_threads(more_threads: Callable[[], None]) -> None:
    step = Step(tiny_model("llama").config, torch.float32, LoRA(rank=4), synthetic_rows(1, 8))
    before = remembered._base_key(step)
    more_threads()
    assert before is not None and remembered._base_key(step) != before


def test_rates_depend_on_shapes_type_device_and_threads(
    cache: Path, monkeypatch: pytest.MonkeyPatch, more_threads: Callable[[], None]
) -> None:
    measured: list[Any] = []

    def measure(*arguments: Any) -> machine.Rates:
        measured.append(arguments)
        return machine.Rates(date.today(), (1.0,) * len(arguments[0]), 1.0, 1.0, 1.0)

    monkeypatch.setattr(machine, "_measured", measure)

    def measures(
        flops: int = 1000,
        columns: int = 32,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> bool:
        work, before = Work(), len(measured)
        work.products[(16, 32, columns)] = flops
        machine.this_machine(work, dtype, device)
        return len(measured) > before

    assert measures() and not measures()
    assert measures(columns=48) and measures(flops=2000)
    assert measures(dtype=torch.bfloat16)
    assert measures(device="meta")
    more_threads()
    assert measures()


def test_the_memory_of_an_idle_process_is_measured_again_after_an_upgrade(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = iter((1, 2))
    monkeypatch.setattr(remembered, "idle_bytes", lambda: next(sizes))
    assert [remembered.remember_idle_bytes(), remembered.remember_idle_bytes()] == [1, 1]
    monkeypatch.setattr(memory, "own_files_hash", lambda: "other files")
    memory.surroundings.cache_clear()
    assert remembered.remember_idle_bytes() == 2


def test_the_memory_of_an_idle_process_is_not_that_of_a_process_that_has_worked(
    cache: Path,
) -> None:
    """As one that converted a base, and plans afterwards."""
    held = bytearray(500 * 10**6)
    held[:: 2**12] = b"x" * len(held[:: 2**12])
    remembered.idle_bytes.cache_clear()
    assert 50 * 10**6 < remembered.remember_idle_bytes() < len(held) < process_memory_bytes()


class Store:
    """A store as fsspec presents one."""

    def __init__(self, **info: Any) -> None:
        self.info_of_file, self.opened = info, 0

    def invalidate_cache(self) -> None: ...

    def info(self, file: str) -> dict[str, Any]:
        return self.info_of_file


def test_a_download_is_known_by_address_tag_time_and_size(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[str] = []

    def fetch(store: Store, file: str, name: str, target: Path) -> None:
        fetched.append(name)
        target.write_text(f"{name} {store.info_of_file}")

    monkeypatch.setattr(downloads, "_download", fetch)

    def fetches(name: str = "s3://a/rows.jsonl", **changed: Any) -> bool:
        before = len(fetched)
        info = {"etag": "1", "LastModified": "2015-10-21T07:28:00+00:00", "size": 10, **changed}
        downloads.download_if_changed(Store(**info), "a/rows.jsonl", name)
        return len(fetched) > before

    assert fetches() and not fetches()
    assert fetches(name="s3://b/rows.jsonl")
    assert (
        fetches(etag="2") and fetches(size=11) and fetches(LastModified="2015-10-21T07:28:01+00:00")
    )
    assert not fetches()


def _tokens_name(file: Path, **changed: Any) -> str:
    fields = {"train": str(file), "tokens": "files", **changed.pop("data", {})}
    tokenizer = changed.pop("tokenizer", None) or tiny_tokenizer()
    preamble = changed.get("preamble", Preamble())
    today = changed.pop("today", date(2024, 1, 1))
    template = ChatTemplate(tokenizer, today=today, variables=preamble.variables)
    settings = {
        "length": 64,
        "capacity": Capacity(128, 272),
        "preamble": preamble,
        "held_out_by": BY_COUNT,
        **changed,
    }
    return large._set_name(DataConfig.of(fields), RowRules(**settings), template)


def test_stored_tokens_depend_on_rows_settings_tokenizer_template_and_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\n')
    first = _tokens_name(file)
    assert _tokens_name(file) == first and _tokens_name(file, today=date(2024, 1, 2)) == first
    special, added, worded, dated = (tiny_tokenizer() for _ in range(4))
    special.add_special_tokens({"unk_token": "<|im_start|>"})
    added.add_tokens(["<new>"])
    worded.chat_template = "{{ enable_thinking }} other " + str(worded.chat_template)
    dated.chat_template = "{{ strftime_now('%d') }}" + str(dated.chat_template)
    names = [
        first,
        *(_tokens_name(file, tokenizer=tokenizer) for tokenizer in (special, added, worded)),
        *(_tokens_name(file, tokenizer=dated, today=date(2024, 1, day)) for day in (1, 2)),
        _tokens_name(file, length=63),
        *(
            _tokens_name(file, capacity=capacity)
            for capacity in (Capacity(127, 272), Capacity(128, 271))
        ),
        _tokens_name(file, held_out_by=BY_THRESHOLD),
        _tokens_name(file, preamble=Preamble(system="Be brief.")),
        _tokens_name(
            file, tokenizer=worded, preamble=Preamble(variables={"enable_thinking": True})
        ),
        *(
            _tokens_name(file, data=data)
            for data in ({"train_on": "all"}, {"validation_share": 0.3})
        ),
        _tokens_name(file, data={"validation": str(file)}),
    ]
    for package in ("veneer", "transformers", "tokenizers"):
        with monkeypatch.context() as patch:
            patch.setattr(
                large, "version", lambda name, package=package: "99" if name == package else "1"
            )
            names.append(_tokens_name(file))
    file.write_text('{"prompt": "a", "completion": "c"}\n')
    names.append(_tokens_name(file))
    assert len(set(names)) == len(names)


def test_a_converted_folder_is_named_by_the_hash_of_its_file() -> None:
    for folder in (converted_folder, blocks_folder):
        assert folder("5" * 64) == folder("5" * 64) != folder("6" * 64)


def test_the_config_of_a_branch_is_asked_for_again_and_that_of_a_commit_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached, current = (
        save_tiny(tmp_path / "cached"),
        save_tiny(tmp_path / "current", num_hidden_layers=3),
    )
    monkeypatch.setattr(
        from_config, "try_to_load_from_cache", lambda *_, **__: str(cached / "config.json")
    )
    monkeypatch.setattr(
        from_config, "hf_hub_download", lambda *_, **__: str(current / "config.json")
    )
    monkeypatch.setattr(from_config.constants, "HF_HUB_OFFLINE", False)

    def layers(source: str) -> int:
        return int(from_config.blueprint(source).config.num_hidden_layers)

    assert layers("org/name") == layers("org/name@main") == 3
    assert layers("org/name@" + "a" * 40) == 2

    def unreachable(*_: Any, **__: Any) -> str:
        raise OSError("no route")

    monkeypatch.setattr(from_config, "hf_hub_download", unreachable)
    assert layers("org/name") == 2
    monkeypatch.setattr(from_config.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(from_config, "hf_hub_download", pytest.fail)
    assert layers("org/name") == 2
    monkeypatch.setattr(from_config, "try_to_load_from_cache", lambda *_, **__: None)
    with pytest.raises(SourceError, match="HF_HUB_OFFLINE is set"):
        layers("org/name")
    assert hub.is_pinned("a" * 40) and not hub.is_pinned("a" * 7) and not hub.is_pinned(None)


@pytest.fixture
def comparison(tmp_path: Path) -> Comparison:
    base, rows = save_tiny(tmp_path / "base"), tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    candidates = [
        Candidate(
            name, RunConfig.of({"base": str(base), "data": str(rows), "method": name, "out": "o"})
        )
        for name in ("lora", "full")
    ]
    places = (rows, rows, rows, tmp_path / "out")
    return Comparison(candidates, str(base), *places, general=None, max_new_tokens=2, steps=1)


def test_a_run_of_a_comparison_is_known_by_settings_rows_and_circumstances(
    comparison: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = comparison.candidates[0].config
    here = environment.circumstances(comparison.base)

    def key(changed: RunConfig = config, around: dict[str, str] = here) -> str:
        return JobRunner(comparison, around, lambda text: None, [])._key(changed)

    keys = [
        key(),
        key(config.model_copy(update={"steps": 7})),
        key(config.model_copy(update={"seed": 7})),
    ]
    keys += [key(around={**here, name: "another"}) for name in here]
    comparison.train.write_text('{"prompt": "a", "completion": "c"}\n')
    keys.append(key())
    parent = comparison.train.parent / "parent"
    for scale in (0.1, 0.2):  # another adapter in the same place
        base = tiny_base()
        made = filled_lora(base)
        fill(made.parameters().values(), scale=scale)
        write_adapter(parent, made, manifest_for(base, method="lora"), model=base.model)
        keys.append(
            key(config.model_copy(update={"from_adapter": [StartFrom(adapter=str(parent))]}))
        )
        shutil.rmtree(parent)
    assert len(set(keys)) == len(keys)

    assert set(here) == {"base", "veneer", "torch", "transformers", "files", "processor", "gpu"}
    for name, value in (("own_files_hash", "another"), ("processor", {"model name": "another"})):
        with monkeypatch.context() as patch:
            patch.setattr(environment, name, lambda value=value: value)
            assert environment.circumstances(comparison.base) != here, name


def test_an_evaluation_is_not_used_beside_other_predictions(comparison: Comparison) -> None:
    """The intervals of a comparison are computed from the predictions: they belong to the
    figures."""
    file, here = comparison.out / "base" / "predictions.jsonl", {"torch": "1"}

    def evaluates(around: dict[str, str] = here, changed: Comparison = comparison) -> bool:
        asking = JobRunner(changed, around, lambda text: None, []).evaluate("the base", None)
        with suppress(StopIteration):
            (job,) = next(asking)
            file.write_text('{"loss": 1.5}\n')
            with suppress(StopIteration):
                asking.send((job, Outcome(0, '{"loss": 1.5}', "", ())))
            return True
        return False

    assert evaluates() and not evaluates()
    file.write_text('{"loss": 1.25}\n')
    assert evaluates() and not evaluates()
    file.unlink()
    assert evaluates() and not evaluates()
    assert evaluates({"torch": "2"}) and evaluates()
    assert evaluates(changed=replace(comparison, max_new_tokens=3)) and evaluates()
    comparison.test.write_text('{"prompt": "a", "completion": "c"}\n')
    assert evaluates() and not evaluates()


def test_answers_of_the_demo_depend_on_base_tokenizer_template_versions_files_and_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [tmp_path / name for name in ("train.jsonl", "held_out.jsonl")]
    for file in files:
        file.write_text("{}\n")
    rows = demo._DemoRows([], [], *files)
    base, other, added, worded = tiny_base(), tiny_base(seed=1), tiny_base(), tiny_base()
    added.tokenizer.add_tokens(["<new>"])
    worded.tokenizer.chat_template = "other " + str(worded.tokenizer.chat_template)
    contexts = [demo._context(each, rows) for each in (base, other, added, worded)]
    assert demo._context(base, rows) == contexts[0]
    for package in ("veneer", "torch", "transformers"):
        with monkeypatch.context() as patch:
            patch.setattr(
                demo, "version", lambda name, package=package: "99" if name == package else "1"
            )
            contexts.append(demo._context(base, rows))
    with monkeypatch.context() as patch:
        patch.setattr(demo, "own_files_hash", lambda: "other files")
        contexts.append(demo._context(base, rows))
    for file in files:
        file.write_text("[]\n")
        contexts.append(demo._context(base, rows))
    assert len({tuple(context) for context in contexts}) == len(contexts)
