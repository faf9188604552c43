"""What a prefix starts from: the keys and values of a real prompt, by far the best start there is
(from random values it learns a fraction in the same steps).

Which prompt, in this order: the one the settings name; what all training rows begin with; a plain
instruction.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from veneer.adapters.config import Prefix
from veneer.adapters.methods.prefix import decoder_of, record_keys
from veneer.adapters.methods.prefix_layer import DEFAULT_TOKENS, PrefixLayer, put_start
from veneer.adapters.placement.attachment import Attachment
from veneer.data.batching import shared_prompt
from veneer.data.examples import Example
from veneer.errors import ConfigError
from veneer.models.capacity import configured_capacity
from veneer.models.frozen_base import FrozenBase
from veneer.models.start import AdapterStart

INSTRUCTION = (
    "Read the text below with care and give the answer that it asks for, in exactly the form in"
    " which such answers are given, and nothing besides."
)
MIN_SHARED_TOKENS = 8
"""What rows begin with counts as a prompt from here on; fewer tokens are only a template's
markers."""
MAX_START_TOKENS = 64
"""Length of a prefix that nobody gave a length: the end of a longer prompt, which says more of the
task."""
SHOWN = 60
"""Characters of the prompt on the screen, its end; the start record has all of it."""


def start_prefix(
    config: Prefix, base: FrozenBase, examples: Sequence[Example], *, seed: int
) -> AdapterStart:
    """ConfigError: the rows and the prefix together find no place in the model."""
    found = prefix_start(config, base, examples)
    _check_room(base, found.tokens, examples)

    def put(attachment: Attachment) -> str:
        if found.ids:
            _start_from(base, attachment, found.ids)
        return found.line

    return AdapterStart(config.model_copy(update={"tokens": found.tokens}), put, found.text)


@dataclass(frozen=True)
class PrefixStart:
    """ids: the prompt's, one for each token of the prefix, and its text; none: random values.
    origin: in words."""

    ids: list[int]
    text: str | None
    tokens: int
    origin: str

    @property
    def line(self) -> str:
        told = f"prefix of {self.tokens} tokens, starting from {self.origin}"
        if self.text is None:
            return told
        words = " ".join(self.text.split())
        return told + f": “{words if len(words) <= SHOWN else '…' + words[-SHOWN:]}”"


def prefix_start(config: Prefix, base: FrozenBase, examples: Sequence[Example]) -> PrefixStart:
    """What a prefix of these settings starts from on this base, with these rows."""
    if config.start == "random":
        tokens = config.tokens or DEFAULT_TOKENS
        return PrefixStart([], None, tokens, "random keys and values")
    shared = shared_prompt(examples) if len(examples) > 1 else 0
    if config.prompt is not None:
        ids, origin = list(base.tokenizer(config.prompt)["input_ids"]), "the prompt given"
    elif shared >= MIN_SHARED_TOKENS:
        ids, origin = examples[0].ids[:shared].tolist(), "what all rows begin with"
    else:
        ids, origin = (
            list(base.tokenizer(INSTRUCTION)["input_ids"]),
            "an instruction, as the rows share none",
        )
    tokens = config.tokens or min(len(ids), MAX_START_TOKENS)
    chosen = (ids * (tokens // len(ids) + 1))[:tokens] if tokens > len(ids) else ids[-tokens:]
    return PrefixStart(
        chosen, str(base.tokenizer.decode(chosen, skip_special_tokens=False)), tokens, origin
    )


def _check_room(base: FrozenBase, tokens: int, examples: Sequence[Example]) -> None:
    """The rows stand behind the prefix: both must find places in the model."""
    limit = configured_capacity(base.config).positions
    longest = max((len(e.ids) for e in examples), default=0)
    if limit is not None and longest + tokens > limit:
        raise ConfigError(
            f"the longest row has {longest} tokens: with {tokens} of the prefix that exceeds the"
            f" model's {limit} places",
            next_step=(
                f"Take method.tokens below {max(limit - longest, 0) + 1}, or shorter rows (length)."
            ),
        )


def _start_from(base: FrozenBase, attachment: Attachment, ids: Sequence[int]) -> None:
    _, decoder = decoder_of(base.model)
    with base.routing.none():
        pairs = record_keys(decoder, torch.tensor(list(ids), device=base.device))
    for layer in attachment.layers.values():
        assert isinstance(layer, PrefixLayer)
        put_start(layer, pairs)
