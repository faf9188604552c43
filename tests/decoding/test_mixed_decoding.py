"""Prompts of several adapters read in one forward and continued together give what each gives
alone."""

import random

import pytest
import torch

from tests.adapters.test_methods import move
from tests.support.tiny import tiny_base
from veneer.adapters.attach import attach
from veneer.adapters.config import Bottleneck, DoRA, LoRA, Prefix
from veneer.adapters.placement.acting import in_turn
from veneer.adapters.placement.token_rows import AddedTokens
from veneer.decoding.engine import Engine, bytes_per_token
from veneer.decoding.sampling.sampling import Sampling
from veneer.decoding.schedule.adapters import FixedAdapters
from veneer.decoding.schedule.limits import Limits
from veneer.decoding.schedule.sequence import Request
from veneer.kernels.bindings import library as native

METHODS = {
    "lora": LoRA(rank=3, alpha=5.0),
    "head": LoRA(rank=5, alpha=2.0, rslora=True, targets=["lm_head", "embed_tokens", "down_proj"]),
    "dora": DoRA(rank=2, alpha=5.0),
    "prefix": Prefix(tokens=4, start="random"),
    "bottleneck": Bottleneck(placement="houlsby", size=5),
}
PROMPTS = {  # more tokens than the window of a family that has one
    "lora": [[5, 9, 30, 7, 5], [5, 9, 30, 11, 12, 13, 14, 15, 16, 17]],
    "head": [[61, 2, 8]],
    "dora": [[5, 9, 30, 44]],
    "prefix": [[10, 11, 12], [10, 11, 12, 13]],
    "bottleneck": [[7, 7]],
    None: [[5, 9, 30, 7, 5], [5, 9, 1]],
}
GIVEN = [3, 77, 5, 200, 9]


class Given:
    """Lets an answer say nothing else."""

    def allowed(self, new):
        return torch.arange(GIVEN[len(new)] + 1) == GIVEN[len(new)]

    def ended(self, new):
        return len(new) == len(GIVEN)


def chances(base, applied, asked, limits):
    """The model's own of each given token and of the likeliest beside it, by request."""
    engine = Engine(base, budget_bytes=2**23, adapters=FixedAdapters(applied), limits=limits)
    told = Sampling(logprobs=20)
    made = [
        engine.add(
            Request(
                prompt=tuple(p), max_new_tokens=9, adapter=who, sampling=told, constraints=Given
            )
        )[0]
        for who, p in asked
    ]
    engine.run()
    assert all(answer.new == GIVEN for answer in made)
    return [
        [{logprob.token: logprob.logprob, **dict(logprob.alternatives)} for logprob in a.logprobs]
        for a in made
    ]


@pytest.mark.parametrize("family", ["llama_untied", "gemma3", "qwen3_moe"])
def test_prompts_of_several_adapters_are_continued_together_as_each_alone(family):
    base = tiny_base(family)
    _ = base.paths
    for number, (name, config) in enumerate(METHODS.items()):
        if name == "dora" and family == "qwen3_moe":
            config = config.model_copy(update={"targets": ["q_proj", "o_proj"]})
        made = attach(
            base.model,
            config,
            name=name,
            routing=base.routing,
            head=base.model.get_output_embeddings(),
            seed=number,
        )
        move(made, seed=number)
    names = {name: () if name is None else ((name, 1.0),) for name in PROMPTS}
    applied = {
        names[name]: base.routing.applied(names[name]) for name in PROMPTS if name is not None
    }
    asked = [(names[name], prompt) for name, prompts in PROMPTS.items() for prompt in prompts]
    together = chances(base, applied, asked, Limits())
    chunks = chances(base, applied, asked, Limits(rows=5, step_tokens=11, chunk_tokens=4))
    for number, one in enumerate(asked):
        (alone,) = chances(base, applied, [one], Limits())
        for mixed in (together[number], chunks[number]):
            for own, other in zip(alone, mixed, strict=True):
                both = own.keys() & other.keys()
                assert len(both) >= 19  # two that are as likely may change places at the end
                assert [other[i] for i in both] == pytest.approx([own[i] for i in both], abs=1e-4)


def test_a_mix_keeps_what_it_prepared_until_its_plan_is_told_to_forget():
    base = tiny_base("llama")
    for number, name in enumerate("ab"):
        made = attach(
            base.model, LoRA(rank=3), name=name, routing=base.routing, head=None, seed=number
        )
        move(made, seed=number)
    mixed = in_turn([(3, base.routing.applied(((name, 1.0),))) for name in "ab"])
    ids = torch.tensor([[5, 9, 30], [5, 9, 30]])

    def said():
        with torch.no_grad(), base.routing.held(mixed):
            return base.model(ids, use_cache=False).logits

    before = said()
    assert torch.equal(said(), before)
    move(base.attachments["b"], seed=9)
    mixed.plan.forget()
    after = said()
    assert torch.equal(after[0], before[0]) and not torch.allclose(after[1], before[1])


@pytest.mark.skipif(native.level() < 2, reason="a processor whose registers were not measured")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("family", "seed"),
    [("llama_untied", 0), ("llama_untied", 1), ("llama_untied", 2), ("mixtral", 0), ("olmoe", 1)],
)
def test_answers_of_the_base_and_of_loras_are_to_the_bit_those_that_they_are_alone(
    dtype, family, seed
):
    """Drawn ones too, with every chance that they tell: prompts read together, in chunks, found
    again or read twice. In a mixture the adapters change experts too."""
    base = tiny_base(family, dtype, max_position_embeddings=512)
    _ = base.paths
    for number, name in enumerate("abc"):
        made = attach(
            base.model,
            LoRA(rank=3 + number),
            name=name,
            routing=base.routing,
            head=None,
            seed=number,
        )
        move(made, seed=number)
    names = [(), (("a", 1.0),), (("b", 0.7),), (("c", 1.0),), (("a", 0.5), ("b", 1.0))]
    applied = {name: base.routing.applied(name) for name in names if name}
    draw = random.Random(seed)
    shared = [draw.randrange(4, 200) for _ in range(80)]
    asked = []
    for number in range(12):
        prompt = shared[: draw.choice([0, 17, 80])] + [
            draw.randrange(4, 200) for _ in range(draw.choice([1, 9, 40, 90]))
        ]
        how = Sampling(
            temperature=draw.choice([0.0, 0.8, 1.5]), top_p=draw.choice([1.0, 0.9]), logprobs=3
        )
        asked.append(
            Request(
                prompt=tuple(prompt),
                max_new_tokens=24,
                adapter=names[number % 5],
                sampling=how,
                seed=number,
            )
        )

    def answers(requests, limits, places=8192):
        budget = places * bytes_per_token(base)
        engine = Engine(base, budget_bytes=budget, adapters=FixedAdapters(applied), limits=limits)
        assert engine.decode_step.not_by_parts is None
        made = [engine.add(request)[0] for request in requests]
        engine.run()
        return [(sequence.new, sequence.logprobs) for sequence in made]

    alone = [answers([request], Limits())[0] for request in asked]
    assert answers(asked, Limits()) == alone
    assert answers(asked, Limits(rows=5, step_tokens=100, chunk_tokens=33)) == alone
    assert (
        answers(asked[::-1], Limits(rows=7, step_tokens=64, chunk_tokens=64), places=560)
        == alone[::-1]
    )


BESIDE = {
    "prefix": Prefix(tokens=4, start="random"),
    "dora": DoRA(rank=2, alpha=5.0, targets=["q_proj", "down_proj"]),
    "bottleneck": Bottleneck(placement="houlsby", size=5),
    "embedding": LoRA(rank=3, alpha=5.0, targets=["embed_tokens", "v_proj"]),
    "norms": LoRA(rank=3, alpha=5.0, targets=["q_proj"], train_modules=["norm", "input_layernorm"]),
    "head": LoRA(rank=3, alpha=5.0, targets=["q_proj"], train_modules=["lm_head"]),
    "offsets": LoRA(rank=3, alpha=5.0, targets=["q_proj"], lora_bias=True),
}
"""What the model's parts or one call for all rows cannot compute; by name, each in one mix at
least."""


@pytest.mark.skipif(native.level() < 2, reason="a processor whose registers were not measured")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_answers_of_the_base_and_of_loras_keep_their_bits_beside_every_other_method(dtype):
    base = tiny_base("llama_untied", dtype, max_position_embeddings=512)
    _ = base.paths
    head, settings = (
        base.model.get_output_embeddings(),
        {"a": LoRA(rank=3), "b": LoRA(rank=2, targets=["lm_head"])},
    )
    for number, (name, config) in enumerate({**settings, **BESIDE}.items()):
        move(
            attach(base.model, config, name=name, routing=base.routing, head=head, seed=number),
            seed=number,
        )
    tokens = AddedTokens(("<x>",), (272,))
    made = attach(
        base.model,
        LoRA(rank=2),
        name="tokens",
        routing=base.routing,
        head=head,
        tokens=tokens,
        seed=20,
    )
    move(made, seed=20)
    exact = [(), (("a", 1.0),), (("b", 0.7), ("a", 0.5))]
    others = [((name, 1.0),) for name in (*BESIDE, "tokens")]
    applied = {each: base.routing.applied(each) for each in (*exact, *others) if each}
    draw = random.Random(7)

    def request(identity, number):
        prompt = tuple(draw.randrange(4, 200) for _ in range(draw.choice([1, 9, 40, 90])))
        how = Sampling(temperature=draw.choice([0.0, 0.0, 1.0]), logprobs=3)
        return Request(
            prompt=prompt, max_new_tokens=12, adapter=identity, sampling=how, seed=number
        )

    def answers(requests, limits):
        engine = Engine(
            base,
            budget_bytes=8192 * bytes_per_token(base),
            adapters=FixedAdapters(applied),
            limits=limits,
        )
        assert engine.decode_step.not_by_parts is None
        made = [engine.add(request)[0] for request in requests]
        engine.run()
        assert not any(sequence.error for sequence in made)
        return [(sequence.new, sequence.logprobs) for sequence in made]

    asked = [request(exact[number % 3], number) for number in range(6)]
    alone = [answers([request], Limits())[0] for request in asked]
    for mix in (others, *([other] for other in others)):
        beside = [request(identity, number) for number, identity in enumerate(mix)]
        limits = draw.choice([Limits(), Limits(rows=6, step_tokens=100, chunk_tokens=33)])
        assert answers([*beside, *asked], limits)[len(beside) :] == alone, mix
