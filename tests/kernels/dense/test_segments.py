"""A frozen linear layer whose rows have adapters of their own, against the plain loop over them."""

import itertools
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from veneer.kernels.dense import few_rows
from veneer.kernels.dense.bundles import LONG, SPREAD, make_bundles
from veneer.kernels.dense.dropout import Dropout
from veneer.kernels.dense.row_updates import RowUpdate
from veneer.kernels.dense.segments import (
    UpdateCache,
    linear_with_updates,
    linear_with_updates_reference,
)
from veneer.linear import DenseLinear

I, O = 24, 40


@dataclass(eq=False)
class Pair:
    A: nn.Parameter
    B: nn.Parameter

    def factors(self):
        return self.A, self.B


def pair(rank, seed):
    generator = torch.Generator().manual_seed(seed)
    return Pair(
        nn.Parameter(torch.randn(rank, I, generator=generator)),
        nn.Parameter(torch.randn(O, rank, generator=generator)),
    )


def update(start, stop, *, rank=4, scaling=1.7, share=0.0, seed=0):
    keys = torch.arange(start, stop) * 977
    return RowUpdate(
        slice(start, stop),
        pair(rank, 7 * start + seed),
        scaling,
        Dropout(keys, 3 + seed, share) if share else None,
    )


MIXES = {
    "none": [],
    "one": [update(3, 9)],
    "single rows": [update(n, n + 1, rank=2 + n % 3) for n in range(12)],
    "like lengths": [update(5 * n, 5 * n + 5) for n in range(6)],
    "a gap as long as what is filled up": [update(0, 10), update(15, 20)],
    "unlike lengths and ranks": [
        update(0, 7, rank=3),
        update(9, 14, rank=5),
        update(20, 26, rank=9),
        update(26, 27),
    ],
    "long ones among short ones": [
        update(0, LONG),
        update(LONG, LONG + 3),
        update(LONG + 3, LONG + 6),
    ],
    "several on the same rows": [
        update(0, 6),
        update(0, 6, seed=1),
        update(6, 12),
        update(6, 12, rank=2, seed=1),
    ],
    "overlapping": [update(0, 8), update(4, 12), update(6, 7, seed=2)],
    "dropout": [update(0, 6, share=0.5), update(6, 13), update(13, 20, share=0.3, seed=1)],
    "out of order": [update(8, 12), update(0, 4), update(4, 8)],
}


def computed(way, x, bias, base, updates):
    leaves = [
        x,
        *([] if bias is None else [bias]),
        *(p for u in updates for p in u.layer.factors()),
    ]
    for leaf in leaves:
        leaf.grad = None
    y = way(x, bias, base, updates)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    return [y.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_rows_and_gradients_are_those_of_the_plain_loop(mix, with_bias):
    torch.manual_seed(0)
    linear = nn.Linear(I, O, bias=False).requires_grad_(False).double()
    x = torch.randn(LONG + 10, I, dtype=torch.float64, requires_grad=True)
    bias = nn.Parameter(torch.randn(O, dtype=torch.float64)) if with_bias else None
    updates, base, plan = MIXES[mix], DenseLinear(linear), UpdateCache()
    expected = computed(linear_with_updates_reference, x, bias, base, updates)
    found = computed(lambda *given: linear_with_updates(*given, plan), x, bias, base, updates)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(linear_with_updates(x, bias, base, updates, plan), expected[0])


@pytest.mark.parametrize(
    ("ends", "bundles"),
    [
        ([0, LONG - 1, 2 * LONG - 2], [(0, 1)]),
        ([0, LONG, 2 * LONG], []),
        ([0, 5, 5 + 5 * SPREAD], [(0, 1)]),
        ([0, 5, 6 + 5 * SPREAD], []),
    ],
)
def test_short_segments_of_similar_length_are_computed_together(ends, bundles):
    updates = [update(start, stop) for start, stop in itertools.pairwise(ends)]
    made = make_bundles(updates, torch.float32, torch.device("cpu"))
    assert [bundle.numbers for bundle in made] == bundles


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_no_update_names_are_the_bases_to_the_bit(dtype):
    torch.manual_seed(0)
    base, x = DenseLinear(nn.Linear(I, O, bias=False).to(dtype)), torch.randn(40, I, dtype=dtype)
    with torch.no_grad():
        plain = base.product(x, None)
        for updates in MIXES.values():
            named = torch.zeros(LONG + 10, dtype=torch.bool)
            for each in updates:
                named[each.rows] = True
            if named[40:].any():
                continue
            found = linear_with_updates(x, None, base, updates, UpdateCache())
            assert torch.equal(found[~named[:40]], plain[~named[:40]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mix", MIXES)
def test_prepared_updates_are_those_of_the_plain_loop(mix, dtype):
    torch.manual_seed(0)
    updates = [each for each in MIXES[mix] if each.dropout is None]
    base, x = DenseLinear(nn.Linear(I, O).to(dtype)), torch.randn(LONG + 10, I).to(dtype)
    wide = DenseLinear(nn.Linear(I, O).double())
    wide.module.load_state_dict(base.module.state_dict())
    bias = base.own_bias()
    with torch.no_grad():
        expected = linear_with_updates_reference(x.double(), wide.own_bias(), wide, updates)
        found = linear_with_updates(x, bias, base, updates, UpdateCache())
    worst = (found.double() - expected).abs().max() / expected.abs().max()
    assert worst <= (1e-5 if dtype == torch.float32 else 2**-6)


def test_what_stays_for_the_next_mix_is_not_typed_anew_and_what_trained_in_between_is():
    layers = [pair(4, seed) for seed in range(3)]
    mix = [RowUpdate(slice(n, n + 1), layer, 1.0) for n, layer in enumerate(layers)]
    base, x = DenseLinear(nn.Linear(I, O).bfloat16()), torch.ones(3, I, dtype=torch.bfloat16)
    asked = []

    def product(plan, updates):
        with torch.no_grad():
            return linear_with_updates(x, None, base, updates, plan)

    for layer in layers:
        layer.factors = lambda layer=layer: asked.append(layer) or (layer.A, layer.B)
    first = UpdateCache()
    before = product(first, mix[:2])
    second = first.following()
    assert torch.equal(product(second, mix[1:])[1], before[1])
    if few_rows.takes_updates(2, torch.bfloat16, x.device):
        assert asked == layers
        product(second.following(layers[:1]).following(), mix)
        assert asked == [*layers, *layers[1:]]
    with torch.no_grad():
        layers[1].B.mul_(3)
    second.forget()
    assert not torch.equal(product(second, mix[1:])[1], before[1])
    assert torch.equal(product(second.following(), mix[1:]), product(UpdateCache(), mix[1:]))
