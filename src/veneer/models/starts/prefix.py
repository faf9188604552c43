"""Initial values of a prefix: the keys and values of a prompt, from which it learns many times more
in the same steps than from random values.

The prompt is the one of the settings, else the common beginning of all training rows, else a plain
instruction. With start teacher it is the beginning of what a teacher reads in front of every row,
as in cartridges: Eyuboglu et al. 2025, arXiv:2506.06266.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from veneer.adapters.attach import attach
from veneer.adapters.config import Prefix
from veneer.adapters.methods.prefix import decoder_of, record_keys
from veneer.adapters.methods.prefix_layer import DEFAULT_TOKENS, PrefixLayer, put_start
from veneer.adapters.placement.acting import Acting, Applied
from veneer.adapters.placement.attachment import Attachment
from veneer.data.batching import shared_prompt
from veneer.data.examples import Example
from veneer.errors import ConfigError
from veneer.models.capacity import configured_capacity
from veneer.models.frozen_base import FrozenBase
from veneer.models.starts.computed import AdapterStart

INSTRUCTION = (
    "Read the text below with care and give the answer that it asks for, in exactly the form in"
    " which such answers are given, and nothing besides."
)
MIN_SHARED_TOKENS = 8
"""Least length of a common beginning that counts as a prompt; fewer tokens are a template's
markers."""
MAX_START_TOKENS = 64
"""Most tokens of a prefix without a set length: the end of a longer prompt, which says more about
the task."""
MAX_TEACHER_TOKENS = 512
"""Most tokens of a prefix without a set length that starts from a teacher's text."""
SHOWN = 60
"""Characters of the prompt's end to show; the start record has all of it."""


def start_prefix(
    config: Prefix, base: FrozenBase, examples: Sequence[Example], *, seed: int
) -> AdapterStart:
    """Returns the start of a prefix. ConfigError if prefix and rows exceed the model's length.

    examples: the training rows as the student reads them, or as the teacher does with start teacher
    """
    values = choose_values(config, base, examples)
    if (config.frozen_tokens or 0) > values.tokens:
        raise ConfigError(
            f"frozen_tokens {config.frozen_tokens} are more than the {values.tokens} tokens of the"
            f" prefix, which starts from {values.origin}",
            next_step="Set method.tokens, or fewer frozen_tokens.",
        )
    longest = max((len(e.ids) for e in examples), default=0)
    if config.starts_from_teacher:
        longest -= shared_prompt(examples)
    _check_room(base, values.tokens, longest)

    def put(attachment: Attachment) -> str:
        if values.ids:
            _start_from(base, attachment, values.ids)
        return values.line

    return AdapterStart(config.model_copy(update={"tokens": values.tokens}), put, values.text)


@dataclass(frozen=True)
class PrefixValues:
    """Describes initial values. ids, text: of the prompt, an id for each token of the prefix; none
    for random values. origin: in words."""

    ids: list[int]
    text: str | None
    tokens: int
    origin: str

    @property
    def line(self) -> str:
        line = f"prefix of {self.tokens} tokens, starting from {self.origin}"
        if self.text is None:
            return line
        words = " ".join(self.text.split())
        return line + f": “{words if len(words) <= SHOWN else '…' + words[-SHOWN:]}”"


def choose_values(config: Prefix, base: FrozenBase, examples: Sequence[Example]) -> PrefixValues:
    """Chooses the initial values for these settings, base and rows."""
    if config.start == "random":
        tokens = config.tokens or DEFAULT_TOKENS
        return PrefixValues([], None, tokens, "random keys and values")
    shared = shared_prompt(examples) if len(examples) > 1 else 0
    if config.starts_from_teacher:
        return _of_teacher(config, base, examples, shared)
    if config.prompt is not None:
        ids, origin = list(base.tokenizer(config.prompt)["input_ids"]), "the given prompt"
    elif shared >= MIN_SHARED_TOKENS:
        ids, origin = examples[0].ids[:shared].tolist(), "the common beginning of all rows"
    else:
        ids, origin = (
            list(base.tokenizer(INSTRUCTION)["input_ids"]),
            "an instruction, as the rows have no common beginning",
        )
    tokens = config.tokens or min(len(ids), MAX_START_TOKENS)
    chosen = (ids * (tokens // len(ids) + 1))[:tokens] if tokens > len(ids) else ids[-tokens:]
    return PrefixValues(
        chosen, str(base.tokenizer.decode(chosen, skip_special_tokens=False)), tokens, origin
    )


def _of_teacher(
    config: Prefix, base: FrozenBase, examples: Sequence[Example], shared: int
) -> PrefixValues:
    """Returns the values of the first tokens that the teacher reads in front of every row."""
    tokens = config.tokens or min(shared, MAX_TEACHER_TOKENS)
    if not 0 < tokens <= shared:
        raise ConfigError(
            f"the teacher reads {shared:,} tokens in front of every row, and a prefix of"
            f" {tokens:,} should start from them",
            next_step=(
                "Give a longer system prompt or document (objective.document), or a smaller"
                " method.tokens."
            ),
        )
    ids = examples[0].ids[:tokens].tolist()
    text = str(base.tokenizer.decode(ids, skip_special_tokens=False))
    return PrefixValues(ids, text, tokens, "the beginning of what the teacher reads")


def _check_room(base: FrozenBase, tokens: int, longest: int) -> None:
    """Raises ConfigError if the prefix and the longest row exceed the model's positions.

    longest: tokens of that row
    """
    limit = configured_capacity(base.config).positions
    if limit is not None and longest + tokens > limit:
        raise ConfigError(
            f"the longest row has {longest} tokens: with {tokens} of the prefix that exceeds the"
            f" model's {limit} positions",
            next_step=(
                f"Take method.tokens below {max(limit - longest, 0) + 1}, or shorter rows (length)."
            ),
        )


def attach_text(
    base: FrozenBase, ids: Sequence[int], *, name: str, adapters: Applied = ()
) -> Attachment:
    """Attaches the keys and values of a text as an inactive prefix that does not train.

    adapters: those that act on the text. Raises ConfigError, with nothing attached, if the model
    takes no prefix.
    """
    attachment = attach(
        base.model,
        Prefix(tokens=len(ids), start="random"),
        name=name,
        routing=base.routing,
        head=base.model.get_output_embeddings(),
        values_follow=True,
        read_past=base.read_past,
        idle=base.paths.idle,
    )
    try:
        _start_from(base, attachment, ids, adapters)
    except BaseException:
        base.detach(name)
        raise
    for parameter in attachment.parameters().values():
        parameter.requires_grad_(False)
    return attachment


def _start_from(
    base: FrozenBase, attachment: Attachment, ids: Sequence[int], adapters: Applied = ()
) -> None:
    _, decoder = decoder_of(base.model)
    with base.routing.held(Acting.everywhere(adapters)):
        pairs = record_keys(decoder, torch.tensor(list(ids), device=base.device))
    for layer in attachment.layers.values():
        assert isinstance(layer, PrefixLayer)
        put_start(layer, pairs)
