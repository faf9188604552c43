"""Saved activations that leave the device come back to the bit, are copied once, and weights stay.

On a CPU the hooks are told that "cpu" is the device to leave: the copies are then as real as they
are on a GPU.
"""

import weakref
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from tests.support.helpers import make_examples
from tests.support.models.routed import Routed, batch_loss
from tests.support.tiny import tiny_model
from veneer.adapters.attach import attach
from veneer.adapters.config import LoRA
from veneer.adapters.placement.routing import Routing
from veneer.data.batching import make_batch
from veneer.errors import ConfigError
from veneer.models.step import prepare
from veneer.training.config import RunConfig
from veneer.training.optimizer import offload
from veneer.training.optimizer.offload import CudaCopyStreams, Offload, offload_for, offloaded


@pytest.fixture(autouse=True)
def small_tensors_count(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(offload, "WORTH_BYTES", 512)


def gradients(dtype, *, moved, lanes=None, most=2**29):
    model = tiny_model("llama", dtype)
    paths, routing = prepare(model), Routing()
    attachment = attach(
        model,
        LoRA(rank=2, alpha=6.0),
        name="a",
        routing=routing,
        head=model.get_output_embeddings(),
    )
    for layer in attachment.layers.values():
        layer.B.data.normal_(generator=torch.Generator().manual_seed(1))
    routing.active = (("a", 1.0),)
    batch = make_batch(
        make_examples(6), packed=paths.packed, share_prompt=True, device=torch.device("cpu")
    )
    weights = [*model.parameters(), *model.buffers()]
    hooks = Offload(weights, moves="cpu", lanes=lanes, pending_bytes=most) if moved else None
    with offloaded(hooks):
        loss = batch_loss(Routed(model, paths, routing), batch, total=1.0)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in attachment.parameters().items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loss_and_gradients_are_the_same_to_the_bit(dtype):
    (loss, moved), (expected, stayed) = gradients(dtype, moved=True), gradients(dtype, moved=False)
    assert torch.equal(loss, expected)
    assert all(torch.equal(moved[name], stayed[name]) for name in stayed)


def watched(hooks):
    """saved_tensors_hooks, and what each pack returned."""
    packed = []
    return (
        saved_tensors_hooks(lambda t: packed.append(hooks.pack(t)) or packed[-1], hooks.unpack),
        packed,
    )


def test_what_several_operations_save_is_copied_once_and_weights_never():
    weight = torch.randn(64, 64, requires_grad=True)
    x = torch.randn(32, 64, requires_grad=True)
    hidden = x * 1.5
    context, packed = watched(Offload([weight], moves="cpu"))
    with context:
        y = (
            (hidden @ weight).sum()
            + (hidden @ weight.detach().clone()).sum()
            + (hidden * hidden).sum()
        )
    away = [saved for saved in packed if not isinstance(saved, torch.Tensor)]
    assert len({id(saved) for saved in away if saved.host.shape == hidden.shape}) == 1
    assert any(
        saved is weight or saved.data_ptr() == weight.data_ptr()
        for saved in packed
        if isinstance(saved, torch.Tensor)
    )
    y.backward()
    expected = 1.5 * ((weight.detach() * 2).sum(1) + 2 * hidden.detach())
    torch.testing.assert_close(x.grad, expected, rtol=1e-5, atol=1e-4)


def test_the_original_is_let_go_and_its_address_is_not_mistaken_for_it():
    hooks = Offload([], moves="cpu")
    found = []
    for number in range(50):  # freed memory is used again for the next tensor of the same size
        tensor = torch.full((64, 64), float(number))
        found.append(hooks.pack(tensor))
        kept = weakref.ref(tensor)
        del tensor
        assert kept() is None
    assert [float(hooks.unpack(away)[0, 0]) for away in found] == list(range(50))


def test_a_tensor_that_changed_in_place_is_another_one():
    hooks = Offload([], moves="cpu")
    tensor = torch.zeros(64, 64)
    first = hooks.pack(tensor)
    tensor.add_(1)
    second = hooks.pack(tensor)
    assert (hooks.unpack(first).sum(), hooks.unpack(second).sum()) == (0, 64 * 64)
    assert hooks.pack(tensor) is second


def test_layouts_come_back_as_they_were_and_repeated_values_stay():
    hooks = Offload([], moves="cpu")
    base = torch.randn(64, 96)
    for view in (base.T, base[:, 32:64], base[::2], base.view(96, 64)):
        back = hooks.unpack(hooks.pack(view))
        assert (back.shape, back.stride()) == (view.shape, view.stride())
        assert torch.equal(back, view)
    repeated = torch.randn(96).expand(64, 96)
    assert hooks.pack(repeated) is repeated
    assert hooks.pack(torch.zeros(3)).shape == (3,)


def test_tensors_leave_from_a_size_on_and_those_of_another_device_stay():
    hooks = Offload([], moves="cpu")
    large, small = torch.zeros(512, dtype=torch.uint8), torch.zeros(511, dtype=torch.uint8)
    assert hooks.pack(large) is not large and hooks.pack(small) is small
    assert hooks.unpack(small) is small and torch.equal(hooks.unpack(hooks.pack(large)), large)
    assert Offload([]).pack(large) is large


@pytest.mark.parametrize(
    ("own", "to", "pinned"), [("cuda", "cpu", True), ("cpu", "cuda", False), ("cpu", "cpu", False)]
)
def test_memory_of_the_host_is_pinned_where_a_gpu_copies_into_it(own, to, pinned, monkeypatch):
    given = {}
    monkeypatch.setattr(torch, "empty_strided", lambda *shape, **more: given.update(more))
    tensor = SimpleNamespace(
        shape=(2,), stride=lambda: (1,), dtype=torch.float32, device=torch.device(own)
    )
    offload._empty_like(tensor, torch.device(to))
    assert (given["device"].type, given["pin_memory"]) == (to, pinned)


class Late:
    """Lanes whose copies run when somebody waits for them, no sooner: until then there is nothing
    to read, and memory that nobody holds any more is another's. said: in order, copies by the
    number that they left with."""

    def __init__(self):
        self.said, self.hosts, self.begun = [], [], []

    def out(self, host, of):
        self.hosts.append(host)
        self.said.append(("out", len(self.hosts) - 1))
        return self._late(host, weakref.ref(of), None)

    def back(self, there, host, after):
        number = next(n for n, each in enumerate(self.hosts) if each is host)
        self.said.append(("back", number))
        there.fill_(float("nan"))
        return self._late(weakref.ref(there), host, after)

    def _late(self, to, of, after):
        def run():
            if not run.over:
                run.over = True
                if after is not None:
                    after()
                ends = [each() if isinstance(each, weakref.ref) else each for each in (to, of)]
                assert all(end is not None for end in ends), (
                    "memory was let go before its copy was over"
                )
                ends[0].copy_(ends[1])

        run.over = False
        self.begun.append(run)
        return run

    def finish(self):
        """Every copy is over in the end, waited for or not."""
        for run in self.begun:
            run()

    def wait(self, event):
        self.said.append(("wait", None))
        event()


@pytest.mark.parametrize("under_way", [0, 5_000, 40_000, 2**29])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_copies_that_run_as_late_as_they_may_change_no_bit(dtype, under_way):
    lanes = Late()
    (loss, moved), (expected, stayed) = (
        gradients(dtype, moved=True, lanes=lanes, most=under_way),
        gradients(dtype, moved=False),
    )
    assert torch.equal(loss, expected)
    assert all(torch.equal(moved[name], stayed[name]) for name in stayed)
    assert any(way == "out" for way, _ in lanes.said)
    assert any(way == "back" for way, _ in lanes.said) == (under_way < 2**29), (
        "what is still there is not fetched"
    )


def test_copies_hold_no_more_than_is_said_and_are_under_way_before_they_are_asked_for():
    size, lanes = 64 * 64 * 4, Late()
    hooks = Offload([], moves="cpu", lanes=lanes, pending_bytes=3 * size)
    hooks.begin()
    away = []
    for number in range(8):
        away.append(hooks.pack(torch.full((64, 64), float(number))))
        assert hooks.pending_bytes == min(number + 1, 3) * size
    hooks.forget()
    assert [float(hooks.unpack(each)[0, 0]) for each in (away[7], away[6], away[5])] == [7, 6, 5]
    assert "back" not in [way for way, _ in lanes.said], "they had not gone"
    lanes.said.clear()
    assert float(hooks.unpack(away[4])[0, 0]) == 4
    backs = [number for way, number in lanes.said if way == "back"]
    assert backs == [4, 3, 2, 1] and hooks.pending_bytes == 3 * size
    lanes.said.clear()
    assert float(hooks.unpack(away[3])[0, 0]) == 3
    assert lanes.said == [("wait", None), ("back", 0)]
    assert [float(hooks.unpack(away[n])[0, 0]) for n in (2, 1, 0)] == [2, 1, 0]
    assert hooks.pending_bytes == 0


def test_what_a_backward_left_behind_is_let_go_when_its_copies_are_over():
    lanes = Late()
    hooks = Offload([], moves="cpu", lanes=lanes, pending_bytes=2 * 64 * 64 * 4)
    for _ in range(3):
        hooks.begin()
        assert hooks.pending_bytes == 0
        away = [hooks.pack(torch.full((64, 64), float(number))) for number in range(6)]
        hooks.forget()
        assert float(hooks.unpack(away[2])[0, 0]) == 2 and hooks.pending_bytes
        assert float(hooks.unpack(away[5])[0, 0]) == 5, "out of turn"
        del away
    hooks.begin()
    lanes.finish()


def test_on_cuda_a_copy_begins_after_what_was_asked_for_before_and_after_the_copy_that_it_needs(
    monkeypatch,
):
    said = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            said.append(f"{self.name} after {other.name}")

        def wait_event(self, event):
            said.append(f"{self.name} after {event}")

        def record_event(self):
            return f"all of {self.name}"

    @contextmanager
    def on(stream):
        said.append(f"on {stream.name}")
        yield
        said.append(f"off {stream.name}")

    names = iter(("out", "back"))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(next(names)))
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("own"))
    lanes, (x, y) = CudaCopyStreams(torch.device("cuda:1")), torch.arange(2.0)
    lanes.wait(lanes.back(x, y, lanes.out(y, x)))
    assert said == [
        *("out after own", "on out", "off out"),
        *("back after all of out", "back after own", "on back", "off back"),
        "own after all of back",
    ]


def test_on_a_cpu_it_is_refused_because_it_would_save_nothing():
    with pytest.raises(ConfigError, match="host memory"):
        offload_for(torch.device("cpu"), [])


def test_with_checkpointing_there_would_be_nothing_to_move():
    with pytest.raises(ConfigError, match="give one"):
        RunConfig(base="b", data="d.jsonl", out="o", checkpointing=True, offload=True)
