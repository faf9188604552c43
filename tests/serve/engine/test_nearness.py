"""Which adapter a question is nearest to, on states drawn around known centres."""

import numpy as np
import pytest

from veneer.serve.engine.nearness import LEAST_NEARNESS, NearnessSpace

D = 64
DRAW = np.random.default_rng(0)
CENTRES = DRAW.normal(size=(5, D)) * 2
"""Of three adapters, the general questions, and a subject that no adapter has."""
STRETCH = np.exp(DRAW.normal(size=D) * 2)
"""Dimensions of hidden states differ in size by orders of magnitude."""


def around(centre, count):
    states = CENTRES[centre] + DRAW.normal(size=(count, D))
    return (states * STRETCH + 7).astype(np.float32)


@pytest.mark.parametrize("texts", [1, 2, 16])
@pytest.mark.parametrize("adapters", [1, 3])
def test_a_question_like_the_texts_of_an_adapter_is_near_to_it(adapters, texts):
    space = NearnessSpace([around(n, texts) for n in range(adapters)], around(3, 32))
    for number in range(adapters):
        nearest = [space.nearest(question) for question in around(number, 20)]
        assert {near.number for near in nearest} == {number}
        assert all(near.margin > 0 for near in nearest)


@pytest.mark.parametrize("adapters", [1, 3])
def test_other_questions_are_left_to_the_base(adapters):
    space = NearnessSpace([around(n, 16) for n in range(adapters)], around(3, 32))
    for question in (*around(3, 20), *around(4, 20)):
        assert space.nearest(question).margin < 0


def test_a_question_that_an_adapter_was_trained_on_has_a_nearness_of_about_one():
    space = NearnessSpace([around(0, 16), around(1, 16)], around(3, 32))
    margins = [space.nearest(question).margin for question in around(0, 50)]
    assert np.mean(margins) + LEAST_NEARNESS == pytest.approx(1.0, abs=0.05)
