"""Proves on the model itself the fast paths that hold for its structure
(execution/proofs/structure.py).

The structure's proof runs a small copy in float32. Here the real weights, in their own type and on
their own device, read two short texts both ways, before any adapter is attached. So a mistake of a
kernel or of a weight format shows here.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from veneer.adapters.methods.prefix import PrefixedDecoder
from veneer.adapters.methods.prefix_layer import tokens_in_front
from veneer.errors import SourceError
from veneer.execution.agreement import HEAD, MODEL, difference, disagreement
from veneer.execution.attention import decoder, packed_states, take_packed
from veneer.execution.proofs.structure import Proven, no_seam, proven, unreached
from veneer.kernels.dense.loss import Head
from veneer.kernels.layout import BatchLayout
from veneer.linear import frozen_linear
from veneer.private.transformers import attention_of


def structure(model: PreTrainedModel) -> Proven:
    """Returns what holds for the model's structure. SourceError: it sees the tokens that it is to
    predict."""
    facts = proven(type(model), model.config)
    if facts.causal is not None:
        raise SourceError(
            f"{type(model).__name__} does not predict each token from those before it alone",
            [facts.causal],
            "Take a base that generates text: a decoder, without bidirectional attention.",
        )
    return facts


def acting_prefix_length(model: PreTrainedModel) -> int:
    """Returns how many positions an acting prefix takes in front of every text."""
    inner = decoder(model)
    if not isinstance(inner, PrefixedDecoder):
        return 0
    parts = inner.routing.acting.parts
    return max(
        tokens_in_front(layer for layer, _ in inner.layers_of(part.adapters)) for part in parts
    )


def some_ids(model: PreTrainedModel, count: int, seed: int) -> Tensor:
    """Draws `count` ids of the model's vocabulary."""
    vocabulary = int(model.get_input_embeddings().get_parameter("weight").shape[0])
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, min(vocabulary, 1000), (count,), generator=draw).to(model.device)


@torch.no_grad()
def takes_packing(model: PreTrainedModel) -> str | None:
    """Switches a model without storage (meta device) to packed attention if its structure takes it;
    else returns why not.

    prove_packing compares values too; here there are none.
    """
    if (reason := no_seam(model) or structure(model).packed) is not None:
        return reason
    return _try_packing(model, None)


@torch.no_grad()
def prove_packing(model: PreTrainedModel) -> str | None:
    """Switches the model to packed attention if that gives the same as each document alone; else
    returns why not.

    Runs two short documents with a shared prompt packed and one by one, before any adapter is
    attached.
    """
    if (reason := no_seam(model) or structure(model).packed) is not None:
        return reason
    ids = some_ids(model, 12, 0)
    inner = decoder(model)
    assert inner is not None
    documents = [torch.cat([ids[:3], ids[3:7]]), torch.cat([ids[:3], ids[7:]])]
    alone = [inner(input_ids=d[None], use_cache=False).last_hidden_state[0] for d in documents]
    return _try_packing(model, torch.cat([alone[0][:3], alone[0][3:], alone[1][3:]]))


def _try_packing(model: PreTrainedModel, expected: Tensor | None) -> str | None:
    before = attention_of(model.config)
    device = next(model.parameters()).device
    layout = BatchLayout.of(3, (4, 5), device)
    positions = torch.cat([torch.arange(3), torch.arange(3, 7), torch.arange(3, 8)]).to(device)
    ids = (
        torch.zeros(12, dtype=torch.int64, device=device)
        if expected is None
        else some_ids(model, 12, 0)
    )
    reached: list[int] = []

    def measure() -> float:
        take_packed(model)
        states, calls = packed_states(model, ids[None], positions[None], layout)
        reached.append(calls)
        return 0.0 if expected is None else difference(states, expected)

    limit = 0.0 if expected is None else MODEL.limits[expected.dtype]
    reason = disagreement(model, "packed rows", measure, limit)
    reason = (unreached(model, reached[0]) if reached else None) or reason
    if reason is not None:
        model.set_attn_implementation(before)
    return reason


@torch.no_grad()
def prove_head(model: PreTrainedModel) -> tuple[float, float | None, str | None]:
    """Returns (scale, softcap, None) if these lead from the head's output to the logits in one
    forward, else a reason."""
    facts, head, inner = structure(model), model.get_output_embeddings(), decoder(model)
    if facts.head is not None:
        return 1.0, None, facts.head
    if not isinstance(head, nn.Linear) or inner is None:
        return 1.0, None, f"the output head is {type(head).__name__}, not a linear layer"
    ids = some_ids(model, 6, 1)[None]
    states = inner(input_ids=ids, use_cache=False).last_hidden_state
    view = frozen_linear(head)
    head_type = head.weight.dtype if view is None else view.dtype
    if states.dtype != head_type:  # the model casts them: Mamba keeps float32 in bf16
        reason = f"its hidden states are {states.dtype}, and its output head {head_type}"
        return 1.0, None, reason
    ours = Head(head.weight, head.bias, facts.scale, facts.softcap).logits(states)
    theirs = model(input_ids=ids, use_cache=False).logits
    if difference(ours, theirs) > HEAD.limits[theirs.dtype]:
        return (
            1.0,
            None,
            f"{type(model).__name__} changes its logits in a way that is not known here",
        )
    return facts.scale, facts.softcap, None
