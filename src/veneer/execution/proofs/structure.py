"""Finds out what holds for a model's structure, by running a small float32 copy of it
(execution/proofs/small_copy.py).

    causal    tokens behind a token do not change it; else nothing can be trained or answered
    packed    packed documents with a shared prompt give the same as each document alone
              (execution/attention.py)
    padded    rows padded on the right give the same as each row alone; else rows are computed one
              by one
    head      the logits are the head's output, times a scale, with a soft cap
              (kernels/dense/loss.py)
    gradient  backward passes through the whole model in eval mode; idle: the places that no
              gradient reaches (adapters/placement/idle.py)

The texts are longer than every window, chunk and rotary switch of the copy. Results may differ by
float32's rounding: a lost window, an ignored selection or an unknown cap on logits shows a
difference a hundred times larger. If a structure cannot be copied, nothing is assumed: rows are
computed one by one, through the model's own head and loop. A config of transformers' own classes is
proven once on a machine, others once in a process (files/remembered.py).
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from veneer.adapters.placement.idle import places_without_gradient
from veneer.bases.quiet_transformers import quiet
from veneer.execution.agreement import SMALL_COPY, difference, disagreement
from veneer.execution.attention import (
    NAME,
    decoder,
    packed_states,
    padded_states,
    take_packed,
    takes_layouts,
)
from veneer.execution.proofs.small_copy import SWITCH, VOCABULARY, NoCopyError, small_copy
from veneer.execution.states import layers_without_keys
from veneer.execution.switches import forget_lengths, sides, switches
from veneer.execution.text_rows import state_modules
from veneer.files.remembered import is_known, remember
from veneer.kernels.dense.loss import Head
from veneer.kernels.layout import BatchLayout
from veneer.private.transformers import adds_distances, attention_of

Result = TypeVar("Result")

LIMIT = SMALL_COPY.limits[torch.float32]
SHARED = 3
LENGTHS = (20, 11, SWITCH + 7, SWITCH + 18)
"""Tokens of the texts: on both sides of the switch, all longer than a window."""


@dataclass(frozen=True)
class Proven:
    """For each property None if it holds, else the reason. scale, softcap: of the logits, if `head`
    is None."""

    causal: str | None = None
    packed: str | None = None
    padded: str | None = None
    head: str | None = None
    gradient: str | None = None
    idle: frozenset[str] = frozenset()
    scale: float = 1.0
    softcap: float | None = None


_NO_STRUCTURE = (
    "dtype",
    "_name_or_path",
    "quantization_config",
    "transformers_version",
    "architectures",
)
_PROOFS: dict[tuple[str, str], Any] = {}
"""Results of this process, by (kind of proof, structure)."""


def proven(kind: type[PreTrainedModel], config: PreTrainedConfig) -> Proven:
    """Returns what holds for models of this class and config."""
    return structure_proof("structure", kind, config, Proven, lambda: _prove(kind, config))


def structure_proof(
    proof_name: str,
    kind: type[PreTrainedModel],
    config: PreTrainedConfig,
    value_type: Any,
    prove: Callable[[], Result],
) -> Result:
    """Returns the result of `prove` for a structure, computed once in a process."""
    key = proof_name, structure_key(kind, config)
    if key not in _PROOFS:
        with quiet():
            _PROOFS[key] = remember_proof(proof_name, kind, config, value_type, prove)
    return _PROOFS[key]


def remember_proof(
    proof_name: str,
    kind: type[PreTrainedModel],
    config: PreTrainedConfig,
    value_type: Any,
    prove: Callable[[], Result],
) -> Result:
    """Returns the result of `prove` for models of this class and config. It is remembered for
    transformers' own classes only: the code of others may change.

    proof_name, value_type: the kind and the type for `remember`.
    """
    if not is_known(kind):
        return prove()
    key = {
        "class": f"{kind.__module__}.{kind.__qualname__}",
        "structure": structure_key(kind, config),
    }
    return remember(proof_name, {**key, "threads": torch.get_num_threads()}, value_type, prove)


def structure_key(kind: type[PreTrainedModel], config: PreTrainedConfig) -> str:
    """Returns a key that is equal for models of one structure, whatever their dtype and path."""
    fields = {name: value for name, value in config.to_dict().items() if name not in _NO_STRUCTURE}
    names = [f"{cls.__module__}.{cls.__qualname__}" for cls in (kind, type(config))]
    return json.dumps([*names, fields], sort_keys=True, default=str)


@torch.no_grad()
def _prove(kind: type[PreTrainedModel], config: PreTrainedConfig) -> Proven:
    try:
        copy = small_copy(kind, config)
    except NoCopyError as fault:
        reason = str(fault).splitlines()[0]
        return Proven(packed=reason, padded=reason, head=reason)
    texts = sample_texts(copy)
    causal = _why_not_causal(copy, texts[0])
    scale, softcap, head = _head(copy, texts[0])
    padded = _why_not_padded(copy, texts)
    gradient = _why_no_gradient(copy, texts[0])
    idle = frozenset[str]()
    if gradient is None:
        idle = places_without_gradient(copy, torch.tensor([texts[-1]]))
    packed = _why_not_packed(copy, texts)  # the last: it switches the copy's attention
    return Proven(causal, packed, padded, head, gradient, idle, scale, softcap)


def sample_texts(model: PreTrainedModel) -> list[list[int]]:
    """Draws the texts for all proofs; all begin with the same SHARED tokens."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(4, VOCABULARY - 4, (len(LENGTHS), max(LENGTHS)), generator=draw)
    ids[:, :SHARED] = ids[0, :SHARED]
    return [row[:length].tolist() for row, length in zip(ids, LENGTHS, strict=True)]


def logits_alone(model: PreTrainedModel, text: Sequence[int]) -> Tensor:
    """Returns the logits (T, V) of one text alone, with which all proofs compare."""
    forget_lengths(model)
    return model(input_ids=torch.tensor([text]), use_cache=False).logits[0]


def _why_not_causal(model: PreTrainedModel, text: list[int]) -> str | None:
    part = len(text) - 3
    reversed_end = [*text[:part], *reversed(text[part:])]
    worst = max(
        difference(logits_alone(model, t)[:part], logits_alone(model, text)[:part])
        for t in (text[:part], reversed_end)
    )
    if worst <= LIMIT:
        return None
    return (
        f"{type(model).__name__} lets a token see what stands behind it (its logits change by"
        f" {worst:.1e})"
    )


def _by_side(
    model: PreTrainedModel, texts: list[list[int]], run: Callable[[list[list[int]]], float]
) -> float:
    """Runs texts together that get the same rotary frequencies; returns the largest difference."""
    groups = sides([len(t) for t in texts], switches(model.config))
    return max(run([texts[i] for i in group]) for group in groups)


def _why_not_padded(model: PreTrainedModel, texts: list[list[int]]) -> str | None:
    def run(rows: list[list[int]]) -> float:
        longest = max(map(len, rows))
        ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        positions = torch.arange(longest).expand(len(rows), -1)
        expected = [logits_alone(model, row) for row in rows]
        forget_lengths(model)
        whole = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        worst = max(difference(whole[i, : len(row)], expected[i]) for i, row in enumerate(rows))
        if decoder(model) is None:
            return worst
        states = [_states(model, row) for row in rows]
        forget_lengths(model)
        hidden = padded_states(model, ids, positions, mask)
        return max(
            worst, *(difference(hidden[i, : len(row)], states[i]) for i, row in enumerate(rows))
        )

    return disagreement(model, "padded rows", lambda: _by_side(model, texts, run), LIMIT)


def _states(model: PreTrainedModel, text: Sequence[int]) -> Tensor:
    forget_lengths(model)
    inner: Any = decoder(model)
    return inner(input_ids=torch.tensor([text]), use_cache=False).last_hidden_state[0]


@torch.enable_grad()
def _why_no_gradient(model: PreTrainedModel, text: list[int]) -> str | None:
    """Runs backward from the logits to the embeddings, and so through every layer."""
    table = model.get_input_embeddings().get_parameter("weight").requires_grad_(True)
    try:
        torch.autograd.grad(logits_alone(model, text).square().sum(), table, allow_unused=True)
    except Exception as fault:  # as of disagreement
        return f"its backward pass stops ({type(fault).__name__}: {str(fault).strip()[:160]})"
    finally:
        table.requires_grad_(False)
    return None


def _why_not_packed(model: PreTrainedModel, texts: list[list[int]]) -> str | None:
    """Switches the copy to packed attention if it takes it."""
    if (reason := no_seam(model)) is not None:
        return reason
    device = torch.device("cpu")
    calls: list[int] = []

    def run(rows: list[list[int]]) -> float:
        # The model's own attention gives the expected states, ours those to compare.
        model.set_attn_implementation(before)
        alone = [_states(model, row) for row in rows]
        take_packed(model)
        forget_lengths(model)
        shared = SHARED if len(rows) > 1 else 0
        ids, positions = [*rows[0][:shared]], [*range(shared)]
        for row in rows:
            ids += row[shared:]
            positions += range(shared, len(row))
        layout = BatchLayout.of(shared, [len(row) - shared for row in rows], device)
        packed, layers = packed_states(
            model, torch.tensor([ids]), torch.tensor([positions]), layout
        )
        calls.append(layers)
        expected = torch.cat([alone[0][:shared], *(states[shared:] for states in alone)])
        return difference(packed, expected)

    before = attention_of(model.config)
    take_packed(model)
    if not takes_layouts(model):
        return _no_interface(model)
    reason = disagreement(model, "packed rows", lambda: _by_side(model, texts, run), LIMIT)
    if calls and (short := unreached(model, calls[0])) is not None:
        reason = short
    if reason is not None:
        model.set_attn_implementation(before)
    return reason


def no_seam(model: PreTrainedModel) -> str | None:
    """Returns why packed rows cannot reach the model's attention, as far as its class tells."""
    name = type(model).__name__
    if (inner := decoder(model)) is None:
        return f"{name} has no part that gives its hidden states"
    if adds_distances(inner):
        return f"{name} adds biases by distance to the scores of attention (ALiBi)"
    return None


def _no_interface(model: PreTrainedModel) -> str:
    return f"{type(model).__name__} does not offer transformers' attention interface"


def unreached(model: PreTrainedModel, calls: int) -> str | None:
    """Says why packed rows do not fit, if they do not reach every layer that mixes tokens."""
    text = model.config.get_text_config()
    attention = text.num_hidden_layers - len(layers_without_keys(model.config))
    layers = attention + len(state_modules(decoder(model) or model))
    name = type(model).__name__
    if calls == layers:
        return None
    if calls == 0 and attention_of(model.config) != NAME:
        return _no_interface(model)
    if calls > layers:
        return f"{name} computes attention {calls} times for {layers} layers"
    types: Any = getattr(text, "layer_types", None) or ()
    kinds = f" ({', '.join(dict.fromkeys(map(str, types)))})" if types else ""
    return f"only {calls} of {layers} layers of {name} mix tokens by attention{kinds}"


def _head(model: PreTrainedModel, text: list[int]) -> tuple[float, float | None, str | None]:
    """Returns (scale, softcap, None) if these lead from the head's output to the logits, else a
    reason."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        return 1.0, None, f"the output head is {type(head).__name__}, not a linear layer"
    if decoder(model) is None:
        return 1.0, None, f"{type(model).__name__} has no part that gives its hidden states"
    config = model.config.get_text_config()
    expected = logits_alone(model, text)
    try:
        states = _states(model, text)
        for scale in _scales(config):
            for softcap in _softcaps(config):
                if (
                    difference(
                        Head(head.weight, head.bias, scale, softcap).logits(states), expected
                    )
                    <= LIMIT
                ):
                    return scale, softcap, None
    except Exception as fault:  # as of disagreement
        return (
            1.0,
            None,
            f"{type(model).__name__} does not give what its head takes ({type(fault).__name__})",
        )
    return 1.0, None, f"{type(model).__name__} changes its logits in a way that is not known here"


def _scales(config: PreTrainedConfig) -> list[float]:
    """Returns factors that logits may have: fields of that name, as a factor and as a divisor."""
    values = [
        float(value)
        for name, value in vars(config).items()
        if (("logit" in name and "scal" in name) or name == "lm_head_multiplier")
        and isinstance(value, int | float)
        and value
    ]
    return list(dict.fromkeys([1.0, *values, *(1.0 / value for value in values)]))


def _softcaps(config: PreTrainedConfig) -> list[float | None]:
    values = [
        float(value)
        for name, value in vars(config).items()
        if "logit" in name
        and "cap" in name
        and "attn" not in name
        and isinstance(value, int | float)
        and value
    ]
    return list(dict.fromkeys([None, *values]))
