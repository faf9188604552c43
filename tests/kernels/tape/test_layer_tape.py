"""The calls of one layer are replayed for others to the same bits; those that a tape cannot hold
are not."""

import pytest
import torch

from tests.support.helpers import fill, make_examples
from tests.support.models.routed import batch_loss
from tests.support.tiny import tiny_model
from veneer.adapters.attach import attach
from veneer.adapters.config import DoRA, Full, LoRA
from veneer.adapters.placement.acting import TokenKeys
from veneer.adapters.placement.routing import Routing
from veneer.bases.loading.from_config import blueprint
from veneer.data.batching import make_batch
from veneer.execution.train_step import fused, replacements
from veneer.kernels.bindings import arguments, attention_calls
from veneer.kernels.bindings import library as native
from veneer.kernels.bindings.arguments import CallError
from veneer.kernels.layers import block
from veneer.kernels.tape import layer_tape
from veneer.kernels.tape.tape import Tape, TapeCall
from veneer.models.checkpointing import checkpointed
from veneer.models.step import prepare
from veneer.plan.simulation.dry_run import dry_run
from veneer.plan.simulation.step_counts import Step
from veneer.plan.workload import synthetic_rows

pytestmark = pytest.mark.skipif(not native.has_bf16(), reason="no products of bf16 pairs here")
SIZES = {
    "hidden_size": 512,
    "intermediate_size": 480,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


class Trained:
    """A model of four layers in bf16 whose products are large enough for kernels of our own, and
    rows."""

    def __init__(self, family="llama", prompt=40, sizes=SIZES, **settings):
        self.model = tiny_model(family, torch.bfloat16, **sizes, head_dim=64, num_hidden_layers=4)
        self.routing = Routing()
        self.paths = prepare(self.model)
        given = {"targets": "all-linear", "rank": 16, "alpha": 5.0, **settings}
        head = self.model.get_output_embeddings()
        attachment = attach(self.model, LoRA(**given), name="a", routing=self.routing, head=head)
        fill(attachment.parameters().values(), scale=0.1)
        self.parameters = list(attachment.parameters().values())
        self.routing.active = (("a", 1.0),)
        self.examples = make_examples(9, prompt=prompt, longest=prompt + 30)

    def measured(self):
        batch = make_batch(
            self.examples, packed=True, share_prompt=True, device=torch.device("cpu")
        )
        keys = TokenKeys(torch.arange(batch.ids.numel()) * 7919 % 2**32, 3)
        found, drawing = (
            replacements(self.model),
            self.routing.held(self.routing.acting.drawing(keys)),
        )
        with drawing, fused(self.model, found):
            loss = batch_loss(self, batch, total=float(batch.trained_tokens))
            return [loss, *torch.autograd.grad(loss, self.parameters)]


@pytest.fixture
def again(monkeypatch):
    """How many times calls were made again."""
    made, own = [], layer_tape.LayerTape.replay

    def counted(self, addresses):
        made.append(len(addresses))
        return own(self, addresses)

    monkeypatch.setattr(layer_tape.LayerTape, "replay", counted)
    return made


def both(trained, monkeypatch):
    """What is measured, then the same with every layer's calls made by Python."""
    ours = trained.measured()
    with monkeypatch.context() as patch:
        patch.setattr(block.Block, "replay_key", lambda *_: None)
        return ours, trained.measured()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"rank": 8},
        {"rank_pattern": {"k_proj": 32, "up_proj": 64}},
        {"prompt": 0},
        {"targets": ["q_proj", "v_proj"]},
        {"targets": ["down_proj", "k_proj"]},
        {"dropout": 0.2},
        {"dropout": 0.2, "targets": ["down_proj", "k_proj"]},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_layers_made_again_have_the_bits_of_their_own_calls(family, settings, again, monkeypatch):
    ours, plain = both(Trained(family, **settings), monkeypatch)
    assert (
        len(again) == 3 + 2
    )  # forward all but the first, backward all but the last and the first, of which x needs none
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))
    assert all(gradient.abs().max() > 0 for gradient in ours[1:])


def test_so_they_have_with_one_thread(again):
    trained, found = Trained(), []
    for threads in (2, 1):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        found.append(trained.measured())
        torch.set_num_threads(before)
    assert len(again) == 2 * 5
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("together", [layer_tape.MOST_SHARED, 2**14, 1])
def test_checkpointed_layers_keep_the_same_tensors_when_they_are_computed_again(
    together, again, monkeypatch
):
    """The first layer's calls are made by Python in forward, and made again in backward."""
    monkeypatch.setattr(layer_tape, "MOST_SHARED", together)
    trained = Trained()
    kept = trained.measured()
    again.clear()
    with checkpointed(trained.model, trained.routing, on=True):
        ours = trained.measured()
    assert len(again) == 3 + 4 + 2
    assert all(torch.equal(a, b) for a, b in zip(ours, kept, strict=True))


SECOND = r".*\.1\..*q_proj"
WINDOWS = {
    "use_sliding_window": True,
    "sliding_window": 6,
    "layer_types": ["full_attention", "sliding_attention"] * 2,
}


@pytest.mark.parametrize(
    "settings",
    [
        {"rank_pattern": {SECOND: 32}},
        {"alpha_pattern": {SECOND: 9.0}},
        {"family": "qwen2", "sizes": {**SIZES, **WINDOWS}, "prompt": 0},
    ],
    ids=["rank", "scaling", "window"],
)
def test_layers_that_differ_make_their_own_calls(settings, again, monkeypatch):
    ours, plain = both(Trained(**settings), monkeypatch)
    assert len(again) < 5
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


def test_what_torch_computes_is_not_left_out(again, monkeypatch):
    """Products with fewer weights than kernels of our own are for are the library's."""
    ours, plain = both(Trained(sizes={**SIZES, "num_key_value_heads": 1}), monkeypatch)
    assert not again
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


def test_nor_is_what_somebody_hears_of(again):
    trained, names = Trained(), []
    with arguments.observe_calls(lambda name, given: names.append(name)):
        heard = trained.measured()
    assert not again
    assert names.count("veneer_block_heads") == 2 * 4
    assert all(torch.equal(a, b) for a, b in zip(heard, trained.measured(), strict=True))


def added_twice(own, scratch=None):
    """(2, 48, 1, 16) = own (2, 3, 1, 1, 48, 16), summed, twice, by way of other memory."""
    first = torch.empty(2, 48, 1, 16) if scratch is None else scratch
    attention_calls.attention_shared(own, first, add=False)
    second = torch.empty(2, 48, 1, 16)
    attention_calls.zeros(second[0], 0)
    attention_calls.attention_summed(first[:, None], first, second[0], second[1])
    return second


def test_memory_between_is_used_again_where_it_may_be():
    pieces = [
        layer_tape.Allocation(0, size, first, last)
        for size, first, last in ((100, 0, 2), (64, 1, 3), (10, 3, 3), (200, 4, 5))
    ]
    assert layer_tape.share_memory(pieces) == ([0, 128, 0, 0], 200)


def test_what_lies_elsewhere_is_read_and_written_there():
    own, other = (torch.randn(2, 3, 1, 1, 48, 16) for _ in range(2))
    (made,), found = layer_tape.record_layer([own], lambda: [[added_twice(own)]])
    assert torch.equal(made[0], 2 * own.sum(1)[:, 0].transpose(1, 2))
    kept = made[0].clone()
    (memory,) = found.replay([other.data_ptr()])
    (again,) = found.tensors(0, memory)
    assert torch.equal(again, added_twice(other))
    assert torch.equal(made[0], kept)


def test_what_a_group_keeps_lies_in_few_pieces(monkeypatch):
    own, other = (torch.randn(2, 3, 1, 1, 48, 16) for _ in range(2))

    def made(own):
        kept, nothing, odd = (
            added_twice(own),
            torch.empty(0, 3, dtype=torch.int64),
            torch.empty(3)[:0],
        )
        return [[added_twice(own)], [kept, nothing, added_twice(own)[1], odd, kept[0]]]

    for most, pieces in ((layer_tape.MOST_SHARED, 1), (1, 2)):
        monkeypatch.setattr(layer_tape, "MOST_SHARED", most)
        _, found = layer_tape.record_layer([own], lambda: made(own))
        groups = found.replay([other.data_ptr()])
        assert [len(group) for group in groups] == [1, pieces]
        for number, (group, expected) in enumerate(zip(groups, made(other), strict=True)):
            for a, b in zip(found.tensors(number, group), expected, strict=True):
                assert torch.equal(a, b) and (a.dtype, a.stride()) == (b.dtype, b.stride())
            starts = [a.data_ptr() for a in found.tensors(number, group)]
            real = [
                at
                for at, b in zip(found.addresses(number, group), expected, strict=True)
                if b.numel()
            ]
            assert real == [at for at, b in zip(starts, expected, strict=True) if b.numel()]


def test_calls_over_memory_that_nobody_named_are_not_made_again():
    own, elsewhere = torch.randn(2, 3, 1, 1, 48, 16), torch.empty(2, 48, 1, 16)
    for given in ([own], [own, elsewhere]):
        _, found = layer_tape.record_layer(given, lambda: [[added_twice(own, elsewhere)]])
        assert (found is None) == (len(given) == 1)


def test_a_function_that_c_does_not_know_is_an_error():
    with pytest.raises(CallError, match="does not know"):
        Tape([TapeCall(99)]).replay(0, 1)


@pytest.mark.parametrize(
    ("method", "layers"), [(LoRA(rank=16), 30), (DoRA(rank=16), 0), (Full(), 0)]
)
def test_a_plan_knows_the_layers_whose_calls_are_made_so(method, layers):
    base = blueprint("smollm2-135m")
    assert (
        dry_run(
            Step(base.config, torch.bfloat16, method, synthetic_rows(2, 64))
        ).work.replayed_layers
        == layers
    )
