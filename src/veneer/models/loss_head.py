"""The output head of a model for the loss: its weights, or its module if adapters act on it or it
has hooks."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from veneer.adapters.methods.new_tokens import ExtendedHead
from veneer.adapters.placement.acting import Acting
from veneer.adapters.placement.routing import Routing
from veneer.adapters.placement.wrapping import AdaptedModule, unwrapped
from veneer.kernels.dense.loss import Head, TrainedHeadRows
from veneer.private.torch import has_hooks


def loss_head(
    model: PreTrainedModel, routing: Routing, scale: float, softcap: float | None
) -> Head:
    """Returns the output head for the loss: its weights, or its module if an adapter acts on it or
    it has hooks."""
    head: Any = model.get_output_embeddings()
    plain: Any = unwrapped(head)
    acting, wrappers = routing.acting, list(_wrappers(head))
    plain_head = Head(plain.weight, plain.bias, scale, softcap)
    called_head = CalledHead(
        plain.weight, None, scale, softcap, module=head, routing=routing, rows=acting
    )
    if any(map(has_hooks, (*wrappers, plain))):
        return called_head
    concerned = [wrapper for wrapper in wrappers if wrapper.acts()]
    if not concerned:
        return plain_head
    if acting.whole is not None and [type(wrapper) for wrapper in concerned] == [ExtendedHead]:
        tokens = concerned[0].token_rows_of(acting.whole)
        bias = None if plain.bias is None else tokens.of_bias(plain.bias)
        return replace(
            plain_head, beside=TrainedHeadRows(tokens.rows, tokens.at, bias), columns=tokens.end
        )
    return called_head


def _wrappers(head: nn.Module) -> Iterator[Any]:
    """Yields the wrappers of a head, the outermost first."""
    module: Any = head
    while isinstance(module, AdaptedModule):
        yield module
        module = module.base


@dataclass(frozen=True)
class CalledHead(Head):
    """A head with adapters or hooks: its module computes the logits. rows: what acts on its input
    rows."""

    module: nn.Module = field(kw_only=True)
    routing: Routing = field(kw_only=True)
    rows: Acting = field(kw_only=True)

    def of(self, rows: slice) -> "Head":
        return replace(self, rows=self.rows.between(rows))

    def logits_into(self, out: Tensor, h: Tensor) -> Tensor:
        return self.logits(h)

    def logits(self, h: Tensor) -> Tensor:
        # Rows behind those of the adapters fill up the chunk; their logits are not read.
        filler = 0 if self.rows.rows is None else len(h) - self.rows.rows
        with self.routing.held(self.rows.padded(filler)):
            z: Tensor = self.module(h)
        z = z if self.scale == 1.0 else z * self.scale
        if self.softcap is None:
            return z
        unknown = z == float("-inf")  # new tokens of other adapters
        return (torch.tanh(z / self.softcap) * self.softcap).masked_fill(unknown, float("-inf"))
