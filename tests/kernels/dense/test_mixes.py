"""The updates of a mix, listed for all layers at once, are those that each layer lists for
itself."""

import ctypes
import gc
import weakref

import pytest
import torch

from tests.support.tiny import tiny_model
from veneer.adapters.attach import attach
from veneer.adapters.config import LoRA
from veneer.adapters.placement.routing import Routing
from veneer.decoding.schedule.adapters import lay_out
from veneer.kernels.bindings import library as native
from veneer.kernels.bindings.arguments import CallError
from veneer.kernels.bindings.dense_calls import Updates, laid_out
from veneer.kernels.dense import few_rows, mixes
from veneer.kernels.dense.mixes import WORDS, AdapterMix, FactorTable

pytestmark = pytest.mark.skipif(
    native.level() < 2, reason="no products of few rows are compiled here"
)

SIZES = {"q": (24, 40), "v": (24, 16), "down": (40, 24)}


def table(keys, rank, dtype=torch.float32, seed=0):
    draw = torch.Generator().manual_seed(seed)
    pairs = [
        (
            torch.randn(rank, SIZES[key][0], generator=draw),
            torch.randn(SIZES[key][1], rank, generator=draw),
        )
        for key in keys
    ]
    scalings = [0.3 + seed + number for number in range(len(keys))]
    return FactorTable(dict(zip(keys, laid_out(pairs, dtype), strict=True)), scalings), scalings


def words(address, count):
    """A, B, first, rows, rank, turn and the bits of the scale of each, as C reads them."""
    found = (ctypes.c_int64 * (count * WORDS)).from_address(address)
    return [(*found[n : n + 6], found[n + 6] & 0xFFFFFFFF) for n in range(0, count * WORDS, WORDS)]


MIXES = {
    "alike": [(0, 3, ("q", "v"), 1.0), (3, 4, ("q", "v"), 1.0), (7, 9, ("q", "v"), 0.5)],
    "of other layers": [(0, 3, ("q", "down"), 1.0), (3, 4, ("v",), -2.0), (4, 5, ("v", "q"), 1.0)],
    "several on the same rows": [
        (0, 2, ("q",), 1.0),
        (2, 4, ("v", "q"), 0.5),
        (2, 4, ("q", "v"), -1.5),
        (4, 6, ("q",), 1.0),
    ],
    "one": [(1, 2, ("down",), 1.0)],
    "none": [],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MIXES)
def test_lists_are_those_that_each_layer_makes_for_itself(name, dtype):
    made = [
        (slice(a, b), *table(keys, 2 + n, dtype, n), weight)
        for n, (a, b, keys, weight) in enumerate(MIXES[name])
    ]
    mix = AdapterMix([(rows, own, weight) for rows, own, _, weight in made], dtype)
    for key in SIZES:
        given = [
            (rows, own.factors[own.keys.index(key)], scalings[own.keys.index(key)] * weight)
            for rows, own, scalings, weight in made
            if key in own.keys
        ]
        assert (key in mix.listed) == (key in mix.keys) == bool(given)
        found = mix.at(key, dtype)
        if not given:
            assert len(found) == 0
            continue
        expected = Updates(given)
        theirs, ours = (words(each.address, len(each)) for each in (expected, found))
        assert [row[:5] + row[6:] for row in ours] == [row[:5] + row[6:] for row in theirs]
        assert [a[5] <= b[5] for a, b in zip(theirs, ours, strict=True)]
        assert (found.room, found.width, found.outs, found.dtype) == (
            expected.room,
            *SIZES[key],
            dtype,
        )
        x, weight = (
            torch.randn(9, SIZES[key][0]).to(dtype),
            torch.randn(*reversed(SIZES[key])).to(dtype),
        )
        by_each, by_mix = (
            few_rows.updated(x, [(weight, None, each)])[0] for each in (expected, found)
        )
        assert torch.equal(by_each, by_mix)


def test_what_is_more_than_updates_is_left_to_the_layer(monkeypatch):
    own, _ = table(("q", "v"), 4)
    mix = AdapterMix([(slice(0, 1), own, 1.0)], torch.float32, {"v", "norm"})
    assert mix.keys == {"q", "v", "norm"}
    assert len(mix.at("q", torch.float32)) == 1 and mix.at("v", torch.float32) is None
    assert mix.at("q", torch.bfloat16) is None
    monkeypatch.setattr(mixes, "MOST_UPDATES", 2)
    pair, crowd = (AdapterMix([(slice(0, 1), own, 1.0)] * n, torch.float32) for n in (2, 3))
    assert len(pair.at("q", torch.float32)) == 2 and crowd.at("q", torch.float32) is None


def test_what_c_could_not_read_is_refused():
    own, _ = table(("q",), 4)
    with pytest.raises(CallError, match="of no rows"):
        AdapterMix([(slice(2, 2), own, 1.0)], torch.float32)
    with pytest.raises(CallError, match="another type"):
        AdapterMix([(slice(0, 2), own, 1.0)], torch.bfloat16)
    other = FactorTable(
        {"q": laid_out([(torch.ones(2, 8), torch.ones(8, 2))], torch.float32)[0]}, [1.0]
    )
    with pytest.raises(CallError, match="different sizes"):
        _ = AdapterMix([(slice(0, 1), own, 1.0), (slice(1, 2), other, 1.0)], torch.float32).listed
    with pytest.raises(CallError, match="a scaling for each"):
        FactorTable({"q": own.factors[0]}, [])
    x = torch.randn(3, 24)
    with pytest.raises(CallError):  # rows that x does not have
        few_rows.updated(
            x,
            [
                (
                    torch.randn(40, 24),
                    None,
                    AdapterMix([(slice(0, 4), own, 1.0)], torch.float32).at("q", x.dtype),
                )
            ],
        )


def test_whoever_has_a_list_holds_what_it_points_at():
    own, _ = table(("q",), 4)
    kept = weakref.ref(own.factors[0].kept)
    listed = AdapterMix([(slice(0, 1), own, 1.0)], torch.float32).at("q", torch.float32)
    del own
    gc.collect()
    assert kept() is not None and len(words(listed.address, 1)) == 1
    del listed
    gc.collect()
    assert kept() is None


def test_factors_are_laid_out_within_the_bytes_that_are_given_or_not_at_all():
    model, routing = tiny_model("llama"), Routing()
    settings = LoRA(rank=4, targets=["q_proj"])
    attachment = attach(
        model, settings, name="a", routing=routing, head=model.get_output_embeddings()
    )
    needed = lay_out(attachment, torch.float32, torch.device("cpu"), 10**9)
    assert needed >= sum(parameter.nbytes for parameter in attachment.parameters().values())
    attachment.laid_out = None
    assert (
        lay_out(attachment, torch.float32, torch.device("cpu"), needed - 1) == 0
        and attachment.laid_out is None
    )
    assert lay_out(attachment, torch.float32, torch.device("cpu"), needed) == needed
    assert attachment.laid_out is not None
