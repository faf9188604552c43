"""States that kernels pass on by one token are what plain torch gives, in the slots they belong
to."""

import pytest
import torch
from torch.nn import functional as F

from veneer.kernels.bindings import state_calls
from veneer.kernels.bindings.arguments import available, observe_calls
from veneer.kernels.decoding import state_step
from veneer.kernels.decoding.state_step import HeadRates, SlotStates

CLOSE = {torch.float32: 1e-5, torch.bfloat16: 2**-7}
TYPES = [torch.float32, torch.bfloat16]
SHAPES = [(1, 1, 1, 1, 1), (3, 4, 2, 5, 16), (5, 6, 1, 8, 37), (16, 18, 3, 64, 128)]
"""Rows, heads, groups, sizes and widths."""


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def slots(rows, *shape, dtype=torch.float32):
    order = torch.randperm(2 * rows + 1, generator=torch.Generator().manual_seed(1))
    stored = drawn(2 * rows + 1, *shape).to(dtype)
    return SlotStates(stored, order[:rows], order[rows : 2 * rows])


def agree(name, states, *given, limit=None, **settings):
    """Compares outputs and all slots; returns the compiled functions that were called."""
    own, reference = getattr(state_step, name), getattr(state_step, f"{name}_reference")
    other = SlotStates(states.stored.clone(), states.read, states.written)
    before, called = states.stored.clone(), []
    with observe_calls(lambda name, _: called.append(name)):
        out = own(states, *given, **settings)
    expected = reference(other, *given, **settings)
    assert out.dtype is expected.dtype
    near = CLOSE[out.dtype] * float(expected.abs().max()) + 1e-30
    assert torch.allclose(out.float(), expected.float(), rtol=CLOSE[out.dtype], atol=near)
    assert torch.allclose(states.stored, other.stored, rtol=1e-4, atol=1e-5)
    others = [n for n in range(len(before)) if n not in states.written.tolist()]
    assert torch.equal(states.stored[others], before[others])
    assert not torch.equal(states.stored, before)
    return called


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_state_space_is_that_of_torch(shape, gated, dtype):
    N, H, G, P, W = shape
    joined = drawn(N, 2 * H * P + 2 * G * W + H, seed=3).to(dtype)  # its parts have gaps
    x, gate, b, c, step = joined.split((H * P, H * P, G * W, G * W, H), dim=1)
    rates = HeadRates(*(drawn(H, seed=4 + n).to(dtype) for n in range(3)))
    given = x, b, c, step * 10, rates, gate if gated else None
    called = agree("space", slots(N, H, P, W), *given, groups=G)
    assert called == ["veneer_state_space"] * available("veneer_state_space")


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("by_group", [False, True])
@pytest.mark.parametrize("shape", [*SHAPES, (2, 6, 2, 33, 130)])
def test_a_delta_rule_is_that_of_torch(shape, by_group, dtype):
    """Steps and strengths of a group lie side by side, or all steps and then all strengths."""
    N, H, G, P, W = shape
    joined = drawn(N, 2 * H + 2 * G * P + H * W, seed=3).to(dtype)
    gates, x = joined.split((2 * H, 2 * G * P + H * W), dim=1)  # rows have gaps
    shape = (G, 2, -1) if by_group else (2, G, -1)
    step, strength = (gates * 3).unflatten(1, shape).unbind(2 if by_group else 1)
    rates = [drawn(H, seed=4 + n).to(dtype) for n in range(2)]
    for most in (1.0, 2.0):
        states = slots(N, H, P, W)
        called = agree("delta", states, x, step, strength, *rates, most_strength=most)
        assert called == ["veneer_state_delta"] * available("veneer_state_delta")


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("length, taps", [(3, 3), (4, 4), (4, 2), (1, 1), (5, 6), (7, 3)])
@pytest.mark.parametrize("rows, channels", [(1, 1), (3, 64), (5, 200)])
def test_a_window_is_that_of_torch(rows, channels, length, taps, dtype):
    joined = drawn(rows, 3 * channels, seed=2).to(dtype)
    before, x, behind = joined.split(channels, dim=1)
    weight, bias = drawn(channels, taps, seed=3).to(dtype), drawn(channels, seed=4).to(dtype)
    for settings in (
        {"bias_C": bias, "has_silu": True},
        {"before_NC": before, "behind_NC": behind},
        {"before_NC": before, "has_silu": True},
    ):
        states = slots(rows, channels, length, dtype=dtype)
        called = agree("window", states, x, weight, **settings)
        assert called == ["veneer_state_window"] * available("veneer_state_window")


def test_what_is_not_compiled_for_the_type_is_torchs():
    states = slots(1, 2, 4, 8, dtype=torch.bfloat16)
    rates = HeadRates(*(drawn(2) for _ in range(3)))
    given = drawn(1, 8), drawn(1, 8), drawn(1, 8), drawn(1, 2), rates
    assert not agree("space", states, *given, groups=1)
    of_heads = drawn(1, 1, 2), drawn(1, 1, 2), drawn(2), drawn(2)
    assert not agree("delta", states, drawn(1, 24), *of_heads)
    states = slots(1, 2, 4, dtype=torch.bfloat16)
    assert not agree("window", states, drawn(1, 2), drawn(2, 3))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", ["window", "space", "delta"])
def test_all_sets_of_instructions_give_alike_values(name, dtype):
    if not available("veneer_state_window"):
        pytest.skip("no compiled kernels")
    outs = []
    for level in (0, 2, 3):
        states = slots(3, 70, 4, dtype=dtype) if name == "window" else slots(3, 6, 8, 37)
        width = {"window": 70, "space": 48, "delta": 6 * 37}[name]
        out = torch.empty(3, width, dtype=dtype)
        x = drawn(3, 200, seed=1).to(dtype)
        if name == "window":
            weight = drawn(70, 4, seed=5).to(dtype)
            given = x[:, :70], None, None, weight, None, *states, out, True
            state_calls.state_window(*given, level)
        elif name == "delta":
            rates = [drawn(6, seed=n) for n in range(2)]
            qkv, gates = drawn(3, 32 + 6 * 37, seed=1).to(dtype), x[:, :6].unflatten(1, (2, 3))
            given = states.stored, gates, gates, qkv, *rates, states.read, states.written, out
            state_calls.state_delta(*given, 2.0, 1e-6, level)
        else:
            rates = [drawn(6, seed=n) for n in range(3)]
            rows = x[:, :48], x[:, 60:134], x[:, 60:134], x[:, 150:156], None
            given = states.stored, *rows, *rates, states.read, states.written, out, 2
            state_calls.state_space(*given, level)
        outs.append(torch.cat([out.flatten(), states.stored.flatten()]).float())
    for out in outs[1:]:
        assert torch.allclose(out, outs[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("taps", [2, 3, 4])
def test_windows_moved_on_token_by_token_are_a_convolution(taps):
    x, weight = drawn(2, 5, 9), drawn(5, taps, seed=1)
    whole = F.conv1d(F.pad(x, (taps - 1, 0)), weight[:, None], groups=5)
    stored, places = torch.zeros(5, 5, taps), torch.tensor([[1, 2], [4, 3]])
    for token in range(9):
        read, written = places[token % 2], places[1 - token % 2]
        own = x[..., token].contiguous()
        out = state_step.window(SlotStates(stored, read, written), own, weight)
        assert torch.allclose(out, whole[..., token], atol=1e-5)
