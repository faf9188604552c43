"""Saved activations that leave the device come back to the bit, are copied once, and weights stay.

On a CPU the hooks are told that "cpu" is the device to leave: the copies are then as real as they are on a GPU.
"""

import gc
from types import SimpleNamespace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from tests.helpers import make_examples
from tests.tiny import tiny_model
from veneer.adapters.attach import attach
from veneer.adapters.config import LoRA
from veneer.adapters.routing import Routing
from veneer.data.batching import make_batch
from veneer.errors import ConfigError
from veneer.models.step import batch_loss, prepare
from veneer.train import offload
from veneer.train.config import RunConfig
from veneer.train.offload import Offload, offload_for, offloaded


@pytest.fixture(autouse=True)
def small_tensors_count(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(offload, "WORTH_BYTES", 512)


def gradients(dtype, *, moved):
    model = tiny_model("llama", dtype)
    paths, routing = prepare(model), Routing()
    attachment = attach(model, LoRA(rank=2, alpha=6.0), name="a", routing=routing, head=model.get_output_embeddings())
    for layer in attachment.layers.values():
        layer.B.data.normal_(generator=torch.Generator().manual_seed(1))
    routing.active = (("a", 1.0),)
    batch = make_batch(make_examples(6), packed=paths.packed, share_prompt=True, device=torch.device("cpu"))
    hooks = Offload([*model.parameters(), *model.buffers()], moves="cpu") if moved else None
    with offloaded(hooks):
        loss = batch_loss(model, paths, routing, batch, total=1.0)
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
    return saved_tensors_hooks(lambda t: packed.append(hooks.pack(t)) or packed[-1], hooks.unpack), packed


def test_what_several_operations_save_is_copied_once_and_weights_never():
    weight = torch.randn(64, 64, requires_grad=True)
    x = torch.randn(32, 64, requires_grad=True)
    hidden = x * 1.5
    context, packed = watched(Offload([weight], moves="cpu"))
    with context:
        y = (hidden @ weight).sum() + (hidden @ weight.detach().clone()).sum() + (hidden * hidden).sum()
    away = [saved for saved in packed if not isinstance(saved, torch.Tensor)]
    assert len({id(saved) for saved in away if saved.host.shape == hidden.shape}) == 1
    assert any(
        saved is weight or saved.data_ptr() == weight.data_ptr() for saved in packed if isinstance(saved, torch.Tensor)
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
        del tensor
        gc.collect()
    assert [float(away.back()[0, 0]) for away in found] == list(range(50))


def test_a_tensor_that_changed_in_place_is_another_one():
    hooks = Offload([], moves="cpu")
    tensor = torch.zeros(64, 64)
    first = hooks.pack(tensor)
    tensor.add_(1)
    second = hooks.pack(tensor)
    assert (first.back().sum(), second.back().sum()) == (0, 64 * 64)
    assert hooks.pack(tensor) is second


def test_layouts_come_back_as_they_were_and_repeated_values_stay():
    hooks = Offload([], moves="cpu")
    base = torch.randn(64, 96)
    for view in (base.T, base[:, 32:64], base[::2], base.view(96, 64)):
        back = hooks.pack(view).back()
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
    there = SimpleNamespace(copy_=lambda tensor, non_blocking: non_blocking)
    monkeypatch.setattr(torch, "empty_strided", lambda *shape, **more: given.update(more) or there)
    tensor = SimpleNamespace(shape=(2,), stride=lambda: (1,), dtype=torch.float32, device=torch.device(own))
    assert offload._copied(tensor, torch.device(to)) is True  # the copy does not wait
    assert (given["device"].type, given["pin_memory"]) == (to, pinned)


def test_on_a_cpu_it_is_refused_because_it_would_save_nothing():
    with pytest.raises(ConfigError, match="host memory"):
        offload_for(torch.device("cpu"), [])


def test_with_checkpointing_there_would_be_nothing_to_move():
    with pytest.raises(ConfigError, match="give one"):
        RunConfig(base="b", data="d.jsonl", out="o", checkpointing=True, offload=True)
