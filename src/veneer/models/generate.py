"""Answers: token ids in, token ids out, many rows at once with a cache.

Says what stops an answer, how tokens are drawn, and which loop decodes: our own (models/decode.py) where it is
proven on the model, else transformers'. Knows nothing of chats or templates.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from veneer.adapters.prefix import tokens_in_front
from veneer.errors import ConfigError
from veneer.models.base import Base, stop_token_ids
from veneer.models.decode import Choose, decode, greedy, prove_decoding

PADDED_ROWS = 32
"""Prompts that transformers' loop decodes together, padded on the left to the longest of them."""


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
    on_done: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """One list of new ids per prompt, the stop token left out. temperature 0 is greedy.

    on_token gets each new id as it comes (the stop token included); for a single prompt only.
    on_done gets the number of prompts answered so far, now and then.
    ConfigError: an empty prompt, or a prompt that leaves no room within the model's positions.
    """
    if faults := _prompt_faults(base, prompts, max_new_tokens):
        raise ConfigError(
            "these prompts cannot be answered", faults, "Shorten them or ask for fewer new tokens."
        )
    stops = list(stop_token_ids(base.tokenizer, base.model.generation_config))
    stream = on_token if len(prompts) == 1 else None
    if _decodes_packed(base):
        seen: set[int] = set()
        counts: dict[int, int] = {}

        def token(number: int, new: int) -> None:
            if stream is not None:
                stream(new)
            counts[number] = counts.get(number, 0) + 1
            if on_done is not None and (new in stops or counts[number] == max_new_tokens):
                seen.add(number)
                on_done(len(seen))

        choose = greedy if temperature <= 0 else _sampler(len(prompts), temperature, top_p, seed)
        return decode(
            base.model,
            prompts,
            stops=set(stops),
            max_new_tokens=max_new_tokens,
            choose=choose,
            on_token=token,
        )
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": 0} if temperature > 0 else {}
    return _by_transformers(base, prompts, stops, max_new_tokens, sampling, seed, stream, on_done)


def _decodes_packed(base: Base) -> bool:
    """Whether our own loop is proven on this base: with no adapter acting, once."""
    if base.decodes_packed is None:
        with base.routing.none():
            base.decodes_packed = prove_decoding(base.model) is None
    return base.decodes_packed


def _sampler(rows: int, temperature: float, top_p: float, seed: int) -> Choose:
    """Draws from the likeliest tokens that together have `top_p`; a row's draws do not depend on the other rows."""
    random = [torch.Generator().manual_seed(seed * 1_000_003 + row) for row in range(rows)]

    def choose(logits: Tensor, numbers: Sequence[int]) -> list[int]:
        chances, tokens = torch.softmax(logits.float() / temperature, dim=-1).sort(dim=-1, descending=True)
        reach = chances.cumsum(dim=-1)
        chances = chances.masked_fill_(reach - chances >= top_p, 0.0)  # the first is always kept
        reach = chances.cumsum(dim=-1).cpu()
        drawn = torch.cat([torch.rand(1, generator=random[number]) for number in numbers])
        places = torch.searchsorted(reach, (drawn * reach[:, -1])[:, None], right=True)
        places = places.clamp_(max=reach.shape[1] - 1).to(tokens.device)
        return tokens.gather(1, places)[:, 0].tolist()

    return choose


class _Tokens(BaseStreamer):
    """Hands every new token on as it is chosen; transformers sends the prompt first."""

    def __init__(self, on_token: Callable[[int], None]) -> None:
        self.on_token, self.prompt_seen = on_token, False

    def put(self, value: Tensor) -> None:
        if self.prompt_seen:
            for token in value.flatten().tolist():
                self.on_token(token)
        self.prompt_seen = True

    def end(self) -> None: ...


def _by_transformers(
    base: Base, prompts: Sequence[list[int]], stops: list[int], max_new_tokens: int, sampling: dict[str, float],
    seed: int, on_token: Callable[[int], None] | None, on_done: Callable[[int], None] | None,
) -> list[list[int]]:  # fmt: skip
    """transformers' own loop, on batches padded on the left: for models whose attention cannot be reached."""
    pad = base.tokenizer.pad_token_id if base.tokenizer.pad_token_id is not None else (stops or [0])[0]
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=bool(sampling), eos_token_id=stops or None, pad_token_id=pad,
        use_cache=True, **sampling,
    )  # fmt: skip
    answers: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    with torch.random.fork_rng(devices=[base.device] if base.device.type == "cuda" else []):
        torch.manual_seed(seed)
        for start in range(0, len(order), PADDED_ROWS):
            rows = order[start : start + PADDED_ROWS]
            longest = max(len(prompts[i]) for i in rows)
            ids = torch.full((len(rows), longest), pad)
            mask = torch.zeros((len(rows), longest), dtype=torch.long)
            for place, i in enumerate(rows):
                ids[place, longest - len(prompts[i]) :] = torch.tensor(prompts[i])
                mask[place, longest - len(prompts[i]) :] = 1
            run: Any = base.model.generate
            out = run(
                ids.to(base.device),
                attention_mask=mask.to(base.device),
                generation_config=settings,
                streamer=_Tokens(on_token) if on_token is not None else None,
            )
            for place, i in enumerate(rows):
                answers[i] = _until_stop(out[place, longest:].tolist(), set(stops))
            if on_done is not None:
                on_done(start + len(rows))
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
