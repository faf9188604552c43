"""Embeddings with LoRA or DoRA, and modules that multiply by their `weight` themselves.

Shapes: V vocabulary, D hidden.
"""

from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapters.methods.lora import low_rank_matrix
from veneer.adapters.placement.acting import Applied
from veneer.adapters.placement.routing import Routing
from veneer.adapters.placement.wrapping import AdaptedModule
from veneer.linear import embedding_as_linear


class AdaptedEmbedding(AdaptedModule):
    """table[ids] + sum over active adapters of weight * change. A model that scales its embeddings
    scales the changes too."""

    def __init__(self, base: nn.Module, routing: Routing, path: str) -> None:
        super().__init__(base, routing, path)
        self.table = embedding_as_linear(base)

    @property
    def weight(self) -> Tensor:
        return self.base.get_parameter("weight")

    def adapted(self, adapters: Applied, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        (ids,) = (*args, *kwargs.values())
        trained, layers = self.trained(adapters), self.layers_of(adapters)
        y: Tensor = self.output_sum(trained, ids) if trained else self.base(ids)
        if not layers:
            return y
        plain = self.base(ids) if trained else y  # changes are changes of the base's own table
        scale = getattr(self.base, "embed_scale", 1.0)
        for layer, weight in layers:
            y = y + weight * layer.looked_up(ids, plain, self.table, scale=scale)
        return y


class AdaptedMatrix(AdaptedModule):
    """A router or another module that multiplies by its `weight` itself. It is called with W + the
    changes, in W's type."""

    def adapted(self, adapters: Applied, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        values = self.replaced(adapters)
        for layer, weight in self.layers_of(adapters):
            base_weight = values.get("weight", self.base.get_parameter("weight"))
            delta = low_rank_matrix(layer.A, layer.B, layer.scaling * weight)
            values["weight"] = base_weight + delta.to(base_weight.dtype)
        return torch.func.functional_call(self.base, values, args, kwargs)
