"""Attaches a fresh adapter with its initial values, which the base computes for some methods."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from veneer.adapters.attach import attach
from veneer.adapters.config import AdapterConfig, LoRA, Prefix
from veneer.adapters.labels import HeadSettings
from veneer.adapters.placement.attachment import Attachment
from veneer.adapters.placement.reads import refused_by_peft
from veneer.adapters.placement.token_rows import AddedTokens
from veneer.data.activation import invocation_tokens
from veneer.data.examples import Example
from veneer.models.frozen_base import FrozenBase
from veneer.models.own_head import fresh_head, head_line
from veneer.models.starts.computed import AdapterStart
from veneer.models.starts.eva_loftq import start_lora
from veneer.models.starts.prefix import start_prefix
from veneer.models.step import refuse_untrainable

_STARTS: dict[type[AdapterConfig], Callable[..., AdapterStart]] = {
    LoRA: start_lora,
    Prefix: start_prefix,
}
"""Settings class -> function of (settings, base, training rows, seed=). Other methods start with
the values of their builder."""


@dataclass(frozen=True)
class FreshAdapter:
    """A fresh adapter.

    attachment   the attached adapter; its config has every default resolved
    starts_from  the prompt whose values it starts from
    lines        the same for the screen
    """

    attachment: Attachment
    starts_from: str | None
    lines: list[str]


def begin(
    base: FrozenBase,
    config: AdapterConfig,
    *,
    name: str,
    seed: int = 0,
    examples: Sequence[Example] = (),
    tokens: AddedTokens | None = None,
    score: HeadSettings | None = None,
) -> FreshAdapter:
    """Attaches a fresh, inactive adapter to `base`. examples: training rows, if any; tokens: new
    tokens; score: of its head, if it classifies.

    Raises ConfigError, with nothing attached, if the name is taken or the settings do not fit, and
    RefusedError if the model cannot be trained.
    """
    paths = base.paths  # proves them and switches attention
    refuse_untrainable(base.model, paths)
    start_of = _STARTS.get(type(config))
    start = None if start_of is None else start_of(config, base, examples, seed=seed)
    head = base.model.get_output_embeddings()
    attachment = attach(
        base.model,
        config if start is None else start.config,
        name=name,
        routing=base.routing,
        head=head,
        tokens=tokens,
        score=None if score is None else fresh_head(base, score),
        invocation=invocation_tokens(config, base.tokenizer),
        seed=seed,
        read_past=base.read_past,
        idle=paths.idle,
    )
    try:
        line = None if start is None else start.put(attachment)
    except BaseException:
        base.detach(name)
        raise
    lines = [*([] if line is None else [line]), *_refused_by_peft(base, attachment)]
    if attachment.invocation:
        count = len(attachment.invocation)
        lines.append(f"acts from its activation on ({count:,} tokens): before it the base computes")
    if tokens is not None:
        lines.append(f"{len(tokens.ids):,} new tokens: only their rows of the vocabulary train")
    if score is not None:
        lines.append(head_line(score))
    return FreshAdapter(attachment, None if start is None else start.prompt, lines)


def _refused_by_peft(base: FrozenBase, attachment: Attachment) -> list[str]:
    """Returns a warning for an adapter that PEFT will not load."""
    refused = sorted(refused_by_peft(base.model) & attachment.layers.keys())
    if not refused:
        return []
    names = ", ".join(sorted({path.rpartition(".")[2] for path in refused}))
    return [
        f"PEFT refuses LoRA on {names} of this model ({len(refused)} modules): only Veneer loads"
        " this adapter; veneer merge writes a model that others read"
    ]
