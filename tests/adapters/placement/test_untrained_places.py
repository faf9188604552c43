"""Places that no gradient reaches, and models that cannot be trained at all: found by running a
small copy, told by name."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from tests.support.tiny import tiny_tokenizer
from veneer.adapters.attach import attach
from veneer.adapters.config import DoRA, Full, LoRA
from veneer.adapters.placement.idle import places_without_gradient
from veneer.errors import ConfigError, RefusedError
from veneer.formats.adapter import manifest_for, write_adapter
from veneer.formats.loading import load_adapter
from veneer.models.frozen_base import FrozenBase
from veneer.models.starts.initial_values import begin
from veneer.plan.simulation.dry_run import dry_run
from veneer.plan.simulation.step_counts import Step
from veneer.plan.workload import synthetic_rows

_COMMON = {
    "vocab_size": 272,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
FIELDS = {
    "deepseek_v32": {
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "index_topk": 16,
        "index_n_heads": 4,
        "index_head_dim": 16,
    },
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "local"],
        "axial_pos_embds": False,
        "attention_head_size": 8,
        "feed_forward_size": 48,
        "local_attn_chunk_length": 8,
    },
    "jetmoe": {
        "num_key_value_heads": 4,
        "kv_channels": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
}


def config(family):
    return AutoConfig.for_model(family, **{**_COMMON, **FIELDS[family]})


def base(family):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config(family)).eval().requires_grad_(False)
    return FrozenBase(model, tiny_tokenizer(), source=family, name_or_path=family)


class Indexed(nn.Module):
    """Adds what it picks by `index`, whose numbers have no gradient; writes into what `mixed` gave
    it."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"index": nn.Linear(4, 3), "used": nn.Linear(4, 4)}) for _ in range(2)
        )
        self.mixed, self.unused, self.apart = (nn.Linear(4, 4) for _ in range(3))
        self.requires_grad_(False)

    def forward(self, input_ids, use_cache):
        x = self.embed(input_ids)
        for layer in self.layers:
            picked = layer["index"](x).argmax(-1, keepdim=True)
            x = x + layer["used"](x).gather(-1, picked)
        x = self.mixed(x)
        x += 1
        self.unused(x)
        with torch.no_grad():
            self.apart(x)
        return type("Output", (), {"logits": x})


def test_only_what_the_logits_follow_has_a_gradient():
    ids = torch.arange(1, 8)[None]
    assert places_without_gradient(Indexed(), ids) == {"layers.#.index", "unused", "apart"}


def test_all_linear_leaves_an_index_out_and_where_it_is_named_it_is_refused():
    fresh = base("deepseek_v32")
    made = begin(fresh, LoRA(rank=2), name="a").attachment
    assert made.layers and not any("indexer" in path for path in made.layers)
    for settings in (
        LoRA(targets=["o_proj", "wq_b"]),
        DoRA(targets=["wq_b"]),
        LoRA(targets=["o_proj"], train_modules=["k_norm"]),
    ):
        with pytest.raises(ConfigError) as caught:
            begin(fresh, settings, name="b")
        assert "2 places: no gradient" in str(caught.value.faults) and "b" not in fresh.attachments


def test_an_adapter_file_that_updates_an_index_is_loaded_as_it_acts(tmp_path):
    """Another library may have trained it for something else than the next token."""
    writer = base("deepseek_v32")
    made = attach(
        writer.model, LoRA(rank=2, targets=["wq_b"]), name="a", routing=writer.routing, head=None
    )
    write_adapter(tmp_path / "a", made, manifest_for(writer, method="lora"), model=writer.model)
    assert len(load_adapter(base("deepseek_v32"), tmp_path / "a", name="a").layers) == 2


def test_a_model_whose_backward_pass_stops_is_refused_before_anything_is_attached():
    fresh = base("reformer")
    with pytest.raises(
        RefusedError, match="ReformerModelWithLMHead cannot be trained here"
    ) as caught:
        begin(fresh, LoRA(rank=2), name="a")
    assert "backward pass stops" in caught.value.faults[0] and not fresh.attachments


@pytest.mark.parametrize("method", [LoRA(rank=2), Full()], ids=["lora", "full"])
def test_a_plan_refuses_it_too(method):
    with pytest.raises(RefusedError, match="cannot be trained here"):
        dry_run(Step(config("reformer"), torch.float32, method, synthetic_rows(1, 16)))


def test_a_model_that_looks_at_values_is_not_planned_and_what_to_do_instead_is_said():
    with pytest.raises(ConfigError, match="JetMoeForCausalLM cannot be planned") as caught:
        dry_run(Step(config("jetmoe"), torch.float32, LoRA(rank=2), synthetic_rows(1, 16)))
    assert "--steps 5" in caught.value.next_step
