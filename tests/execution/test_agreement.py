"""One comparison decides whether a fast path agrees: by the largest difference, beyond which a path
is refused, and never where a value is not a number."""

import math

import pytest
import torch

from veneer.execution.agreement import EXACT, PART, agrees, difference, disagreement


def test_a_difference_is_relative_to_the_largest_value_of_all_or_of_its_row():
    theirs = torch.tensor([[1.0, 2.0], [100.0, 400.0]])
    ours = theirs + torch.tensor([[0.5, 0.0], [0.0, 0.0]])
    assert difference(ours, theirs) == pytest.approx(0.5 / 400)
    assert difference(ours, theirs, by_row=True) == pytest.approx(0.5 / 2)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("by_row", [False, True])
def test_what_is_not_finite_or_of_another_shape_differs_infinitely(value, by_row):
    ours, theirs = torch.ones(2, 3), torch.ones(2, 3)
    ours[1, 2] = value
    assert difference(ours, theirs, by_row=by_row) == math.inf
    assert difference(theirs, theirs[:1], by_row=by_row) == math.inf
    assert difference(theirs, theirs, by_row=by_row) == 0.0


def test_a_comparison_adds_no_rounding_of_its_own():
    theirs = torch.tensor([256.0], dtype=torch.bfloat16)
    ours = torch.tensor([260.0], dtype=torch.bfloat16)
    assert difference(ours, theirs) == 4 / 256
    assert difference(torch.tensor([1e-7]).half(), torch.zeros(1).half()) > 1


def test_a_disagreement_says_what_was_raised_or_how_much_differs():
    class Model:
        pass

    def refuse() -> float:
        raise KeyError("no such cache")

    assert disagreement(Model(), "packed rows", lambda: 0.25, 0.25) is None
    assert disagreement(Model(), "packed rows", lambda: 0.5, 0.25) == (
        "Model with packed rows differs from rows computed alone by 5.0e-01"
    )
    said = disagreement(Model(), "packed rows", refuse, 0.25)
    assert said == "Model does not take packed rows (KeyError: 'no such cache')"


def test_two_computations_agree_within_a_tolerance_and_in_all_they_give():
    x = torch.tensor([[1.0, 3.0]])
    assert agrees(lambda x: x * (1 + 5e-6), lambda x: x, (x,), PART)
    assert not agrees(lambda x: x * (1 + 5e-6), lambda x: x, (x,), EXACT)
    assert not agrees(lambda x: x * (1 + 2e-5), lambda x: x, (x,), PART)
    assert not agrees(lambda x: x.double(), lambda x: x, (x,), PART)
    assert agrees(lambda x: (x, None), lambda x: (x, None), (x,), EXACT)
    assert not agrees(lambda x: (x, None), lambda x: (x, 1), (x,), EXACT)
    assert not agrees(lambda x: (x, None), lambda x: x, (x,), EXACT)
    assert not agrees(lambda x: x[5], lambda x: x, (x,), PART)  # it refuses
