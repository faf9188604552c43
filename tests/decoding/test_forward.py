"""What a step of the engine computes: its rows, what they are filled up to, the bytes of a
token."""

import torch

from tests.support.tiny import tiny_base, tiny_model
from veneer.decoding.continued import logits_of_continuations
from veneer.decoding.engine import bytes_per_token
from veneer.decoding.forward import PagedForward
from veneer.decoding.schedule.limits import Limits
from veneer.execution.attention import take_packed


def test_rows_that_are_read_are_filled_up_to_one_of_few_shapes_and_single_tokens_are_not(
    monkeypatch,
):
    steps, right = [], PagedForward.rows

    def noted(self, plan):
        steps.append(right(self, plan))
        return steps[-1]

    monkeypatch.setattr(PagedForward, "rows", noted)
    model = tiny_model("llama")
    take_packed(model)
    logits_of_continuations(model, [[1, 2, 3, 4, 5]], [[9, 10]], Limits())
    reading, *single = steps
    assert reading.rows.tolist() == [[1, 2, 3, 4, 5] + [0] * 27, [0, 1, 2, 3, 4] + [0] * 27]
    assert (reading.filler, reading.kept.tolist()) == (27, [4])
    assert [step.rows.tolist() for step in single] == [[[9], [5]], [[10], [6]]]
    assert all(step.filler == 0 and step.kept is None for step in single)


def test_a_token_takes_the_bytes_of_its_keys_and_values_in_all_layers():
    layers, heads, size = 2, 2, 12
    for dtype, width in ((torch.float32, 4), (torch.bfloat16, 2)):
        assert bytes_per_token(tiny_base("qwen3", dtype)) == 2 * layers * heads * size * width
