"""Linear layers of a base whose products of a few rows have a kernel of their own: put in their
places once, when it is loaded, as packed weights are.

What is exchanged is proven: each kind, of one shape and type, multiplies a few random rows both
ways.
"""

import torch
from torch import nn

from veneer.execution.agreement import PART, agrees
from veneer.kernels.dense import few_rows
from veneer.linear import FewRowsLinear
from veneer.sharded import whole_module

ROWS = 3


@torch.no_grad()
def take_few_rows(model: nn.Module) -> None:
    """Replaces every plain nn.Linear that the kernel takes by a FewRowsLinear with the same
    parameters."""
    agreed: dict[tuple[object, ...], bool] = {}
    made: dict[nn.Module, FewRowsLinear] = {}
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if type(module) is not nn.Linear:
            continue
        kind = module.weight.shape, module.weight.dtype, module.weight.device, module.bias is None
        if kind not in agreed:
            with whole_module(module):
                agreed[kind] = _agrees(module)
        if agreed[kind]:
            head, _, last = path.rpartition(".")
            setattr(
                model.get_submodule(head), last, made.setdefault(module, FewRowsLinear.of(module))
            )


def _agrees(module: nn.Linear) -> bool:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, module.in_features, generator=draw).to(module.weight.dtype)
    if not few_rows.usable(x, module.weight, module.bias):
        return False
    return agrees(lambda x: few_rows.product(x, module.weight, module.bias), module, (x,), PART)
