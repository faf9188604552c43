"""Adapters folded into a loaded base for inference, and the base back again to the last bit.

The originals are kept, not computed back: subtracting the update would leave about every tenth
weight changed. Memory: the changed weights twice. A quantised weight has no dense place to be
merged into and is refused.
"""

from dataclasses import dataclass, field

import torch
from torch import nn

from veneer.adapters.placement.wrapping import plain_modules
from veneer.errors import RefusedError
from veneer.merge.fold.fold import Applied, stored_tensors, wanted_weights
from veneer.merge.fold.tokens import refuse_tokens


@dataclass
class MergedParameters:
    """The merged parameters by module and name; `install` puts them into the model, `restore` the
    very objects back that stood there before."""

    changed: list[tuple[nn.Module, str, nn.Parameter]]
    originals: list[tuple[nn.Module, str, nn.Parameter]] = field(default_factory=list)

    def install(self) -> None:
        """All of them or, where it is interrupted, none."""
        self.originals = [
            (module, name, module.get_parameter(name)) for module, name, _ in self.changed
        ]
        try:
            for module, name, parameter in self.changed:
                module._parameters[name] = parameter
        except BaseException:
            self.restore()
            raise
        self.changed = []

    def restore(self) -> None:
        for module, name, parameter in self.originals:
            module._parameters[name] = parameter


@torch.no_grad()
def merged_weights(model: nn.Module, applied: Applied) -> MergedParameters:
    """Every changed weight as W + D, summed in float32 and rounded to its own type; tied ones part.
    The model stays as it is.

    RefusedError: a method that does not fold, quantised weights, values not finite.
    """
    wanted = wanted_weights(model, applied)
    refuse_tokens(applied, "the base's tables would grow", "Write a merged folder: veneer merge.")
    stored = stored_tensors(model)
    if packed := [name for name in wanted if stored[name].quantised]:
        raise RefusedError(
            "these weights are held quantised and cannot be merged into in memory",
            packed[:6] + ([f"and {len(packed) - 6} more"] if len(packed) > 6 else []),
            "Let the adapter act beside the base, or write a merged folder: veneer merge --into"
            " dequantised.",
        )
    modules = plain_modules(model)
    changed = []
    for name, new in wanted.items():
        value = new(stored[name].read().float()).to(stored[name].dtype)
        if not bool(torch.isfinite(value).all()):
            raise RefusedError(
                f"{name} would hold values that are not finite", next_step="Nothing was changed."
            )
        path, _, parameter = name.rpartition(".")
        changed.append((modules[path], parameter, nn.Parameter(value, requires_grad=False)))
    return MergedParameters(changed)
