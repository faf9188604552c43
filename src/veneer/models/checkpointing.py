"""Gradient checkpointing: keep each decoder layer's input, compute the rest again in backward.

Exact to the bit: nothing in a layer is random (dropout masks are computed from keys), and the same
shapes take the same kernels. Wrapping our own way keeps the base in eval mode, where its own
dropout is off.
"""

import ctypes
import sys
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
from veneer.execution.attention import decoder
from veneer.execution.decoder_layer import decoder_layers
from veneer.execution.stand_in import StandIn

GIVE_BACK_EVERY = 4
"""Layers. Before each of these the heap's free pages are given back: small objects cut up what
temporaries leave between kept inputs, and the next layer's do not fit. SmolLM2 in bf16, 8 rows of
256 tokens: 6 MB a layer where 2 are kept, a peak of 1,130 MB and now 960; Llama's layers in
float32: 25 where 4 are, 1,120 and 1,010."""


class CheckpointedLayer(StandIn):
    """A decoder layer whose activations are not kept. They are computed again with the adapters
    that acted, on whatever thread that happens: backward has threads of its own on a GPU.
    gives_back: free pages, before either."""

    def __init__(self, base: nn.Module, routing: Routing, *, gives_back: bool) -> None:
        super().__init__(base)
        self.routing, self.gives_back = routing, gives_back

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        acting = self.routing.acting
        if self.gives_back and torch.is_grad_enabled():
            give_back()
        return checkpoint(
            self.base,
            *args,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=lambda: (nullcontext(), self._again(acting)),
            **kwargs,
        )

    @contextmanager
    def _again(self, acting: Acting) -> Iterator[None]:
        if self.gives_back:
            give_back()
        with self.routing.held(acting):
            yield


def give_back() -> None:
    """Return free pages to the system, where the C library is glibc."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _before_logits(*_: object) -> None:
    """The temporaries of the layers have left holes in the heap, and the logits, which come next,
    do not fit."""
    if torch.is_grad_enabled():
        give_back()


@contextmanager
def checkpointed(model: PreTrainedModel, routing: Routing, *, on: bool) -> Iterator[None]:
    """Within the block every decoder layer is checkpointed (if `on`); afterwards the layers stand
    as before."""
    layers = decoder_layers(model) if on else None
    if on and layers is None:
        raise ConfigError(
            f"{type(model).__name__} has no list of layers to checkpoint",
            next_step="Set checkpointing: false.",
        )
    own = list(layers or ())
    on_cpu = next(model.parameters()).device.type == "cpu"
    hook = (
        (decoder(model) or model).register_forward_hook(_before_logits) if own and on_cpu else None
    )
    try:
        for index, layer in enumerate(own):
            assert layers is not None
            gives_back = on_cpu and index % GIVE_BACK_EVERY == GIVE_BACK_EVERY - 1
            layers[index] = CheckpointedLayer(layer, routing, gives_back=gives_back)
        yield
    finally:
        if hook is not None:
            hook.remove()
        for index, layer in enumerate(own):
            assert layers is not None
            layers[index] = layer
