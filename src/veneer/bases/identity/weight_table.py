"""Where the bytes of a base are: what is held packed, what is not, and what each costs.

transformers leaves fused experts and routers in 16 bits without a word, and a 4-bit model of
experts is then nearly as large as the dense one: so what was not packed is always told.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from veneer.adapters.methods.experts import expert_parameters
from veneer.linear import PackedExperts, PackedLinear, PackedModule, is_transposed_linear
from veneer.quant.layers import Holder
from veneer.quant.weight import PackedSize


@dataclass(frozen=True)
class WeightGroup:
    """what: kind of module; held: format or type; values: of the dense weights; bytes: in memory,
    tables included."""

    what: str
    held: str
    modules: int
    values: int
    bytes: int


def weight_table(model: PreTrainedModel) -> list[WeightGroup]:
    """One row for each kind of module and way of holding it, the largest first; tied weights count
    once."""
    head = model.get_output_embeddings()
    rows: dict[tuple[str, str], list[int]] = {}
    seen: set[int] = set()
    for module in model.modules():
        tensors = [
            (name, tensor)
            for name, tensor in [
                *module.named_parameters(recurse=False, remove_duplicate=False),
                *module.named_buffers(recurse=False, remove_duplicate=False),
            ]
            if id(tensor) not in seen
        ]
        if not tensors:
            continue
        seen |= {id(tensor) for _, tensor in tensors}
        parameters = {name for name, _ in module.named_parameters(recurse=False)}
        packed = module.packed_shapes() if isinstance(module, PackedModule) else {}
        held = (
            module.packed_format if isinstance(module, PackedModule) else _type(tensors[0][1].dtype)
        )
        row = rows.setdefault((_what(module, head), held), [0, 0, 0])
        row[0] += 1
        for name, tensor in tensors:
            values = tensor.numel() if name in parameters else 0
            row[1] += torch.Size(packed[name]).numel() if name in packed else values
            row[2] += tensor.numel() * tensor.element_size()
    groups = [WeightGroup(what, held, *row) for (what, held), row in rows.items() if row[1]]
    return sorted(groups, key=lambda group: -group.bytes)


def _what(module: nn.Module, head: nn.Module | None) -> str:
    if module is head:
        return "output head"
    if isinstance(module, nn.Embedding):
        return "embeddings"
    if isinstance(module, PackedExperts) or expert_parameters(module):
        return "experts"
    if isinstance(module, PackedLinear | nn.Linear) or is_transposed_linear(module):
        return "linear layers"
    return "norms and others"


def _type(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def packed_sizes(model: PreTrainedModel) -> tuple[PackedSize, ...]:
    """What each weight takes that a loaded model holds packed."""
    return tuple(
        PackedSize(
            f"{path}.{name}",
            shape,
            sum(each.nbytes for each in module.packed(name).tensors.values()),
        )
        for path, module in model.named_modules()
        if isinstance(module, Holder)
        for name, shape in module.packed_shapes().items()
    )


def weight_line(model: PreTrainedModel) -> str:
    """The table in one line, for a screen."""
    return "weights: " + "; ".join(
        f"{g.what} {g.values / 1e6:.1f} M in {g.held}, {g.bytes / 1e6:.1f} MB"
        for g in weight_table(model)
    )
