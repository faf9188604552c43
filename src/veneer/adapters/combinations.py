"""Contents of adapters, and which of them combine: one table for serving, merging and combining.

Adapters that act together add up: base + sum of weight * (output with the adapter - base). Three
contents cannot be added: a trained prefix, which is text in front of the text, a new token, which
has no row in the base's table to differ from, and a score head, whose outputs are its own labels.
Only one adapter with such a content may act, with weight 1. This module imports no torch, because
settings name their contents (config.py).
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from veneer.errors import ConfigError, RefusedError


@dataclass(frozen=True)
class Content:
    """A kind of trained values.

    adds_up   acts with any weight, and beside the same content of other adapters
    merges    can become part of the base's weights
    combines  can become part of an adapter made of several (veneer adapters combine, or training
              from a sum)
    answers   a base with it generates text and scores answers
    alone     no other adapter acts beside it
    instead   next step in the error of a content that the operation does not take
    """

    name: str
    adds_up: bool = True
    merges: bool = True
    combines: bool = False
    answers: bool = True
    alone: bool = False
    instead: str = (
        "Merge it into its base (veneer merge); veneer extract then makes a plain LoRA of the"
        " difference."
    )


UPDATE = Content("low-rank updates", combines=True)
MODULES = Content("modules trained in full", combines=True)
BIASES = Content("trained biases")
OFFSETS = Content("lora_bias vectors")
MAGNITUDES = Content("DoRA magnitudes")
BOTTLENECKS = Content(
    "bottleneck layers",
    merges=False,
    instead=(
        "Its activation stands between its weights: use it beside its base (--adapter), "
        "or train lora where one merged model is wanted."
    ),
)
PREFIX = Content(
    "a trained prefix",
    adds_up=False,
    merges=False,
    instead=(
        "A prefix stands beside the tokens, not in the weights: use it beside its base (--adapter),"
        " or train lora where one merged model is wanted."
    ),
)
TOKENS = Content(
    "new tokens",
    adds_up=False,
    instead="Use it beside its base (--adapter), or merge it: veneer merge.",
)
HEAD = Content(
    "a score head",
    adds_up=False,
    merges=False,
    answers=False,
    instead=(
        "It classifies texts instead of answering: use veneer.classify, veneer evaluate or"
        " v1/classify of veneer serve; PEFT and transformers read its folder as it is."
    ),
)
ACTIVATION = Content(
    "an activation",
    adds_up=False,
    merges=False,
    alone=True,
    instead=(
        "It acts from its activation on, and a merged weight acts on all tokens: use it beside its"
        " base (--adapter), or train lora without activation."
    ),
)
CONTENTS = (
    UPDATE,
    MODULES,
    BIASES,
    OFFSETS,
    MAGNITUDES,
    BOTTLENECKS,
    PREFIX,
    TOKENS,
    HEAD,
    ACTIVATION,
)
"""The rows of the table in docs/format.md."""

Holding = tuple[str, Collection[Content]]
"""Name of an adapter, for messages, and its contents."""


def refuse_sum(acting: Sequence[tuple[str, Collection[Content], float]]) -> None:
    """Raises ConfigError if these adapters (name, contents, weight) cannot act together."""
    for content in CONTENTS:
        holders = [(name, weight) for name, contents, weight in acting if content in contents]
        if content.adds_up or not holders:
            continue
        if content.alone and len(acting) > 1:
            raise ConfigError(
                f"an adapter with {content.name} acts alone",
                [f"{name}: weight {weight:g}" for name, _, weight in acting],
                f"Name {holders[0][0]} alone, with weight 1.",
            )
        if len(holders) == 1 and holders[0][1] == 1.0:
            continue
        raise ConfigError(
            f"one adapter with {content.name} may act, and with weight 1",
            [f"{name}: weight {weight:g}" for name, weight in holders],
            "Name one of them, with weight 1; adapters with other contents may act beside it.",
        )


def beside_activation(contents: Collection[Content]) -> list[str]:
    """Names the contents that act on all tokens: an adapter with an activation cannot have them."""
    return [content.name for content in contents if content not in (UPDATE, OFFSETS, ACTIVATION)]


def refuse_beside_activation(name: str, contents: Collection[Content]) -> None:
    """Raises ConfigError for an adapter with an activation and contents that act on all tokens."""
    if ACTIVATION in contents and (unfit_contents := beside_activation(contents)):
        raise ConfigError(
            f"{name} acts from its activation on, and some of its contents would act on all tokens",
            unfit_contents,
            "Leave activation out, or train these contents as an adapter of their own.",
        )


def refuse_merge(adapters: Sequence[Holding]) -> None:
    """Raises RefusedError if some contents cannot become weights of the base."""
    _refuse(
        adapters,
        lambda content: content.merges,
        "these adapters cannot be merged into the base's weights",
    )


def refuse_combining(adapters: Sequence[Holding]) -> None:
    """Raises RefusedError if some contents cannot become part of one adapter."""
    _refuse(
        adapters,
        lambda content: content.combines,
        "these adapters cannot be combined into one adapter",
    )


def refuse_answers(adapters: Sequence[Holding]) -> None:
    """Raises RefusedError if a base with these adapters writes no answers."""
    _refuse(adapters, lambda content: content.answers, "these adapters write no answers")


def refuse_without_head(adapters: Sequence[Holding]) -> None:
    """Raises ConfigError if none of these adapters has a score head: a head is never made up."""
    if not any(HEAD in contents for _, contents in adapters):
        raise ConfigError(
            "there is no score head to classify with",
            [name for name, _ in adapters] or ["the base alone"],
            "Name an adapter that was trained with objective: classify. An adapter without a head"
            " answers at v1/chat/completions.",
        )


def _refuse(adapters: Sequence[Holding], allowed: Callable[[Content], bool], message: str) -> None:
    """Raises RefusedError that names adapters and contents that are not allowed, if there are
    any."""
    refused = [
        (name, content)
        for name, contents in adapters
        for content in contents
        if not allowed(content)
    ]
    if refused:
        faults = [f"{name}: {content.name}" for name, content in refused]
        raise RefusedError(message, faults, refused[0][1].instead)
