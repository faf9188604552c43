"""The experts of a mixture in a decoding step: a few calls for the experts of all rows.

    y[m] = sum over k of w[m, k] * down_e(gate(gate_up_e(x[m]))),    e = index[m, k]

The rows of x are sorted by expert, and one call multiplies all of them with the matrices of their
experts, dense or in 4 bits and each read once, and adds the updates of adapters, of other ones on
other rows (native/dense/experts.c). Which experts act is read from memory, so that a recorded step
(tape/step_tape.py) computes any. As in dense/few_rows.py, the bits of a row depend neither on other
rows nor on the number of threads. Over 4 bits this holds from 7 rows on. Shapes: N rows, K experts
of a row, S = N K sorted rows, E experts, D hidden, F the width of an expert.
"""

import torch
from torch import Tensor

from veneer.kernels.bindings import expert_calls
from veneer.kernels.bindings.dense_calls import Updates
from veneer.kernels.bindings.library import on_cpu
from veneer.kernels.decoding import decoder_step
from veneer.kernels.dense import few_rows
from veneer.kernels.layers.expert_operands import Experts, Matrices, PackedStack
from veneer.kernels.packed import nf4

StackUpdates = tuple[Updates | None, Updates | None]
"""Updates of gate_up and of down, on the step's rows."""
NO_UPDATES: StackUpdates = None, None


def usable(x: Tensor, index: Tensor, weights: Tensor, experts: Experts) -> bool:
    """True if `experts_of_rows` is the fast way for these, and no row lacks an expert."""
    if torch.is_grad_enabled() or not few_rows.takes(index.numel(), few_rows.MOST_ROWS):
        return False
    if not all(on_cpu(t) and t.dim() == 2 and t.is_contiguous() for t in (x, index, weights)):
        return False
    if weights.dtype not in (x.dtype, torch.float32) or index.dtype is not torch.int64:
        return False
    return fits(x, experts) and int(index.max()) < experts.down.count


def fits(x: Tensor, experts: Experts) -> bool:
    """True if the compiled functions take these experts of x."""
    few = 0 < experts.down.count <= expert_calls.MOST_EXPERTS
    return few and all(_fits(x, matrices) for matrices in (experts.gate_up, experts.down))


def _fits(x: Tensor, matrices: Matrices) -> bool:
    weight, bias = matrices.weight, matrices.bias
    if isinstance(weight, Tensor):
        read, is_multiplied = weight, few_rows.multiplies(x, weight)
    elif weight.nf4 is not None:
        read, is_multiplied = weight.nf4.packed, weight.dtype is x.dtype and nf4.is_compiled()
    else:
        return False
    tensors = (read,) if bias is None else (read, bias)
    if matrices.is_transposed or not all(on_cpu(t) and t.is_contiguous() for t in tensors):
        return False
    if bias is not None and bias.dtype is not x.dtype:
        return False
    return is_multiplied and few_rows.takes_updates(1, x.dtype, x.device)


def route(
    logits: Tensor, chosen: int, *, is_normal: bool, weight_type: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Returns the numbers and the weights (N, K) of the experts with the largest logits (N, E):
    softmax(logits) of these, divided by their sum if is_normal. Of equal logits the first counts.
    """
    index = torch.empty(len(logits), chosen, dtype=torch.int64)
    weights = torch.empty(len(logits), chosen, dtype=weight_type)
    expert_calls.expert_route(logits, index, weights, is_normal)
    return index, weights


def route_reference(
    logits: Tensor, chosen: int, *, is_normal: bool, weight_type: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Defines `route`, in plain torch."""
    index = logits.sort(descending=True, stable=True).indices[:, :chosen]
    weights = logits.softmax(-1, dtype=torch.float32).gather(1, index)
    weights = weights / weights.sum(-1, keepdim=True) if is_normal else weights
    return index, weights.to(weight_type)


def experts_of_rows(
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    experts: Experts,
    updates: StackUpdates = NO_UPDATES,
    *,
    level: int = few_rows.ANY_LEVEL,
) -> Tensor:
    """Returns y (N, D) of x (N, D), the numbers and the weights (N, K) of each row's experts.
    Requires `usable`; the updates are of factors of stacks (dense/mixes.py)."""
    rows, chosen = index.shape
    layout = torch.empty(3 * rows * chosen, dtype=torch.int64)
    sorted_x = x.new_empty(rows * chosen, x.shape[1])
    expert_calls.expert_sort(x, index, layout, sorted_x, experts.down.count)

    def product(values: Tensor, matrices: Matrices, own: Updates | None) -> Tensor:
        y = values.new_empty(rows * chosen, matrices.sizes[0])
        w = matrices.weight
        w = w.nf4.checked if isinstance(w, PackedStack) and w.nf4 else w
        expert_calls.expert_product(values, w, matrices.bias, own, y, layout, chosen, level)
        return y

    both = product(sorted_x, experts.gate_up, updates[0])
    if experts.activation is None:
        inner = experts.gate(both).contiguous()
    else:
        gate, up = both.chunk(2, dim=-1)
        inner = decoder_step.gate(gate, up, experts.activation)
    out = torch.empty_like(x)
    expert_calls.expert_sum(product(inner, experts.down, updates[1]), weights, layout, out)
    return out
