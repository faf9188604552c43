"""A step that was recorded gives what the step gives, to the bit; what changed since is seen."""

import gc
import random
import threading
import weakref

import pytest
import torch

from tests.adapters.test_methods import move
from tests.decoding.test_engine import METHODS
from tests.support.models.tiny_gguf import random_blocks
from tests.support.tiny import tiny_base
from veneer.adapters.attach import attach
from veneer.adapters.config import LoRA
from veneer.adapters.methods.adapted_linear import AdaptedLinear
from veneer.decoding.engine import Engine, bytes_per_token, decode_step_of
from veneer.decoding.forward import PagedForward
from veneer.decoding.lanes import Lane
from veneer.decoding.schedule.adapters import FixedAdapters
from veneer.decoding.schedule.sequence import Request
from veneer.execution import ends, recorded
from veneer.execution.facts.model_start import embedding_scale, find_start
from veneer.execution.recorded import RecordedSteps, _RecordedStep
from veneer.kernels.attention.paged import SpanRows, Spans
from veneer.kernels.bindings import dense_calls, step_calls
from veneer.kernels.bindings import library as native
from veneer.kernels.bindings.arguments import CallError
from veneer.kernels.dense import few_rows
from veneer.kernels.dense.loss import Head
from veneer.kernels.packed import gguf, nf4
from veneer.kernels.tape.step_tape import RowMemory, record_step
from veneer.quant.nf4 import quantize

PROMPTS = [(5, 9, 31), tuple(range(40, 71)), (7,)]

pytestmark = pytest.mark.skipif(
    native.level() < 2, reason="no products of few rows are compiled here"
)


@pytest.fixture(autouse=True)
def products_of_few_rows(monkeypatch):
    monkeypatch.setattr(few_rows, "LEAST_VALUES", 1)


def based(dtype=torch.float32, **overrides):
    base = tiny_base("llama_untied", dtype, **overrides)
    _ = base.paths
    return base


def with_method(base, name, config=None):
    config, head = config or METHODS[name], base.model.get_output_embeddings()
    move(attach(base.model, config, name=name, routing=base.routing, head=head, seed=1), seed=1)
    return ((name, 1.0),)


def steps_of(base, identities, monkeypatch, between=None, new=40, joins=False, prompts=PROMPTS):
    """All logits of the engine's steps, and what the base has recorded by then. between: called
    after ten; joins: a request comes then too."""
    found, right = [], PagedForward.logits

    def noted(*given):
        found.append(right(*given).clone())
        return found[-1]

    engine = Engine(
        base,
        budget_bytes=2**22,
        adapters=FixedAdapters({i: base.routing.applied(i) for i in identities if i}),
        lookup="off",  # guesses depend on what is recorded, and steps are compared
    )
    for number, prompt in enumerate(prompts):
        engine.add(
            Request(prompt=prompt, max_new_tokens=new, adapter=identities[number % len(identities)])
        )
    with monkeypatch.context() as patch:
        patch.setattr(PagedForward, "logits", noted)
        count = 0
        while not engine.scheduler.idle:
            engine.step(0.0)
            count += 1
            if count == 10 and between is not None:
                between()
            if count == 10 and joins:
                engine.add(Request(prompt=(8, 9), max_new_tokens=5))
    return found, recorded_of(base)


def recorded_of(base):
    return [] if decode_step_of(base)._parts is None else decode_step_of(base)._parts.steps._steps


def never(patch):
    patch.setattr(
        RecordedSteps, "compute", lambda _, inputs, laid, layers, *__: layers(inputs, laid)
    )
    patch.setattr(RecordedSteps, "logits", lambda *_: None)


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
        expected, _ = steps_of(base, [own, (), own], monkeypatch)
    assert same(found, expected)
    assert (
        len(kept) == 1
    )  # of the base's rows, which have a forward of their own beside those of other methods


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adapted_layers_of_one_input_are_one_call_and_give_what_each_gives(dtype, monkeypatch):
    base, other = based(dtype), based(dtype)
    own, _ = with_method(base, "lora"), with_method(other, "lora")
    found, kept = steps_of(base, [own, (), own], monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(AdaptedLinear, "step_operand", lambda *_: None)
        expected, each = steps_of(other, [own, (), own], monkeypatch)
    assert same(found, expected)
    together, alone = (
        len(steps[0]._tape.structs("veneer_few_rows_updated")) for steps in (kept, each)
    )
    assert 0 < together < alone


def whole_steps(monkeypatch):
    """Of how many rows each step was that one call computed, from ids to logits."""
    rows, right = [], _RecordedStep.logits

    def noted(own, ids, laid):
        found = right(own, ids, laid)
        rows.extend([] if found is None else [len(ids)])
        return found

    monkeypatch.setattr(_RecordedStep, "logits", noted)
    return rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_an_answers_steps_are_one_call_from_ids_to_logits_to_the_bit(dtype, tied, monkeypatch):
    """Over blocks that are taken one by one, beyond the room that tables were given, and places
    beyond the tables of angles that were made first."""
    monkeypatch.setattr(ends, "FIRST_POSITIONS", 32)
    base = based(dtype, tie_word_embeddings=tied)
    rows = whole_steps(monkeypatch)
    found, _ = steps_of(base, [()], monkeypatch, new=150)
    assert len(rows) > 140 and set(rows) == {3}
    with monkeypatch.context() as patch:
        never(patch)
        expected, _ = steps_of(base, [()], monkeypatch, new=150)
    assert same(found, expected)


FAMILIES = ["qwen2", "qwen3", "gemma", "gemma2", "gemma3", "olmo2", "exaone4", "smollm3"]
FAMILIES += ["granite", "glm4"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_steps_of_each_family_are_one_call_from_ids_to_logits_to_the_bit(
    family, dtype, monkeypatch
):
    """By the base and an adapter side by side, beyond windows and the first tables of angles."""
    monkeypatch.setattr(ends, "FIRST_POSITIONS", 32)
    base = tiny_base(family, dtype)
    _ = base.paths
    own, rows = with_method(base, "lora"), whole_steps(monkeypatch)
    found, _ = steps_of(base, [own, (), own], monkeypatch, new=50)
    assert len(rows) > 40 and set(rows) == {3}
    with monkeypatch.context() as patch:
        never(patch)
        expected, _ = steps_of(base, [own, (), own], monkeypatch, new=50)
    assert same(found, expected)


@pytest.mark.parametrize(
    "family", [*FAMILIES, "llama_untied", "phi3", "cohere", "stablelm", "starcoder2", "phi"]
)
def test_a_recording_of_a_single_row_serves_any_number_of_rows(family, monkeypatch):
    """Torch takes any distance between rows for that of a single one."""
    base = tiny_base(family, torch.float32)
    _ = base.paths
    own = with_method(base, "lora", LoRA(rank=3, alpha=5.0, targets="all-linear"))
    _, kept = steps_of(base, [()], monkeypatch, prompts=PROMPTS[:1], new=3)
    assert [step._tape.memory.rows for step in kept] == [1]
    states, replay = [], _RecordedStep.replay

    def noted(*given):
        states.append(replay(*given))
        return states[-1]

    monkeypatch.setattr(_RecordedStep, "replay", noted)
    found, _ = steps_of(base, [own, (), own], monkeypatch, new=6)
    assert states and None not in states
    with monkeypatch.context() as patch:
        never(patch)
        expected, _ = steps_of(base, [own, (), own], monkeypatch, new=6)
    assert same(found, expected)


def test_a_mix_of_updates_is_one_call_too_and_what_acts_around_the_layers_is_not(monkeypatch):
    base, rows = based(), whole_steps(monkeypatch)
    lora, head = with_method(base, "lora"), with_method(base, "head")
    steps_of(base, [lora, ()], monkeypatch)
    assert len(rows) > 30
    count = len(rows)
    steps_of(base, [head, ()], monkeypatch)
    assert set(rows[count:]) == {1}  # the base's answer, in a forward of its own


@pytest.mark.parametrize("how", ["embedding", "head", "listener", "angles"])
def test_what_is_exchanged_around_the_layers_is_seen(how, monkeypatch):
    monkeypatch.setattr(recorded, "UNCHECKED", 1)

    def exchange(base):
        inner = base.model.model
        if how == "embedding":
            changed = torch.nn.Embedding(*inner.embed_tokens.weight.shape)
            changed.weight = torch.nn.Parameter(
                inner.embed_tokens.weight * 1.5, requires_grad=False
            )
            inner.embed_tokens = changed
        elif how == "head":
            head = base.model.get_output_embeddings()
            head.weight = torch.nn.Parameter(head.weight * -1.0, requires_grad=False)
        elif how == "listener":
            inner.embed_tokens.register_forward_hook(lambda module, given, found: found * 2)
        else:
            inner.rotary_emb.inv_freq = inner.rotary_emb.inv_freq * 0.5

    one, other, rows = based(), based(), whole_steps(monkeypatch)
    found, _ = steps_of(one, [()], monkeypatch, lambda: exchange(one))
    assert rows
    with monkeypatch.context() as patch:
        never(patch)
        expected, _ = steps_of(other, [()], monkeypatch, lambda: exchange(other))
    assert same(found, expected)


@pytest.mark.parametrize("part", ["embedding", "head"])
def test_layers_are_recorded_without_an_embedding_or_a_head_that_has_a_hook(part, monkeypatch):
    base, rows = based(), whole_steps(monkeypatch)
    model = base.model
    hooked = model.get_input_embeddings() if part == "embedding" else model.get_output_embeddings()
    hooked.register_forward_hook(lambda module, inputs, output: output * 2)
    _, kept = steps_of(base, [()], monkeypatch, prompts=PROMPTS[:1], new=4)
    assert [step.ends for step in kept] == [None] and not rows


def test_what_computes_otherwise_is_never_recorded(monkeypatch):
    base = based()
    _, kept = steps_of(base, [with_method(base, "dora")], monkeypatch)
    assert not kept


def test_who_begins_to_listen_is_heard(monkeypatch):
    monkeypatch.setattr(recorded, "UNCHECKED", 1)
    base, heard = based(), []
    module = base.model.model.layers[1].mlp.up_proj
    steps_of(
        base, [()], monkeypatch, lambda: module.register_forward_hook(lambda *_: heard.append(1))
    )
    assert len(heard) == 40 - 10


@pytest.mark.parametrize(
    "how", ["another parameter", "other memory", "another module", "another adapter"]
)
def test_what_is_exchanged_is_seen(how, monkeypatch):
    monkeypatch.setattr(recorded, "UNCHECKED", 1)

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


@pytest.mark.parametrize("joins", [False, True])
def test_what_is_exchanged_under_answers_is_seen_after_some_steps_or_when_another_joins(
    joins, monkeypatch
):
    def exchange(base):
        norm = base.model.model.norm
        norm.weight = torch.nn.Parameter(norm.weight * 1.5, requires_grad=False)

    one, other = based(), based()
    kept, _ = steps_of(one, [()], monkeypatch, joins=joins)
    found, _ = steps_of(other, [()], monkeypatch, lambda: exchange(other), joins=joins)
    first = next(
        n
        for n, (some, others) in enumerate(zip(found, kept, strict=True))
        if not torch.equal(some, others)
    )
    assert first == 10 if joins else 10 < first < 10 + recorded.UNCHECKED


def test_calls_are_replayed_over_what_is_in_memory_now():
    draw = torch.Generator().manual_seed(0)
    weight, x = torch.randn(24, 40, generator=draw), torch.randn(3, 40, generator=draw)
    with record_step(RowMemory(3, 3)) as tape:
        y = few_rows.product(x.view(3, 40), weight, None)
    x.copy_(torch.randn(3, 40, generator=draw))
    assert tape.unsupported_call is None and not torch.equal(y, few_rows.product(x, weight, None))
    tape.replay()
    assert torch.equal(y, few_rows.product(x, weight, None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_product_of_4_bit_weights_is_replayed_in_its_type(dtype):
    draw = torch.Generator().manual_seed(0)
    weight = quantize(torch.randn(24, 64, generator=draw))
    x = torch.randn(1, 64, generator=draw).to(dtype)
    expected = nf4.product(weight.blocks, x, 24)  # the first call checks the weight with torch
    with record_step(RowMemory(1, 1)) as tape:
        y = nf4.product(weight.blocks, x, 24)
    assert tape.unsupported_call is None and len(tape.structs("veneer_nf4_product")) == 1
    y.fill_(7.0)
    tape.replay()
    assert torch.equal(y, expected)


def test_a_tape_without_what_torch_computed_is_not_replayed():
    with record_step(RowMemory(2, 2)) as tape:
        torch.ones(2) + 1
    assert tape.unsupported_call == "ones"
    with pytest.raises(CallError, match="not hold all calls"):
        tape.replay()


def test_a_recording_within_another_is_refused_for_the_outer_one_would_miss_its_calls():
    x, y, memory = torch.ones(2, 8), torch.empty(2, 8), RowMemory(2, 2)
    with record_step(memory) as outer:
        step_calls.step_gate(x, x, y)
        with pytest.raises(CallError, match="within a block that observes"), record_step(memory):
            pass
        step_calls.step_gate(x, x, y)
    assert len(outer.structs("veneer_step_gate")) == 2
    with record_step(memory) as again:
        step_calls.step_gate(x, x, y)
    assert len(again.structs("veneer_step_gate")) == 1


@pytest.mark.parametrize("rows", [3, 4])
def test_calls_that_compute_no_multiple_of_the_steps_rows_keep_their_number(rows):
    x, y = torch.ones(rows, 8), torch.empty(rows, 8)
    with record_step(RowMemory(2, 8)) as tape:
        step_calls.step_gate(x, x, y)
    assert tape.has_any_rows == (rows == 4)


MIXED = {
    "wide": LoRA(rank=3, alpha=5.0, targets=["q_proj", "o_proj", "v_proj"]),
    "deep": LoRA(rank=5, alpha=3.0, targets=["gate_proj", "down_proj", "v_proj"]),
    "all": LoRA(rank=2),
    "head": METHODS["head"],
}


def with_many(dtype=torch.float32):
    base = based(dtype)
    for number, (name, config) in enumerate(MIXED.items()):
        head = base.model.get_output_embeddings()
        move(
            attach(base.model, config, name=name, routing=base.routing, head=head, seed=number),
            seed=number,
        )
    return base, [
        (),
        *(((name, 1.0),) for name in MIXED),
        (("wide", 0.5), ("deep", -1.5)),
        (("all", 1.0), ("wide", 2.0)),
    ]


def engine_of(base, identities):
    return Engine(
        base,
        budget_bytes=2**22,
        adapters=FixedAdapters({i: base.routing.applied(i) for i in identities if i}),
        lookup="off",  # guesses depend on what is recorded, and steps are compared
    )


def traffic(engine, identities, monkeypatch, count=24, flight=6):
    """All logits of requests that come and go, each for other adapters; other engines' are left
    out."""
    draw, found, right = random.Random(5), [], PagedForward.logits
    own = (engine.lanes.exact.forward, engine.lanes.mixed.forward)

    def noted(forward, *given):
        logits = right(forward, *given)
        if forward in own:
            found.append(logits.clone())
        return logits

    waiting = [
        Request(
            prompt=tuple(draw.randrange(3, 250) for _ in range(draw.randint(1, 40))),
            max_new_tokens=draw.randint(1, 12),
            adapter=draw.choice(identities),
        )
        for _ in range(count)
    ]
    with monkeypatch.context() as patch:
        patch.setattr(PagedForward, "logits", noted)
        while waiting or not engine.scheduler.idle:
            while (
                waiting and len(engine.scheduler.running) + len(engine.scheduler.waiting) < flight
            ):
                engine.add(waiting.pop())
            engine.step(0.0)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_recording_serves_prompts_and_answers_of_all_mixes_to_the_bit(dtype, monkeypatch):
    base, identities = with_many(dtype)
    steps, right = [], _RecordedStep._prepare
    monkeypatch.setattr(
        _RecordedStep, "_prepare", lambda own, *given: steps.append(1) or right(own, *given)
    )
    found = traffic(engine_of(base, identities), identities, monkeypatch)
    (only,) = recorded_of(base)
    assert len(steps) >= len(found) - 4 and only.most >= 64
    with monkeypatch.context() as patch:
        never(patch)
        assert same(found, traffic(engine_of(base, identities), identities, monkeypatch))


def test_two_engines_of_a_base_take_turns_and_one_that_is_gone_leaves_nothing(monkeypatch):
    base, identities = with_many()
    expected = traffic(engine_of(base, identities), identities, monkeypatch)
    one, other = engine_of(base, identities), engine_of(base, identities)
    other.add(Request(prompt=(5, 9, 31), max_new_tokens=10**3, adapter=identities[3]))
    right = Engine.step

    def both(engine, now):
        right(other, now)
        return right(engine, now)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", both)
        found = traffic(one, identities, monkeypatch)
    assert same(found, expected)
    pages, layer = (
        weakref.ref(one.lanes.exact.forward.keys),
        weakref.ref(one.lanes.exact.forward.keys.layers[0].keys),
    )
    del one
    gc.collect()
    assert pages() is None and layer() is None


@pytest.mark.parametrize("rows", [72, 96, 108])
def test_an_engine_that_begins_with_more_rows_than_were_recorded_keeps_its_blocks(
    rows, monkeypatch
):
    """Its blocks, whose numbers of values these rows divide, are made in its first step."""
    base = based()

    def answered(prompts):
        engine = Engine(
            base, budget_bytes=9 * 16 * bytes_per_token(base), adapters=FixedAdapters({})
        )
        answers = [engine.add(Request(prompt=prompt, max_new_tokens=9))[0] for prompt in prompts]
        engine.run()
        return [answer.new for answer in answers], engine

    prompts = [tuple((7 * n) % 250 for n in range(rows - 9)), tuple(range(40, 49))]
    with monkeypatch.context() as patch:
        never(patch)
        expected, _ = answered(prompts)
    answered([(5, 9, 31)])
    found, engine = answered(prompts)
    assert any(
        blocks.keys.numel() % rows == 0
        for blocks in engine.lanes.exact.forward.keys.layers.values()
    )
    assert found == expected
    assert len(recorded_of(base)) == 1 and recorded_of(base)[0].most >= 64


def test_who_finds_a_recording_taken_computes_in_python(monkeypatch):
    base, identities = with_many()
    expected = traffic(engine_of(base, identities), identities, monkeypatch)
    taken, done = threading.Event(), threading.Event()

    def hold():
        with decode_step_of(base)._parts.steps.leased() as free:
            assert free
            taken.set()
            done.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    taken.wait(60)
    with monkeypatch.context() as patch:
        patch.setattr(_RecordedStep, "_prepare", lambda *_: pytest.fail("of another thread"))
        found = traffic(engine_of(base, identities), identities, monkeypatch)
    done.set()
    thread.join()
    assert same(found, expected)


def spoiled(engine, base):
    """All factors that are laid out and that no running answer uses hold nothing sensible from here
    on."""
    used = {a for s in engine.scheduler.running for a, _ in base.routing.applied(s.request.adapter)}
    for adapter, (table, _) in list(SEEN.items()):
        if adapter not in used:
            for factors in table.factors:
                factors.kept.fill_(0xFF)  # no number, in either type
            del SEEN[adapter]


SEEN: dict = {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_factors_of_adapters_that_went_are_never_read_again(dtype, monkeypatch):
    """As if their memory were somebody else's at once: adapters that are evicted, or come back as
    another version."""
    base, identities = with_many(dtype)
    with monkeypatch.context() as patch:
        never(patch)
        expected = traffic(engine_of(base, identities), identities, monkeypatch)
    engine, right, laid_out = engine_of(base, identities), Engine.step, Lane._laid_out_adapter

    def noted(own, adapter):
        found = laid_out(own, adapter)
        if found[0] is not None:
            SEEN[adapter] = found
        return found

    def step(own, now):
        ended = right(own, now)
        if ended:
            spoiled(own, base)
        return ended

    SEEN.clear()
    with monkeypatch.context() as patch:
        patch.setattr(Lane, "_laid_out_adapter", noted)
        patch.setattr(Engine, "step", step)
        found = traffic(engine, identities, monkeypatch)
    assert same(found, expected) and not SEEN


def test_another_version_under_the_same_name_is_the_one_that_answers(monkeypatch):
    base, identities = with_many()
    own = identities[1:2]
    before = traffic(engine_of(base, own), own, monkeypatch, count=3)
    base.routing.leave("wide")
    move(
        attach(base.model, MIXED["wide"], name="wide", routing=base.routing, head=None, seed=77),
        seed=77,
    )
    engine = engine_of(base, own)
    after = traffic(engine, own, monkeypatch, count=3)
    with monkeypatch.context() as patch:
        never(patch)
        expected = traffic(engine_of(base, own), own, monkeypatch, count=3)
    assert same(after, expected) and not same(before, after)


def test_what_answers_used_is_let_go_when_they_end(monkeypatch):
    base, identities = with_many()
    engine = engine_of(base, identities)
    traffic(engine, identities, monkeypatch)
    assert not (engine.lanes.exact._laid_out or engine.lanes.mixed._laid_out)
    assert all(each._mix is None for each in recorded_of(base))


def test_more_updates_than_a_call_takes_are_computed_otherwise(monkeypatch):
    base, (*identities, _, _) = with_many()
    expected = traffic(engine_of(base, identities), identities, monkeypatch)
    monkeypatch.setattr(dense_calls, "MOST_UPDATES", 3)
    monkeypatch.setattr(few_rows, "MOST_UPDATES", 3)
    given, right = [], _RecordedStep._prepare
    monkeypatch.setattr(
        _RecordedStep, "_prepare", lambda *own: given.append(right(*own)) or given[-1]
    )
    assert same(traffic(engine_of(base, identities), identities, monkeypatch), expected)
    assert any(given) and not all(given)


def test_calls_are_made_again_of_fewer_and_more_rows_within_their_room():
    draw = torch.Generator().manual_seed(0)
    weight, room = torch.randn(40, 40, generator=draw), RowMemory(3, 8)
    x = room.empty(torch.float32, 3, 40)
    x.normal_(generator=draw)
    with record_step(room) as tape:
        y = few_rows.product(
            few_rows.product(few_rows.product(x, weight, None), weight, None), weight, None
        )
    assert tape.unsupported_call is None and tape.has_any_rows
    assert len(room._pieces) == 3  # x's, and two that the products took in turn
    for rows in (8, 1, 5):
        tape.set_rows(rows)
        own, found = (each.as_strided((rows, 40), (40, 1)) for each in (x, y))
        own.normal_(generator=draw)
        tape.replay()
        once = few_rows.product(own, weight, None)
        assert torch.equal(
            found, few_rows.product(few_rows.product(once, weight, None), weight, None)
        )
    for rows in (0, 9):
        with pytest.raises(CallError):
            tape.set_rows(rows)


def test_tables_and_heads_that_c_cannot_read_are_no_ends():
    base = based()
    inner = base.model.model
    embedding = inner.embed_tokens
    head, start = Head(base.model.lm_head.weight), find_start(inner)

    def ends_of(table, head=head):
        return ends.Ends.of(table, 1.0, head, inner, start)

    assert ends_of(embedding) is not None
    turned, other = torch.nn.Embedding(*embedding.weight.shape), torch.nn.Embedding(4, 4)
    turned.weight.data = embedding.weight.data.T.contiguous().T
    assert not turned.weight.is_contiguous()
    for table in (turned, other.to(torch.float64), other.to("meta")):
        assert ends_of(table) is None
    assert ends_of(embedding, Head(head.weight.half())) is None


def test_the_scale_of_an_embedding_is_found_and_no_other_table_has_one():
    table = torch.nn.Embedding(7, 5)
    assert embedding_scale(table) == 1.0
    assert embedding_scale(torch.nn.Embedding(7, 5, max_norm=1.0)) is None
    assert embedding_scale(torch.nn.Linear(2, 2)) is None
    for dtype, scale in ((torch.float32, 32**0.5), (torch.bfloat16, 5.65625)):
        scaled = tiny_base("gemma", dtype).model.get_input_embeddings()
        assert embedding_scale(scaled) == pytest.approx(scale)


def test_a_recorded_step_takes_ids_of_the_table_alone(monkeypatch):
    base = based()
    _, steps = steps_of(base, [()], monkeypatch)
    around_layers = next(step.ends.ends for step in steps if step.ends is not None)
    spans = Spans([SpanRows(0, 3, [0])], 16)
    ids = len(base.model.get_input_embeddings().weight)
    assert around_layers.take([0, 5, ids - 1], spans).shape == (3, ids)
    for wrong in (-1, ids):
        with pytest.raises(ValueError, match="without a row"):
            around_layers.take([0, 5, wrong], spans)


def test_what_is_made_in_the_room_and_kept_spoils_a_recording():
    """Calls that are made again write over it where it took memory that others had before."""
    weight, room, kept = torch.randn(40, 40), RowMemory(3, 8), []
    x = room.empty(torch.float32, 3, 40)

    def run(keep):
        with record_step(room) as tape:
            once = few_rows.product(x, weight, None)
            y = few_rows.product(once, weight, None)
            if keep:
                kept.append(once)
        del once
        tape.check_memory([x, y])
        return tape.unsupported_call

    assert run(keep=False) is None
    assert run(keep=True) == "a tensor that is kept"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_calls_that_read_what_the_one_before_wrote_are_the_same_with_any_number_of_threads(dtype):
    """More of them than processors too: one is late, and the others do not go on before its share
    is done."""
    draw, width = torch.Generator().manual_seed(0), 512
    weights = [torch.randn(width, width, generator=draw).to(dtype) / 16 for _ in range(12)]
    room, before = RowMemory(2, 2), torch.get_num_threads()
    x = room.empty(dtype, 2, width)
    x.normal_(generator=draw)
    with record_step(room) as tape:
        y = x
        for weight in weights:
            y = few_rows.product(y, weight, None)
    expected = y.clone()
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            for _ in range(20):
                y.zero_()
                tape.replay()
                assert torch.equal(y, expected), threads
    finally:
        torch.set_num_threads(before)


def test_what_does_not_grow_with_the_rows_spoils_a_recording_that_is_to_have_others():
    with record_step(RowMemory(3, 8)) as tape:
        torch.empty(4)
    assert tape.unsupported_call == "empty"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_over_blocks_that_are_made_together_give_what_each_gives(dtype):
    """q, k and v of one input, v of another kind, with updates between them, and what is made of
    their outputs."""
    draw, room, width = torch.Generator().manual_seed(0), RowMemory(3, 8), 256
    kinds = {"q": "Q4_K", "k": "Q4_K", "v": "Q6_K", "gate": "Q4_K", "up": "Q4_K", "down": "Q4_K"}
    blocks = {
        name: random_blocks(kind, width, width, seed=i)
        for i, (name, kind) in enumerate(kinds.items())
    }
    pairs = [
        (torch.randn(4, width, generator=draw), torch.randn(width, 4, generator=draw))
        for _ in range(3)
    ]
    factors, bias = few_rows.laid_out(pairs, dtype), torch.ones(width, dtype=dtype)

    def made(x):
        found = {}
        for name, own in zip("qkv", factors, strict=True):
            found[name] = gguf.product(x, blocks[name], kinds[name])
            few_rows.add_updates(found[name], x, few_rows.Updates([(slice(0, 1), own, 0.5)]))
        found["gate"] = gguf.product(found["q"], blocks["gate"], kinds["gate"])
        found["up"] = gguf.product(found["k"], blocks["up"], kinds["up"])
        found["again"] = gguf.product(found["k"], blocks["down"], kinds["down"], bias)
        found["down"] = gguf.product(found["up"], blocks["down"], kinds["down"])
        return found

    x = room.empty(dtype, 3, width)
    x.normal_(generator=draw)
    with record_step(room) as tape:
        found = made(x)
    for _ in range(2):
        x.normal_(generator=draw)
        tape.replay()
        for name, expected in made(x.clone()).items():
            assert torch.equal(found[name], expected), name
