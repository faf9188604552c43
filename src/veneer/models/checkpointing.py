"""Gradient checkpointing: saves each decoder layer's input and computes the rest again in backward.

Exact to the bit: nothing in a layer is random (dropout masks are computed from keys), and equal
shapes use the same kernels. Unlike transformers' checkpointing it works in eval mode, in which the
base's own dropout is off.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from veneer.adapters.placement.acting import Acting
from veneer.adapters.placement.routing import Routing
from veneer.errors import ConfigError
from veneer.execution.facts.decoder_layer import decoder_layers
from veneer.execution.stand_in import StandIn
from veneer.files.memory import give_back

GIVE_BACK_EVERY = 4
"""Free heap pages are returned before every so many layers. Otherwise small objects fragment the
space that temporaries leave between saved inputs. Peak memory of SmolLM2 in bf16, 8 rows of 256
tokens: 960 MB instead of 1,130; of Llama's layers in float32: 1,010 MB instead of 1,120."""


class CheckpointedLayer(StandIn):
    """A decoder layer whose activations are computed again in backward, with the adapters that
    acted in the forward, even on another thread. gives_back: returns free pages before both;
    is_last: behind the forward, before the logits, which do not fit into the gaps that layers
    leave."""

    def __init__(
        self, base: nn.Module, routing: Routing, *, gives_back: bool, is_last: bool
    ) -> None:
        super().__init__(base)
        self.routing, self.gives_back, self.is_last = routing, gives_back, is_last

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        acting = self.routing.acting
        if self.gives_back and torch.is_grad_enabled():
            give_back()
        out = checkpoint(
            self.base,
            *args,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=lambda: (nullcontext(), self._again(acting)),
            **kwargs,
        )
        if self.is_last and torch.is_grad_enabled():
            give_back()
        return out

    @contextmanager
    def _again(self, acting: Acting) -> Iterator[None]:
        if self.gives_back:
            give_back()
        with self.routing.held(acting):
            yield


@contextmanager
def checkpointed(model: PreTrainedModel, routing: Routing, *, on: bool) -> Iterator[None]:
    """Within the block every decoder layer is checkpointed, if `on`."""
    layers = decoder_layers(model) if on else None
    if on and layers is None:
        raise ConfigError(
            f"{type(model).__name__} has no list of layers to checkpoint",
            next_step="Set checkpointing: false.",
        )
    original_layers = list(layers or ())
    on_cpu = next(model.parameters()).device.type == "cpu"
    try:
        for index, layer in enumerate(original_layers):
            assert layers is not None
            gives_back = on_cpu and index % GIVE_BACK_EVERY == GIVE_BACK_EVERY - 1
            is_last = on_cpu and index == len(original_layers) - 1
            layers[index] = CheckpointedLayer(
                layer, routing, gives_back=gives_back, is_last=is_last
            )
        yield
    finally:
        for index, layer in enumerate(original_layers):
            assert layers is not None
            layers[index] = layer
