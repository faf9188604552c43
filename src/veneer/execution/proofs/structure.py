"""What holds for a model's structure, found by running a small float32 copy of it
(execution/proofs/small_copy.py).

    causal    what stands behind a token does not change it; else nothing can be trained or answered
    packed    documents end to end with a shared prompt give what each gives alone
              (execution/attention.py)
    padded    rows padded on the right give what each gives alone; else they are computed one by one
    head      what lies between the head and the logits (kernels/dense/loss.py)
    gradient  it can be trained as it stands, in eval mode; idle: the places that no gradient
              reaches (adapters/placement/idle.py)

The texts are longer than every window, chunk and rotary switch of the copy. Agreement is to what
float32's rounding explains: a window that is lost, a selection that is ignored or a cap on logits
that is not known shows a hundred times larger. What cannot be copied is not assumed: rows one by
one, through the model's own head and loop. A config of transformers' own classes is proven once on
a machine, others once in a process (files/remembered.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from veneer.adapters.placement.idle import places_without_gradient
from veneer.bases.quiet_transformers import quiet
from veneer.execution.agreement import SMALL_COPY, difference, disagreement
from veneer.execution.attention import NAME, decoder, packed_states, padded_states
from veneer.execution.proofs.small_copy import SWITCH, VOCABULARY, NoCopyError, small_copy
from veneer.execution.switches import forget_lengths, sides, switches
from veneer.files.remembered import is_known, remember
from veneer.kernels.dense.loss import Head
from veneer.kernels.layout import BatchLayout
from veneer.private.transformers import attention_of

Result = TypeVar("Result")

LIMIT = SMALL_COPY.limits[torch.float32]
SHARED = 3
LENGTHS = (20, 11, SWITCH + 7, SWITCH + 18)
"""Tokens of the texts: on both sides of the switch, all longer than a window."""


@dataclass(frozen=True)
class Proven:
    """None where it holds, else why not. scale, softcap: of the logits, where `head` is None."""

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
"""What was proven in this process, by the kind of proof and the structure."""


def proven(kind: type[PreTrainedModel], config: PreTrainedConfig) -> Proven:
    """What holds for models of this class and config."""
    return structure_proof("structure", kind, config, Proven, lambda: _prove(kind, config))


def structure_proof(
    what: str,
    kind: type[PreTrainedModel],
    config: PreTrainedConfig,
    of: Any,
    prove: Callable[[], Result],
) -> Result:
    """Returns what `prove` finds of a structure, once in a process. what, of: as for
    remember_proof."""
    key = what, structure_key(kind, config)
    if key not in _PROOFS:
        with quiet():
            _PROOFS[key] = remember_proof(what, kind, config, of, prove)
    proof: Result = _PROOFS[key]
    return proof


def remember_proof(
    what: str,
    kind: type[PreTrainedModel],
    config: PreTrainedConfig,
    of: Any,
    prove: Callable[[], Result],
) -> Result:
    """What `prove` finds of models of this class and config, remembered where the class is
    transformers' own: of others the code is not known."""
    if not is_known(kind):
        return prove()
    key = {
        "class": f"{kind.__module__}.{kind.__qualname__}",
        "structure": structure_key(kind, config),
    }
    return remember(what, {**key, "threads": torch.get_num_threads()}, of, prove)


def structure_key(kind: type[PreTrainedModel], config: PreTrainedConfig) -> str:
    """The same for models of the same structure, whatever their type and path."""
    fields = {name: value for name, value in config.to_dict().items() if name not in _NO_STRUCTURE}
    names = [f"{each.__module__}.{each.__qualname__}" for each in (kind, type(config))]
    return json.dumps([*names, fields], sort_keys=True, default=str)


@torch.no_grad()
def _prove(kind: type[PreTrainedModel], config: PreTrainedConfig) -> Proven:
    try:
        copy = small_copy(kind, config)
    except NoCopyError as fault:
        reason = str(fault).splitlines()[0]
        return Proven(packed=reason, padded=reason, head=reason)
    texts = sample_texts(copy)
    found = Proven(causal=_causal(copy, texts[0]))
    scale, softcap, head = _head(copy, texts[0])
    found = replace(found, padded=_padded(copy, texts), scale=scale, softcap=softcap, head=head)
    found = replace(found, gradient=_gradient(copy, texts[0]))
    if found.gradient is None:
        found = replace(found, idle=places_without_gradient(copy, torch.tensor([texts[-1]])))
    return replace(found, packed=_packed(copy, texts))


def sample_texts(model: PreTrainedModel) -> list[list[int]]:
    """The texts that everything is tried on; all begin with the same SHARED tokens."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(4, VOCABULARY - 4, (len(LENGTHS), max(LENGTHS)), generator=draw)
    ids[:, :SHARED] = ids[0, :SHARED]
    return [row[:length].tolist() for row, length in zip(ids, LENGTHS, strict=True)]


def logits_alone(model: PreTrainedModel, text: Sequence[int]) -> Tensor:
    """(T, V) of one text alone: what everything here is held against."""
    forget_lengths(model)
    return model(input_ids=torch.tensor([text]), use_cache=False).logits[0]


def _causal(model: PreTrainedModel, text: list[int]) -> str | None:
    part = len(text) - 3
    other = [*text[:part], *reversed(text[part:])]
    worst = max(
        difference(logits_alone(model, t)[:part], logits_alone(model, text)[:part])
        for t in (text[:part], other)
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
    found = switches(model.config)
    groups = sides([len(t) for t in texts], found)
    return max(run([texts[i] for i in group]) for group in groups)


def _padded(model: PreTrainedModel, texts: list[list[int]]) -> str | None:
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
def _gradient(model: PreTrainedModel, text: list[int]) -> str | None:
    """From the logits back to the embeddings, and so through every layer."""
    table = model.get_input_embeddings().get_parameter("weight").requires_grad_(True)
    try:
        torch.autograd.grad(logits_alone(model, text).square().sum(), table, allow_unused=True)
    except Exception as fault:  # as of disagreement
        return f"its backward pass stops ({type(fault).__name__}: {str(fault).strip()[:160]})"
    finally:
        table.requires_grad_(False)
    return None


def _packed(model: PreTrainedModel, texts: list[list[int]]) -> str | None:
    """Also switches the copy to packed attention, where that holds."""
    if (reason := no_seam(model)) is not None:
        return reason
    device = torch.device("cpu")
    calls: list[int] = []

    def run(rows: list[list[int]]) -> float:
        # The model's own attention gives what is expected, ours what is found.
        model.set_attn_implementation(before)
        alone = [_states(model, row) for row in rows]
        model.set_attn_implementation(NAME)
        forget_lengths(model)
        shared = SHARED if len(rows) > 1 else 0
        ids, positions = [*rows[0][:shared]], [*range(shared)]
        for row in rows:
            ids += row[shared:]
            positions += range(shared, len(row))
        layout = BatchLayout.of(shared, [len(row) - shared for row in rows], device)
        states, layers = packed_states(
            model, torch.tensor([ids]), torch.tensor([positions]), layout
        )
        calls.append(layers)
        expected = torch.cat([alone[0][:shared], *(own[shared:] for own in alone)])
        return difference(states, expected)

    before = attention_of(model.config)
    model.set_attn_implementation(NAME)
    if attention_of(model.config) != NAME:
        return f"{type(model).__name__} does not offer transformers' attention interface"
    reason = disagreement(model, "packed rows", lambda: _by_side(model, texts, run), LIMIT)
    if calls and (short := unreached(model, calls[0])) is not None:
        reason = short
    if reason is not None:
        model.set_attn_implementation(before)
    return reason


def no_seam(model: PreTrainedModel) -> str | None:
    """Why packed rows cannot reach the model's attention, as far as its class says."""
    if decoder(model) is None:
        return f"{type(model).__name__} has no part that gives its hidden states"
    return None


def unreached(model: PreTrainedModel, calls: int) -> str | None:
    """Says why packed rows do not fit, if attention does not run once for every layer."""
    text = model.config.get_text_config()
    layers = text.num_hidden_layers
    name = type(model).__name__
    if calls == layers:
        return None
    if calls > layers:
        return f"{name} computes attention {calls} times for {layers} layers"
    types: Any = getattr(text, "layer_types", None) or ()
    kinds = f" ({', '.join(dict.fromkeys(map(str, types)))})" if types else ""
    return f"only {calls} of {layers} layers of {name} mix tokens by attention{kinds}"


def _head(model: PreTrainedModel, text: list[int]) -> tuple[float, float | None, str | None]:
    """(scale, softcap, reason): what the model does between its head and the logits."""
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
    """What logits may be multiplied by: a field that speaks of it, as it stands or as a divisor."""
    own = [
        float(value)
        for name, value in vars(config).items()
        if "logit" in name and "scal" in name and isinstance(value, int | float) and value
    ]
    return list(dict.fromkeys([1.0, *own, *(1.0 / value for value in own)]))


def _softcaps(config: PreTrainedConfig) -> list[float | None]:
    own = [
        float(value)
        for name, value in vars(config).items()
        if "logit" in name
        and "cap" in name
        and "attn" not in name
        and isinstance(value, int | float)
        and value
    ]
    return list(dict.fromkeys([None, *own]))
