"""Generates by reading the whole text for each token, for models whose cache gives other logits."""

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from veneer.adapters.placement.acting import Acting, invocation_of
from veneer.adapters.placement.routing import Routing
from veneer.decoding.draws import ChoiceSampler, draw
from veneer.decoding.schedule.sequence import Request
from veneer.errors import VeneerError
from veneer.execution.switches import forget_lengths


@torch.no_grad()
def answer_by_rereading(
    model: PreTrainedModel,
    routing: Routing,
    request: Request,
    *,
    on_token: Callable[[int], None] | None = None,
) -> list[int]:
    """Returns the new ids of the request's first choice, without the stop token. The adapters that
    act now act from the request's activation on.

    on_token: called with each id. Raises the draw's error if logits are not finite.
    """
    sampler = ChoiceSampler(request, 0)
    new: list[int] = []
    while len(new) < request.max_new_tokens:
        forget_lengths(model)
        ids = torch.tensor([[*request.prompt, *new]], device=model.device)
        with routing.held(_acting_on(routing.acting, request, ids.numel())):
            logits = model(input_ids=ids, use_cache=False).logits[:, -1]
        (drawn,) = draw(logits, [(sampler, new)])
        if isinstance(drawn, VeneerError):
            raise drawn
        token = drawn if isinstance(drawn, int) else drawn.token
        if token in request.stops:
            break
        if on_token is not None:
            on_token(token)
        new.append(token)
    return new


def _acting_on(acting: Acting, request: Request, tokens: int) -> Acting:
    """Returns what acts on prompt and answer: an adapter with an activation from there on."""
    if not invocation_of(acting.whole or ()):
        return acting
    return acting.within((slice(request.acts_from, tokens),), tokens)
