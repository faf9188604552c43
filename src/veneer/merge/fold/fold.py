"""What each weight of a base becomes when adapters are added into it: W + D, summed in float32, one
at a time.

The base is read, never written. Its weights may be stored in any way that has a dense form: what is
added to is what the base computes with. Several adapters add up: W + sum of weight * (folded_i(W) -
W). Not known here: files, rounding. Shapes: I/O in/out features, V vocabulary, D hidden, E experts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from veneer.adapters.combinations import refuse_merge
from veneer.adapters.methods.experts import is_transposed
from veneer.adapters.placement.acting import check_together
from veneer.adapters.placement.attachment import Attachment, summed_change
from veneer.adapters.placement.layer import Layer
from veneer.adapters.placement.wrapping import plain_modules
from veneer.errors import RefusedError
from veneer.linear import PackedExperts, PackedLinear, PackedModule, is_transposed_linear

Applied = Sequence[tuple[Attachment, float]]
"""Adapters with the weight each acts with."""
Trained = Sequence[tuple[Tensor, float]]
"""Values of one parameter, each trained in full by one adapter, with the adapters' weights."""


@dataclass(frozen=True)
class SourceTensor:
    """One weight or buffer of a model: `read` gives it, decoded to float32 where it is stored
    quantised."""

    shape: torch.Size
    dtype: torch.dtype
    read: Callable[[], Tensor]
    quantised: bool = False


def stored_tensors(model: nn.Module) -> dict[str, SourceTensor]:
    """Every tensor of a model's state by the name it has in the dense model, in the model's
    order."""
    found: dict[str, SourceTensor] = {}
    for path, module in plain_modules(model).items():
        prefix = f"{path}." if path else ""
        packed = module.packed_shapes() if isinstance(module, PackedModule) else {}
        plain: dict[str, Tensor | None] = dict(module._parameters)
        if not packed:  # what else a packed module holds belongs to its format
            left_out = module._non_persistent_buffers_set
            plain |= {
                name: buffer for name, buffer in module._buffers.items() if name not in left_out
            }
        for name, tensor in plain.items():
            if name in packed:
                read = _decoder(module, name, packed[name])
                shape = packed[name][::-1] if _turned(module) else packed[name]
                found[prefix + name] = SourceTensor(
                    torch.Size(shape), torch.float32, read, quantised=True
                )
            elif tensor is not None:
                found[prefix + name] = SourceTensor(tensor.shape, tensor.dtype, tensor.detach)
    return found


def _decoder(module: nn.Module, name: str, shape: tuple[int, ...]) -> Callable[[], Tensor]:
    """Reads a packed weight as float32, as the dense module would store it."""

    def read() -> Tensor:
        if isinstance(module, PackedLinear):
            weight = module.dense_weight(torch.float32)
            return weight.T.contiguous() if module.replaces_transposed else weight
        assert isinstance(module, PackedExperts)
        stack = [
            module.expert(name, number).dense_weight(torch.float32) for number in range(shape[0])
        ]
        whole = torch.stack(stack)
        return whole.transpose(1, 2) if module.is_transposed else whole

    return read


def _turned(module: nn.Module) -> bool:
    """Whether the dense model stores this linear layer's weight as (I, O)."""
    return (
        module.replaces_transposed
        if isinstance(module, PackedLinear)
        else is_transposed_linear(module)
    )


def is_turned(modules: Mapping[str, nn.Module], place: str) -> bool:
    """Whether the weight at an update's place is stored as the transpose of B A. place: path of a
    module, or of a 3-D parameter."""
    module = modules.get(place)
    if module is None:
        return is_transposed(modules[place.rpartition(".")[0]])
    return isinstance(module, nn.Embedding) or _turned(module)


def wanted_weights(model: nn.Module, applied: Applied) -> dict[str, Callable[[Tensor], Tensor]]:
    """Name of each weight that changes -> function of its own value, float32, to what it becomes,
    float32.

    RefusedError: contents that do not merge, or lora_bias at a layer without a bias. ConfigError:
    adapters that cannot act together with these weights.
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
                part = _WeightUpdate(layer, _turned(module), weight)
                parts.setdefault(f"{path}.weight", []).append(part)
                if (offset := layer.stored().get("offset")) is not None:
                    offsets.setdefault(f"{path}.bias", []).append(layer.scaling * weight * offset)
            else:  # the path of a 3-D parameter
                owner = modules[path.rpartition(".")[0]]
                parts.setdefault(path, []).append(
                    _WeightUpdate(layer, is_transposed(owner), weight)
                )
    found: dict[str, Callable[[Tensor], Tensor]] = {
        name: _sum_of(group) for name, group in parts.items()
    }
    found |= {name: _plus(group) for name, group in offsets.items()}
    if missing := [
        name
        for name in offsets
        if modules[name.removesuffix(".bias")]._parameters.get("bias") is None
    ]:
        raise RefusedError(
            "lora_bias has no place in these layers, which have no bias of their own",
            missing[:6] + ([f"and {len(missing) - 6} more"] if len(missing) > 6 else []),
            "Let the adapter act beside the base.",
        )
    for name, trained in trained_values(
        [(each.values, weight) for each, weight in applied]
    ).items():
        found[name] = _with_trained(trained, found.get(name))
    return found


@dataclass(frozen=True)
class _WeightUpdate:
    """One adapter's change of one weight. turned: the weight is stored as (..., I, O)."""

    layer: Layer
    turned: bool
    weight: float

    def folded(self, own: Tensor) -> Tensor:
        """The weight with the update in it, as it is stored."""
        if not self.turned:
            return self.layer.folded(own)
        return self.layer.folded(own.transpose(-1, -2)).transpose(-1, -2).contiguous()


def _sum_of(group: Sequence[_WeightUpdate]) -> Callable[[Tensor], Tensor]:
    def wanted(own: Tensor) -> Tensor:
        if len(group) == 1 and group[0].weight == 1.0:
            return group[0].folded(own)
        changed = own.clone()
        for part in group:
            changed += part.weight * (part.folded(own) - own)
        return changed

    return wanted


def _plus(offsets: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
    def wanted(own: Tensor) -> Tensor:
        return own + torch.stack(list(offsets)).sum(0).to(own)

    return wanted


def _with_trained(
    trained: Trained, update: Callable[[Tensor], Tensor] | None
) -> Callable[[Tensor], Tensor]:
    """The weighted sum of what was trained in full; updates of other adapters come on top."""

    def wanted(own: Tensor) -> Tensor:
        replaced = summed_change(
            own, [(value.detach().float().to(own.device), weight) for value, weight in trained]
        )
        return replaced if update is None else replaced + (update(own) - own)

    return wanted


def trained_values(adapters: Sequence[tuple[Mapping[str, Tensor], float]]) -> dict[str, Trained]:
    """Parameter -> its trained values. adapters: each with its values by parameter, and its
    weight."""
    trained: dict[str, list[tuple[Tensor, float]]] = {}
    for values, weight in adapters:
        for name, value in values.items():
            trained.setdefault(name, []).append((value, weight))
    return dict(trained)


def tied_names(model: nn.Module) -> dict[str, str]:
    """{alias: source} of parameters that are one tensor under two names; files hold the source
    alone."""
    modules = plain_modules(model)
    by_name = {
        f"{path}.{name}": parameter
        for path, module in modules.items()
        for name, parameter in module._parameters.items()
    }
    declared: Mapping[str, str] = getattr(model, "all_tied_weights_keys", {})
    return {
        alias: source
        for alias, source in declared.items()
        if by_name.get(alias) is not None and by_name.get(source) is by_name[alias]
    }


def parting(tied: Mapping[str, str], changed: Mapping[str, object]) -> dict[str, str]:
    """The tied names that must become two tensors: an update of an embedding does not act on a tied
    head while it is an adapter, nor the other way round."""
    return {
        alias: source for alias, source in tied.items() if alias in changed or source in changed
    }
