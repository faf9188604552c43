"""Dropout's masks: a token's by the text up to it, however rows are laid; and where several
adapters act."""

import numpy as np
import pytest
import torch

from tests.adapters.test_methods import move
from tests.models.test_step import FP32, assert_same
from tests.support.helpers import make_examples
from tests.support.models.routed import Routed, acting_on, batch_loss
from tests.support.tiny import tiny_model
from tests.training.test_loop import make_job
from tests.training.test_loop import run as train
from veneer.adapters.attach import attach
from veneer.adapters.config import Bottleneck, DoRA, LoRA
from veneer.adapters.placement.acting import TokenKeys
from veneer.adapters.placement.routing import Routing
from veneer.data.batching import make_batch, make_groups, prefix_keys, shared_prompt
from veneer.models.step import prepare

FLOAT32 = 1e-6
"""Lengths of rows and experts are computed in it."""
PLACES = {"targets": ["q_proj", "down_proj"]}
METHODS = {
    "lora": LoRA(rank=3, alpha=5.0, dropout=0.5, **PLACES),
    "dora": DoRA(rank=3, alpha=5.0, dropout=0.5, **PLACES),
    "experts": LoRA(rank=3, alpha=5.0, dropout=0.5, targets=["gate_up_proj", "down_proj"]),
    "bottleneck": Bottleneck(size=5, dropout=0.5),
}


def take_over(made, first, model):
    """The first one's values; of DoRA the lengths that turn nothing, so that it is LoRA."""
    for path, layer in made.layers.items():
        for name, value in first.layers[path].parts().items():
            layer.parts()[name].data.copy_(value)
        if "magnitude" in layer.parts():
            layer.magnitude.data.copy_(layer.norm(model.get_submodule(path).frozen))


def given(family, methods, groups, *, alike=False):
    """The loss as a function of rows and adapters; each group's rows; each group's adapters,
    (number, weight) each."""
    model, routing = (
        tiny_model(family, torch.float32 if family == "qwen3_moe" else torch.float64),
        Routing(),
    )
    paths = prepare(model)
    for number, name in enumerate(methods):
        made = attach(
            model,
            METHODS[name],
            name=f"a{number}",
            routing=routing,
            head=model.get_output_embeddings(),
            seed=9,
        )
        move(made, seed=1 if alike else number, scale=0.3)
        if alike:
            take_over(made, routing.attached["a0"], model)
    examples = make_examples(2 * len(groups))
    rows = [examples[2 * n : 2 * n + 2] for n in range(len(groups))]
    adapters = [
        routing.applied(tuple((f"a{number}", weight) for number, weight in group))
        for group in groups
    ]

    def loss(rows, adapters, *, drops=True):
        batch = make_groups(rows, packed=True, share_prompt=False, device=torch.device("cpu"))
        keys = TokenKeys(batch.dropout_rows, 3) if drops else None
        with torch.no_grad(), routing.held(acting_on(batch, adapters)), routing.drawing(keys):
            return float(batch_loss(Routed(model, paths, routing), batch, total=10.0))

    return loss, rows, adapters


@pytest.mark.parametrize(
    ("family", "methods"),
    [
        ("llama", ["lora", "lora", "dora"]),
        ("llama", ["bottleneck", "lora", "bottleneck"]),
        ("qwen3_moe", ["experts", "experts", "lora"]),
    ],
    ids=str,
)
def test_weighted_adapters_draw_the_same_masks_in_a_mix_as_alone(family, methods):
    groups = [[(0, 1.0)], [(2, 0.5), (0, -1.5), (1, 1.0)], [], [(1, -1.0), (2, 1.0)]]
    loss, rows, adapters = given(family, methods, groups)
    alone = sum(loss([own], [its]) for own, its in zip(rows, adapters, strict=True))
    assert loss(rows, adapters) == pytest.approx(alone, rel=FLOAT32)
    assert loss(rows, adapters, drops=False) != pytest.approx(alone, rel=1e-3)


@pytest.mark.parametrize(
    "methods", [["lora", "lora"], ["lora", "dora"], ["dora", "dora"], ["bottleneck"] * 2], ids=str
)
def test_adapters_that_act_together_draw_masks_of_their_own(methods):
    """Two of the same values, one taken from the other: with the same masks nothing would be
    left."""
    loss, rows, (both, base) = given("llama", methods, [[(0, 1.0), (1, -1.0)], []], alike=True)
    nothing = loss(rows[:1], [base])
    assert loss(rows[:1], [both], drops=False) == pytest.approx(nothing, rel=FLOAT32)
    assert loss(rows[:1], [both]) != pytest.approx(nothing, rel=1e-3)


# by the text up to a token


def test_texts_that_begin_alike_have_the_same_keys_as_far_as_they_do_and_none_behind():
    draw = np.random.default_rng(0)
    text = draw.integers(0, 50_000, 600).astype(np.int32)
    keys = prefix_keys(text)
    assert keys.dtype == np.int64 and keys.min() >= 0 and keys.max() < 2**32
    for end in (0, 1, 77, 600):
        assert np.array_equal(prefix_keys(text[:end]), keys[:end])
    for at in (0, 1, 311, 599):
        other = text.copy()
        other[at] += 1
        found = prefix_keys(other)
        assert np.array_equal(found[:at], keys[:at]) and not (found[at:] == keys[at:]).any()
    swapped = text.copy()
    swapped[[3, 4]] = text[[4, 3]]
    assert text[3] != text[4] and not (prefix_keys(swapped)[3:] == keys[3:]).any()


@pytest.mark.parametrize(
    "text", [[0] * 4000, [1, 2] * 2000, [*range(4000)]], ids=["one token", "two", "rising"]
)
def test_the_tokens_of_a_text_have_keys_of_their_own(text):
    keys = prefix_keys(np.array(text, dtype=np.int32))
    assert len(set(keys.tolist())) == len(text)
    bits = keys[:, None] >> np.arange(32) & 1
    assert np.abs(bits.mean(0) - 0.5).max() < 0.05


def drawing(method, family="llama", examples=None):
    """Loss and gradients as a function of how the rows are laid."""
    model, routing = tiny_model(family), Routing()
    paths = prepare(model)
    made = attach(
        model, method, name="a", routing=routing, head=model.get_output_embeddings(), seed=9
    )
    move(made, seed=1, scale=0.3)
    routing.active = (("a", 1.0),)
    examples = make_examples(6, prompt=11, longest=30) if examples is None else examples
    parameters = made.parameters().values()

    def run(*, parts=((0, 1, 2, 3, 4, 5),), step=3, seed=0, drops=True, **laid):
        for parameter in parameters:
            parameter.requires_grad_(True).grad = None
        loss, computed = 0.0, 0
        for part in parts:
            kinds = {"packed": True, "share_prompt": True, **laid}
            batch = make_batch([examples[i] for i in part], **kinds, device=torch.device("cpu"))
            with routing.drawing(TokenKeys(batch.dropout_rows, step, seed) if drops else None):
                found = batch_loss(Routed(model, paths, routing), batch, total=10.0)
                found.backward()
            loss, computed = loss + found.item(), computed + batch.computed_tokens
        return loss, [p.grad.clone() for p in parameters], computed

    return run


LAID = {
    **{
        name: ("qwen3_moe" if name == "experts" else "llama", method)
        for name, method in METHODS.items()
    },
    "head": ("llama", LoRA(rank=3, alpha=5.0, dropout=0.5, targets=["lm_head", "o_proj"])),
    "a window": ("gemma3", METHODS["lora"]),
}


@pytest.mark.parametrize("case", LAID)
def test_with_dropout_too_a_prompt_is_computed_once_and_nothing_depends_on_how_rows_are_laid(case):
    family, method = LAID[case]
    run = drawing(method, family)
    shared = run()
    assert shared[0] != pytest.approx(run(drops=False)[0], rel=1e-3)
    apart = run(share_prompt=False)
    assert shared[2] < apart[2] - 40
    assert_same(shared[:2], apart[:2])
    for laid in (
        {"packed": False},
        {"parts": ((4, 2, 0, 5, 3, 1),)},
        {"parts": ((0, 1), (2, 3), (4, 5))},
        {"parts": [(number,) for number in range(6)]},
        {"parts": ((3, 0, 1, 2, 5), (4,)), "share_prompt": False},
    ):
        assert_same(run(**laid)[:2], shared[:2])


def test_rows_that_share_a_part_of_their_beginning_have_the_same_masks_over_that_part_alone():
    examples = make_examples(2, prompt=11, longest=30)
    (one, other), prompt = examples, shared_prompt(examples)
    assert 0 < prompt <= 11
    batch = make_batch(examples, packed=False, share_prompt=False, device=torch.device("cpu"))
    first, second = batch.dropout_rows.view(2, -1)
    both = min(len(one.ids), len(other.ids)) - 2
    assert torch.equal(first[:11], second[:11]) and not (first[11:both] == second[11:both]).any()


def test_the_same_row_draws_the_same_in_a_step_and_another_with_another_step_seed_or_module():
    (one,) = make_examples(1)
    run = drawing(METHODS["lora"], examples=[one, one])
    twice, once = run(parts=((0, 1),)), run(parts=((0,),))
    assert_same(twice[:2], (2 * once[0], [2 * each for each in once[1]]))
    for other in ({"step": 4}, {"seed": 1}):
        assert run(parts=((0,),), **other)[0] != pytest.approx(once[0], rel=1e-4)
    keys = torch.from_numpy(prefix_keys(one.ids))
    masks = [
        TokenKeys(keys, step, seed, number)
        .mask(module, 0.5, expert=expert)
        .apply(torch.ones(len(keys), 64))
        != 0
        for step, seed, number, module, expert in (
            (3, 0, 0, 7, 0),
            (4, 0, 0, 7, 0),
            (3, 1, 0, 7, 0),
            (3, 0, 1, 7, 0),
            (3, 0, 0, 8, 0),
            (3, 0, 0, 7, 1),
        )
    ]
    for at, mask in enumerate(masks):
        assert mask.float().mean() == pytest.approx(0.5, abs=0.05)
        for another in masks[:at]:  # as independent ones agree
            assert (mask == another).float().mean() == pytest.approx(0.5, abs=0.05)


def test_a_run_draws_by_its_seed_and_whatever_is_computed_at_once(tmp_path):
    def losses(name, **settings):
        job = make_job(
            tmp_path / name, dropout=0.5, validation=0, steps=3, order="file", **settings
        )
        progress = train(job)[0].progress
        return progress.first_loss, progress.last_loss

    one, *others = (losses(f"{size}", micro_batch=size) for size in (1, 2, 4))
    for other in (*others, losses("apart", micro_batch=4, share_prompt=False)):
        assert other == pytest.approx(one, rel=20 * FP32)
    first, last = losses("seed", micro_batch=1, seed=1)
    assert first == pytest.approx(one[0], rel=FP32)  # B is 0
    assert last != pytest.approx(one[1], rel=1e-3)
