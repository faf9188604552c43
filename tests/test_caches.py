"""A remembered result is keyed by all that it depends on: docs/caches.md names every cache and what
changes it."""

from __future__ import annotations

import ast
import copy
import ctypes
import dataclasses
import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM, MistralForCausalLM

from tests.support.caches import PAGE, caches, properties
from tests.support.helpers import fill
from tests.support.tiny import tiny_base, tiny_model, tiny_tokenizer
from veneer.adapters.attach import attach
from veneer.adapters.config import LoRA
from veneer.adapters.methods.prefix import key_shape
from veneer.bases import compute
from veneer.bases.identity import fingerprint
from veneer.execution import attention
from veneer.execution.proofs.structure import structure_key
from veneer.formats.adapter import manifest_for, write_adapter
from veneer.kernels.attention import flex
from veneer.kernels.layout import Group
from veneer.kernels.tape import layer_tape
from veneer.library.library import Library
from veneer.model_record import record_of
from veneer.patterns import first_match
from veneer.plan import machine
from veneer.quant import mxfp4, nf4
from veneer.serve.http import details

CPU = torch.device("cpu")
MUTABLE = {
    "data.template.rendering.Template",  # never changed after it is made
    "kernels.dense.mixes.AdapterMix",
    "kernels.attention.paged.Spans",
    "plan.planner.Planner",  # facts of its blueprint, which is frozen
    "trained.TrainedRun",  # the base, loaded once on purpose
}
"""Classes with a cached_property that are no frozen dataclass."""
FILES_NAMED = {"tests/test_caches.py"}
"""Test files that the page names as a whole, in its text."""


def test_the_page_names_every_cache_and_no_other() -> None:
    named = set(re.findall(r"`([\w./]+)`", PAGE.read_text(encoding="utf-8")))
    found = caches()
    assert found - named == set(), (
        "name them in docs/caches.md: what they depend on, and what their key holds"
    )
    stale = {name for name in named if name.startswith("found/") or "._" in name} - found
    assert stale == set(), "these are no caches any more"


def _functions(file: Path) -> set[str]:
    tree = ast.parse(file.read_text(encoding="utf-8")) if file.is_file() else ast.Module([], [])
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_row_of_the_page_names_tests_that_exist() -> None:
    root, text = Path(__file__).parents[1], PAGE.read_text(encoding="utf-8")
    names = re.findall(r"`(tests/[^`]*)`", text)
    missing = []
    for name in names:
        file, _, function = name.partition("::")
        if function not in _functions(root / file) and name not in FILES_NAMED:
            missing.append(name)
    assert missing == []
    keyed = text.partition("## On disk")[2].replace(
        text.partition("## In memory, once a process")[2], ""
    )
    held = text.partition("## Held by an object")[2]
    rows = [
        line
        for line in (keyed + held).splitlines()
        if re.match(r"\| [^-|]", line) and "depends on" not in line
    ]
    assert len(rows) > 30 and [row for row in rows if "`tests/" not in row] == []


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


@pytest.mark.parametrize("made", ["code_book", "nested_map", "_powers", "_sampled_positions"])
def test_constants_are_the_same_whatever_is_around_the_first_call(made: str) -> None:
    """A plan computes on the meta device; what it made first would have stayed there for all that
    came later."""
    cached: Any = {
        "code_book": lambda: nf4.code_book("nf4").thresholds,
        "nested_map": nf4.nested_map,
        "_powers": mxfp4._powers,
        "_sampled_positions": lambda: fingerprint._sampled_positions(10_000, 4096),
    }[made]
    expected = cached().clone()
    for function in (nf4.code_book, nf4.nested_map, mxfp4._powers, fingerprint._sampled_positions):
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


def test_what_a_model_is_known_by_is_of_that_model() -> None:
    llama, mixtral = tiny_model("llama"), tiny_model("mixtral")
    for model in (llama, mixtral, llama):
        assert attention.decoder(model) is model.model
    wide = tiny_model("llama", head_dim=64)
    assert key_shape(llama) != key_shape(wide) and key_shape(llama) == key_shape(llama)

    class Bare(nn.Module):
        pass

    layouts: list[Any] = [Bare(), Bare()]
    positions = torch.zeros(1, 1)
    masks = [attention.packed_arguments(positions, layout)["attention_mask"] for layout in layouts]
    assert [attention._LAYOUTS[mask] for mask in masks] == layouts


def test_a_copy_of_a_model_is_asked_anew() -> None:
    model = tiny_model("llama")
    assert attention.decoder(model) is model.model
    other = copy.deepcopy(model)
    assert record_of(other) is not record_of(model) and record_of(model) is record_of(model)
    assert record_of(other).known(attention.DecoderPath) is None
    assert attention.decoder(other) is other.model


def test_a_type_is_measured_apart_from_others(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter((2.0, 3.0))
    monkeypatch.setattr(compute, "_products", lambda dtype: lambda: None)

    def least(calls: dict[torch.dtype, Callable[[], None]]) -> dict[torch.dtype, float]:
        base, other = calls
        return {base: 1.0, other: next(seconds)}

    monkeypatch.setattr(compute, "_fastest_seconds", least)
    compute.times_float32.cache_clear()
    types = (torch.bfloat16, torch.bfloat16, torch.float16)
    assert [compute.times_float32(dtype) for dtype in types] == [2.0, 2.0, 3.0]
    compute.times_float32.cache_clear()


def test_constants_and_patterns_are_those_of_their_arguments() -> None:
    places = [
        fingerprint._sampled_positions(*numbers) for numbers in ((100, 8), (200, 8), (100, 9))
    ]
    assert all(not torch.equal(a, b) for i, a in enumerate(places) for b in places[:i])
    assert not torch.equal(nf4.code_book("nf4").thresholds, nf4.code_book("fp4").thresholds)
    patterns = {"q_proj": 1, ".*_proj": 2}
    assert first_match(patterns, "layers.0.q_proj", 0) == 1
    assert first_match(dict(reversed(patterns.items())), "layers.0.q_proj", 0) == 2
    assert first_match({**patterns, "q_proj": 3}, "layers.0.q_proj", 0) == 3

    class One(ctypes.Structure):
        _fields_ = (("number", ctypes.c_int64), ("address", ctypes.c_void_p))

    class Two(ctypes.Structure):
        _fields_ = (("one", One), ("address", ctypes.c_void_p))

    address = ctypes.c_void_p
    assert layer_tape.offsets(One, address) == (8,)
    assert layer_tape.offsets(Two, address) == (8, 16)
    assert layer_tape.offsets(Two, One) == (0,)


def test_flex_attention_is_tried_for_every_argument_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Any] = []

    def outputs(attend: Any, tensors: Any, *rest: Any) -> list[torch.Tensor]:
        tried.append(attend)
        return [torch.ones(1)]

    monkeypatch.setattr(flex, "_with_gradients", outputs)
    first: tuple[Any, ...] = (CPU, torch.float32, (4, 2, 16), 2.0, False, attention)
    changes = {1: torch.bfloat16, 2: (4, 4, 16), 3: 3.0, 4: True, 5: machine}
    flex._fault.cache_clear()
    for arguments in (
        first,
        *((*first[:i], value, *first[i + 1 :]) for i, value in changes.items()),
    ):
        before = len(tried)
        flex._fault(*arguments)
        once = len(tried)
        flex._fault(*arguments)
        assert before < once == len(tried)
    flex._fault.cache_clear()
    assert flex._capped(2.0) is flex._capped(2.0) is not flex._capped(3.0)


def test_a_layout_holds_what_was_made_for_each_window_and_device() -> None:
    group = Group(0, (9,), CPU)
    q, k, v = (torch.zeros(9, 2, 16) for _ in range(3))

    def attend(q: torch.Tensor, *_: Any, **__: Any) -> Any:
        return q, None

    for window, device in ((None, "cpu"), (4, "cpu"), (4, "meta")):
        rules = attention.AttentionRules(0.1, window=window, softcap=2.0)
        moved = [each.to(device) for each in (q, k, v)]
        flex.flex_packed_attention(*moved, group, rules, attend)
    assert set(group.derived) == {
        ("flex", None, CPU),
        ("flex", 4, CPU),
        ("flex", 4, torch.device("meta")),
    }


def test_the_hash_of_a_template_follows_its_text() -> None:
    base = tiny_base()
    first = base.template_hash()
    base.tokenizer.chat_template = "other " + str(base.tokenizer.chat_template)
    assert base.template_hash() not in (None, first)
    base.tokenizer.chat_template = {"default": "one"}
    named = base.template_hash()
    base.tokenizer.chat_template["default"] = "two"
    assert base.template_hash() != named
    base.tokenizer.chat_template = None
    assert base.template_hash() is None


def test_contents_and_angles_are_those_of_the_folders(tmp_path: Path) -> None:
    """The library names a folder by the hash of its content."""
    library = Library(tmp_path / "library")
    for seed in (0, 1):
        base = tiny_base()
        head = base.model.get_output_embeddings()
        made = attach(base.model, LoRA(rank=2), name="x", routing=base.routing, head=head)
        fill(made.parameters().values(), seed=seed, scale=0.3)
        write_adapter(
            tmp_path / str(seed), made, manifest_for(base, method="lora"), model=base.model
        )
        library.add(str(tmp_path / str(seed)), name="same")
    one, two = (library.path(f"same@{version}") for version in (1, 2))
    assert one != two and details._contents(one) == details._contents(one) != details._contents(two)
    assert details._angle(one, one) != details._angle(one, two)
