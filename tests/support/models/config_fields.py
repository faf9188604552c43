"""Every field of a config that changes what transformers computes changes it here alike, or is
refused by name.

    python -m tests.support.models.config_fields llama gemma2
        prints what does not hold of these families; all without names

Each family's small random model is written with one field of config.json changed, over the same
weights. Where transformers' own logits change, `veneer.load` of that folder has to give these
logits, the losses of packed rows with a fresh LoRA, and the greedy answers, by the paths that it
takes in training and serving; a `VeneerError` is as good. And the base has to be another one for
adapters (bases/identity/config_fields.py).
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.nn import functional as F
from transformers import CONFIG_MAPPING, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import veneer
from tests.support.helpers import make_examples
from tests.support.models.routed import batch_loss
from tests.support.tiny import CHATML
from veneer.adapters.config import LoRA
from veneer.bases.config.model_class import model_class
from veneer.bases.quiet_transformers import quiet
from veneer.bases.stop_tokens import stop_token_ids
from veneer.decoding.generate import generate
from veneer.errors import VeneerError
from veneer.execution.proofs.small_copy import drawn, small_copy
from veneer.execution.switches import forget_lengths
from veneer.execution.train_step import fused, replacements
from veneer.models.starts.initial_values import begin
from veneer.models.step import batch_of, parts_of

IDS, LONGEST = 90, 44
SAME, ALIKE = 1e-6, 1e-4
"""Logits relative to the largest: what counts as changed, and what rounding explains."""
NOT_CHANGED = (
    "model_type",
    "architectures",
    "transformers_version",
    "vocab_size",
    "dtype",
    "torch_dtype",
)
"""They name the class and its code, and are held against the weights."""
WORDS = {
    "silu": "gelu",
    "gelu": "silu",
    "gelu_pytorch_tanh": "silu",
    "relu": "gelu",
    "default": "linear",
}
WORDS |= {"sigmoid": "softmax", "softmax": "sigmoid", "full_attention": "sliding_attention"}
WORDS |= {"sliding_attention": "full_attention", "gelu_new": "relu", "relu2": "gelu"}
MISSING = {"softcap": 2.0, "window": 5, "clip": 0.5, "limit": 0.5, "scalar": 7.0}
"""What a field gets that says null, by a word of its name."""


def small_family(name: str) -> PreTrainedModel:
    """A small random model of a family of transformers, with windows shorter than a text here."""
    config = CONFIG_MAPPING[name](**({"is_decoder": True} if "bert" in name else {}))
    kind = model_class(config)
    if kind.config_class is not type(config):  # the text's part of a model that sees or hears
        config = config.get_text_config()
    return drawn(kind, small_copy(kind, config, window=16, switch=32).config)


def _small_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each printable character: fewer than a small copy has rows."""
    vocabulary = {chr(code): number for number, code in enumerate([10, *range(32, 127)])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    roles = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    backend.add_special_tokens(list(roles.values()))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, **roles
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def changed_values(name: str, value: Any) -> list[Any]:
    """Other values of a field that a config might say."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, value * 2, max(1, value // 2)] if value else [1]
    if isinstance(value, float):
        return [value * 1.7 + 0.13]
    if isinstance(value, str):
        return [WORDS[value]] if value in WORDS else []
    if value is None:
        return [given for word, given in MISSING.items() if word in name]
    if isinstance(value, list) and value:
        return [[*value[:-1], last] for last in changed_values(name, value[-1])]
    return []


def changes(
    fields: dict[str, Any], above: tuple[str, ...] = ()
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(what was changed, config.json with one field changed)."""
    for name, value in fields.items():
        if name in NOT_CHANGED or name.startswith("_"):
            continue
        if isinstance(value, dict):
            if name not in ("id2label", "label2id"):
                for what, inner in changes(value, (*above, name)):
                    yield what, {**fields, name: inner}
            continue
        for other in changed_values(name, value):
            inner = {**fields, name: other}
            if other == "linear" and name == "rope_type":
                inner["factor"] = 3.0
            yield f"{'.'.join((*above, name))}: {value} -> {other}", inner


@torch.no_grad()
def logits_of(model: Any, ids: list[int]) -> Tensor:
    forget_lengths(model)
    found: Tensor = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    return found


def apart(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12)).item()


def read_by_transformers(folder: Path, kind: Any) -> Any:
    """None if transformers refuses the config, or needs other weights for it."""
    try:
        model, info = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    except Exception:  # a class may refuse a config with anything
        return None
    if info["missing_keys"] or info["mismatched_keys"] or info["unexpected_keys"]:
        return None
    return model.eval()


@dataclass
class Swept:
    """computed, refused: fields that change transformers' logits, and are computed or refused here.
    faults: one line for each field and fault."""

    computed: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def sweep(name: str, folder: Path, only: tuple[str, ...] = ()) -> Swept:
    """only: fields whose names begin so; all without."""
    with quiet():
        return _sweep(name, folder, only)


def _sweep(name: str, folder: Path, only: tuple[str, ...]) -> Swept:
    found = Swept()
    model = small_family(name)
    kind = type(model)
    model.save_pretrained(folder)
    _small_tokenizer().save_pretrained(folder)
    path, ids = folder / "config.json", [(7 * i + i * i) % IDS for i in range(LONGEST)]
    fields = json.loads(path.read_text())
    plain = read_by_transformers(folder, kind)
    if plain is None:
        return found
    before, identity = (
        logits_of(plain, ids),
        veneer.load(str(folder), dtype="float32").fingerprint(),
    )
    done: set[str] = set()
    for what, other in changes(fields):
        called = what.partition(":")[0]
        if called in done or not (called.startswith(only) or not only):
            continue
        path.write_text(json.dumps(other))
        twin = read_by_transformers(folder, kind)
        if twin is None:
            continue
        try:
            after = logits_of(twin, ids)
        except Exception:  # transformers cannot compute it
            continue
        if not bool(after.isfinite().all()) or apart(after, before) <= SAME:
            continue
        done.add(called)
        try:
            base = veneer.load(str(folder), dtype="float32")
        except VeneerError:
            found.refused.append(called)
            continue
        found.computed.append(called)
        found.faults += [
            f"{name}: {what}: {fault}" for fault in _faults(base, twin, after, ids, identity)
        ]
    return found


def _faults(base: Any, twin: Any, after: Tensor, ids: list[int], identity: Any) -> Iterator[str]:
    if base.fingerprint().differences(identity) == []:
        yield "the base is taken for the one before"
    if (worst := apart(logits_of(base.model, ids), after)) > ALIKE:
        yield f"logits differ by {worst:.1e}"
    with suppress(VeneerError):
        expected, found = _losses(base, twin)
        if abs(found - expected) > ALIKE * abs(expected):
            yield f"the loss in training is {found:.6f}, and {expected:.6f} in transformers"
    with suppress(VeneerError):
        prompts = [ids[:27], ids[5:9], ids[3:38]]
        stops = set(stop_token_ids(base.tokenizer, base.model.generation_config))
        with base.routing.none():
            answers = generate(base, prompts, max_new_tokens=6)
        wrong = [
            n for n, prompt in enumerate(prompts) if answers[n] != _greedy(twin, prompt, stops)
        ]
        if wrong:
            yield f"{len(wrong)} of {len(prompts)} answers differ"


def _losses(base: Any, twin: Any) -> tuple[float, float]:
    """Of transformers one row after the other, and here of rows that share a prompt, packed and
    fused if that holds."""
    examples = make_examples(4, vocab=IDS, prompt=5, longest=LONGEST)
    total = float(sum(example.trained.sum() for example in examples))
    expected = 0.0
    for example in examples:
        rows = example.trained.nonzero()[0]
        logits = logits_of(twin, example.ids[: rows[-1]].tolist())
        targets = torch.from_numpy(example.ids[rows].astype("int64"))
        expected += F.cross_entropy(logits[rows - 1], targets, reduction="sum").item()
    made = begin(base, LoRA(rank=16, alpha=5), name="a").attachment
    base.routing.active = (("a", 1.0),)
    with fused(base.model, replacements(base.model)), torch.no_grad():
        parts = parts_of(base, examples, [list(range(len(examples)))])
        batches = [batch_of(base, examples, part, share_prompt=True) for part in parts]
        found = sum(batch_loss(base, batch, total=total).item() for batch in batches)
    del made
    base.routing.active = ()
    return expected / total, found


def _greedy(model: Any, prompt: list[int], stops: set[int]) -> list[int]:
    ids = list(prompt)
    for _ in range(6):
        token = int(logits_of(model, ids)[-1].argmax())
        if token in stops:
            break
        ids.append(token)
    return ids[len(prompt) :]


def main(asked: list[str]) -> None:
    for name in asked or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        with tempfile.TemporaryDirectory() as folder:
            try:
                found = sweep(name, Path(folder))
            except Exception as fault:
                found = Swept(
                    faults=[f"{name}: not swept: {type(fault).__name__}: {str(fault)[:150]}"]
                )
        counted = f"{name}: {len(found.computed)} fields computed, {len(found.refused)} refused"
        print("\n".join([counted, *found.faults]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
