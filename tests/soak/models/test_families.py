"""The whole table of families: none in `make test`, where tests/families/test_families.py holds a
sample."""

import pytest
import torch

from tests.families.measure import measure
from tests.families.models import IDS, family_base, names
from tests.families.page import PAGE, rows_of
from tests.soak.counts import chosen
from tests.support.helpers import fill, make_examples
from tests.support.models.routed import batch_loss
from veneer.adapters.config import LoRA
from veneer.adapters.placement.acting import TokenKeys
from veneer.models.checkpointing import checkpointed
from veneer.models.starts.initial_values import begin
from veneer.models.step import batch_of, parts_of

pytest.importorskip("peft")


@pytest.mark.parametrize("name", chosen(names(), "families", ci=0))
def test_every_family_agrees_with_transformers_and_peft_or_says_why_not(name):
    found = measure(name)
    assert not found.wrong
    assert rows_of(PAGE.read_text()).get(name) == found.row, (
        f"python -m tests.families '{name}' writes it anew"
    )


HYBRIDS = {
    "bamba": "mamba.in_proj",
    "falcon_h1": "mamba.in_proj",
    "granitemoehybrid": "mamba.in_proj",
    "jamba": "mamba.in_proj",
    "lfm2": "conv.in_proj",
    "mamba2": "mixer.in_proj",
    "minimax": "self_attn.qkv_proj",
    "nemotron_h": "mixer.in_proj",
    "qwen3_5": "linear_attn.in_proj_qkv",
    "qwen3_next": "linear_attn.in_proj_qkvz",
}
"""Family -> a projection of its layers that carry a state from token to token."""


@pytest.mark.parametrize("name", chosen(list(HYBRIDS), "hybrids", ci=0))
def test_layers_with_a_state_are_adapted_and_checkpointing_changes_no_bit_of_them(name):
    base = family_base(name)
    dropout = 0.0 if name == "nemotron_h" else 0.2  # refused there: beside experts without a gate
    made = begin(base, LoRA(rank=3, dropout=dropout), name="a").attachment
    own = [path for path in made.layers if path.endswith(HYBRIDS[name])]
    assert own and not base.paths.packed
    fill(made.parameters().values())
    base.routing.active = (("a", 1.0),)
    examples = make_examples(3, vocab=IDS)

    def run(on):
        for parameter in made.parameters().values():
            parameter.requires_grad_(True).grad = None
        loss = torch.zeros(())
        with checkpointed(base.model, base.routing, on=on):
            for part in parts_of(base, examples, [[0, 1, 2]]):
                batch = batch_of(base, examples, part, share_prompt=False)
                with base.routing.drawing(TokenKeys(batch.dropout_rows, 3)):
                    found = batch_loss(base, batch, total=7.0)
                    found.backward()
                loss = loss + found.detach()
        return loss, {name: p.grad.clone() for name, p in made.parameters().items()}

    (kept, gradients), (again, same) = run(False), run(True)
    assert torch.equal(kept, again) and all(
        torch.equal(gradients[key], same[key]) for key in gradients
    )
    assert all(gradients[f"{path}.{factor}"].any() for path in own for factor in "AB")
