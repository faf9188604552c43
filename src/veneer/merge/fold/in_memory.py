"""Merges adapters into a loaded base for inference, and restores the base to the last bit.

The originals are kept, not recomputed: subtracting the update would change about every tenth
weight. Memory: the changed weights twice. A quantised weight has no dense form to merge into and is
refused.
"""

from dataclasses import dataclass, field

import torch
from torch import nn

from veneer.adapters.placement.wrapping import plain_modules
from veneer.errors import RefusedError
from veneer.linear import type_in_products
from veneer.merge.fold.fold import Applied, stored_tensors, weight_changes
from veneer.merge.fold.tokens import refuse_tokens
from veneer.private.torch import parameters_of
from veneer.wording import first_lines


@dataclass
class MergedParameters:
    """Holds merged parameters. `install` puts them into the model, `restore` puts the originals
    back.
    """

    changed: list[tuple[nn.Module, str, nn.Parameter]]
    originals: list[tuple[nn.Module, str, nn.Parameter]] = field(default_factory=list)

    def install(self) -> None:
        """Installs all of them, or none if it is interrupted."""
        self.originals = [
            (module, name, module.get_parameter(name)) for module, name, _ in self.changed
        ]
        try:
            for module, name, parameter in self.changed:
                parameters_of(module)[name] = parameter
        except BaseException:
            self.restore()
            raise
        self.changed = []

    def restore(self) -> None:
        for module, name, parameter in self.originals:
            parameters_of(module)[name] = parameter


@torch.no_grad()
def merged_weights(model: nn.Module, applied: Applied) -> MergedParameters:
    """Computes every changed weight as W + D in float32, rounded to the type that its module
    computes in; the model does not change.

    Tied weights become separate. RefusedError: a method that cannot be merged, quantised weights,
    values that are not finite.
    """
    changes = weight_changes(model, applied)
    refuse_tokens(applied, "the base's tables would grow", "Write a merged folder: veneer merge.")
    stored = stored_tensors(model)
    if packed := [name for name in changes if stored[name].quantised]:
        raise RefusedError(
            "these weights are held quantised and cannot be merged into in memory",
            first_lines(packed, 6),
            "Let the adapter act beside the base, or write a merged folder: veneer merge --into"
            " dequantised.",
        )
    modules = plain_modules(model)
    changed = []
    for name, new in changes.items():
        path, _, parameter = name.rpartition(".")
        own = stored[name].read()
        value = new(own.float()).to(type_in_products(modules[path], own))
        if not bool(torch.isfinite(value).all()):
            raise RefusedError(
                f"{name} would hold values that are not finite", next_step="Nothing was changed."
            )
        changed.append((modules[path], parameter, nn.Parameter(value, requires_grad=False)))
    return MergedParameters(changed)
