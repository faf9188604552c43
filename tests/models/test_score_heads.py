"""Outputs of several heads in one forward, against each adapter alone and the model's own forward
of one text at a time in float64."""

import pytest
import torch

from tests.support.helpers import fill
from tests.support.models.routed import Routed
from tests.support.tiny import tiny_model
from veneer.adapters.attach import attach
from veneer.adapters.config import DoRA, LoRA, Prefix
from veneer.adapters.labels import HeadSettings
from veneer.adapters.placement.acting import Acting
from veneer.adapters.placement.routing import Routing
from veneer.adapters.placement.score_head import ScoreHead
from veneer.data.examples import RowRef
from veneer.evaluation.classify import text_example
from veneer.models.score_heads import score_texts
from veneer.models.scores import ScoreRequest
from veneer.models.step import prepare

FLOAT32 = 1e-5
"""Relative to the largest output: float32 against float64."""
METHODS = {"lora": LoRA(rank=3, alpha=5), "dora": DoRA(rank=2, alpha=3), "prefix": Prefix(tokens=3)}
IDS = [[5, 6, 7, 8], [5, 6, 9], [11], [5, 6, 7, 8, 9, 10, 11, 12]]


def adapted(dtype):
    """A tiny model with an adapter of each method, and a head of another width on each."""
    model, routing = tiny_model("llama", dtype), Routing()
    paths = prepare(model)
    for width, (name, config) in enumerate(METHODS.items(), 2):
        settings = HeadSettings("label", tuple(f"label {number}" for number in range(width)))
        score = ScoreHead.fresh(
            settings, hidden_size=model.config.hidden_size, device=torch.device("cpu")
        )
        head = model.get_output_embeddings()
        attachment = attach(model, config, name=name, routing=routing, head=head, score=score)
        fill(attachment.parameters().values(), seed=width)
    return model, paths, routing


@pytest.mark.parametrize("batch_rows", [1, 4])
def test_several_heads_in_one_forward_are_each_adapter_alone(batch_rows):
    model, paths, routing = adapted(torch.float32)
    plain_model, _, plain_routing = adapted(torch.float64)
    examples = [text_example(ids, RowRef("texts", number)) for number, ids in enumerate(IDS)]
    requests = [
        ScoreRequest(routing.applied(((name, 1.0),)), examples[start:])
        for start, name in enumerate(METHODS)
    ]
    together = score_texts(Routed(model, paths, routing), requests, batch_rows=batch_rows)
    assert [outputs.shape for outputs in together] == [(4, 2), (3, 3), (2, 4)]
    for start, (name, outputs) in enumerate(zip(METHODS, together, strict=True)):
        (own,) = score_texts(Routed(model, paths, routing), [requests[start]])
        assert outputs == pytest.approx(own, rel=0, abs=FLOAT32 * abs(own).max())
        applied = plain_routing.applied(((name, 1.0),))
        head = applied[0][0].score
        for row, ids in zip(outputs, IDS[start:], strict=True):
            with torch.no_grad(), plain_routing.held(Acting.everywhere(applied)):
                states = plain_model.base_model(torch.tensor([ids])).last_hidden_state
            expected = head.outputs(states[0, -1]).detach().numpy()
            assert row == pytest.approx(expected, rel=0, abs=FLOAT32 * abs(expected).max()), name
