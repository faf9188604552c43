"""Attaches adapters to a base and detaches them.

Wrapping a module changes no output bit. After the last adapter is detached, the model holds its
original modules again.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import nn

from veneer.adapters.combinations import refuse_beside_activation
from veneer.adapters.config import AdapterConfig, Bottleneck, DoRA, LoRA, Prefix
from veneer.adapters.methods.bottleneck import build_bottleneck
from veneer.adapters.methods.low_rank import build_dora, build_lora
from veneer.adapters.methods.new_tokens import put_tokens
from veneer.adapters.methods.prefix import build_prefix
from veneer.adapters.placement.attachment import Attachment
from veneer.adapters.placement.routing import Routing
from veneer.adapters.placement.score_head import ScoreHead
from veneer.adapters.placement.site import Site
from veneer.adapters.placement.token_rows import AddedTokens
from veneer.adapters.placement.wrapping import plain_modules, unwrap, unwrapped
from veneer.errors import ConfigError
from veneer.files.process_wide import ALONE

_BUILDERS: dict[type[AdapterConfig], Callable[[Site, Any], None]] = {
    LoRA: build_lora,
    DoRA: build_dora,
    Bottleneck: build_bottleneck,
    Prefix: build_prefix,
}
"""The settings class of a method -> the function that puts its layers into a model."""


def attach(
    model: nn.Module,
    config: AdapterConfig,
    *,
    name: str,
    routing: Routing,
    head: nn.Module | None,
    tokens: AddedTokens | None = None,
    score: ScoreHead | None = None,
    invocation: Sequence[int] = (),
    seed: int = 0,
    values_follow: bool = False,
    read_past: Collection[str] | None = None,
    idle: Collection[str] = (),
) -> Attachment:
    """Attaches a fresh, inactive adapter to `model`: no output changes.

    head           the output head; all-linear leaves it out
    tokens         new tokens of the adapter
    score          its own head, if it classifies
    invocation     token ids of its activation, if its settings have a text; (): their ids, or none
    values_follow  the caller sets every trained value before the first forward, so none is drawn
    read_past      weights that the model reads without calling their module (placement/reads.py);
                   None: found by a forward where it matters
    idle           modules that no gradient reaches (placement/idle.py); (): the adapter may be one
                   that never trains

    Raises ConfigError, with nothing attached, if the name is taken or the settings do not fit the
    model.
    """
    with routing.changing, ALONE:
        if name in routing.attached:
            raise ConfigError(
                f"an adapter named {name!r} is attached already",
                next_step="Detach it or take another name.",
            )
        stated = () if isinstance(config.acts_from, str) else config.acts_from
        attachment = Attachment(name, config, score=score, invocation=tuple(invocation or stated))
        site = Site(
            model=model,
            modules=plain_modules(model),
            head=None if head is None else unwrapped(head),
            routing=routing,
            attachment=attachment,
            generator=torch.Generator().manual_seed(seed),
            values_follow=values_follow,
            read_past=read_past,
            idle=idle,
        )
        try:
            _BUILDERS[type(config)](site, config)
            if tokens is not None:
                put_tokens(site, tokens, model.get_input_embeddings())  # type: ignore[operator]
            refuse_beside_activation(name, attachment.contents)
        except BaseException:
            unwrap(model)
            raise
        routing.enter(model, name, attachment)
    return attachment


def check_settings(config: object) -> None:
    """Raises ConfigError unless `config` is the settings of an adapter method."""
    if type(config) not in _BUILDERS:
        description = (
            f"the class {config.__name__}"
            if isinstance(config, type)
            else f"of type {type(config).__name__}"
        )
        step = "For instance veneer.LoRA(rank=8)."
        if getattr(config, "trains_base", False):
            step = "It trains the base's own weights: veneer.train(…, method=…) does."
        raise ConfigError(
            f"an adapter is made from the settings of its method, and this is {description}",
            next_step=step,
        )


def detach(model: nn.Module, name: str, *, routing: Routing) -> None:
    """Detaches an adapter and removes wrappers that no other adapter needs.

    Raises KeyError if there is no such adapter, and ConfigError if another thread or a block around
    this one uses it; it stays attached then.
    """
    with routing.changing:
        if not routing.leave(name):
            raise ConfigError(
                f"adapter {name!r} is in use by another thread or by a block around this one",
                next_step="Detach it when that is done.",
            )
        unwrap(model)
