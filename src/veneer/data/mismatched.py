"""Adds to every rated row an answer to another row's prompt, which KTO's estimate of the KL needs.

Row i gets its own prompt with the answer of the next row that has another prompt, cyclically within
its set. The order is never reversed, so with two rows or more no row gets its own answer.
Source: Ethayarajh et al. 2024, arXiv:2402.01306, section 4.1.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from veneer.data.batching import RowSpans
from veneer.data.collector import ExampleCollector
from veneer.data.examples import Example, Problem, part_key


def add_mismatched(
    collector: ExampleCollector, length: int, spare: Sequence[Example] = ()
) -> list[Problem]:
    """Adds the mismatched example of every row, behind the row's own.

    length: most tokens. spare: rows of all sets, whose answers are taken for a set with a single
    prompt. Returns a problem for each set with a single prompt that all of `spare` has, too.
    """
    return collector.extend_rows(
        lambda examples: mismatched(examples, length, spare),
        "all rows have the same prompt: KTO compares an answer with those to other prompts",
    )


def mismatched(
    examples: Sequence[Example], length: int, spare: Sequence[Example] = ()
) -> list[Example] | None:
    """Returns one example for each row of a set; None if all rows have one prompt."""
    rows = RowSpans.of(examples)
    first = [examples[int(start)] for start in rows.starts[:-1]]
    prompts = [_prompt(example) for example in first]
    donors = _next_different(prompts)
    if donors is None:
        other = next((row for row in spare if _prompt(row) != prompts[0]), None)
        if other is None:
            return None
        return [_with_answer_of(example, other, length) for example in first]
    return [
        _with_answer_of(example, first[donor], length)
        for example, donor in zip(first, donors, strict=True)
    ]


def _prompt(example: Example) -> bytes:
    return example.ids[: int(np.argmax(example.trained))].tobytes()


def _next_different(prompts: Sequence[bytes]) -> list[int] | None:
    """Returns for each row the next one, cyclically, that has another prompt."""
    count = len(prompts)
    different = [n for n in range(count) if prompts[n] != prompts[(n + 1) % count]]
    if not different:
        return None
    # The next row with another prompt is behind the last row of a run of equal prompts.
    result, end = [0] * count, different[0]
    for number in reversed(range(count)):
        end = number if prompts[number] != prompts[(number + 1) % count] else end
        result[number] = (end + 1) % count
    return result


def _with_answer_of(example: Example, donor: Example, length: int) -> Example:
    start, donor_start = int(np.argmax(example.trained)), int(np.argmax(donor.trained))
    ids = np.concatenate([example.ids[:start], donor.ids[donor_start:]])[:length]
    trained = np.concatenate([example.trained[:start], donor.trained[donor_start:]])[:length]
    key = part_key(example.key, len(example.ids))
    return replace(example, ids=ids, trained=trained, key=key, roles=(), kind="mismatched")
