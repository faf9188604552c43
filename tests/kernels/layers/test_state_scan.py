"""The scan of a state space in chunks, beside the loop over tokens that defines it."""

import pytest
import torch
from torch import Tensor

from veneer.kernels.layers.state_scan import LONGEST_CHUNK, state_scan, state_scan_reference

CLOSE = 1e-5
"""Of the largest value: float32 sums in another order."""
LENGTHS = [1, 2, LONGEST_CHUNK - 1, LONGEST_CHUNK, LONGEST_CHUNK + 1, 3 * LONGEST_CHUNK + 7]


def operands(tokens: int, *, groups: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Two texts, heads of 3 values whose states are 5 wide, two heads a group."""
    draw = torch.Generator().manual_seed(tokens)
    heads = 2 * groups
    x = torch.randn(2, tokens, heads, 3, generator=draw).to(dtype)
    step = torch.rand(2, tokens, heads, generator=draw)
    b, c = (torch.randn(2, tokens, groups, 5, generator=draw).to(dtype) for _ in range(2))
    state = torch.randn(2, heads, 3, 5, generator=draw)
    decay = -step * torch.arange(1.0, heads + 1) / heads
    return [own.requires_grad_() for own in (x, step, decay, b, c, state)]


def assert_near(ours: Tensor, expected: Tensor, close: float = CLOSE) -> None:
    assert ours.shape == expected.shape and ours.dtype is expected.dtype
    assert (ours.float() - expected.float()).abs().max() <= close * expected.float().abs().max()


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("tokens", LENGTHS)
def test_values_states_and_gradients_are_those_of_the_loop(tokens, groups):
    own = operands(tokens, groups=groups)
    ours, expected = state_scan(*own), state_scan_reference(*own)
    grads = [torch.randn(out.shape, generator=torch.Generator().manual_seed(1)) for out in expected]
    for mine, other in zip(ours, expected, strict=True):
        assert_near(mine, other)
    of_ours, of_expected = (torch.autograd.grad(out, own, grads) for out in (ours, expected))
    for mine, other in zip(of_ours, of_expected, strict=True):
        assert_near(mine, other)


def test_bf16_is_computed_in_float32_and_gradients_are_rounded_once():
    own = operands(LONGEST_CHUNK + 9, groups=2, dtype=torch.bfloat16)
    ours, expected = state_scan(*own)[0], state_scan_reference(*own)[0]
    assert_near(ours, expected)
    grads = (torch.autograd.grad(out.sum(), own[:5]) for out in (ours, expected))
    for mine, other in zip(*grads, strict=True):
        assert_near(mine, other, 2**-8)


def test_a_text_in_two_parts_is_the_whole_text():
    own = operands(LONGEST_CHUNK * 2, groups=2)
    parts = [[value[:, some] for value in own[:5]] for some in (slice(50), slice(50, None))]
    y, state = state_scan(*own)
    first, between = state_scan(*parts[0], own[5])
    second, last = state_scan(*parts[1], between)
    assert_near(torch.cat([first, second], 1), y)
    assert_near(last, state)


def test_rates_that_let_nothing_pass_give_finite_gradients():
    own = operands(LONGEST_CHUNK * 2, groups=1)
    own[2] = (own[2].detach() * 100).requires_grad_()
    ours, expected = state_scan(*own), state_scan_reference(*own)
    grads = [torch.autograd.grad(sum(out.sum() for out in both), own) for both in (ours, expected)]
    for mine, other in zip(*grads, strict=True):
        assert mine.isfinite().all()
        assert_near(mine, other, 1e-4)


def test_forward_keeps_its_inputs_alone():
    kept: list[Tensor] = []
    own = operands(LONGEST_CHUNK, groups=2)
    with torch.autograd.graph.saved_tensors_hooks(lambda value: kept.append(value) or value, id):
        state_scan(*own)
    assert {value.data_ptr() for value in kept} <= {value.data_ptr() for value in own}
