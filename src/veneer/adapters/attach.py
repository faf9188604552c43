"""Putting an adapter beside a base and taking it away: the only place where a model's modules are exchanged.

Wrapping changes no output bit; when the last adapter leaves, the original modules stand in their old places.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from veneer.adapters.config import LoRA
from veneer.adapters.experts import AdaptedExperts, expert_parameters
from veneer.adapters.lora import (
    AdaptedEmbedding,
    AdaptedLinear,
    AdaptedModule,
    LoRALayer,
    SwappedModule,
    kaiming_A,
)
from veneer.adapters.routing import Routing
from veneer.adapters.targets import Targets, find_targets, pattern_value
from veneer.errors import ConfigError
from veneer.linear import frozen_linear


@dataclass
class Attachment:
    """An adapter on a base.

    layers   path in the base model (experts: path of the 3-D parameter) -> its factors, float32
    values   full parameter path in the base -> the parameter trained in its place, in the base's type
    targets  what the settings resolved to
    """

    name: str
    config: LoRA
    targets: Targets
    layers: dict[str, LoRALayer] = field(default_factory=dict)
    values: dict[str, nn.Parameter] = field(default_factory=dict)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Every trained tensor by a name of its own, in a fixed order: model order, A before B, values last."""
        found = {
            f"{path}.{part}": getattr(layer, part) for path, layer in self.layers.items() for part in "AB"
        }
        return found | self.values

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters().values())


def _parent(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    head, _, last = path.rpartition(".")
    return (model.get_submodule(head) if head else model), last


def _wrap(model: nn.Module, path: str, kind: type[AdaptedModule], routing: Routing) -> AdaptedModule:
    parent, last = _parent(model, path)
    module = getattr(parent, last)
    if isinstance(module, AdaptedModule):
        return module
    wrapper = kind(module, routing)
    setattr(parent, last, wrapper)
    return wrapper


def _kind(module: nn.Module) -> type[AdaptedModule]:
    if frozen_linear(module) is not None:
        return AdaptedLinear
    if isinstance(module, nn.Embedding):
        return AdaptedEmbedding
    return AdaptedExperts if expert_parameters(module) else SwappedModule


def plain_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The base's own modules by their own paths, wrappers looked through."""
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, AdaptedModule):
            own = ".".join(_unwrapped_path(model, path.split(".")))
            found.setdefault(own, module)
    return found


def _unwrapped_path(model: nn.Module, parts: list[str]) -> list[str]:
    own, module = [], model
    for part in parts:
        if not (isinstance(module, AdaptedModule) and part == "base"):
            own.append(part)
        module = getattr(module, part) if part else module
    return own


class _View(nn.Module):
    """The base without its wrappers, so that targets resolve the same with and without other adapters."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._own = plain_modules(model)

    def named_modules(self, *_: object, **__: object):  # type: ignore[no-untyped-def]
        return iter(self._own.items())


def resolve(model: nn.Module, config: LoRA, *, head: nn.Module | None) -> Targets:
    """What the settings name on this model, whether or not it carries adapters."""
    own_head = head.base if isinstance(head, AdaptedModule) else head
    return find_targets(_View(model), config, head=own_head)


def attach(
    model: nn.Module, config: LoRA, *, name: str, routing: Routing, head: nn.Module | None, seed: int = 0
) -> Attachment:
    """A fresh adapter beside `model`, not yet active; no output changes. head: the output head, never in all-linear.

    ConfigError: the name is taken, or the settings match nothing.
    """
    if any(
        name in m.layers or name in m.values for m in model.modules() if isinstance(m, AdaptedModule)
    ) or any(name in m.stacks for m in model.modules() if isinstance(m, AdaptedExperts)):
        raise ConfigError(
            f"an adapter named {name!r} is attached already", next_step="Detach it or take another name."
        )
    targets = resolve(model, config, head=head)
    modules = plain_modules(model)
    generator = torch.Generator().manual_seed(seed)
    attachment = Attachment(name, config, targets)

    def layer(
        kind: str, path: str, A: tuple[int, ...], B: tuple[int, ...], device: torch.device
    ) -> LoRALayer:
        factor_A, factor_B = kaiming_A(A, generator), torch.zeros(B)
        if kind == "embedding":  # the other way round, as PEFT: rows of A are looked up, B mixes them
            factor_A, factor_B = torch.zeros(A), torch.randn(B, generator=generator)
        made = LoRALayer(
            kind,  # type: ignore[arg-type]
            factor_A.to(device), factor_B.to(device), alpha=pattern_value(config.alpha_pattern, path, config.alpha),
            rslora=config.rslora, dropout=config.dropout if kind == "linear" else 0.0, key=len(attachment.layers),
        )  # fmt: skip
        attachment.layers[path] = made
        return made

    for path in targets.linears:
        frozen = frozen_linear(modules[path])
        assert frozen is not None
        r = pattern_value(config.rank_pattern, path, config.rank)
        made = layer("linear", path, (r, frozen.in_features), (frozen.out_features, r), frozen.device)
        _wrap(model, path, AdaptedLinear, routing).layers[name] = made
    for path in targets.embeddings:
        table = modules[path].get_parameter("weight")
        r = pattern_value(config.rank_pattern, path, config.rank)
        made = layer("embedding", path, (r, table.shape[0]), (table.shape[1], r), table.device)
        _wrap(model, path, AdaptedEmbedding, routing).layers[name] = made
    for path in targets.experts:
        owner, _, parameter = path.rpartition(".")
        E, O, I = expert_parameters(modules[owner])[parameter]
        r = pattern_value(config.rank_pattern, path, config.rank)
        made = layer("experts", path, (E, r, I), (E, O, r), modules[owner].get_parameter(parameter).device)
        wrapper = _wrap(model, owner, AdaptedExperts, routing)
        assert isinstance(wrapper, AdaptedExperts)
        wrapper.stacks.setdefault(name, {})[parameter] = made
    trained = {path: [n for n, _ in modules[path].named_parameters()] for path in targets.trained}
    for path, names in [*((p, ["bias"]) for p in targets.biases), *trained.items()]:
        wrapper = _wrap(model, path, _kind(modules[path]), routing)
        for parameter in names:
            value: Tensor = modules[path].get_parameter(parameter).detach().clone()
            wrapper.values.setdefault(name, {})[parameter] = attachment.values[f"{path}.{parameter}"] = (
                nn.Parameter(value)
            )
    return attachment


def detach(model: nn.Module, name: str) -> None:
    """Take the adapter's layers away; wrappers that hold none any more give their place back to the base's module."""
    for path, module in list(model.named_modules()):
        if not isinstance(module, AdaptedModule):
            continue
        module.layers.pop(name, None)
        module.values.pop(name, None)
        stacks = module.stacks if isinstance(module, AdaptedExperts) else {}
        stacks.pop(name, None)
        if not (module.layers or module.values or stacks):
            parent, last = _parent(model, path)
            setattr(parent, last, module.base)
