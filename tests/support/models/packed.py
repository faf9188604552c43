"""A base in 4 bits and the dense model that it stands for."""

import torch

from veneer.linear import PackedExperts, PackedLinear
from veneer.models.load import load_base


def packed_and_dense(folder, *, dtype="auto", quantize="nf4"):
    """(the base held packed, a dense model whose weights are the packed ones decoded). quantize:
    None leaves both dense."""
    base, dense = (
        load_base(str(folder), dtype=dtype, quantize=quantize),
        load_base(str(folder), dtype=dtype).model,
    )
    for path, module in base.model.named_modules():
        twin = dense.get_submodule(path) if path else dense
        with torch.no_grad():
            if isinstance(module, PackedLinear):
                weight = module.dense_weight(base.dtype)
                twin.weight.copy_(weight.T if type(twin).__name__ == "Conv1D" else weight)
            elif isinstance(module, PackedExperts):
                for name, shape in module.packed_shapes().items():
                    for number in range(shape[0]):
                        matrix = module.expert(name, number).dense_weight(base.dtype)
                        twin.get_parameter(name)[number] = (
                            matrix.T if module.is_transposed else matrix
                        )
    return base, dense


def packed_modules(model):
    return {p: m for p, m in model.named_modules() if isinstance(m, PackedLinear | PackedExperts)}
