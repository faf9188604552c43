"""A remembered result is keyed by all that it depends on: docs/caches.md names every cache and what changes it."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, MistralForCausalLM

from tests.caches import PAGE, caches, properties
from tests.tiny import tiny_base, tiny_model, tiny_tokenizer
from veneer.bases import fingerprint
from veneer.models.proof import structure_key
from veneer.quant import mxfp4, nf4

MUTABLE = {
    "data.rendering.Template",  # never changed after it is made
    "kernels.mixes.Mix",
    "kernels.paged_attention.Spans",
    "plan.planner.Planner",  # facts of its blueprint, which is frozen
    "trained.TrainedRun",  # the base, loaded once on purpose
}
"""Classes with a cached_property that are no frozen dataclass."""


def test_the_page_names_every_cache_and_no_other() -> None:
    named = set(re.findall(r"`([\w./]+)`", PAGE.read_text(encoding="utf-8")))
    assert caches() - named == set(), "name them in docs/caches.md: what they depend on, and what their key holds"
    stale = {name for name in named if name.startswith("found/") or "._" in name} - caches()
    assert stale == set(), "these are no caches any more"


def test_the_page_names_tests_that_exist() -> None:
    root = Path(__file__).parents[1]
    names = set(re.findall(r"`(tests/[\w/]+\.py)`", PAGE.read_text(encoding="utf-8")))
    assert names and [name for name in sorted(names) if not (root / name).is_file()] == []


def test_a_property_is_kept_by_objects_that_do_not_change() -> None:
    changing = set()
    for name in properties():
        module, _, kind = name.rpartition(".")
        found: Any = getattr(importlib.import_module(f"veneer.{module}"), kind)
        if not (dataclasses.is_dataclass(found) and found.__dataclass_params__.frozen):  # type: ignore[attr-defined]
            changing.add(name)
    assert changing == MUTABLE


def test_a_structure_is_another_one_by_its_class_and_by_every_field() -> None:
    config = tiny_model("llama").config
    keys = {structure_key(LlamaForCausalLM, config), structure_key(MistralForCausalLM, config)}
    fields = {
        "rms_norm_eps": 0.5,
        "hidden_act": "gelu",
        "num_hidden_layers": 3,
        "head_dim": 16,
        "attention_bias": True,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    }
    for name, value in fields.items():
        other = copy.deepcopy(config)
        setattr(other, name, value)
        keys.add(structure_key(LlamaForCausalLM, other))
    other = copy.deepcopy(config)
    other.rope_parameters["rope_theta"] = 500.0
    assert len({*keys, structure_key(LlamaForCausalLM, other)}) == len(fields) + 3


@pytest.mark.parametrize("made", ["code_book", "nested_map", "_powers", "_places"])
def test_constants_are_the_same_whatever_is_around_the_first_call(made: str) -> None:
    """A plan computes on the meta device; what it made first would have stayed there for all that came later."""
    cached: Any = {
        "code_book": lambda: nf4.code_book("nf4").thresholds,
        "nested_map": nf4.nested_map,
        "_powers": mxfp4._powers,
        "_places": lambda: fingerprint._places(10_000, 4096),
    }[made]
    expected = cached().clone()
    for function in (nf4.code_book, nf4.nested_map, mxfp4._powers, fingerprint._places):
        function.cache_clear()
    with torch.device("meta"), torch.inference_mode():
        cached()
    assert torch.equal(cached(), expected)
    assert not cached().is_inference()


def test_the_hash_of_a_tokenizer_follows_what_is_done_to_it() -> None:
    base = tiny_base()
    hashes = [base.tokenizer_hash(), base.tokenizer_hash()]
    base.tokenizer.add_tokens(["<new>"])
    hashes.append(base.tokenizer_hash())
    base.tokenizer.add_special_tokens({"unk_token": "<new>"})
    hashes.append(base.tokenizer_hash())
    base.tokenizer = tiny_tokenizer()
    hashes.append(base.tokenizer_hash())
    assert len(set(hashes)) == 3 and hashes[0] == hashes[1] == hashes[4]
