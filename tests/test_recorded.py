"""A step that was recorded gives what the step gives, to the bit; what changed since is seen."""

import pytest
import torch

from tests.test_engine import METHODS
from tests.test_methods import move
from tests.tiny import tiny_base
from veneer.adapters.attach import attach
from veneer.adapters.config import LoRA
from veneer.adapters.lora import AdaptedLinear
from veneer.decoding import direct as direct_forward
from veneer.decoding.adapters import Fixed
from veneer.decoding.engine import Engine
from veneer.decoding.forward import PagedForward
from veneer.decoding.recorded import _Recorded
from veneer.decoding.sequence import Request
from veneer.kernels import few_rows, native, step_calls
from veneer.kernels.arguments import CallError
from veneer.kernels.recorded import recording

PROMPTS = [(5, 9, 31), tuple(range(40, 71)), (7,)]

pytestmark = pytest.mark.skipif(native.level() < 2, reason="no products of few rows are compiled here")


@pytest.fixture(autouse=True)
def products_of_few_rows(monkeypatch):
    monkeypatch.setattr(few_rows, "LEAST_VALUES", 1)


def based(dtype=torch.float32, **overrides):
    base = tiny_base("llama_untied", dtype, **overrides)
    _ = base.paths
    return base


def with_method(base, name):
    head = base.model.get_output_embeddings()
    move(attach(base.model, METHODS[name], name=name, routing=base.routing, head=head, seed=1), seed=1)
    return ((name, 1.0),)


def steps_of(base, identities, monkeypatch, between=None, new=40):
    """All logits of the engine's steps, and the steps that it has recorded at the end. between: called after ten."""
    found, right = [], PagedForward.logits

    def noted(*given):
        found.append(right(*given).clone())
        return found[-1]

    engine = Engine(base, budget_bytes=2**22, adapters=Fixed({i: base.routing.applied(i) for i in identities if i}))
    for number, prompt in enumerate(PROMPTS):
        engine.add(Request(prompt=prompt, max_new_tokens=new, adapter=identities[number % len(identities)]))
    with monkeypatch.context() as patch:
        patch.setattr(PagedForward, "logits", noted)
        kept, count = {}, 0
        while not engine.scheduler.idle:
            engine.step(0.0)
            count += 1
            if count == 10 and between is not None:
                between()
            acting = [*engine._nobody.values(), *([engine._acting[1]] if engine._acting else [])]
            kept |= {rows: step for each in acting for rows, step in each.plan.steps.items()}
    return found, kept


def never(patch):
    patch.setattr(direct_forward, "computed", lambda inputs, laid, rest, modules: rest(inputs, laid))


def same(some, others):
    return len(some) == len(others) and all(map(torch.equal, some, others))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [None, *METHODS])
def test_recorded_steps_give_the_same_bits(dtype, name, monkeypatch):
    base = based(dtype)
    own = () if name is None else with_method(base, name)
    found, kept = steps_of(base, [own, (), own], monkeypatch)
    with monkeypatch.context() as patch:
        never(patch)
        expected, none = steps_of(base, [own, (), own], monkeypatch)
    assert same(found, expected) and not none
    if name in (None, "lora"):
        assert isinstance(kept[3], _Recorded)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adapted_layers_of_one_input_are_one_call_and_give_what_each_gives(dtype, monkeypatch):
    base = based(dtype)
    own = with_method(base, "lora")
    found, kept = steps_of(base, [own, (), own], monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(AdaptedLinear, "in_step", lambda *_: None)
        expected, each = steps_of(base, [own, (), own], monkeypatch)
    assert same(found, expected)
    together, alone = (len(steps[3]._noted.structs("veneer_few_rows_updated")) for steps in (kept, each))
    assert 0 < together < alone


def test_what_computes_otherwise_is_never_recorded(monkeypatch):
    base = based()
    _, kept = steps_of(base, [with_method(base, "dora")], monkeypatch)
    assert kept[3] == "declined"


def test_who_begins_to_listen_is_heard(monkeypatch):
    base, heard = based(), []
    module = base.model.model.layers[1].mlp.up_proj
    steps_of(base, [()], monkeypatch, lambda: module.register_forward_hook(lambda *_: heard.append(1)))
    assert len(heard) == 40 - 10


@pytest.mark.parametrize("how", ["another parameter", "other memory", "another module", "another adapter"])
def test_what_is_exchanged_is_seen(how, monkeypatch):
    def exchange(base):
        layer = base.model.model.layers[1]
        linear = layer.mlp.up_proj
        changed = torch.nn.Parameter(linear.weight.detach() * 1.5, requires_grad=False)
        if how == "another parameter":
            linear.weight = changed
        elif how == "other memory":
            linear.weight.data = changed.data
        elif how == "another module":
            layer.mlp.up_proj = torch.nn.Linear(*reversed(changed.shape), bias=False)
            layer.mlp.up_proj.weight = changed
        else:
            attach(base.model, LoRA(rank=2), name="late", routing=base.routing, head=None, seed=3)

    one, other = based(), based()
    found, _ = steps_of(one, [()], monkeypatch, lambda: exchange(one))
    with monkeypatch.context() as patch:
        never(patch)
        expected, _ = steps_of(other, [()], monkeypatch, lambda: exchange(other))
    assert same(found, expected)


def test_calls_are_made_again_over_what_lies_there_now():
    draw = torch.Generator().manual_seed(0)
    weight, x = torch.randn(24, 40, generator=draw), torch.randn(3, 40, generator=draw)
    with recording() as noted:
        y = few_rows.product(x.view(3, 40), weight, None)
    x.copy_(torch.randn(3, 40, generator=draw))
    assert noted.spoiled is None and not torch.equal(y, few_rows.product(x, weight, None))
    noted.again()
    assert torch.equal(y, few_rows.product(x, weight, None))


def test_what_torch_computed_is_no_part_of_it():
    with recording() as noted:
        torch.ones(2) + 1
    assert noted.spoiled == "ones"
    with pytest.raises(CallError, match="not all there was"):
        noted.again()


def test_a_recording_within_another_is_refused_for_the_outer_one_would_miss_its_calls():
    x, y = torch.ones(2, 8), torch.empty(2, 8)
    with recording() as outer:
        step_calls.step_gate(x, x, y)
        with pytest.raises(CallError, match="within a block that notes"), recording():
            pass
        step_calls.step_gate(x, x, y)
    assert len(outer.structs("veneer_step_gate")) == 2
    with recording() as again:
        step_calls.step_gate(x, x, y)
    assert len(again.structs("veneer_step_gate")) == 1
