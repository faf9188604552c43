"""Answers of each family whose steps are recorded are those of transformers, by the base and by
adapters side by side, with and without guessed tokens."""

import pytest
import torch

from tests.adapters.test_methods import move
from tests.support.models.packed import packed_and_dense, packed_modules
from tests.support.tiny import save_tiny, tiny_base
from veneer.adapters.attach import attach
from veneer.adapters.config import LoRA
from veneer.adapters.placement.acting import Acting
from veneer.decoding.engine import Engine
from veneer.decoding.schedule.adapters import FixedAdapters
from veneer.decoding.schedule.sequence import Request
from veneer.kernels.bindings import library as native
from veneer.kernels.dense import few_rows

FAMILIES = [
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3",
    "olmo2",
    "exaone4",
    "smollm3",
    "granite",
    "phi3",
    "glm4",
    "cohere",
    "stablelm",
    "starcoder2",
    "phi",
    "gpt_neox",
    "gpt2",
    "opt",
    "falcon",
    "falcon_groups",
    "falcon_heads",
    "ernie4_5",
    "hyperclovax",
    "ministral3",
    "nemotron",
    "olmo",
    "hunyuan",
]
OUTPUTS = {
    "starcoder2": ["o_proj", "c_proj"],
    "phi": ["dense", "fc2"],
    "gpt_neox": ["dense", "dense_4h_to_h"],
    "gpt2": ["c_proj"],
    "opt": ["out_proj", "fc2"],
}
OUTPUTS |= dict.fromkeys(("falcon", "falcon_groups", "falcon_heads"), OUTPUTS["gpt_neox"])
"""Modules at the ends of the blocks, where they have other names."""
NEW = 24
IDENTITIES = [(), (("a", 1.0),), (("b", 1.0),), (("a", 0.5), ("b", -1.0))]

pytestmark = pytest.mark.skipif(native.level() < 2, reason="no products of few rows are compiled")


def with_adapters(base, family):
    """Attaches an adapter to the outputs of the blocks, and one to all linear layers."""
    outputs = OUTPUTS.get(family, ["o_proj", "down_proj"])
    for number, targets in enumerate((outputs, "all-linear")):
        made = attach(
            base.model,
            LoRA(rank=3, targets=targets),
            name="ab"[number],
            routing=base.routing,
            head=base.model.get_output_embeddings(),
            seed=number,
        )
        move(made, seed=number)
    return base


def prompts_of(rows):
    draw = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 20, (rows,), generator=draw).tolist()
    prompts = [torch.randint(3, 250, (n,), generator=draw).tolist() for n in lengths]
    return [[*prompt, *prompt[:4], *prompt[:2]] for prompt in prompts]  # something to look up


def transformers_agrees(base, prompts, answers):
    """Whether each token is the likeliest behind the text before it, by transformers' own
    attention."""
    base.model.set_attn_implementation("eager")
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        applied = base.routing.applied(IDENTITIES[number % len(IDENTITIES)])
        text = torch.tensor([[*prompt, *answer]])
        with base.routing.held(Acting.everywhere(applied)), torch.no_grad():
            logits = base.model(text, use_cache=False).logits[0, len(prompt) - 1 : -1]
        if logits.argmax(-1).tolist() != answer:
            return False
    return True


def by_engine(base, prompts, lookup):
    _ = base.paths
    applied = {identity: base.routing.applied(identity) for identity in IDENTITIES if identity}
    engine = Engine(base, budget_bytes=2**23, adapters=FixedAdapters(applied), lookup=lookup)
    assert engine.decode_step.not_by_parts is None
    answers = [
        engine.add(
            Request(
                prompt=tuple(prompt),
                max_new_tokens=NEW,
                adapter=IDENTITIES[number % len(IDENTITIES)],
            )
        )[0]
        for number, prompt in enumerate(prompts)
    ]
    engine.run()
    step = engine.decode_step  # of 4-bit weights few rows have a product of their own
    assert step._parts.steps._steps if packed_modules(base.model) else step.is_recorded
    return [answer.new for answer in answers]


@pytest.mark.parametrize("family", FAMILIES)
def test_recorded_steps_answer_as_transformers_does(family, monkeypatch):
    monkeypatch.setattr(few_rows, "LEAST_VALUES", 1)
    prompts, base = prompts_of(16), with_adapters(tiny_base(family), family)
    answers = by_engine(base, prompts, "off")
    assert all(len(answer) == NEW for answer in answers)
    assert transformers_agrees(with_adapters(tiny_base(family), family), prompts, answers)
    assert by_engine(base, prompts, "auto") == answers
    for lookup in ("off", "auto"):
        assert by_engine(base, prompts[:1], lookup) == answers[:1]


@pytest.mark.parametrize("family", ["llama", "qwen2", "starcoder2", "gpt2", "opt"])
def test_recorded_steps_over_4_bits_answer_as_over_the_decoded_weights(
    family, tmp_path, monkeypatch
):
    """All of these but Llama have biases."""
    monkeypatch.setattr(few_rows, "LEAST_VALUES", 1)
    base, dense = packed_and_dense(save_tiny(tmp_path, family), dtype="float32")
    assert packed_modules(base.model)
    prompts = prompts_of(9)
    answers = by_engine(with_adapters(base, family), prompts, "off")
    assert all(len(answer) == NEW for answer in answers)
    plain = tiny_base(family)
    plain.model.load_state_dict(dense.state_dict())
    assert transformers_agrees(with_adapters(plain, family), prompts, answers)
    assert by_engine(base, prompts[:1], "off") == answers[:1]
