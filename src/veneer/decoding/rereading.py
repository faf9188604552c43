"""Generates by reading the whole text for each token, for models whose cache gives other logits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from veneer.decoding.draws import ChoiceSampler, draw
from veneer.decoding.schedule.sequence import Request
from veneer.errors import VeneerError
from veneer.execution.switches import forget_lengths


@torch.no_grad()
def answer_by_rereading(
    model: PreTrainedModel, request: Request, *, on_token: Callable[[int], None] | None = None
) -> list[int]:
    """Returns the new ids of the request's first choice, without the stop token.

    on_token: called with each id. Raises the draw's error if logits are not finite.
    """
    sampler = ChoiceSampler(request, 0)
    new: list[int] = []
    while len(new) < request.max_new_tokens:
        forget_lengths(model)
        ids = torch.tensor([[*request.prompt, *new]], device=model.device)
        (drawn,) = draw(model(input_ids=ids, use_cache=False).logits[:, -1], [(sampler, new)])
        if isinstance(drawn, VeneerError):
            raise drawn
        token = drawn if isinstance(drawn, int) else drawn.token
        if token in request.stops:
            break
        if on_token is not None:
            on_token(token)
        new.append(token)
    return new
