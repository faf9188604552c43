"""Dropout's masks where several adapters act: each draws its own, and the same alone as in a mix."""

import pytest
import torch

from tests.helpers import make_examples
from tests.test_methods import move
from tests.tiny import tiny_model
from veneer.adapters.acting import TokenKeys
from veneer.adapters.attach import attach
from veneer.adapters.config import Bottleneck, DoRA, LoRA
from veneer.adapters.routing import Routing
from veneer.data.batching import make_groups
from veneer.models.step import acting_on, batch_loss, prepare

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
    """The loss as a function of rows and adapters; each group's rows; each group's adapters, (number, weight) each."""
    model, routing = tiny_model(family, torch.float32 if family == "qwen3_moe" else torch.float64), Routing()
    paths = prepare(model)
    for number, name in enumerate(methods):
        made = attach(
            model, METHODS[name], name=f"a{number}", routing=routing, head=model.get_output_embeddings(), seed=9
        )
        move(made, seed=1 if alike else number, scale=0.3)
        if alike:
            take_over(made, routing.attached["a0"], model)
    examples = make_examples(2 * len(groups))
    rows = [examples[2 * n : 2 * n + 2] for n in range(len(groups))]
    adapters = [routing.applied(tuple((f"a{number}", weight) for number, weight in group)) for group in groups]

    def loss(rows, adapters, *, drops=True):
        batch = make_groups(rows, packed=True, share_prompt=False, device=torch.device("cpu"))
        keys = TokenKeys(batch.dropout_rows, 3) if drops else None
        with torch.no_grad(), routing.held(acting_on(batch, adapters)), routing.drawing(keys):
            return float(batch_loss(model, paths, routing, batch, total=10.0))

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


@pytest.mark.parametrize("methods", [["lora", "lora"], ["lora", "dora"], ["dora", "dora"], ["bottleneck"] * 2], ids=str)
def test_adapters_that_act_together_draw_masks_of_their_own(methods):
    """Two of the same values, one taken from the other: with the same masks nothing would be left."""
    loss, rows, (both, base) = given("llama", methods, [[(0, 1.0), (1, -1.0)], []], alike=True)
    nothing = loss(rows[:1], [base])
    assert loss(rows[:1], [both], drops=False) == pytest.approx(nothing, rel=FLOAT32)
    assert loss(rows[:1], [both]) != pytest.approx(nothing, rel=1e-3)
