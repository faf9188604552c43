"""A server's adapters come from disk and go again while others are answered: nobody waits, nothing
is left behind."""

import gc
import random
import shutil
import threading
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.adapters.test_methods import move
from tests.decoding.test_engine import generate_alone
from tests.soak.counts import rounds
from tests.support.adapter_files import IDS
from tests.support.tiny import tiny_base
from veneer.adapters.attach import attach
from veneer.adapters.config import Bottleneck, DoRA, LoRA, Prefix
from veneer.adapters.placement.acting import Acting
from veneer.adapters.placement.attachment import Attachment
from veneer.decoding.engine import Engine
from veneer.decoding.schedule.adapters import FixedAdapters
from veneer.decoding.schedule.limits import Limits
from veneer.decoding.schedule.sequence import FinishReason, Request
from veneer.errors import (
    AdapterMismatchError,
    BudgetFullError,
    ConfigError,
    CorruptFileError,
    UnknownNameError,
)
from veneer.formats.adapter import manifest_for, write_adapter
from veneer.formats.loading import load_adapter
from veneer.formats.manifest import MANIFEST_NAME, read_manifest
from veneer.kernels.bindings import library as native
from veneer.kernels.dense import few_rows
from veneer.library.library import Library
from veneer.library.residents import eviction
from veneer.library.residents.limits import LoadLimits
from veneer.library.residents.resident import Tier
from veneer.library.residents.residents import Residents

METHODS = {
    "lora": LoRA(rank=4, alpha=7),
    "low": LoRA(rank=2, alpha=5, targets=["q_proj"]),
    "dora": DoRA(rank=3, alpha=5.0, targets=["q_proj", "o_proj"]),
    "prefix": Prefix(tokens=4, start="random"),
    "bottleneck": Bottleneck(placement="houlsby", size=5),
}
ALIKE = ("a", "b", "c", "d", "e", "f")
BASE = "the base"
"""Asks for the base in these tests. It has no name in a library; its identity is ()."""
PROMPT = tuple((7 * n) % 250 for n in range(21))


def publish(
    library: Library,
    folder: Path,
    name: str,
    config,
    seed: int,
    family="llama_untied",
    base=None,
    **tags,
):
    base = base or tiny_base(family)
    _ = base.paths
    head = base.model.get_output_embeddings()
    made = attach(base.model, config, name=name, routing=base.routing, head=head)
    move(made, seed=seed)
    written = folder / f"{name}-{seed}"
    write_adapter(written, made, manifest_for(base, method=config.name), model=base.model)
    return library.add(written, name=name, **tags)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A library: one of each method, six of one size, one of another base."""
    folder = tmp_path_factory.mktemp("residents")
    library = Library(folder / "library")
    for number, (name, config) in enumerate(METHODS.items()):
        publish(library, folder, name, config, number, tags=["best"])
    for number, name in enumerate(ALIKE):
        publish(library, folder, name, LoRA(rank=4, alpha=7), 20 + number)
    publish(
        library, folder, "stranger", LoRA(rank=2, alpha=3, targets=["q_proj"]), 1, family="qwen3"
    )
    return folder


@pytest.fixture
def library(made, tmp_path) -> Library:
    shutil.copytree(made / "library", tmp_path / "library")
    return Library(tmp_path / "library")


class Served:
    """A server without HTTP. room: adapters like "a" that fit into memory."""

    def __init__(
        self,
        library: Library,
        *,
        room: float = 100,
        limits: LoadLimits | None = None,
        **engine: int,
    ):
        self.now = 0.0
        self.base = tiny_base("llama_untied")
        size = library.get("a").version.facts.parameters * 4
        self.residents = Residents(
            self.base, library, budget_bytes=int(size * room), limits=limits, clock=lambda: self.now
        )
        self.engine = Engine(
            self.base, budget_bytes=2**22, adapters=self.residents.tiers, limits=Limits(**engine)
        )
        self.came = threading.Event()
        self.residents.tiers.changed = self.came.set

    def add(self, *names: str, new: int = 4, prompt=PROMPT, **asked):
        own = tuple(pair for name in names if name != BASE for pair in self.residents.resolve(name))
        return self.engine.add(Request(prompt=prompt, max_new_tokens=new, adapter=own, **asked))[0]

    def step(self):
        """One step; where all wait for adapters, until one has come."""
        ended = self.engine.step(self.now)
        assert self.residents.tiers.used_bytes() <= self.residents.tiers.budget_bytes
        if not self.engine.scheduler.idle and not self.engine.scheduler.running and not ended:
            assert self.came.wait(20), "nothing comes"
            self.came.clear()
        return ended

    def run(self, most: int = 2000):
        ended = []
        for _ in range(most):
            if self.engine.scheduler.idle:
                break
            ended += self.step()
        assert self.engine.scheduler.idle
        self.engine.scheduler.blocks.check()
        return ended

    def tiers(self) -> dict[str, str]:
        return {
            resident.reference: resident.tier.value for resident in self.residents.tiers.shown()
        }

    def quiet(self) -> None:
        """What is being read or taken off has been."""
        for _ in range(2000):
            if self.residents.tiers._loaders.idle:
                return
            threading.Event().wait(0.005)
        raise AssertionError("something still reads")


@pytest.fixture(scope="module")
def right(made):
    """The answer that a version gives alone, on a base of its own."""
    library, known = Library(made / "library"), {}

    def answer(name: str, new: int = 4) -> list[int]:
        if name not in known:
            base = tiny_base("llama_untied")
            _ = base.paths
            own = (
                () if name == BASE else ((load_adapter(base, library.path(name), name=name), 1.0),)
            )
            known[name] = generate_alone(base, own, list(PROMPT))
        return known[name][:new]

    return answer


@pytest.fixture
def reads(monkeypatch):
    """How often each folder is read; `jammed` holds those whose disk hangs until `free` is set."""
    found = Counter()
    found.jammed, found.free = set(), threading.Event()
    plain = eviction.read_adapter

    def read(folder):
        found[folder.name] += 1
        if folder.name in found.jammed:
            found.free.wait(60)
        return plain(folder)

    monkeypatch.setattr(eviction, "read_adapter", read)
    yield found
    found.free.set()


# names


def test_a_name_means_a_content_whichever_way_it_is_said(library):
    residents = Served(library).residents
    (own,) = residents.resolve("lora")
    assert own == (library.get("lora").version.object, 1.0)
    assert residents.resolve("lora@1") == residents.resolve("lora@best") == (own,)
    assert residents.resolve("lora", 0.5) == ((own[0], 0.5),)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("lorra", "Did you mean 'lora'"),
        ("lora@9", "lora has @1 (best)"),
        ("lora@old", "lora has @1 (best)"),
        ("tiny:lora", "Did you mean"),  # the names of models are the server's (serve/engine)
        ("other:lora", "Did you mean"),
        ("../../etc/passwd", "nothing is called"),
        ("x" * 5000, "nothing is called"),
        ("", "nothing is called"),
    ],
)
def test_an_unknown_name_is_an_error_of_its_own_that_says_what_there_is(library, name, said):
    with pytest.raises(UnknownNameError) as caught:
        Served(library).residents.resolve(name)
    assert said in str(caught.value) and str(library.folder) not in str(caught.value)


def test_an_adapter_of_another_base_is_refused_before_anything_is_read(library, reads):
    served = Served(library)
    with pytest.raises(AdapterMismatchError, match="another base") as caught:
        served.add("stranger")
    assert len(caught.value.faults) == 1 and not reads and served.tiers() == {}


def test_an_adapter_whose_record_an_earlier_version_wrote_is_served(library, tmp_path):
    base = tiny_base("llama_untied")
    base.identity = base.identity.earlier
    entry = publish(library, tmp_path, "older", LoRA(rank=2), 3, base=base)
    assert entry.version.facts.base_digest == base.identity.digest
    served = Served(library)
    served.add("older")
    assert [ended.error for ended in served.run()] == [None]


def test_an_adapter_of_an_edited_config_over_the_same_weights_is_refused_when_it_is_read(library):
    served = Served(library)
    config = served.base.identity.config
    default = {name: value for name, value in config["default"].items() if name != "rms_norm_eps"}
    edited = {"default": default, "set": {**config["set"], "rms_norm_eps": 0.01}}
    served.base.identity = replace(served.base.identity, config=edited)
    served.add("lora")
    (ended,) = served.run()
    assert isinstance(ended.error, AdapterMismatchError)
    assert ended.error.faults == ["config.json rms_norm_eps: 1e-06 against 0.01"]


# answers


def test_every_method_is_read_when_it_is_asked_for_and_answers_as_alone(library, right):
    served = Served(library)
    names = [BASE, *METHODS]
    asked = {served.add(name): name for name in [*names, *names]}
    assert set(served.run()) == set(asked)
    for answer, name in asked.items():
        assert answer.answer == right(name), name
    shown = served.residents.tiers.shown()
    assert {resident.reference for resident in shown} == {f"{name}@1" for name in METHODS}
    assert all(
        resident.tier is Tier.READY and not resident.holders and not resident.pinned
        for resident in shown
    )
    assert sum(resident.bytes for resident in shown) == served.residents.tiers.used_bytes()


def test_a_base_in_bf16_holds_factors_in_bf16_and_answers_as_with_those_of_the_file(tmp_path):
    library = Library(tmp_path / "library")
    publish(
        library,
        tmp_path,
        "lora",
        METHODS["lora"],
        0,
        base=tiny_base("llama_untied", torch.bfloat16),
    )
    base, other = (
        tiny_base("llama_untied", torch.bfloat16),
        tiny_base("llama_untied", torch.bfloat16),
    )
    for each in (base, other):
        _ = each.paths
    residents = Residents(base, library, budget_bytes=2**20)
    engine = Engine(base, budget_bytes=2**22, adapters=residents.tiers)
    (held,) = engine.add(
        Request(prompt=PROMPT, max_new_tokens=8, adapter=residents.resolve("lora"))
    )
    while not engine.scheduler.idle:
        engine.step(0.0)
    own = ((load_adapter(other, library.path("lora"), name="lora"), 1.0),)
    identity = (("lora", 1.0),)
    read = Engine(other, budget_bytes=2**22, adapters=FixedAdapters({identity: own}))
    (expected,) = read.add(Request(prompt=PROMPT, max_new_tokens=8, adapter=identity))
    read.run()
    (shown,) = residents.tiers.shown()
    assert (
        held.answer == expected.answer
        and shown.bytes == 2 * library.get("lora").version.facts.parameters
    )


@pytest.mark.skipif(not native.has_bf16(), reason="no products of bf16 pairs here")
def test_factors_are_laid_out_once_as_long_as_it_is_here_and_counted(tmp_path, monkeypatch):
    library = Library(tmp_path / "library")
    wide = partial(tiny_base, "llama_untied", torch.bfloat16, hidden_size=64, intermediate_size=64)
    publish(library, tmp_path, "lora", LoRA(rank=16, targets=["gate_proj"]), 0, base=wide())
    base, times = wide(), []
    made = few_rows.laid_out
    monkeypatch.setattr(few_rows, "laid_out", lambda *given: times.append(1) or made(*given))
    residents = Residents(base, library, budget_bytes=2**20)
    engine = Engine(base, budget_bytes=2**22, adapters=residents.tiers)
    said = []
    for _ in range(2):  # nobody uses it between these
        (answer,) = engine.add(
            Request(prompt=PROMPT, max_new_tokens=8, adapter=residents.resolve("lora"))
        )
        while not engine.scheduler.idle:
            engine.step(0.0)
        said.append(answer.answer)
    assert said[0] == said[1] and len(times) == 1
    (adapter,) = base.attachments.values()
    held, own = 2 * library.get("lora").version.facts.parameters, adapter.laid_out[0].bytes
    assert own > 0 and residents.tiers.used_bytes() == held + own <= 2 * held


@pytest.mark.parametrize("room", [1, 2.5])
def test_with_room_for_few_all_are_answered_each_as_alone_and_the_budget_holds(
    library, right, room
):
    served = Served(library, room=room)
    order = [*ALIKE, BASE, *ALIKE[::-1], "a", BASE, "a"]
    asked = {served.add(name): name for name in order}
    assert set(served.run()) == set(asked)
    for answer, name in asked.items():
        assert answer.answer == right(name), name
    assert len(served.tiers()) <= room


def test_the_least_recently_used_goes_and_what_is_pinned_stays(library, reads):
    served = Served(library, room=2)
    for name in ("a", "b", "a", "c"):
        served.add(name)
        served.run()
    assert served.tiers() == {"c@1": "ready", "a@1": "ready"}
    served.residents.pin("a")
    for name in ("b", "c", "d"):
        served.add(name)
        served.run()
    assert set(served.tiers()) == {"a@1", "d@1"}
    assert [resident.pinned for resident in served.residents.tiers.shown()] == [False, True]
    served.residents.pin("d")
    with pytest.raises(BudgetFullError, match="pinned"):
        served.add("b")
    with pytest.raises(BudgetFullError):
        served.residents.pin("b")
    served.residents.unpin("a")
    assert served.add("b") and served.run()
    assert set(served.tiers()) == {"b@1", "d@1"}


def test_one_that_is_larger_than_the_budget_is_an_error_of_its_own(library, right):
    served = Served(library, room=0.5)
    with pytest.raises(BudgetFullError, match="bytes"):
        served.add("a")
    assert served.add("low") in served.run() and served.add(BASE) in served.run()


def test_two_requests_that_each_need_two_adapters_do_not_wait_for_each_other(library):
    served = Served(library, room=2)
    first, second = served.add("a", "b"), served.add("c", "d")
    third = served.add("b", "c")
    assert set(served.run()) == {first, second, third}
    assert {each.reason for each in (first, second, third)} == {FinishReason.LENGTH}


def test_two_prefixes_together_end_their_own_request_alone(library):
    served = Served(library)
    weak = ((served.residents.resolve("prefix")[0][0], 0.5),)
    other = served.add("a")
    (answer,) = served.engine.add(Request(prompt=PROMPT, max_new_tokens=3, adapter=weak))
    served.run()
    assert answer.reason is FinishReason.ERROR and "and with weight 1" in str(answer.error)
    assert other.reason is FinishReason.LENGTH


# what does not come


def test_a_disk_that_hangs_holds_up_its_own_requests_alone(library, reads, right):
    served = Served(library, limits=LoadLimits(at_once=1, slow_seconds=1, load_seconds=30))
    reads.jammed = {library.path("a").name}
    stuck, behind, base = served.add("a"), served.add("b"), served.add(BASE, new=9)
    ended = []
    while base not in ended:
        ended += served.step()
    assert stuck not in ended
    served.now = 2.0  # the thread that hangs counts no more
    while behind not in ended:
        ended += served.step()
    assert behind.answer == right("b") and served.tiers() == {"a@1": "loading", "b@1": "ready"}
    served.now = 40.0
    assert (
        served.step() == [stuck]
        and stuck.reason is FinishReason.ERROR
        and "longer than 30 s" in str(stuck.error)
    )
    served.now = 100.0
    with pytest.raises(Exception, match="longer than 30 s"):
        served.add("a")  # its thread hangs still: no second one
    assert reads[library.path("a").name] == 1
    reads.free.set()
    served.quiet()
    again = served.add("a")
    assert served.run() == [again] and again.answer == right("a")


def test_a_broken_adapter_ends_its_own_requests_and_is_not_read_again_at_once(
    library, reads, right
):
    served = Served(library, limits=LoadLimits(retry_seconds=30))
    file = library.path("a") / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-4] + b"\0\0\0\0")
    reads.jammed = {library.path("a").name}
    bad, worse, fine, base = served.add("a"), served.add("a"), served.add("b"), served.add(BASE)
    reads.free.set()  # not before both wait: the second would be told at once
    served.run()
    assert {bad.reason, worse.reason} == {FinishReason.ERROR} and isinstance(
        bad.error, CorruptFileError
    )
    assert fine.answer == right("b") and base.answer == right(BASE)
    for _ in range(3):
        with pytest.raises(CorruptFileError):
            served.add("a")
    assert reads[library.path("a").name] == 1
    assert [
        resident.error
        for resident in served.residents.tiers.shown()
        if resident.tier is Tier.FAILED
    ] == [bad.error]
    file.write_bytes(whole)
    served.now = 31.0
    again = served.add("a")
    assert served.run() == [again] and again.answer == right("a")
    assert reads[library.path("a").name] == 2


def test_a_broken_adapter_is_read_at_once_when_its_files_are_others(library, right):
    served = Served(library)
    folder = library.path("a")
    file = folder / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(b"\0" * 100)
    served.add("a")
    served.run()
    shutil.copytree(folder, folder.with_name("copy"))
    shutil.rmtree(folder)
    (folder.with_name("copy") / "adapter_model.safetensors").write_bytes(whole)
    folder.with_name("copy").rename(folder)
    again = served.add("a")
    assert served.run() == [again] and again.answer == right("a")


def test_a_record_that_lies_about_the_size_is_refused_and_the_budget_holds(library, reads):
    served = Served(library)
    record = library.folder / "names" / "a.json"
    text = record.read_text()
    parameters = library.get("a").version.facts.parameters
    record.write_text(text.replace(f'"parameters": {parameters}', '"parameters": 3'))
    bad = served.add("a")
    served.run()
    assert isinstance(bad.error, CorruptFileError) and "larger than the library says" in str(
        bad.error
    )
    assert served.residents.tiers.used_bytes() == 0 and not served.base.attachments


# versions


def test_versions_that_differ_in_their_manifest_alone_are_two(library, tmp_path):
    folder = library.path("a")
    manifest = read_manifest(folder / MANIFEST_NAME)
    for number, system in enumerate(["Be brief.", "Be polite."]):
        copy = tmp_path / str(number)
        shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("MANIFEST.json"))
        (copy / MANIFEST_NAME).write_text(manifest.model_copy(update={"system": system}).to_json())
        library.add(copy, name="said")
    served = Served(library)
    identities = [served.residents.resolve(f"said@{number}") for number in (1, 2, 1, 2)]
    assert len({*identities}) == 2
    served.add("said@1"), served.add("said@2")
    served.run()
    said = [served.residents.preamble(identity).system for identity in identities]
    assert said == ["Be brief.", "Be polite.", "Be brief.", "Be polite."]
    assert {resident.version for resident in served.residents.tiers.shown()} == {
        manifest.content_hash
    }


def test_a_version_in_flight_ends_as_it_began_and_goes_while_new_requests_get_the_new_one(
    library, made, tmp_path, right
):
    served = Served(library)
    old = served.add("a", new=9)
    while not served.engine.scheduler.running:
        served.step()
    content = old.request.adapter[0][0]
    publish(library, tmp_path, "a", LoRA(rank=3, alpha=4), 99)
    new = served.add("a", new=9)
    assert new.request.adapter != old.request.adapter
    served.run()
    assert old.answer == right("a", 9) and new.answer != old.answer
    served.quiet()
    assert served.tiers() == {"a@2": "ready"} and len(served.base.attachments) == 1
    blocks = served.engine.scheduler.blocks
    assert served.add(BASE) and served.run()
    assert not any(own == content for _, adapter in blocks._names.values() for own, _ in adapter)
    explicit = served.add("a@1", new=9)
    served.run()
    assert explicit.answer == right("a", 9) and explicit.cached_tokens == 0


def test_a_pin_goes_along_with_its_name(library, tmp_path):
    served = Served(library, room=2)
    served.residents.pin("a")
    publish(library, tmp_path, "a", LoRA(rank=4, alpha=3), 98)
    for name in ("a", "b", "c", "d"):
        served.add(name)
        served.run()
    assert {resident.reference: resident.pinned for resident in served.residents.tiers.shown()} == {
        "a@2": True,
        "d@1": False,
    }
    with pytest.raises(UnknownNameError):
        served.residents.unpin("nobody")


def test_a_name_that_is_removed_while_it_is_pinned_leaves_no_pin(library, monkeypatch):
    """Another thread asks for the name, and finds it gone, before the pin is noted."""
    served = Served(library)
    residents, know = served.residents, Residents._know

    def removed_after(own, reference, entry):
        content = know(own, reference, entry)
        monkeypatch.undo()
        library.remove("a")
        with pytest.raises(UnknownNameError):
            own.resolve("a")
        return content

    monkeypatch.setattr(Residents, "_know", removed_after)
    with pytest.raises(UnknownNameError):
        residents.pin("a")
    residents.pin("b")
    assert not residents.unload("c")
    library.remove("b")
    with pytest.raises(UnknownNameError):
        residents.unpin("b")
    served.quiet()
    assert not any(resident.pinned for resident in residents.tiers.shown())


def test_a_name_that_is_removed_goes_when_its_request_has_ended(library, right):
    served = Served(library)
    answer = served.add("a", new=9)
    while not served.engine.scheduler.running:
        served.step()
    library.remove("a")
    with pytest.raises(UnknownNameError):
        served.add("a")
    served.run()
    served.quiet()
    assert answer.answer == right("a", 9) and served.tiers() == {} and not served.base.attachments


# memory


def live() -> tuple[int, int]:
    gc.collect()
    everything = gc.get_objects()
    found = [value for value in everything if type(value) is torch.nn.Parameter]
    return sum(type(value) is Attachment for value in everything), len(found)


def test_what_is_unloaded_leaves_nothing_behind_however_often(library):
    served = Served(library)
    names = [*METHODS, "a"]
    for name in names:  # what is made once is made
        served.add(name, prompt=PROMPT[:3])
    served.run()
    for name in names:
        assert served.residents.unload(name) is True
    served.quiet()
    before = live()
    plain = {path: type(module) for path, module in served.base.model.named_modules()}
    for number in rounds("unloads", ci=24):
        name = names[number % len(names)]
        served.add(name, new=2, prompt=PROMPT[:3])
        served.run()
        assert served.residents.unload(name)
        served.quiet()
        assert served.residents.tiers.used_bytes() == 0 and served.tiers() == {}
    assert live() == before and not served.base.attachments
    assert {path: type(module) for path, module in served.base.model.named_modules()} == plain
    assert served.residents.unload("a") is False


def test_what_was_answered_within_one_step_goes_when_nothing_else_is_asked(library):
    served = Served(library)
    served.add("a", new=1)
    served.run()
    assert served.residents.unload("a")
    served.quiet()
    assert served.residents.tiers.used_bytes() == 0 and not served.base.attachments


def test_what_is_unloaded_while_it_answers_ends_first(library, right):
    served = Served(library)
    answer = served.add("a", new=9)
    while not served.engine.scheduler.running:
        served.step()
    assert served.residents.unload("a") and served.tiers() == {"a@1": "ready"}
    assert [resident.holders for resident in served.residents.tiers.shown()] == [1]
    served.run()
    served.quiet()
    assert answer.answer == right("a", 9) and served.tiers() == {}


def test_loading_by_hand_waits_and_says_why_it_does_not_come(library, reads):
    served = Served(library, room=1)
    assert served.residents.load("a") == served.residents.resolve("a") and served.tiers() == {
        "a@1": "ready"
    }
    assert served.residents.load("b") and served.tiers() == {"b@1": "ready"}
    served.add("b", new=5)
    served.step()
    with pytest.raises(BudgetFullError, match="in use"):
        served.residents.load("a", seconds=0.05)
    served.run()
    reads.jammed = {library.path("a").name}
    with pytest.raises(BudgetFullError):
        served.residents.load("a", seconds=0.05)


# who waits for whom


def test_one_that_finds_no_room_is_overtaken_a_bounded_number_of_times(library, right):
    served = Served(library, room=1, limits=LoadLimits(max_overtaken=3), rows=2)
    first = [served.add("a", new=3) for _ in range(2)]
    while not served.engine.scheduler.running:
        served.step()
    waits, later = served.add("b"), [served.add("a", new=3 + n % 3) for n in range(20)]
    ended = served.run()
    before = ended.index(waits)
    assert before <= len(first) + 3 + 2, "those that went ahead, and those that ran"
    assert set(ended) == {waits, *first, *later}
    assert waits.answer == right("b")


def test_an_adapter_that_makes_room_for_a_waiting_request_takes_no_further_users(library, right):
    served = Served(library, room=1, limits=LoadLimits(max_overtaken=0), rows=2)
    first = served.add("a", new=9)
    while not served.engine.scheduler.running:
        served.step()
    waiting = served.add("b")
    tiers, identity = served.residents.tiers, served.residents.resolve("a")
    while tiers.hold_ready(identity):
        tiers.release(identity)
        served.step()
    assert first.reason is None and served.tiers() == {"a@1": "ready"}
    with pytest.raises(BudgetFullError):
        tiers.wait(identity, 0.05)
    assert served.run() == [first, waiting] and waiting.answer == right("b")
    tiers.wait(identity, 20)
    assert tiers.hold_ready(identity)
    tiers.release(identity)


def test_what_has_come_for_a_request_that_waits_is_not_sent_away_for_the_next(library, reads):
    served = Served(library, room=1, rows=1)
    served.add(BASE, new=30)
    served.add("a"), served.add("b")
    served.run()
    assert set(reads.values()) == {1}


def test_what_has_come_before_anyone_could_ask_for_it_is_not_sent_away(library, reads):
    """Requests wait before the first step, and reading is faster than that comes."""
    served = Served(library, room=1, rows=1)
    served.add("a"), served.add("b")
    assert served.came.wait(20)
    served.run()
    assert set(reads.values()) == {1}


def test_a_cancelled_request_asks_for_nothing_any_more(library, reads):
    served = Served(library, room=1, rows=4)
    held = served.add("a", new=9)
    while not served.engine.scheduler.running:
        served.step()
    gone = [served.add(name) for name in ("b", "c", "d")]
    served.step()
    for each in gone:
        served.engine.cancel(each)
    served.run()
    served.quiet()
    assert set(reads) == {library.path("a").name} and held.reason is FinishReason.LENGTH


# the base


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.found[str(function)] += 1
        return function(*args, **(kwargs or {}))


def test_with_adapters_in_memory_and_none_acting_the_base_makes_the_same_calls(library):
    found = []
    for names in ((), METHODS):
        served = Served(library)
        for name in names:
            served.residents.load(name)
        served.add(BASE)
        with Calls() as calls:
            served.run()
        found.append(calls.found)
    assert found[0] == found[1]


def test_forwards_of_another_thread_see_nothing_of_what_comes_and_goes(library):
    served = Served(library)
    base, residents = served.base, served.residents
    residents.load("a")
    own = residents.tiers.applied(residents.resolve("a"))
    expected = {}
    for which, adapters in (("base", ()), ("a", own)):
        with base.routing.held(Acting.everywhere(adapters)), torch.no_grad():
            expected[which] = base.model(IDS).logits
    stop, wrong, seen = threading.Event(), [], Counter()

    def compute():
        while not stop.is_set():
            for which, adapters in (("base", ()), ("a", own)):
                with base.routing.held(Acting.everywhere(adapters)), torch.no_grad():
                    if not torch.equal(base.model(IDS).logits, expected[which]):
                        wrong.append(which)
                seen[which] += 1

    thread = threading.Thread(target=compute)
    thread.start()
    try:
        for _ in rounds("exchanges", ci=6):
            for name in ("b", "prefix", "bottleneck", "dora", "c"):
                residents.load(name)
            for name in ("b", "prefix", "bottleneck", "dora", "c"):
                residents.unload(name)
    finally:
        stop.set()
        thread.join()
    assert not wrong and seen["a"] > 5


def test_any_traffic_ends_each_request_once_and_within_the_budget(library, right):
    """Requests, cancellations, loads, unloads and pins in any order, room for few."""
    for seed in rounds("tiers", ci=4):
        draw = random.Random(seed)
        served = Served(
            library,
            room=draw.choice([2, 3]),
            limits=LoadLimits(max_overtaken=2),
            rows=draw.choice([1, 3]),
        )
        adapters, asked, ended = [*ALIKE, "low", "prefix"], {}, []
        for _ in range(40):
            what, name = draw.random(), draw.choice(adapters)
            if what < 0.5:
                model = draw.choice([*adapters, BASE])
                asked[served.add(model, new=draw.randint(1, 6))] = model
            elif what < 0.6 and asked:
                served.engine.cancel(draw.choice(list(asked)))
            elif what < 0.65:
                served.residents.unload(name)
            elif what < 0.7:
                served.residents.unpin(name)
            elif served.engine.scheduler.running:
                ended += served.step()
        ended += served.run()
        assert Counter(ended) == Counter(list(asked))
        for answer, name in asked.items():
            assert answer.new == right(name, 9)[: len(answer.new)]
            assert answer.reason in (FinishReason.LENGTH, FinishReason.CANCELLED)
        for name in adapters:
            served.residents.unload(name)
        served.quiet()
        assert served.residents.tiers.used_bytes() == 0 and not served.base.attachments


def test_numbers_out_of_bounds_are_refused(library):
    with pytest.raises(ConfigError):
        LoadLimits(at_once=0)
    with pytest.raises(ConfigError):
        Served(library).residents.resolve("a", float("nan"))
    with pytest.raises(ConfigError, match="Ask for it by its name"):
        Served(library).residents.tiers.ready((("0" * 64, 1.0),))
