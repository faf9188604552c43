"""The plans in which a run's largest micro-batch is looked for, also for a million epochs."""

import numpy as np
import pytest

from veneer.data import longest
from veneer.data.batching import RowSpans, plan_epoch, used_length
from veneer.data.examples import Example, RowRef
from veneer.data.longest import plans_of_run
from veneer.data.mixture import Mixture


def random_examples(count):
    chance = np.random.default_rng(count)
    examples = []
    for number in range(count):
        ids = np.zeros(chance.integers(4, 60), dtype=np.int32)
        trained = np.arange(len(ids)) >= chance.integers(1, len(ids))
        row = int(number // 2)  # two examples a row
        examples.append(Example(ids, trained, RowRef("f", row + 1), key=row, row=row))
    return examples


def sizes(examples, rows, batch):
    """Tokens, longest example and trained tokens of a batch of rows."""
    parts = [examples[i] for i in rows.examples(batch)]
    lengths = [used_length(part) for part in parts]
    return sum(lengths), max(lengths), sum(part.trained_tokens for part in parts)


@pytest.mark.parametrize("mixture", [None, Mixture((6, 7), (15.0, 3.5))])
@pytest.mark.parametrize("order", ["bucketed", "shuffled", "file"])
@pytest.mark.parametrize("batch", [1, 4, 20])
def test_no_batch_of_many_epochs_is_larger_than_all_that_are_planned(
    batch, order, mixture, monkeypatch
):
    monkeypatch.setattr(longest, "MOST_EPOCHS", 2)
    examples = random_examples(26)
    rows = RowSpans.of(examples)
    settings = {"batch": batch, "seed": 3, "order": order, "mixture": mixture}
    plans = list(plans_of_run(examples, rows, steps=10**9, **settings))
    planned = [
        sizes(examples, rows, batch) for plan, taken in plans for batch in list(plan)[:taken]
    ]
    most = np.max(planned, axis=0)
    for epoch in range(60):
        for batch_rows in plan_epoch(rows.lengths, epoch=epoch, **settings):
            assert (most >= sizes(examples, rows, batch_rows)).all()


@pytest.mark.parametrize("order", ["bucketed", "shuffled", "file"])
def test_a_run_of_a_million_epochs_is_planned_as_fast_as_one_of_a_thousand(order):
    examples = random_examples(26)
    rows = RowSpans.of(examples)
    plans = plans_of_run(
        examples, rows, batch=4, seed=0, order=order, mixture=None, steps=4 * 10**6
    )
    assert len(list(plans)) <= longest.MOST_EPOCHS + 1


def test_a_run_of_few_epochs_is_planned_exactly():
    examples = random_examples(26)
    rows = RowSpans.of(examples)
    plans = plans_of_run(examples, rows, batch=4, seed=0, order="shuffled", mixture=None, steps=10)
    assert [taken for _, taken in plans] == [4, 4, 2]
