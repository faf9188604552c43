"""A hook of the base's own module is called where adapters act, and gets what the base computes
without them: a constant that it adds is added as by a hook around the adapters."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from tests.adapters.test_methods import move
from tests.models.test_step import assert_same, loss_and_gradients, own_loss_and_gradients
from tests.support.helpers import make_examples
from tests.support.tiny import tiny_base
from veneer.adapters.attach import attach
from veneer.adapters.config import DoRA, LoRA
from veneer.adapters.methods.adapted_linear import AdaptedLinear
from veneer.adapters.methods.experts import AdaptedExperts
from veneer.adapters.placement.acting import in_turn
from veneer.adapters.placement.wrapping import unwrapped
from veneer.decoding.engine import decode_step_of
from veneer.execution.agreement import difference as apart
from veneer.execution.proofs.steps import read_and_continued
from veneer.kernels.dense import few_rows
from veneer.models.frozen_base import FrozenBase

PROMPTS = [list(range(30, 60)), [7, 90, 4], list(range(100, 117))]
IDS = torch.tensor([[5, 9, 139, 73, 5, 61, 2, 8, 44, 10, 11, 12]])
METHODS = {
    "lora": LoRA(rank=3, alpha=5.0, dropout=0.2),
    "lora with biases": LoRA(rank=3, alpha=5.0, lora_bias=True),
    "biases": LoRA(rank=3, alpha=5.0, targets=["q_proj"], bias="all"),
    "dora": DoRA(rank=2, alpha=5.0),
    "a layer trained in full": LoRA(rank=2, targets=["q_proj"], train_modules=["o_proj"]),
}
CELLS = [("mixtral", "lora"), *(("qwen2", method) for method in METHODS)]


@dataclass
class Adapted:
    base: FrozenBase
    attachments: list[Any]

    def outputs(self) -> dict[str, list[torch.Tensor]]:
        """The loss and gradients, and logits of a forward and of answers, with one adapter and with
        several in a batch."""
        base, routing = self.base, self.base.routing
        a, b = (routing.applied(((name, 1.0),)) for name in ("a", "b"))
        base.routing.active = (("a", 1.0),)
        examples = make_examples(4)
        loss, gradients = loss_and_gradients(
            base.model, base.paths, routing, self.attachments[0], examples
        )
        with torch.no_grad():
            whole = base.model(IDS).logits
            answers = read_and_continued(decode_step_of(base).logits, PROMPTS)
            with routing.held(in_turn([(5, a), (3, ()), (4, b)])):
                parts = base.model(IDS).logits
            with routing.held(in_turn([(1, a), (1, ()), (1, b)])):
                step = read_and_continued(decode_step_of(base).logits, [p[:3] for p in PROMPTS])
        return {
            "training": [torch.tensor(loss), *gradients],
            "a forward": [whole, parts],
            "answers": [answers, step],
        }


def adapted(family: str, method: LoRA) -> Adapted:
    base = tiny_base(family)
    _ = base.paths
    attachments = []
    for seed, (name, config) in enumerate({"a": method, "b": METHODS["lora"]}.items()):
        head = base.model.get_output_embeddings()
        attachment = attach(
            base.model, config, name=name, routing=base.routing, head=head, seed=seed
        )
        move(attachment, seed=seed)
        attachments.append(attachment)
    return Adapted(base, attachments)


@pytest.mark.parametrize(("family", "method"), CELLS)
def test_a_hook_of_the_base_acts_like_one_around_the_adapters(family, method, monkeypatch):
    monkeypatch.setattr(few_rows, "LEAST_VALUES", 1)
    ours = adapted(family, METHODS[method])
    kinds = (AdaptedLinear, AdaptedExperts)
    wrappers = [module for module in ours.base.model.modules() if isinstance(module, kinds)]
    assert wrappers and (family != "mixtral" or AdaptedExperts in map(type, wrappers))
    plain = ours.outputs()
    found = []
    for hooked in ([wrapper.base for wrapper in wrappers], wrappers):
        hooks = [module.register_forward_hook(lambda *given: given[2] + 0.1) for module in hooked]
        found.append(ours.outputs())
        for hook in hooks:
            hook.remove()
    for what, inside in found[0].items():
        for ours_of, around, without in zip(inside, found[1][what], plain[what], strict=True):
            assert apart(ours_of, around) < 1e-4 < apart(ours_of, without), what


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"]], ids=["plain", "adapted"])
def test_a_hook_of_the_head_changes_the_loss(targets):
    ours = adapted("llama", LoRA(rank=3, alpha=5.0, targets=targets))
    base, examples = ours.base, make_examples(4)
    head = base.model.get_output_embeddings()
    base.routing.active = (("a", 1.0),)
    plain, _ = own_loss_and_gradients(base.model, ours.attachments[0], examples)
    unwrapped(head).register_forward_hook(lambda module, given, logits: logits * 1.5)
    expected = own_loss_and_gradients(base.model, ours.attachments[0], examples)
    found = loss_and_gradients(base.model, base.paths, base.routing, ours.attachments[0], examples)
    assert_same(found, expected)
    assert abs(expected[0] - plain) > 0.01
