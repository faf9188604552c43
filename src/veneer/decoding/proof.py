"""Proves which loop generates a model's answers correctly, by comparison with whole texts.

    packed    the engine's steps (decoding/engine.py) give the logits of whole texts: prompts are
              read in chunks while others are continued, and one begins in another one's block
    beside    transformers' loop over prompts padded on the left gives the logits of each prompt
              alone
    cached    transformers' loop over one prompt gives the logits of whole texts. It does not if a
              model's cache is wrong, or its positions do not begin at 0 (RoBERTa); then the whole
              text is read for every token

The proofs run on a small copy of the model's structure (execution/proofs/small_copy.py), once for a
config (execution/proofs/structure.py). The engine is also proven on the model itself, before an
adapter is attached. If it fails, transformers answers prompt by prompt.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from veneer.decoding.continued import SLOTS, logits_of_continuations
from veneer.decoding.schedule.limits import Limits
from veneer.execution.agreement import MODEL, difference, disagreement
from veneer.execution.attention import take_packed, takes_layouts
from veneer.execution.proofs.model import prove_packing, some_ids, structure
from veneer.execution.proofs.same_values import remember_by_values
from veneer.execution.proofs.small_copy import SWITCH, NoCopyError, small_copy
from veneer.execution.proofs.structure import LIMIT, logits_alone, sample_texts, structure_proof
from veneer.execution.states import has_states
from veneer.execution.switches import forget_lengths
from veneer.model_record import record_of
from veneer.models.capacity import read_alike
from veneer.models.frozen_base import FrozenBase
from veneer.private.transformers import offers_sdpa


@dataclass(frozen=True)
class Loops:
    """The result for each loop: None if it gives the logits of whole texts, else why not."""

    packed: str | None
    beside: str | None
    cached: str | None


@dataclass(frozen=True)
class PackedDecoding:
    """Whether the engine gives a model's own logits."""

    holds: bool


def loops(model: PreTrainedModel) -> Loops:
    """Proves the loops for the model's structure. SourceError: the model sees the tokens that it
    predicts."""
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
    if not_packed is not None and has_states(copy):
        not_packed = None  # a step's texts stand beside one another there, not end to end
    return Loops(not_packed or _decoding(copy), beside, cached)


def _decoding(model: PreTrainedModel) -> str | None:
    """Compares prompts that are read together and continued with their whole texts. Switches the
    copy to packed attention."""
    first, second = (text[: SWITCH - 1 - 3 * i] for i, text in enumerate(sample_texts(model)[2:]))
    texts = [first, second, first[: SLOTS + 1] + second[SLOTS + 1 :]]
    split = [len(first) - 9, len(second) - 9, SLOTS + 2]

    def run() -> float:
        model.set_attn_implementation(before)
        whole = [logits_alone(model, text) for text in texts]
        take_packed(model)
        forget_lengths(model)
        return _continuation_difference(model, texts, split, whole)

    before = "sdpa" if offers_sdpa(model) else "eager"
    return disagreement(model, "a packed cache", run, LIMIT)


def _continuation_difference(
    model: PreTrainedModel, texts: list[list[int]], split: list[int], whole: list[Tensor]
) -> float:
    """Compares texts that are read up to `split` and continued from there with the logits of whole
    texts."""
    prompts, answers = zip(
        *((text[:at], text[at:]) for text, at in zip(texts, split, strict=True)), strict=True
    )
    limits = Limits(rows=4, step_tokens=16, chunk_tokens=11)
    continuations = logits_of_continuations(model, prompts, answers, limits)
    return max(
        difference(logits, expected[at - 1 :])
        for logits, expected, at in zip(continuations, whole, split, strict=True)
    )


def _beside(model: PreTrainedModel) -> str | None:
    """Compares transformers' loop over two prompts, padded on the left, with each prompt alone."""
    texts = [text[:length] for text, length in zip(sample_texts(model), (13, 8), strict=False)]

    def run() -> float:
        together = generated(model, texts)
        return max(
            difference(together[:, i], generated(model, [text])[:, 0])
            for i, text in enumerate(texts)
        )

    return disagreement(model, "prompts padded on the left", run, LIMIT)


def _cached(model: PreTrainedModel) -> str | None:
    """Compares transformers' loop over one prompt with its whole answer, read at once."""
    text = sample_texts(model)[0][:13]

    def run() -> float:
        answer = _answer_greedily(model, [text], 9)
        whole = logits_alone(model, answer.sequences[0].tolist())
        return difference(torch.stack(answer.logits)[:, 0], whole[len(text) - 1 : -1])

    return disagreement(model, "a cache", run, LIMIT)


def generated(model: PreTrainedModel, texts: list[list[int]], new: int = 9) -> Tensor:
    """Returns (new, B, V), the logits of a greedy answer by transformers' loop."""
    return torch.stack(_answer_greedily(model, texts, new).logits)


def _answer_greedily(model: PreTrainedModel, texts: list[list[int]], new: int) -> Any:
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
    """Whether the engine is proven on this base, without adapters. Proves it once."""

    def prove() -> bool:
        return prove_decoding(base.model) is None

    def find() -> PackedDecoding:
        with base.routing.none():
            holds = remember_by_values("decoding", base.model, bool, prove, is_valid=bool)
            if holds:
                take_packed(base.model)  # as the proof leaves it
        return PackedDecoding(holds)

    return record_of(base.model).part(PackedDecoding, find).holds


@torch.no_grad()
def prove_decoding(model: PreTrainedModel) -> str | None:
    """Returns None if the engine gives the model's logits of whole texts, else why transformers'
    loop is used.

    Three short prompts, two with the same beginning, are read and continued by two known tokens.
    """
    if (reason := loops(model).packed) is not None:
        return reason
    if has_states(model):
        take_packed(model)
    elif not takes_layouts(model) and (reason := prove_packing(model)) is not None:
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
        model, "a packed cache", lambda: _continuation_difference(model, texts, split, whole), limit
    )
