"""Which loop gives a model's answers: ours and transformers', each held against whole texts.

    packed    our own engine's steps give the logits of whole texts (decoding/engine.py): prompts
              read in chunks beside others that are continued, a text that begins in another's block
    beside    transformers' loop over prompts padded on the left gives what each gives alone
    cached    that loop over one prompt gives the logits of whole texts: some caches are built
              wrongly, and RoBERTa's positions begin elsewhere; else the whole text is read for
              every token

First on a small copy of the model's structure (execution/proofs/small_copy.py), once for a config
(execution/proofs/structure.py); our own then once more on the model itself, before any adapter is
attached. What is not proven goes prompt by prompt through transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from veneer.decoding.continued import SLOTS, continued
from veneer.decoding.schedule.limits import Limits
from veneer.execution.agreement import MODEL, difference, disagreement
from veneer.execution.attention import NAME, take_packed
from veneer.execution.proofs.model import prove_packing, some_ids, structure
from veneer.execution.proofs.same_values import same_values
from veneer.execution.proofs.small_copy import SWITCH, NoCopyError, small_copy
from veneer.execution.proofs.structure import LIMIT, logits_alone, sample_texts, structure_proof
from veneer.execution.switches import forget_lengths
from veneer.model_record import record_of
from veneer.models.capacity import read_alike
from veneer.models.frozen_base import FrozenBase


@dataclass(frozen=True)
class Loops:
    """None where it gives what whole texts give, else why not."""

    packed: str | None
    beside: str | None
    cached: str | None


@dataclass(frozen=True)
class PackedDecoding:
    """Whether our own engine gives what a model gives."""

    holds: bool


def loops(model: PreTrainedModel) -> Loops:
    """What holds for the model's structure. SourceError: it sees what it is to predict."""
    packed = structure(model).packed
    return structure_proof("loops", type(model), model.config, Loops, lambda: _prove(model, packed))


@torch.no_grad()
def _prove(model: PreTrainedModel, not_packed: str | None) -> Loops:
    try:
        copy = small_copy(type(model), model.config)
    except NoCopyError as fault:
        reason = str(fault).splitlines()[0]
        return Loops(reason, reason, None)
    beside, cached = _beside(copy), _cached(copy)
    return Loops(not_packed or _decoding(copy), beside, cached)


def _decoding(model: PreTrainedModel) -> str | None:
    """Prompts read together and continued by given tokens, on a copy that is switched to packed
    attention."""
    first, second = (text[: SWITCH - 1 - 3 * i] for i, text in enumerate(sample_texts(model)[2:]))
    texts = [first, second, first[: SLOTS + 1] + second[SLOTS + 1 :]]
    split = [len(first) - 9, len(second) - 9, SLOTS + 2]

    def run() -> float:
        model.set_attn_implementation(before)
        whole = [logits_alone(model, text) for text in texts]
        model.set_attn_implementation(NAME)
        forget_lengths(model)
        return _continued_apart(model, texts, split, whole)

    before = "sdpa" if getattr(model, "_supports_sdpa", False) else "eager"
    return disagreement(model, "a packed cache", run, LIMIT)


def _continued_apart(
    model: PreTrainedModel, texts: list[list[int]], split: list[int], whole: list[Tensor]
) -> float:
    """Texts read up to `split` and continued from there, against their logits read whole."""
    prompts, given = zip(
        *((text[:at], text[at:]) for text, at in zip(texts, split, strict=True)), strict=True
    )
    found = continued(model, prompts, given, Limits(rows=4, step_tokens=16, chunk_tokens=11))
    return max(
        difference(own, of[at - 1 :]) for own, of, at in zip(found, whole, split, strict=True)
    )


def _beside(model: PreTrainedModel) -> str | None:
    """transformers' own loop over two prompts padded on the left, against each alone."""
    texts = [text[:length] for text, length in zip(sample_texts(model), (13, 8), strict=False)]

    def run() -> float:
        together = generated(model, texts)
        return max(
            difference(together[:, i], generated(model, [text])[:, 0])
            for i, text in enumerate(texts)
        )

    return disagreement(model, "prompts padded on the left", run, LIMIT)


def _cached(model: PreTrainedModel) -> str | None:
    """transformers' own loop over one prompt, against its whole answer read at once."""
    text = sample_texts(model)[0][:13]

    def run() -> float:
        found = _answered(model, [text], 9)
        whole = logits_alone(model, found.sequences[0].tolist())
        return difference(torch.stack(found.logits)[:, 0], whole[len(text) - 1 : -1])

    return disagreement(model, "a cache", run, LIMIT)


def generated(model: PreTrainedModel, texts: list[list[int]], new: int = 9) -> Tensor:
    """(new, B, V): the logits of a greedy answer by transformers' loop."""
    return torch.stack(_answered(model, texts, new).logits)


def _answered(model: PreTrainedModel, texts: list[list[int]], new: int) -> Any:
    forget_lengths(model)
    longest = max(map(len, texts))
    ids = torch.tensor([[*[0] * (longest - len(t)), *t] for t in texts])
    mask = torch.tensor([[0] * (longest - len(t)) + [1] * len(t) for t in texts])
    settings = GenerationConfig(
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        use_cache=True,
        suppress_tokens=[0, 1, 2, 3],
        output_logits=True,
        return_dict_in_generate=True,
    )
    run: Any = model.generate
    return run(ids, attention_mask=mask, generation_config=settings)


def decodes_packed(base: FrozenBase) -> bool:
    """Whether our own engine is proven on this base: with no adapter acting, once."""

    def prove() -> bool:
        return prove_decoding(base.model) is None

    def find() -> PackedDecoding:
        with base.routing.none():
            holds = same_values("decoding", base.model, bool, prove, still=bool)
            if holds:
                take_packed(base.model)  # as the proof leaves it
        return PackedDecoding(holds)

    return record_of(base.model).part(PackedDecoding, find).holds


@torch.no_grad()
def prove_decoding(model: PreTrainedModel) -> str | None:
    """None if our loop gives what the model gives on whole texts; else why transformers' own is
    taken.

    Three short prompts, two of which begin alike, are read and continued by two given tokens each.
    """
    if (reason := loops(model).packed) is not None:
        return reason
    if model.config._attn_implementation != NAME and (reason := prove_packing(model)) is not None:
        return reason
    ids, most = some_ids(model, SLOTS + 7, 2).tolist(), read_alike(model.config)
    start = SLOTS + 1 if most is None else min(SLOTS + 1, most - 3)
    texts = [ids[: start + 3], ids[:start] + ids[-3:], ids[2:10]]
    whole = [
        model(input_ids=torch.tensor([t], device=model.device), use_cache=False).logits[0]
        for t in texts
    ]
    split, limit = [len(text) - 2 for text in texts], MODEL.limits[whole[0].dtype]
    return disagreement(
        model, "a packed cache", lambda: _continued_apart(model, texts, split, whole), limit
    )
