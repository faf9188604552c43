"""Lists how the bytes of a base are held: packed or dense, and the size of each kind.

transformers silently leaves fused experts and routers in 16 bits, and then a 4-bit model of experts
is nearly as large as the dense one. So weights that are not packed are always shown.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from veneer.adapters.methods.expert_stack import expert_parameters
from veneer.linear import PackedExperts, PackedLinear, PackedModule, is_transposed_linear
from veneer.quant.layers import Holder
from veneer.quant.weight import PackedSize


@dataclass(frozen=True)
class WeightGroup:
    """The weights of one kind of module in one format.

    what: kind of module; held: format or type; values: of the dense weights; bytes: in memory,
    tables included
    """

    what: str
    held: str
    modules: int
    values: int
    bytes: int


def weight_table(model: PreTrainedModel) -> list[WeightGroup]:
    """Returns one row for each kind of module and format, the largest first; tied weights count
    once."""
    head = model.get_output_embeddings()
    rows: dict[tuple[str, str], list[int]] = {}
    counted: set[int] = set()
    for module in model.modules():
        tensors = [
            (name, tensor)
            for name, tensor in [
                *module.named_parameters(recurse=False, remove_duplicate=False),
                *module.named_buffers(recurse=False, remove_duplicate=False),
            ]
            if id(tensor) not in counted
        ]
        if not tensors:
            continue
        counted |= {id(tensor) for _, tensor in tensors}
        parameters = {name for name, _ in module.named_parameters(recurse=False)}
        packed = module.packed_shapes() if isinstance(module, PackedModule) else {}
        format_name = (
            module.packed_format
            if isinstance(module, PackedModule)
            else str(tensors[0][1].dtype).removeprefix("torch.")
        )
        row = rows.setdefault((_kind_of_module(module, head), format_name), [0, 0, 0])
        row[0] += 1
        for name, tensor in tensors:
            values = tensor.numel() if name in parameters else 0
            row[1] += torch.Size(packed[name]).numel() if name in packed else values
            row[2] += tensor.nbytes
    groups = [
        WeightGroup(what, format_name, *row) for (what, format_name), row in rows.items() if row[1]
    ]
    return sorted(groups, key=lambda group: -group.bytes)


def _kind_of_module(module: nn.Module, head: nn.Module | None) -> str:
    if module is head:
        return "output head"
    if isinstance(module, nn.Embedding):
        return "embeddings"
    if isinstance(module, PackedExperts) or expert_parameters(module):
        return "experts"
    if isinstance(module, PackedLinear | nn.Linear) or is_transposed_linear(module):
        return "linear layers"
    return "norms and others"


def packed_sizes(model: PreTrainedModel) -> tuple[PackedSize, ...]:
    """Returns the size of each packed weight of a loaded model."""
    return tuple(
        PackedSize(
            f"{path}.{name}",
            shape,
            sum(tensor.nbytes for tensor in module.packed(name).tensors.values()),
        )
        for path, module in model.named_modules()
        if isinstance(module, Holder)
        for name, shape in module.packed_shapes().items()
    )


def weight_line(model: PreTrainedModel) -> str:
    """Returns the table as one line for the screen."""
    return "weights: " + "; ".join(
        f"{group.what} {group.values / 1e6:.1f} M in {group.held}, {group.bytes / 1e6:.1f} MB"
        for group in weight_table(model)
    )
