"""Adapters folded into a loaded base for inference, and the base back again to the last bit.

The originals are kept, not computed back: subtracting the update would leave about every tenth weight changed.
Memory: the changed weights twice. A quantised weight has no dense place to be merged into and is refused.
"""

from dataclasses import dataclass

import torch
from torch import nn

from veneer.adapters.wrapping import plain_modules
from veneer.errors import RefusedError
from veneer.merge.fold import Applied, stored_tensors, wanted_weights


@dataclass(frozen=True)
class Merged:
    """The parameters that stood in the model before, by module and name; `restore` puts those very objects back."""

    originals: list[tuple[nn.Module, str, nn.Parameter]]

    def restore(self) -> None:
        for module, name, parameter in self.originals:
            module._parameters[name] = parameter


@torch.no_grad()
def merge_in_memory(model: nn.Module, applied: Applied) -> Merged:
    """Every changed weight becomes W + D, summed in float32 and rounded to its own type; tied ones part.

    RefusedError: a method that does not fold, quantised weights, values not finite; nothing has changed then.
    """
    wanted = wanted_weights(model, applied)
    stored = stored_tensors(model)
    if packed := [name for name in wanted if stored[name].quantised]:
        raise RefusedError(
            "these weights are held quantised and cannot be merged into in memory",
            packed[:6] + ([f"and {len(packed) - 6} more"] if len(packed) > 6 else []),
            "Let the adapter act beside the base, or write a merged folder: veneer merge --into dequantised.",
        )
    changed = {}
    for name, new in wanted.items():
        value = new(stored[name].read().float()).to(stored[name].dtype)
        if not bool(torch.isfinite(value).all()):
            raise RefusedError(
                f"{name} would hold values that are not finite", next_step="Nothing was changed."
            )
        changed[name] = value
    modules = plain_modules(model)
    originals = []
    for name, value in changed.items():
        path, _, parameter = name.rpartition(".")
        module = modules[path]
        originals.append((module, parameter, module.get_parameter(parameter)))
        module._parameters[parameter] = nn.Parameter(value, requires_grad=False)
    return Merged(originals)
