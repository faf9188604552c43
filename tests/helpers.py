"""Rows for the tests of the step: random ids with a shared start, the answer's tokens trained."""

import numpy as np
import torch

from veneer.data.examples import Example, RowRef


def make_examples(count, *, vocab=272, prompt=5, longest=24, seed=0):
    """`count` examples of ragged length that begin with the same `prompt` tokens; the first is the longest."""
    generator = np.random.default_rng(seed)
    start = generator.integers(0, vocab, prompt)
    examples = []
    for number in range(count):
        own = longest - prompt if number == 0 else int(generator.integers(4, longest - prompt + 1))
        ids = np.concatenate([start, generator.integers(0, vocab, own)]).astype(np.int32)
        trained = np.zeros(len(ids), dtype=bool)
        trained[prompt + 2 : len(ids) - number % 2] = True
        trained[prompt + 3 :: 4] = False
        examples.append(Example(ids, trained, RowRef("rows.jsonl", number + 1), 1000 + 17 * number))
    return examples


def fill(parameters, *, seed=0, scale=0.3):
    """Random values for every trained tensor, so that nothing hides behind B = 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
