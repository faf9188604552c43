"""Keeps the weights of linear layers and embeddings in bf16 under a base that computes in float32.

Products and look-ups widen such weights as they read them (linear.py: WidenedLinear,
WidenedTransposed, WidenedEmbedding), which takes half the memory of weights in float32 and reads
half the bytes. A weight is kept only if plain linear layers, GPT-2's Conv1D and embeddings alone
hold it. A model that reads weights without calling their modules may not take them in bf16, so this
is proven first, on a small copy of the model's structure.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from veneer.execution.agreement import difference, disagreement
from veneer.execution.proofs.small_copy import NoCopyError, small_copy
from veneer.execution.proofs.structure import LIMIT, logits_alone, sample_texts, structure_proof
from veneer.linear import (
    WidenedEmbedding,
    WidenedLinear,
    WidenedTransposed,
    is_plain_embedding,
    is_transposed_linear,
)
from veneer.private.torch import parameters_of


def keep_narrow(model: PreTrainedModel) -> list[nn.Parameter]:
    """Exchanges the modules of a model in bf16 that may keep their weights in it, and returns these
    weights."""
    kept = [weight for weight in narrow_weights(model) if weight.dtype is torch.bfloat16]
    _exchange(model, kept)
    return kept


def narrow_weights(model: PreTrainedModel) -> list[nn.Parameter]:
    """Returns the weights that may stay in bf16, each once; none if the proof fails."""
    kind, config = type(model), model.config
    reason = structure_proof(
        "narrow", kind, config, str | None, lambda: _why_not_narrow(kind, config)
    )
    return [] if reason is not None else _weights_of_plain_modules(model)


def _weights_of_plain_modules(model: nn.Module) -> list[nn.Parameter]:
    weights: dict[int, nn.Parameter] = {}
    others: set[int] = set()
    for module in model.modules():
        is_kept = _widened_class(module) is not None
        for name, parameter in module.named_parameters(recurse=False):
            is_weight = name == "weight" and parameter.dtype in (torch.bfloat16, torch.float32)
            if is_weight and is_kept:
                weights[id(parameter)] = parameter
            else:
                others.add(id(parameter))
    return [weight for key, weight in weights.items() if key not in others]


def _widened_class(module: Any) -> Any:
    """Returns the class that computes what a module does over a weight in bf16; None if none
    does."""
    if type(module) is nn.Linear:
        return WidenedLinear
    if is_transposed_linear(module):
        return WidenedTransposed
    is_table = is_plain_embedding(module) and module.max_norm is None
    return WidenedEmbedding if is_table else None


def _exchange(model: nn.Module, kept: Sequence[nn.Parameter]) -> None:
    """Exchanges the modules that hold these weights."""
    numbers, exchanged = {id(weight) for weight in kept}, dict[nn.Module, nn.Module]()
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if id(parameters_of(module).get("weight")) not in numbers:
            continue
        if module not in exchanged:
            exchanged[module] = _widened_class(module).of(module)
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, exchanged[module])


@torch.no_grad()
def _why_not_narrow(kind: type[PreTrainedModel], config: PreTrainedConfig) -> str | None:
    """Returns why a model of this structure does not compute the same over weights in bf16."""
    try:
        copy = small_copy(kind, config)
    except NoCopyError as fault:
        return str(fault).splitlines()[0]
    for parameter in copy.parameters():
        parameter.copy_(parameter.bfloat16())
    text = sample_texts(copy)[0]
    expected = logits_alone(copy, text)
    kept = _weights_of_plain_modules(copy)
    _exchange(copy, kept)
    for weight in kept:
        weight.data = weight.data.bfloat16()
    return disagreement(
        copy, "weights in bf16", lambda: difference(logits_alone(copy, text), expected), LIMIT
    )
