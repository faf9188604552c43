"""What an earlier process found is taken only where everything that it depends on is the same
(files/remembered.py)."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from datetime import date, timedelta

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.support.tiny import save_tiny
from veneer.adapters.config import LoRA
from veneer.adapters.labels import HeadSettings
from veneer.bases.loading.blueprint import named_size
from veneer.cli import main as cli
from veneer.execution.proofs.structure import Proven, remember_proof
from veneer.files import remembered as memory
from veneer.plan import ask, machine, probe
from veneer.plan.machine import Rates, this_machine
from veneer.plan.simulation import dry_run as counting
from veneer.plan.simulation import remembered
from veneer.plan.simulation.dry_run import attached_facts, dry_run
from veneer.plan.simulation.step_counts import Step
from veneer.plan.simulation.tracker import Work
from veneer.plan.workload import synthetic_rows
from veneer.runs import train_run
from veneer.training.config import RunConfig
from veneer.training.output.screen import QuietScreen


@dataclass(frozen=True)
class Found:
    count: int
    words: frozenset[str] = frozenset()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path))
    monkeypatch.setattr(memory, "_enabled", True)
    memory.surroundings.cache_clear()
    yield tmp_path
    memory.surroundings.cache_clear()


class Maker:
    """Counts how often it is asked."""

    def __init__(self, value):
        self.value, self.calls = value, 0

    def __call__(self):
        self.calls += 1
        return self.value


def entries(cache):
    return sorted(cache.glob("found/*/*.json"))


def test_a_second_process_takes_what_the_first_found(cache):
    make = Maker(Found(3, frozenset({"a"})))
    assert memory.remember("things", {"of": 1}, Found, make) == make.value
    assert memory.remember("things", {"of": 1}, Found, make) == make.value
    assert make.calls == 1
    assert memory.remember("things", {"of": 2}, Found, Maker(Found(4))) == Found(4)
    assert memory.remember("others", {"of": 1}, Found, Maker(Found(5))) == Found(5)


def test_nothing_is_remembered_where_it_was_not_begun(cache, monkeypatch):
    monkeypatch.setattr(memory, "_enabled", False)
    make = Maker(Found(3))
    assert [memory.remember("things", {}, Found, make) for _ in range(2)] == [Found(3)] * 2
    assert make.calls == 2 and not entries(cache)


def test_only_the_command_line_begins_and_a_variable_keeps_it_from_it(cache, monkeypatch):
    monkeypatch.setattr(memory, "_enabled", False)
    asked = ["explain", "D107"]
    monkeypatch.setattr("sys.argv", ["veneer", *asked])
    cli.main(asked)
    assert not memory._enabled, "within a process that others write"
    monkeypatch.setenv(memory.OFF, "1")
    cli.main()
    assert not memory._enabled
    monkeypatch.delenv(memory.OFF)
    cli.main()
    assert memory._enabled


def damaged(entry):
    """Bytes that a file of this entry may have come to hold."""
    text = json.dumps(entry)
    yield text[:-9]
    yield ""
    yield "[]"
    yield json.dumps({**entry, "value": entry["value"].replace("3", "7")})
    yield json.dumps({**entry, "value": '{"count": "x"}', "sha256": memory._hash('{"count": "x"}')})
    yield json.dumps({**entry, "key": entry["key"].replace("1", "2")})
    yield json.dumps({**entry, "value": 3})
    yield "[" * 100_000
    yield text + " " * memory.MOST_BYTES


def test_a_damaged_entry_is_as_none_and_written_again(cache):
    memory.remember("things", {"of": 1}, Found, Maker(Found(3)))
    (file,) = entries(cache)
    whole_text = file.read_text()
    for text in damaged(json.loads(whole_text)):
        file.write_text(text)
        make = Maker(Found(3))
        assert memory.remember("things", {"of": 1}, Found, make) == Found(3)
        assert make.calls == 1, text[:80]
        assert file.read_text() == whole_text


def test_a_cache_that_cannot_be_written_is_none(cache, monkeypatch):
    (cache / "found").write_text("a file where the folder would be")
    make = Maker(Found(3))
    assert [memory.remember("things", {}, Found, make) for _ in range(2)] == [Found(3)] * 2
    assert make.calls == 2


def test_the_oldest_go_where_there_are_many(cache, monkeypatch):
    monkeypatch.setattr(memory, "MOST_ENTRIES", 3)
    for number in range(5):
        memory.remember("things", {"of": number}, Found, Maker(Found(number)))
        os.utime(
            max(entries(cache), key=lambda path: path.stat().st_mtime_ns), (number + 1, number + 1)
        )
    kept_counts = {
        json.loads(json.loads(path.read_text())["value"])["count"] for path in entries(cache)
    }
    assert kept_counts == {2, 3, 4}


@pytest.mark.parametrize(
    "name", ["VENEER_MAX_CPU_ISA", "ONEDNN_MAX_CPU_ISA", "OMP_NUM_THREADS", "VENEER_NO_NATIVE"]
)
def test_variables_that_change_what_is_computed_are_part_of_every_key(cache, monkeypatch, name):
    before = memory.surroundings()
    monkeypatch.setenv(name, "2")
    memory.surroundings.cache_clear()
    assert memory.surroundings() != before


def test_another_place_for_the_cache_is_no_other_key(cache, monkeypatch):
    before = memory.surroundings()
    monkeypatch.setenv("VENEER_CACHE", str(cache / "moved"))
    memory.surroundings.cache_clear()
    assert memory.surroundings() == before


def test_a_byte_of_our_own_files_is_part_of_every_key(cache, monkeypatch):
    own = cache / "veneer"
    (own / "files").mkdir(parents=True)
    monkeypatch.setattr(memory, "__file__", str(own / "files" / "remembered.py"))
    found = set()
    for name, text in [
        ("a.py", "1"),
        ("a.py", "2"),
        ("b.py", ""),
        ("_native.abi3.so", "x"),
        ("_native.abi3.so", "y"),
    ]:
        (own / name).write_text(text)
        memory.surroundings.cache_clear()
        found.add(memory.surroundings())
    assert len(found) == 5


class Installed:
    def __init__(self, version, record, direct=""):
        self.version, self.files = version, {"RECORD": record, "direct_url.json": direct}

    def read_text(self, name):
        return self.files.get(name)


def test_libraries_are_part_of_every_key_by_version_and_files(cache, monkeypatch):
    found = []
    for of in (Installed("1", "a"), Installed("2", "a"), Installed("1", "b")):
        monkeypatch.setattr(memory, "distribution", lambda name, of=of: of)
        memory.surroundings.cache_clear()
        found.append(memory.surroundings())
    assert len(set(found)) == 3 and None not in found


def test_nothing_is_remembered_beside_a_library_that_somebody_works_on(cache, monkeypatch):
    of = Installed("1", "a", '{"dir_info": {"editable": true}}')
    monkeypatch.setattr(memory, "distribution", lambda name: of)
    memory.surroundings.cache_clear()
    make = Maker(Found(3))
    assert [memory.remember("things", {}, Found, make) for _ in range(2)] == [Found(3)] * 2
    assert make.calls == 2 and not entries(cache)


def small(**changes):
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
    }
    return LlamaConfig(**{**sizes, "vocab_size": 128, "num_key_value_heads": 2, **changes})


class OwnForCausalLM(LlamaForCausalLM):
    """A class whose code no version names."""


def test_proofs_are_remembered_of_classes_of_transformers_alone(cache):
    make = Maker(Proven(packed="why not", idle=frozenset({"x"}), scale=0.5))
    for _ in range(2):
        assert remember_proof("structure", LlamaForCausalLM, small(), Proven, make) == make.value
    assert make.calls == 1
    remember_proof("structure", LlamaForCausalLM, small(rope_theta=500.0), Proven, make)
    assert make.calls == 2
    for _ in range(2):
        remember_proof("structure", OwnForCausalLM, small(), Proven, make)
    assert make.calls == 4


def test_a_remembered_dry_run_is_the_dry_run(cache, monkeypatch):
    rows = synthetic_rows(2, 24)
    step = Step(small(), torch.float32, LoRA(rank=4), rows)
    fresh = dry_run(step)
    ran = []
    monkeypatch.setattr(counting, "dry_run", lambda *given: ran.append(1) or dry_run(*given))
    monkeypatch.setattr(
        counting, "attached_facts", lambda *given: ran.append(2) or attached_facts(*given)
    )

    def run(step):
        ran.clear()
        return remembered.remember_run(step, lambda: remembered.remember_attached_facts(step))

    first, again = run(step), run(step)
    assert not ran, "the second is read"
    assert first == fresh and again == fresh
    others = [
        replace(step, rows=synthetic_rows(3, 24)),
        replace(step, rows=synthetic_rows(2, 25)),
        replace(step, rows=[replace(row, trained=np.arange(24) >= 12) for row in rows]),
        replace(step, checkpointing=True),
        replace(step, share_prompt=False),
        replace(step, offload=True),
    ]
    for other in others:
        found, noted = run(other), [*ran]
        assert noted == [1], "another step of the same base"
    assert found == dry_run(other)
    bases = [
        replace(step, dtype=torch.bfloat16),
        replace(step, method=LoRA(rank=5)),
        replace(step, base=small(num_hidden_layers=9)),
        replace(step, optimizer="adamw8bit"),
        replace(step, on_cpu=False),
        replace(step, new_tokens=1),
        replace(step, head=HeadSettings("label", ("yes", "no"))),
    ]
    for other in bases:
        found, noted = run(other), [*ran]
        assert sorted(noted) == [1, 2], "another base"
    assert found == dry_run(other)


def test_a_named_size_is_the_config_that_its_fields_make(cache):
    """And its dry runs are those of a folder that says the same."""
    named = named_size("llama-3.2-1b")
    facts = [
        remembered.config_facts(found)
        for found in (named, named, replace(named, config_or_fields=named.config))
    ]
    assert (
        facts[0] == facts[1] == facts[2] and facts[0].layers == 16 and facts[0].positions == 131072
    )
    assert len(entries(cache)) == 1
    other = named_size("llama-3.2-3b")
    assert remembered.config_facts(other).identity != facts[0].identity
    step = Step(named, torch.bfloat16, LoRA(rank=4), synthetic_rows(1, 24))
    assert remembered._base_key(step) == remembered._base_key(replace(step, base=named.config))


def test_a_folder_of_its_name_is_no_named_size(cache, monkeypatch):
    monkeypatch.chdir(cache)
    assert named_size("gpt2") is not None
    (cache / "gpt2").mkdir()
    assert (
        named_size("gpt2") is None
        and named_size("smollm2-135m") is None
        and named_size("nobody-7b") is None
    )


PLAN = ["plan", "--base", "llama-3.2-1b", "--length", "64", "--json"]


def test_a_plan_that_is_remembered_imports_no_transformers(cache):
    """Nor does one of other settings whose steps are the same; and it says what the first said."""

    def planned(*more):
        asked = ["veneer", *PLAN, *more]
        code = (
            f"import sys\nfrom veneer.cli.main import main\nsys.argv = {asked}\nassert main() in"
            " (0, 3)\n"
        )
        code += (
            "print(*sorted({'transformers', 'torch._dynamo', 'sympy'} & set(sys.modules)),"
            " file=sys.stderr)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)["plans"], done.stderr.splitlines()[-1].split()

    first, loaded = planned()
    assert "transformers" in loaded
    again, loaded = planned()
    assert not loaded
    assert [row["needed_memory_bytes"] for row in again] == [
        row["needed_memory_bytes"] for row in first
    ]
    other, loaded = planned("--steps", "7", "--price", "2")
    assert not loaded and other[0]["steps"] == 7


def test_rates_are_measured_once_a_week(cache, monkeypatch):
    work, measured = Work(), []
    work.products[(16, 32, 32)] = 1000
    real = machine._measured
    monkeypatch.setattr(machine, "_measured", lambda *given: measured.append(1) or real(*given))
    monkeypatch.setattr(machine, "processor_share", lambda device: 1.0)
    first = this_machine(work, torch.float32)
    assert first.measured == date.today()
    second = this_machine(work, torch.float32)
    assert len(measured) == 1 and second.rate((16, 32, 32)) == first.rate((16, 32, 32))
    (file,) = entries(cache)
    entry = json.loads(file.read_text())
    old = json.loads(entry["value"])
    old["day"] = (date.today() - timedelta(days=7)).isoformat()
    text = json.dumps(old)
    file.write_text(json.dumps({**entry, "value": text, "sha256": memory._hash(text)}))
    this_machine(work, torch.float32)
    assert len(measured) == 2
    work.products[(16, 32, 48)] = 10
    this_machine(work, torch.float32)
    assert len(measured) == 3, "of other shapes"
    assert not replace_day(date.today() + timedelta(days=1)).holds, "a clock that was wrong"


def test_rates_of_a_busy_machine_are_used_once_and_say_what_they_are(cache, monkeypatch):
    work, shares = Work(), iter([1.0, 0.3, 1.0, 1.0])
    work.products[(16, 32, 32)] = 1000
    monkeypatch.setattr(machine, "processor_share", lambda device: next(shares))
    busy = this_machine(work, torch.float32)
    assert busy.is_busy and busy.got == 0.3
    assert "30% of the processors were left" in ask._load_words(busy)
    free = this_machine(work, torch.float32)
    assert not free.is_busy and not ask._load_words(free)
    assert this_machine(work, torch.float32).rate((16, 32, 32)) == free.rate((16, 32, 32))


def test_a_machine_with_programs_at_work_leaves_a_measurement_less_of_its_processors():
    spin = [sys.executable, "-c", "while True: pass"]
    others = [subprocess.Popen(spin) for _ in range(2 * (os.cpu_count() or 1))]
    try:
        shares = [machine.processor_share(torch.device("cpu")) for _ in range(8)]
    finally:
        for other in others:
            other.kill()
            other.wait()
    assert min(shares) < machine.FREE


def test_a_run_that_is_faster_than_rates_allow_makes_plans_measure_anew(cache, monkeypatch):
    work, measured = Work(), []
    work.products[(16, 32, 32)] = 1000

    def measure(*given):
        measured.append(1)
        return Rates(date.today(), (1e9,), 1e9, 1e9, 1e-6)

    monkeypatch.setattr(machine, "_measured", measure)
    this_machine(work, torch.float32)
    for flops, dtype, expected in (
        (1e9, torch.float32, 1),  # as planned
        (1e8, torch.float32, 1),  # something else was at work during the run
        (1e10, torch.bfloat16, 1),  # of another type
        (1e10, torch.float32, 2),
    ):
        machine.doubt_rates(flops, dtype)
        this_machine(work, torch.float32)
        assert len(measured) == expected


def test_a_run_tells_plans_how_fast_it_was(cache, monkeypatch, tmp_path):
    doubts = []
    monkeypatch.setattr(probe, "doubt_rates", lambda *given: doubts.append(given))
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a b", "completion": "c d"}\n' * 8)
    settings = RunConfig.model_validate(
        {
            "base": str(save_tiny(tmp_path / "base")),
            "data": {"train": str(rows)},
            "out": str(tmp_path / "run"),
            "steps": 3,
            "batch": 2,
            "method": {"name": "lora", "rank": 2},
        }
    )
    summary = train_run(settings, resume=False, screen=QuietScreen())
    ((flops, dtype, device),) = doubts
    assert (dtype, device) == (torch.float32, "cpu")
    assert flops / summary["tokens_per_second"] > 4 * summary["total_parameters"] / 3


@pytest.mark.parametrize("changed", ["torch", "our own library"])
def test_rates_are_measured_again_after_an_upgrade(cache, monkeypatch, changed):
    work, measured = Work(), []
    work.products[(16, 32, 32)] = 1000
    real = machine._measured
    monkeypatch.setattr(machine, "processor_share", lambda device: 1.0)
    monkeypatch.setattr(machine, "_measured", lambda *given: measured.append(1) or real(*given))
    own = cache / "veneer"
    (own / "files").mkdir(parents=True)
    monkeypatch.setattr(memory, "__file__", str(own / "files" / "remembered.py"))
    for build in ("1", "1", "2"):
        if changed == "torch":
            monkeypatch.setattr(
                memory, "distribution", lambda name, build=build: Installed(build, "files")
            )
        else:
            (own / "_native.abi3.so").write_text(build)
        memory.surroundings.cache_clear()
        this_machine(work, torch.float32)
    assert len(measured) == 2


def test_products_that_are_timed_alike_are_timed_once(monkeypatch):
    asked = []
    monkeypatch.setattr(machine, "product_rate", lambda shape, *_: asked.append(shape) or 2.0)
    shapes = {(4096, 8192, 28672): 30, (2048, 8192, 8192): 10, (4096, 512, 512): 20}
    rates = machine._measured(shapes, torch.float32, torch.device("cpu"))
    assert asked == [(1024, 8192, 1024), (1024, 512, 512)] * machine.ROUNDS
    assert rates.of_shapes == (2.0, 2.0, 2.0) and rates.other == 2.0


def replace_day(day):
    return Rates(day, (), 1.0, 1.0, 1.0)
