"""Computes the merged value of each weight of a base, W + D, in float32, one weight at a time. D is
what the adapters add.

The base is read, never written. Its weights may be stored in any form that can be decoded: the sum
starts from what the base computes with. Several adapters add up: W + sum of weight * (folded_i(W) -
W). Knows nothing of files or rounding. Shapes: I/O in/out features, V vocabulary, D hidden, E
experts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from veneer.adapters.combinations import refuse_merge
from veneer.adapters.methods.expert_stack import is_transposed
from veneer.adapters.placement.acting import check_together
from veneer.adapters.placement.attachment import Attachment, summed_change
from veneer.adapters.placement.layer import Layer
from veneer.adapters.placement.wrapping import plain_modules
from veneer.errors import RefusedError
from veneer.linear import PackedExperts, PackedLinear, PackedModule, is_transposed_linear
from veneer.private.torch import buffers_of, parameters_of, unsaved_buffers
from veneer.wording import first_lines

Applied = Sequence[tuple[Attachment, float]]
"""Adapters with their weights."""
Trained = Sequence[tuple[Tensor, float]]
"""Values of one parameter, trained in full by several adapters, with the adapters' weights."""


@dataclass(frozen=True)
class SourceTensor:
    """Describes a weight or buffer of a model. read: returns it, decoded to float32 if
    quantised.
    """

    shape: torch.Size
    dtype: torch.dtype
    read: Callable[[], Tensor]
    quantised: bool = False


def stored_tensors(model: nn.Module) -> dict[str, SourceTensor]:
    """Returns every tensor of a model's state by its name in the dense model, in the model's
    order.
    """
    tensors: dict[str, SourceTensor] = {}
    for path, module in plain_modules(model).items():
        prefix = f"{path}." if path else ""
        packed = module.packed_shapes() if isinstance(module, PackedModule) else {}
        dense: dict[str, Tensor | None] = dict(parameters_of(module))
        if not packed:  # other buffers of a packed module belong to its format
            left_out = unsaved_buffers(module)
            dense |= {
                name: buffer for name, buffer in buffers_of(module).items() if name not in left_out
            }
        for name, tensor in dense.items():
            if name in packed:
                read = _decoder(module, name, packed[name])
                shape = packed[name][::-1] if _is_stored_transposed(module) else packed[name]
                tensors[prefix + name] = SourceTensor(
                    torch.Size(shape), torch.float32, read, quantised=True
                )
            elif tensor is not None:
                tensors[prefix + name] = SourceTensor(tensor.shape, tensor.dtype, tensor.detach)
    return tensors


def _decoder(module: nn.Module, name: str, shape: tuple[int, ...]) -> Callable[[], Tensor]:
    """Returns a function that decodes a packed weight to float32, as a dense module stores it."""

    def read() -> Tensor:
        if isinstance(module, PackedLinear):
            weight = module.dense_weight(torch.float32)
            return weight.T.contiguous() if module.replaces_transposed else weight
        assert isinstance(module, PackedExperts)
        stack = [
            module.expert(name, number).dense_weight(torch.float32) for number in range(shape[0])
        ]
        stacked = torch.stack(stack)
        return stacked.transpose(1, 2) if module.is_transposed else stacked

    return read


def _is_stored_transposed(module: nn.Module) -> bool:
    """Returns whether the dense model stores this linear layer's weight as (I, O)."""
    return (
        module.replaces_transposed
        if isinstance(module, PackedLinear)
        else is_transposed_linear(module)
    )


def is_transposed_at(modules: Mapping[str, nn.Module], path: str) -> bool:
    """Returns whether a weight is stored as the transpose of B A. path: of a module, or of a
    parameter with 3 axes.
    """
    module = modules.get(path)
    if module is None:
        return is_transposed(modules[path.rpartition(".")[0]])
    return isinstance(module, nn.Embedding) or _is_stored_transposed(module)


def weight_changes(model: nn.Module, applied: Applied) -> dict[str, Callable[[Tensor], Tensor]]:
    """Returns, by name of each changed weight, a function from its value to the merged value, both
    float32.

    RefusedError: contents that cannot be merged, or lora_bias at a layer without a bias.
    ConfigError: adapters that cannot act together with these weights.
    """
    refuse_merge([(attachment.name, attachment.contents) for attachment, _ in applied])
    check_together(tuple(applied))
    modules = plain_modules(model)
    parts: dict[str, list[_WeightUpdate]] = {}
    offsets: dict[str, list[Tensor]] = {}
    for attachment, weight in applied:
        for path, layer in attachment.layers.items():
            module = modules.get(path)
            if module is not None:
                part = _WeightUpdate(layer, _is_stored_transposed(module), weight)
                parts.setdefault(f"{path}.weight", []).append(part)
                if (offset := layer.stored().get("offset")) is not None:
                    offsets.setdefault(f"{path}.bias", []).append(layer.scaling * weight * offset)
            else:  # the path of a parameter with 3 axes
                owner = modules[path.rpartition(".")[0]]
                parts.setdefault(path, []).append(
                    _WeightUpdate(layer, is_transposed(owner), weight)
                )
    merged: dict[str, Callable[[Tensor], Tensor]] = {
        name: _sum_of(updates) for name, updates in parts.items()
    }
    merged |= {name: _plus(updates) for name, updates in offsets.items()}
    if missing := [
        name
        for name in offsets
        if parameters_of(modules[name.removesuffix(".bias")]).get("bias") is None
    ]:
        raise RefusedError(
            "lora_bias has no place in these layers, which have no bias of their own",
            first_lines(missing, 6),
            "Let the adapter act beside the base.",
        )
    for name, trained in trained_values(
        [(attachment.values, weight) for attachment, weight in applied]
    ).items():
        merged[name] = _with_trained(trained, merged.get(name))
    return merged


@dataclass(frozen=True)
class _WeightUpdate:
    """Holds an adapter's change of one weight. transposed: the weight is stored as (..., I, O)."""

    layer: Layer
    transposed: bool
    weight: float

    def folded(self, weight: Tensor) -> Tensor:
        """Returns the weight with the update, as it is stored."""
        if not self.transposed:
            return self.layer.folded(weight)
        return self.layer.folded(weight.transpose(-1, -2)).transpose(-1, -2).contiguous()


def _sum_of(updates: Sequence[_WeightUpdate]) -> Callable[[Tensor], Tensor]:
    def merged(weight: Tensor) -> Tensor:
        if len(updates) == 1 and updates[0].weight == 1.0:
            return updates[0].folded(weight)
        changed = weight.clone()
        for update in updates:
            changed += update.weight * (update.folded(weight) - weight)
        return changed

    return merged


def _plus(offsets: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
    def merged(bias: Tensor) -> Tensor:
        return bias + torch.stack(list(offsets)).sum(0).to(bias)

    return merged


def _with_trained(
    trained: Trained, update: Callable[[Tensor], Tensor] | None
) -> Callable[[Tensor], Tensor]:
    """Returns the weighted sum of values trained in full, plus updates of other adapters."""

    def merged(value: Tensor) -> Tensor:
        replaced = summed_change(
            value,
            [
                (trained_value.detach().float().to(value.device), weight)
                for trained_value, weight in trained
            ],
        )
        return replaced if update is None else replaced + (update(value) - value)

    return merged


def trained_values(adapters: Sequence[tuple[Mapping[str, Tensor], float]]) -> dict[str, Trained]:
    """Groups trained values by parameter. adapters: values by parameter, and weight, of each."""
    trained: dict[str, list[tuple[Tensor, float]]] = {}
    for values, weight in adapters:
        for name, value in values.items():
            trained.setdefault(name, []).append((value, weight))
    return dict(trained)


def tied_names(model: nn.Module) -> dict[str, str]:
    """Returns {alias: source} of parameters that are one tensor with two names; files hold only the
    source.
    """
    modules = plain_modules(model)
    by_name = {
        f"{path}.{name}": parameter
        for path, module in modules.items()
        for name, parameter in parameters_of(module).items()
    }
    declared: Mapping[str, str] = getattr(model, "all_tied_weights_keys", {})
    return {
        alias: source
        for alias, source in declared.items()
        if by_name.get(alias) is not None and by_name.get(source) is by_name[alias]
    }


def names_to_untie(tied: Mapping[str, str], changed: Mapping[str, object]) -> dict[str, str]:
    """Returns the tied names that must become tensors of their own: {alias: source}.

    An adapter's update of an embedding does not act on a tied head, nor the reverse.
    """
    return {
        alias: source for alias, source in tied.items() if alias in changed or source in changed
    }
