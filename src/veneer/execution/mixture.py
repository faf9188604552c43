"""Computes the experts of a few rows without a gradient by few calls (kernels/decoding/), in every
model whose stacks look up their computation by a registered name.

transformers' own computation, registered or written in the stack's class, computes all other rows.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from veneer.adapters.methods.expert_stack import step_experts
from veneer.kernels.decoding import expert_step
from veneer.private.transformers import experts_of, offers_experts

PREFIX = "veneer_over_"
"""Stands before the name of transformers' computation in each registered name."""


def take_experts(model: PreTrainedModel) -> None:
    """Switches the stacks of a model to this computation of a few rows."""
    own = experts_of(model.config.get_text_config())
    if own is None or own.startswith(PREFIX) or not offers_experts(model):
        return
    ALL_EXPERTS_FUNCTIONS.register(PREFIX + own, partial(_compute, own))
    model.set_experts_implementation(PREFIX + own)


def _compute(own: str, stack: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    if not torch.compiler.is_compiling() and not torch.is_grad_enabled():
        experts = step_experts(stack)
        if experts is not None and expert_step.usable(hidden, index, weights, experts):
            return expert_step.experts_of_rows(hidden, index, weights, experts)
    compute: Callable[..., Tensor] = (
        type(stack).forward.__wrapped__ if own == "eager" else ALL_EXPERTS_FUNCTIONS[own]
    )
    return compute(stack, hidden, index, weights)
