"""Batches of prompts: padding on the left is never seen, whatever the model's attention."""

import pytest

from tests.support.tiny import FAMILIES, tiny_base
from veneer.decoding.generate import generate
from veneer.models.step import prepare

PROMPTS = [
    [5, 9, 30, 7],
    [61, 2, 8, 44, 10, 11, 12, 90, 5, 4, 3, 61, 2, 8, 44, 10, 11, 12, 90, 5, 4],
    [1, 2],
]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_of_prompts_gets_the_answers_of_each_alone(family):
    base = tiny_base(family, tie_word_embeddings=False)
    prepare(base.model)
    together = generate(base, PROMPTS, max_new_tokens=8)
    assert together == [generate(base, [prompt], max_new_tokens=8)[0] for prompt in PROMPTS]
