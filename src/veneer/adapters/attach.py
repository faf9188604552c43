"""Putting an adapter beside a base and taking it away.

Wrapping changes no output bit; when the last adapter leaves, the original modules stand in their old places.
"""

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn

from veneer.adapters.bottleneck import build_bottleneck
from veneer.adapters.config import AdapterConfig, Bottleneck, DoRA, LoRA, Prefix
from veneer.adapters.low_rank import build_dora, build_lora
from veneer.adapters.prefix import build_prefix
from veneer.adapters.routing import Routing
from veneer.adapters.site import Attachment, Site
from veneer.adapters.wrapping import adapter_names, plain_modules, unwrap, unwrapped
from veneer.errors import ConfigError

_BUILDERS: dict[type[AdapterConfig], Callable[[Site, Any], None]] = {
    LoRA: build_lora,
    DoRA: build_dora,
    Bottleneck: build_bottleneck,
    Prefix: build_prefix,
}
"""A method's settings -> the function that puts its layers in their places."""


def attach(
    model: nn.Module, config: AdapterConfig, *, name: str, routing: Routing, head: nn.Module | None, seed: int = 0,
    values_follow: bool = False, read_past: Collection[str] | None = None, idle: Collection[str] = (),
) -> Attachment:  # fmt: skip
    """A fresh adapter beside `model`, not yet active: no output changes. head: the output head, never in all-linear.

    values_follow: the caller gives every trained value before anything is computed; none is drawn then.
    read_past: the weights that the model takes past their modules (reads.py); None: the model is asked, where it matters.
    idle: places that no gradient reaches (idle.py); (): whatever is attached need not train.

    ConfigError: the name is taken, or the settings do not fit the model; nothing is attached then.
    """
    if name in adapter_names(model):
        raise ConfigError(
            f"an adapter named {name!r} is attached already", next_step="Detach it or take another name."
        )
    attachment = Attachment(name, config)
    site = Site(
        model=model, modules=plain_modules(model), head=None if head is None else unwrapped(head),
        routing=routing, attachment=attachment, generator=torch.Generator().manual_seed(seed),
        values_follow=values_follow, read_past=read_past, idle=idle,
    )  # fmt: skip
    try:
        _BUILDERS[type(config)](site, config)
    except BaseException:
        unwrap(model, name)
        raise
    routing.attached[name] = attachment
    return attachment


def detach(model: nn.Module, name: str) -> None:
    """Take the adapter's layers away; where no other adapter needs it, a module stands as it was before."""
    unwrap(model, name)
