"""Switching is a pointer change that any thread may make; loading keeps to its budget; the base
stays what it was."""

import gc
import threading
from pathlib import Path

import pytest
import torch

from tests.support.adapter_files import IDS, write
from tests.support.tiny import tiny_base
from veneer.adapters.config import LoRA
from veneer.adapters.placement.acting import Acting
from veneer.adapters.placement.attachment import Attachment
from veneer.adapters.placement.routing import Routing
from veneer.base import Base
from veneer.errors import ConfigError, CorruptFileError, DoesNotFitError
from veneer.library.library import Library

NAMES = ("alpha", "beta", "gamma")


def make_base(library: Library | None = None, **overrides: int) -> Base:
    plain = tiny_base(**overrides)
    return Base(
        model=plain.model,
        tokenizer=plain.tokenizer,
        source="tiny",
        name_or_path="tiny",
        library=library,
    )


def fill(attachment, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in attachment.parameters().values():
        parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Library:
    """Three adapters of one shape that answer differently."""
    folder = tmp_path_factory.mktemp("swap")
    base = make_base()
    found = Library(folder / "library")
    for number, name in enumerate(NAMES):
        made = base.attach(LoRA(rank=4, alpha=7), name=name)
        fill(made, number)
        write(folder / name, base, made)
        found.add(folder / name, name=name, tags=["first"])
    return found


def logits(base: Base) -> torch.Tensor:
    with torch.no_grad():
        return base.model(IDS).logits


def test_names_are_loaded_on_demand_and_each_answers_as_if_alone(library):
    alone = {}
    for name in NAMES:
        base = make_base()
        base.load_adapter(library.path(name), name=name)
        base.use(name)
        alone[name] = logits(base)
    base = make_base(library)
    before = logits(base)
    for name in (*NAMES, *reversed(NAMES)):
        base.use(name)
        assert torch.equal(logits(base), alone[name])
    assert len({alone[name].sum().item() for name in NAMES}) == 3
    base.use(None)
    assert torch.equal(logits(base), before)


def test_a_library_name_may_carry_a_version_or_a_tag(library):
    base = make_base(library)
    base.use("alpha@1")
    by_version = logits(base)
    base.use("alpha@first")
    assert torch.equal(logits(base), by_version)
    with pytest.raises(ConfigError, match="there is no alpha@2"):
        base.use("alpha@2")
    assert base.routing.active == (("alpha@first", 1.0),)


def test_several_act_with_their_weights_and_using_restores(library):
    base = make_base(library)
    base.use(["alpha", "beta"], weights=[0.5, -1.0])
    mixed = logits(base)
    base.use("alpha")
    with base.using(["alpha", "beta"], weights=[0.5, -1.0]):
        assert torch.equal(logits(base), mixed)
        with base.using(None):
            assert not torch.equal(logits(base), mixed)
        assert torch.equal(logits(base), mixed)
    assert base.routing.active == (("alpha", 1.0),)
    with pytest.raises(ConfigError, match="2 adapters and 1 weights"):
        base.use(["alpha", "beta"], weights=[1.0])


def test_an_unknown_name_names_the_nearest_and_changes_nothing(library):
    base = make_base(library)
    base.use("alpha")
    for wrong in ("alhpa", "alpha2", "Alpha", "../alpha", "", "nothing"):
        with pytest.raises(ConfigError, match="no adapter named"):
            base.use(wrong)
    with pytest.raises(ConfigError, match="Did you mean 'beta'"), base.using("betta"):
        pytest.fail("must not be reached")
    assert base.routing.active == (("alpha", 1.0),)


def test_after_the_last_adapter_every_weight_module_and_output_is_as_loaded(library):
    base = make_base(library)
    modules = {name: id(module) for name, module in base.model.named_modules()}
    weights = {name: parameter.clone() for name, parameter in base.model.named_parameters()}
    hooks = len(base.model._forward_pre_hooks), len(base.model._forward_hooks)
    before = logits(base)
    base.use(list(NAMES))
    logits(base)
    for name in NAMES:
        base.detach(name)
    assert {name: id(module) for name, module in base.model.named_modules()} == modules
    assert all(
        torch.equal(parameter, weights[name]) for name, parameter in base.model.named_parameters()
    )
    assert (len(base.model._forward_pre_hooks), len(base.model._forward_hooks)) == hooks
    assert torch.equal(logits(base), before)


# the budget


def size_of_one(library: Library) -> int:
    base = make_base(library)
    base.use("alpha")
    return base._pool.used_bytes()


def test_the_least_recently_used_goes_when_the_budget_is_full(library):
    base = make_base(library)
    base.adapter_budget_bytes = 2 * size_of_one(library)
    base.use("alpha")
    base.use("beta")
    base.use("alpha")
    base.use("gamma")
    assert set(base.attachments) == {"alpha", "gamma"}
    base.use("beta")
    assert set(base.attachments) == {"gamma", "beta"}


def test_what_acts_is_pinned_was_changed_or_made_here_stays(library):
    base = make_base(library)
    one = size_of_one(library)
    base.adapter_budget_bytes = 2 * one
    base.use("alpha")
    base.pin("beta")
    with pytest.raises(DoesNotFitError, match=r"beta: [\d,]+ bytes, pinned") as raised:
        base.use("gamma")
    assert "alpha: " in str(raised.value) and "acting" in str(raised.value)
    base.unpin("beta")
    base.use("gamma")
    assert set(base.attachments) == {"alpha", "gamma"}
    base.use(None)
    fill(base.attachments["alpha"], 9)
    base.attachments["alpha"].parameters()["model.layers.0.self_attn.q_proj.A"].data.add_(0)
    with torch.no_grad():
        base.attachments["alpha"].parameters()["model.layers.0.self_attn.q_proj.A"].add_(1.0)
    base.use("gamma")
    with pytest.raises(DoesNotFitError, match="changed since it was loaded"):
        base.use(["gamma", "beta"])
    base.detach("alpha")
    base.use(None)
    base.attach(LoRA(rank=4), name="mine")
    with pytest.raises(DoesNotFitError, match="not from the library"):
        base.use(["gamma", "beta"])


def test_an_object_that_was_exchanged_is_not_loaded(library, tmp_path):
    import shutil

    copy = Library(shutil.copytree(library.folder, tmp_path / "copy"))
    theirs, ours = copy.path("beta"), copy.path("alpha")
    shutil.rmtree(ours)
    shutil.copytree(theirs, ours)
    base = make_base(copy)
    with pytest.raises(CorruptFileError, match="not what was added"):
        base.use("alpha")
    assert base.attachments == {}


def test_a_thousand_loads_and_unloads_leave_nothing_behind(library):
    base = make_base(library)

    def cycle(count: int) -> None:
        for number in range(count):
            base.use(NAMES[number % 3])
            base.detach(NAMES[number % 3])

    def objects() -> int:
        gc.collect()
        return sum(isinstance(value, torch.Tensor) for value in gc.get_objects())

    cycle(10)
    before = objects()
    cycle(150)  # benchmarks/swap.py does 1,000 and looks at the process's memory
    assert objects() <= before + 2
    assert base.attachments == {} and base._pool.used_bytes() == 0


# threads


def test_a_forward_sees_one_state_whole_while_others_switch(library):
    base = make_base(library)
    known = {}
    for name in (None, *NAMES):
        base.use(name)
        known[name] = logits(base)
    stop, wrong = threading.Event(), []

    def switch() -> None:
        number = 0
        while not stop.wait(
            0.0002
        ):  # several times within each forward, but not all the time Python has
            base.use((None, *NAMES)[number % 4])
            number += 1

    def forward() -> None:
        for _ in range(50):
            found = logits(base)
            if not any(torch.equal(found, tensor) for tensor in known.values()):
                wrong.append(found)

    switcher = threading.Thread(target=switch)
    workers = [threading.Thread(target=forward) for _ in range(3)]
    for thread in (switcher, *workers):
        thread.start()
    for thread in workers:
        thread.join()
    stop.set()
    switcher.join()
    assert not wrong


def test_using_is_a_threads_own_and_loading_and_throwing_out_in_between_harms_nobody(library):
    base = make_base(library)
    known = {}
    for name in NAMES:
        with base.using(name):
            known[name] = logits(base)
    for name in NAMES:
        base.detach(name)
    base.adapter_budget_bytes = 2 * size_of_one(library)
    wrong: list[str] = []

    def work(name: str) -> None:
        for _ in range(40):
            try:
                with base.using(name):
                    for _ in range(2):
                        if not torch.equal(logits(base), known[name]):
                            wrong.append(name)
            except DoesNotFitError:  # the two others are in use at this moment
                continue

    threads = [threading.Thread(target=work, args=(name,)) for name in NAMES]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and base.routing.active == () and base.routing.in_use() == set()


def test_an_adapter_in_use_by_another_thread_is_not_detached(library):
    base = make_base(library)
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with base.using("alpha"):
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    entered.wait(10)
    with pytest.raises(ConfigError, match="in use by another thread"):
        base.detach("alpha")
    leave.set()
    thread.join()
    base.detach("alpha")


def test_blocks_within_blocks_end_one_by_one():
    routing = Routing()
    routing.attached = {name: Attachment(name, LoRA()) for name in "abcd"}

    def only(name):
        return routing.held(Acting.everywhere(routing.applied(((name, 1.0),))))

    routing.active = (("a", 1.0),)
    with only("b"):
        with only("c"):
            routing.active = (("d", 2.0),)
            assert routing.active == (("d", 2.0),)
            assert routing.in_use() == {"a", "b", "d"}
        assert routing.active == (("b", 1.0),) and routing.in_use() == {"a", "b"}
    assert routing.active == (("a", 1.0),) and routing.in_use() == {"a"} and not routing.is_held


def test_a_failing_forward_lets_go_of_what_it_held(library):
    base = make_base(library)
    base.use("alpha")
    with pytest.raises(IndexError):
        base.model(torch.tensor([[10**6]]))
    assert base.routing.in_use() == {"alpha"}
    base.use(None)
    assert base.routing.in_use() == set()


def test_a_forward_lets_go_of_what_it_held(library):
    base = make_base(library)
    base.use("alpha")
    base.model(torch.tensor([[1, 2]]))
    assert not base.routing.is_held


def test_switching_touches_no_module(library, monkeypatch):
    base = make_base(library)
    base.use(list(NAMES))
    monkeypatch.setattr(
        torch.nn.Module, "named_modules", lambda *_: pytest.fail("walked the model")
    )
    monkeypatch.setattr(torch.nn.Module, "modules", lambda *_: pytest.fail("walked the model"))
    for name in (*NAMES, None):
        base.use(name)


def test_a_plain_folder_still_loads_beside_the_library(library, tmp_path):
    base = make_base(library)
    assert base.load_adapter(Path(library.path("alpha")), name="mine") == "mine"
    base.use("mine")
    mine = logits(base)
    base.use("alpha")
    assert torch.equal(logits(base), mine)


# torch.compile


def test_one_compiled_forward_serves_every_adapter_of_the_same_shapes(library):
    from torch._dynamo.testing import (
        CompileCounter,
    )  # runs the graph as it is: no C++ compiler is needed

    base = make_base(library)

    def forward(ids: torch.Tensor) -> torch.Tensor:
        return base.model(ids, use_cache=False).logits

    expected = {}
    with torch.no_grad():
        for name in NAMES:
            base.use(name)
            expected[name] = forward(IDS)
        counter = CompileCounter()
        compiled = torch.compile(forward, backend=counter, fullgraph=True)  # without a break
        for name in (*NAMES, *NAMES):
            base.use(name)
            assert torch.equal(compiled(IDS), expected[name])
        assert counter.frame_count == 1
        for name in (*NAMES, *NAMES):
            with base.using(name):
                assert torch.equal(compiled(IDS), expected[name])
        assert counter.frame_count == 2  # once for what a thread holds
        base.use(["alpha", "beta"], weights=[0.5, 2.0])
        assert torch.allclose(compiled(IDS), forward(IDS), atol=1e-5)
        base.use(None)
        assert torch.equal(compiled(IDS), make_base().model(IDS, use_cache=False).logits)
    torch._dynamo.reset()


def test_an_adapter_that_trains_whole_modules_is_right_when_compiled(library):
    from torch._dynamo.testing import CompileCounter

    base = make_base(num_hidden_layers=1)
    for seed, name in enumerate("ab"):
        fill(base.attach(LoRA(rank=2, alpha=3, train_modules=["model.norm"]), name=name), seed)

    def forward(ids: torch.Tensor) -> torch.Tensor:
        return base.model(ids, use_cache=False).logits

    compiled = torch.compile(forward, backend=CompileCounter())
    with torch.no_grad():
        for name in ("a", "b", None, "a"):
            base.use(name)
            assert torch.allclose(compiled(IDS), forward(IDS), atol=1e-5)
            with base.using("b"):
                assert torch.allclose(compiled(IDS), forward(IDS), atol=1e-5)
    torch._dynamo.reset()


def test_an_adapter_from_disk_draws_no_values_that_its_own_would_replace(library, monkeypatch):
    def drawn(*shape, **settings):
        raise AssertionError("a value was drawn")

    base = make_base(library)
    monkeypatch.setattr(torch, "rand", drawn)
    base.use("alpha")
