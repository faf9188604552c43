"""What adapters contain, and what of it combines: the one table that acting, serving, merging and
combining read.

Adapters that act together add up: base + sum of weight * (what the adapter makes of the base alone
- base). Two contents have no such sum. A trained prefix is text in front of the text. A new token
has no row in the base's table from which its row could differ by a share. One adapter with such a
content may act, and with weight 1; everything else is refused here, by the same error everywhere.
No torch here: settings name their contents (config.py).
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from veneer.errors import ConfigError, RefusedError


@dataclass(frozen=True)
class Content:
    """One kind of trained values.

    adds_up   acts with any weight, and beside the same content of other adapters
    merges    can become part of the base's weights
    combines  can become part of an adapter made of several (veneer adapters combine, or training
              from a sum)
    instead   what to do where it neither merges nor combines
    """

    name: str
    adds_up: bool = True
    merges: bool = True
    combines: bool = False
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
CONTENTS = (UPDATE, MODULES, BIASES, OFFSETS, MAGNITUDES, BOTTLENECKS, PREFIX, TOKENS)
"""The table's rows, as docs/format.md shows them."""

Holding = tuple[str, Collection[Content]]
"""Name of an adapter, for messages, and what it contains."""


def refuse_sum(acting: Sequence[tuple[str, Collection[Content], float]]) -> None:
    """ConfigError if these adapters, by name, contents and weight, cannot act together with these
    weights."""
    for content in CONTENTS:
        holders = [(name, weight) for name, contents, weight in acting if content in contents]
        if content.adds_up or not holders or (len(holders) == 1 and holders[0][1] == 1.0):
            continue
        raise ConfigError(
            f"one adapter with {content.name} may act, and with weight 1",
            [f"{name}: weight {weight:g}" for name, weight in holders],
            "Name one of them, with weight 1; adapters with other contents may act beside it.",
        )


def refuse_merge(adapters: Sequence[Holding]) -> None:
    """RefusedError if the contents of some adapters cannot become weights of the base."""
    _refuse(
        [(name, held) for name, contents in adapters for held in contents if not held.merges],
        "these adapters cannot be merged into the base's weights",
    )


def refuse_combining(adapters: Sequence[Holding]) -> None:
    """RefusedError if the contents of some adapters cannot become part of one adapter."""
    _refuse(
        [(name, held) for name, contents in adapters for held in contents if not held.combines],
        "these adapters cannot be combined into one adapter",
    )


def _refuse(lacking: Sequence[tuple[str, Content]], message: str) -> None:
    """RefusedError that names these adapters and contents, if there are any."""
    if lacking:
        faults = [f"{name}: {content.name}" for name, content in lacking]
        raise RefusedError(message, faults, lacking[0][1].instead)
