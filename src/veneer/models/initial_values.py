"""Attaching with what an adapter starts from: values that the base itself computes, where a method
wants such."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from veneer.adapters.attach import attach
from veneer.adapters.config import AdapterConfig, LoRA, Prefix
from veneer.adapters.placement.attachment import Attachment
from veneer.adapters.placement.reads import refused_by_peft
from veneer.adapters.placement.token_rows import AddedTokens
from veneer.data.examples import Example
from veneer.models.eva_loftq import start_lora
from veneer.models.frozen_base import FrozenBase
from veneer.models.prefix_start import start_prefix
from veneer.models.start import AdapterStart
from veneer.models.step import refuse_untrainable

_STARTS: dict[type[AdapterConfig], Callable[..., AdapterStart]] = {
    LoRA: start_lora,
    Prefix: start_prefix,
}
"""Settings -> (settings, base, training rows, seed) -> the start. Methods not named here start
where their builder puts them."""


@dataclass(frozen=True)
class FreshAdapter:
    """attachment: its config has every default resolved; starts_from: the prompt whose values it
    starts from, whole; lines: the same for the screen."""

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
) -> FreshAdapter:
    """A fresh adapter on `base`, entered in base.attachments, not yet active. examples: the
    training rows, if any; tokens: those that it brings.

    ConfigError: the name is taken, or the settings do not fit the model; nothing is attached then.
    RefusedError: the model cannot be trained.
    """
    paths = base.paths  # proves them, and hands attention over
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
    if tokens is not None:
        lines.append(f"{len(tokens.ids):,} new tokens, whose rows alone train of the vocabulary")
    return FreshAdapter(attachment, None if start is None else start.prompt, lines)


def _refused_by_peft(base: FrozenBase, attachment: Attachment) -> list[str]:
    """A line for an adapter that PEFT will not load."""
    refused = sorted(refused_by_peft(base.model) & attachment.layers.keys())
    if not refused:
        return []
    names = ", ".join(sorted({path.rpartition(".")[2] for path in refused}))
    return [
        f"PEFT refuses LoRA on {names} of this model ({len(refused)} modules): the adapter loads in"
        " Veneer alone; veneer merge makes a model that others read"
    ]
