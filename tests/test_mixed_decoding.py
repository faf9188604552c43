"""Prompts of several adapters read in one forward and continued together give what each gives alone."""

import pytest
import torch

from tests.test_methods import move
from tests.tiny import tiny_base
from veneer.adapters.acting import in_turn
from veneer.adapters.attach import attach
from veneer.adapters.config import Bottleneck, DoRA, LoRA, Prefix
from veneer.decoding.decode import Prompts, continued, prefill_groups, step_groups

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


@pytest.mark.parametrize("family", ["llama_untied", "gemma3", "qwen3_moe"])
def test_prompts_of_several_adapters_are_continued_together_as_each_alone(family):
    base = tiny_base(family)
    _ = base.paths
    for number, (name, config) in enumerate(METHODS.items()):
        if name == "dora" and family == "qwen3_moe":
            config = config.model_copy(update={"targets": ["q_proj", "o_proj"]})
        made = attach(
            base.model, config, name=name, routing=base.routing, head=base.model.get_output_embeddings(), seed=number
        )
        move(made, seed=number)
    groups = [Prompts(ids, shared=2 if len(ids) > 1 else 0) for ids in PROMPTS.values()]
    adapters = [() if name is None else base.routing.applied(((name, 1.0),)) for name in PROMPTS]
    rows = [len(group.ids) for group in groups]
    with torch.no_grad():
        reading = in_turn([(group.tokens, a) for group, a in zip(groups, adapters, strict=True)])
        with base.routing.held(reading):
            caches, logits = prefill_groups(base.model, groups, routing=base.routing)
        together = [logits]
        with base.routing.held(in_turn(list(zip(rows, adapters, strict=True)))):
            for token in GIVEN:
                together.append(step_groups(base.model, caches, [token] * sum(rows)))
                for cache in caches:
                    cache.lengths += 1
        found = torch.stack(together).split(rows, dim=1)
        for group, own, mixed in zip(groups, adapters, found, strict=True):
            with base.routing.held(in_turn([(1, own)])):
                alone = continued(base.model, group.ids, [GIVEN] * len(group.ids), group.shared)
            assert (mixed - alone).abs().max() <= 2e-5 * alone.abs().max()


def test_a_mix_keeps_what_it_prepared_until_its_plan_is_told_to_forget():
    base = tiny_base("llama")
    for number, name in enumerate("ab"):
        made = attach(base.model, LoRA(rank=3), name=name, routing=base.routing, head=None, seed=number)
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
