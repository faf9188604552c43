"""Answers: token ids in, token ids out, many rows at once with a cache.

The decoding loop is transformers' own; this says what stops an answer and keeps sampling reproducible.
Knows nothing of chats or templates.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from veneer.adapters.prefix import tokens_in_front
from veneer.errors import ConfigError
from veneer.models.base import Base, stop_token_ids

ROWS = 32
"""Prompts decoded together: one forward for all, padded on the left to the longest of them."""


class _Tokens(BaseStreamer):
    """Hands every new token on as it is chosen; transformers sends the prompt first."""

    def __init__(self, on_token: Callable[[int], None]) -> None:
        self.on_token, self.prompt_seen = on_token, False

    def put(self, value: torch.Tensor) -> None:
        if self.prompt_seen:
            for token in value.flatten().tolist():
                self.on_token(token)
        self.prompt_seen = True

    def end(self) -> None: ...


@torch.no_grad()
def generate(
    base: Base,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    on_token: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """One list of new ids per prompt, the stop token left out. temperature 0 is greedy.

    on_token gets each new id as it comes (the stop token included); for a single prompt only.
    ConfigError: an empty prompt, or a prompt that leaves no room within the model's positions.
    """
    if faults := _prompt_faults(base, prompts, max_new_tokens):
        raise ConfigError(
            "these prompts cannot be answered", faults, "Shorten them or ask for fewer new tokens."
        )
    stops = list(stop_token_ids(base.tokenizer, base.model.generation_config))
    pad = base.tokenizer.pad_token_id if base.tokenizer.pad_token_id is not None else (stops or [0])[0]
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": 0} if temperature > 0 else {}
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=temperature > 0, eos_token_id=stops or None, pad_token_id=pad,
        use_cache=True, **sampling,
    )  # fmt: skip
    streamer = _Tokens(on_token) if on_token is not None and len(prompts) == 1 else None
    answers: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    with torch.random.fork_rng(devices=[base.device] if base.device.type == "cuda" else []):
        torch.manual_seed(seed)
        for start in range(0, len(order), ROWS):
            rows = order[start : start + ROWS]
            longest = max(len(prompts[i]) for i in rows)
            ids = torch.full((len(rows), longest), pad)
            mask = torch.zeros((len(rows), longest), dtype=torch.long)
            for place, i in enumerate(rows):
                ids[place, longest - len(prompts[i]) :] = torch.tensor(prompts[i])
                mask[place, longest - len(prompts[i]) :] = 1
            decode: Any = base.model.generate
            out = decode(
                ids.to(base.device),
                attention_mask=mask.to(base.device),
                generation_config=settings,
                streamer=streamer,
            )
            for place, i in enumerate(rows):
                answers[i] = _until_stop(out[place, longest:].tolist(), set(stops))
    return answers


def _until_stop(ids: list[int], stops: set[int]) -> list[int]:
    return next((ids[:place] for place, token in enumerate(ids) if token in stops), ids)


def _prompt_faults(base: Base, prompts: Sequence[list[int]], max_new_tokens: int) -> list[str]:
    limit = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    faults = [f"prompt {i + 1} is empty" for i, ids in enumerate(prompts) if not ids]
    acting = [base.attachments[name] for name, _ in base.routing.active if name in base.attachments]
    before = tokens_in_front(layer for attachment in acting for layer in attachment.layers.values())
    behind = f" and {before} of the prefix" if before else ""
    if limit is not None:
        faults += [
            f"prompt {i + 1} has {len(ids)} tokens: with {max_new_tokens} new ones{behind} that exceeds the model's {limit}"
            for i, ids in enumerate(prompts)
            if len(ids) + max_new_tokens + before > limit
        ]
    return faults
