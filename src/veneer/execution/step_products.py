"""Computes products and norms of a decoding step, those of adapted layers too: by the kernels, or
by the modules in their places.

Shapes: N rows of the step, D width, E head size.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from veneer.adapters.methods.adapted_linear import AdaptedLinear
from veneer.adapters.placement.wrapping import AdaptedModule
from veneer.execution.facts.layer_facts import Norm
from veneer.kernels import rules
from veneer.kernels.decoding import decoder_step
from veneer.kernels.dense import few_rows
from veneer.linear import FewRowsLinear, WidenedLinear, is_transposed_linear
from veneer.private.torch import has_hooks, parameters_of

DENSE = (nn.Linear, FewRowsLinear, WidenedLinear)
"""Modules whose products few_rows computes."""


class Branch(NamedTuple):
    """The output of a part of a layer before it is added: h becomes h + scale * norm(values).

    place, facts  the norm's module, and what it computes; None: there is no norm
    """

    values: Tensor
    scale: float
    place: nn.Module | None
    facts: Norm | None


def bare(module: nn.Module | None) -> nn.Module | None:
    """Returns the base's own module; None if an adapter acts on it or it has hooks."""
    while isinstance(module, AdaptedModule):
        if not module.idle() or has_hooks(module):
            return None
        module = module.base
    return None if module is None or has_hooks(module) else module


def dense_operands(x: Tensor, place: nn.Module | None) -> tuple[Tensor, Tensor | None] | None:
    """Returns weight and bias of a linear layer; None if few_rows does not compute its product
    with x."""
    linear: Any = bare(place)
    if type(linear) not in DENSE and (linear is None or not is_transposed_linear(linear)):
        return None
    weight = linear.weight if type(linear) in DENSE else linear.weight.T
    return (weight, linear.bias) if few_rows.usable(x, weight, linear.bias) else None


def product(x: Tensor, place: Any) -> Tensor:
    """Returns the product of x (N, D) with the linear layer in this place."""
    part = _part(x, place)
    if part is not None:
        return (
            few_rows.updated(x, [part])[0]
            if part[2] is not None
            else few_rows.product(x, *part[:2])
        )
    return place(x[None])[0]


def products(x: Tensor, places: Sequence[nn.Module | None]) -> list[Tensor]:
    """Returns the product of x with each layer, contiguous and in a tensor of its own."""
    parts = [part for place in places if (part := _part(x, place)) is not None]
    if (
        len(parts) == len(places)
        and sum(len(updates or ()) for *_, updates in parts) <= few_rows.MOST_UPDATES
    ):
        if all(updates is None for *_, updates in parts):
            return few_rows.products(x, [(weight, bias) for weight, bias, _ in parts])
        return few_rows.updated(x, parts)
    return [product(x, place).contiguous() for place in places]


def _part(x: Tensor, place: nn.Module | None) -> few_rows.UpdatedWeight | None:
    """Returns weight, bias and updates of a layer, for a call that computes several layers of the
    same x; None if few_rows does not compute it. The updates of an adapted layer are listed even if
    there are none now."""
    if isinstance(place, AdaptedLinear) and (operand := place.step_operand(x)) is not None:
        return operand
    dense = dense_operands(x, place)
    return None if dense is None else (*dense, None)


def normed(x: Tensor, place: nn.Module | None, facts: Norm) -> Tensor:
    """Returns the norm of x (N, D) over each head, or over as many values as its weight has."""
    if x.stride(0) != x.shape[1]:  # a single row with a gap behind it is contiguous for torch
        x = x.clone(memory_format=torch.contiguous_format)
    groups = x.view(-1, facts.weight.numel())
    norm = norm_operand(place, facts)
    if norm is None:
        trained: Any = place
        own: Tensor = trained(groups.view(1, len(x), -1, groups.shape[1]))[0]
        return own.flatten(1)
    return decoder_step.add_norm(groups, None, norm)[1].view(x.shape)


def add_norm(
    h: Tensor, branch: Branch | None, place: nn.Module | None, facts: Norm | None
) -> tuple[Tensor, Tensor]:
    """Returns (h', x): h' = h + branch, x = norm(h'). facts None: there is no norm, x is h'."""
    norm, delta, after, scale = norm_operand(place, facts), None, None, 1.0
    if branch is not None:
        delta, after, scale = branch.values, norm_operand(branch.place, branch.facts), branch.scale
        if after is None and branch.facts is not None:
            trained: Any = branch.place
            delta = trained(delta[None])[0]
    if facts is None or norm is not None:
        return decoder_step.add_norm(h, delta, norm, after, scale)
    own: Any = place
    h, _ = decoder_step.add_norm(h, delta, None, after, scale)
    return h, own(h[None])[0]


def norm_operand(place: nn.Module | None, facts: Norm | None) -> rules.Norm | None:
    """Returns a norm for the kernels. Returns None if there is none, or its module computes it."""
    norm: Any = bare(place)
    if norm is None or facts is None:
        return None
    bias = parameters_of(norm).get("bias") if facts.is_centred else None
    kind = facts.epsilon, facts.offset, facts.is_wide, facts.is_centred
    weight = norm.weight if facts.ones is None else facts.ones
    return rules.Norm(weight, *kind, bias)


def scaled(x: Tensor, scale: float) -> Tensor:
    """Returns scale * x (N, D), or x itself if the scale is 1."""
    if scale == 1.0:
        return x
    return decoder_step.cap(decoder_step.compact(x[:, None]), scale)
