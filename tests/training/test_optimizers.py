"""8-bit AdamW: the library's own steps over the flat buffer, and a resumed run is the one that
never stopped."""

import importlib.util
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.support.tiny import tiny_model
from veneer.adapters.attach import attach
from veneer.adapters.config import LoRA
from veneer.adapters.placement.routing import Routing
from veneer.errors import ConfigError
from veneer.formats import loading
from veneer.library.residents.eviction import hold_as
from veneer.private.torch import version_of
from veneer.training.config import MOMENT_BYTES
from veneer.training.optimizer import optimizers
from veneer.training.optimizer.buffer import FlatAdamW, FlatParameters
from veneer.training.optimizer.optimizers import AdamW8bit, make_optimizer
from veneer.training.own_loop.reference import StartReference
from veneer.training.state.checkpoint import load_checkpoint, save_checkpoint

needs_library = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
SIZES = [
    (96, 64),
    (10, 7),
]  # 8 bits from 4,096 values on; the library keeps smaller ones in float32


def flat_of(size, dtype=torch.float32, factors=None):
    generator = torch.Generator().manual_seed(0)
    parameters = {
        name: nn.Parameter(torch.randn(size, generator=generator).to(dtype)) for name in ("a", "b")
    }
    return FlatParameters(parameters, factors)


def steps(optimizer, first, last, clip=1e9):
    for number in range(first, last):
        generator = torch.Generator().manual_seed(number)
        optimizer.flat.gradient.copy_(
            torch.randn(optimizer.flat.gradient.shape, generator=generator)
        )
        optimizer.step(
            learning_rate=0.01 / (number + 1), clip=clip, norm=optimizer.flat.gradient.norm().item()
        )


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", [FlatAdamW, pytest.param(AdamW8bit, marks=needs_library)])
def test_a_gradient_longer_than_clip_is_cut_to_clip_and_a_shorter_one_is_left(kind, size):
    def stepped_with(clip):
        optimizer, seen = kind(flat_of(size), weight_decay=0.0), []
        gradient = optimizer.flat.gradient
        gradient.copy_(given)
        optimizer.inner.register_step_pre_hook(lambda *_: seen.append(gradient.clone()))
        optimizer.step(learning_rate=0.01, clip=clip, norm=optimizer.flat.gradient.norm().item())
        assert (gradient == 0).all()
        return seen[0]

    given = torch.randn(flat_of(size).gradient.shape, generator=torch.Generator().manual_seed(1))
    norm = given.norm().item()
    torch.testing.assert_close(stepped_with(clip=0.5), given * (0.5 / norm), rtol=1e-6, atol=0)
    assert torch.equal(stepped_with(clip=2 * norm), given)


@needs_library
@pytest.mark.parametrize("parts", [2**30, 4096])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_resumed_from_a_checkpoint_it_is_the_run_that_never_stopped(
    size, parts, tmp_path, monkeypatch
):
    monkeypatch.setattr(optimizers, "_PART", parts)
    whole, stopped = (AdamW8bit(flat_of(size), weight_decay=0.1) for _ in range(2))
    steps(whole, 0, 7)
    steps(stopped, 0, 4)
    path = save_checkpoint(tmp_path, 4, stopped.state(), {})
    resumed = AdamW8bit(flat_of(size), weight_decay=0.1)
    resumed.load(load_checkpoint(path)[0])
    steps(resumed, 4, 7)
    assert whole.state().keys() == resumed.state().keys()
    for name, tensor in whole.state().items():
        assert torch.equal(tensor, resumed.state()[name]), name
    assert not torch.equal(whole.flat.values, flat_of(size).values)


@needs_library
def test_its_steps_are_those_of_adamw_as_far_as_8_bits_go():
    eight, full = (
        AdamW8bit(flat_of((96, 64)), weight_decay=0.1),
        FlatAdamW(flat_of((96, 64)), weight_decay=0.1),
    )
    before = full.flat.values.data.clone()
    for optimizer in (eight, full):
        steps(optimizer, 0, 10, clip=50.0)
    moved = (full.flat.values.data - before).norm()
    assert (eight.flat.values.data - full.flat.values.data).norm() < 0.05 * moved
    state = eight.state()
    moments = sum(
        t.nbytes for name, t in state.items() if name.partition(".")[0] not in ("values", "step")
    )
    assert moments == MOMENT_BYTES["adamw8bit"] * state["values"].numel()
    kept = full.state()
    assert (
        kept["exp_avg"].nbytes + kept["exp_avg_sq"].nbytes
        == MOMENT_BYTES["adamw"] * kept["values"].numel()
    )


@needs_library
def test_each_factor_has_its_own_rate():
    """Values at 4 times the rate move as they do in a run at 4 times the rate."""
    both, slow, fast = (
        AdamW8bit(flat_of((96, 64), factors=factors), weight_decay=0.0)
        for factors in ({"a": 1.0, "b": 4.0}, None, {"a": 4.0, "b": 4.0})
    )
    for optimizer in (both, slow, fast):
        steps(optimizer, 0, 3)
    of_a, of_b = (both.flat.parameters[name].data for name in ("a", "b"))
    assert torch.equal(of_a, slow.flat.parameters["a"].data)
    assert torch.equal(of_b, fast.flat.parameters["b"].data)
    assert not torch.equal(of_b, slow.flat.parameters["b"].data)


@needs_library
def test_the_masters_are_rounded_into_bf16_parameters():
    flat = flat_of((96, 64), torch.bfloat16)
    optimizer = AdamW8bit(flat, weight_decay=0.0)
    steps(optimizer, 0, 3)
    for parameter, (_, master) in zip(flat.parameters.values(), flat._masters, strict=True):
        assert torch.equal(parameter, master.bfloat16())


def test_without_the_library_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match="bitsandbytes") as raised:
        make_optimizer("adamw8bit", flat_of((10, 7)), weight_decay=0.0)
    assert "veneer[adamw8bit]" in str(raised.value)


def test_the_names_are_those_of_the_settings():
    assert isinstance(make_optimizer("adamw", flat_of((10, 7)), weight_decay=0.0), FlatAdamW)


def step_once(flat):
    steps(FlatAdamW(flat, weight_decay=0.0), 0, 1)


def step_once_in_8_bits(flat):
    steps(AdamW8bit(flat, weight_decay=0.0), 0, 1)


def load_a_state(flat):
    optimizer = FlatAdamW(flat, weight_decay=0.0)
    optimizer.load(optimizer.state() | {"values": flat.values.data + 1})


def exchange_for_a_reference(flat):
    with StartReference(None, flat, start=flat.values.data + 1, known={})._first_values():
        pass


def fill_from_a_file(flat):
    values = {name: p.detach() + 1 for name, p in flat.parameters.items()}
    loading._fill(SimpleNamespace(parameters=lambda: flat.parameters), values, take=True)


WRITERS = {
    "a step": step_once,
    "a step in 8 bits": pytest.param(step_once_in_8_bits, marks=needs_library),
    "a state": load_a_state,
    "a reference": exchange_for_a_reference,
    "a file": fill_from_a_file,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_every_write_raises_the_version_of_every_trained_tensor(write, dtype):
    """Caches of trained values end by it: DoRA's norms, a library's list of changed adapters, and
    what was proven about a base whose own weights train."""
    flat = flat_of((96, 64), dtype)
    before = {name: version_of(p) for name, p in flat.parameters.items()}
    write(flat)
    assert all(version_of(p) > before[name] for name, p in flat.parameters.items())


def test_factors_that_are_rounded_for_answers_have_a_new_version():
    model = tiny_model("llama")
    attachment = attach(model, LoRA(rank=2), name="a", routing=Routing(), head=model.lm_head)
    before = {name: version_of(p) for name, p in attachment.parameters().items()}
    hold_as(attachment, torch.bfloat16)
    assert all(version_of(p) > before[name] for name, p in attachment.parameters().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_was_released_keeps_its_gradient_when_somebody_else_trains_it(dtype):
    parameter = torch.nn.Parameter(torch.ones(3, dtype=dtype))
    flat = FlatParameters({"a": parameter})
    flat.release()
    parameter.requires_grad_(True)
    parameter.sum().backward()
    assert torch.equal(parameter.grad, torch.ones(3, dtype=dtype))
