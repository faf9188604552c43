"""Mixers that pass a state from token to token: their facts, and the proof of their steps."""

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from tests.families.models import DENSE_HYBRID, family_base
from tests.support.tiny import tiny_model, tiny_tokenizer
from veneer.decoding.proof import decodes_packed
from veneer.execution import decode_step
from veneer.execution.agreement import difference
from veneer.execution.decode_step import forward_by_layers, own_forward
from veneer.execution.facts.decoder_layer import find_layers
from veneer.execution.facts.layer_facts import DeltaRule, ShortConvolution, StateSpace
from veneer.execution.facts.mixer_facts import find_mixer
from veneer.execution.proofs.steps import read_and_continued
from veneer.execution.states import state_layers
from veneer.kernels.decoding import state_step
from veneer.models.frozen_base import FrozenBase

MIXERS = {
    "lfm2": (ShortConvolution, "window"),
    "bamba": (StateSpace, "space"),
    DENSE_HYBRID: (StateSpace, "space"),
    "qwen3_5_text": (DeltaRule, "delta"),
}


ODD = {
    "vocab_size": 400,
    "hidden_size": 40,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 24,
    "num_experts": 0,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 20,
    "pad_token_id": 0,
}


@pytest.mark.parametrize("family", MIXERS)
def test_layers_with_a_mixer_are_understood(family):
    base = family_base(family)
    assert decodes_packed(base)
    layers = find_layers(base.model)
    assert [layer.unknown for layer in layers] == [None] * len(layers)
    mixers = [layer.mixer for layer in layers if layer.attention is None]
    assert mixers and all(type(mixer) is MIXERS[family][0] for mixer in mixers)
    assert all((layer.mixer is None) != (layer.attention is None) for layer in layers)
    assert all(layer.feed_forward is not None for layer in layers)


@pytest.mark.parametrize("family", MIXERS)
def test_a_step_that_gives_other_values_is_not_taken(family, monkeypatch):
    base, name = family_base(family), MIXERS[family][1]
    assert decodes_packed(base) and not isinstance(forward_by_layers(base.model), str)
    right = getattr(state_step, name)
    wrong = lambda *given, **named: right(*given, **named).roll(1, -1)  # noqa: E731
    monkeypatch.setattr(state_step, name, wrong)
    monkeypatch.setattr(decode_step, "structure_proof", lambda *given: given[-1]())
    assert "its parts called one by one" in forward_by_layers(base.model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("family", "heads"), [("qwen3_5_text", (3, 9)), ("qwen3_next", (1, 3))])
def test_delta_rules_and_gated_attention_of_odd_sizes_are_those_of_the_model(family, heads, dtype):
    keys, values = heads
    config = CONFIG_MAPPING[family](linear_num_key_heads=keys, linear_num_value_heads=values, **ODD)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    base = FrozenBase(model, tiny_tokenizer(), family, family)
    assert decodes_packed(base) and all(layer.unknown is None for layer in find_layers(model))
    forward, states = forward_by_layers(model), state_layers(model)
    assert not isinstance(forward, str)
    for texts in (
        [[7, 9, 4, 3]],
        [[number + 3, *range(9, 12 + number % 5)] for number in range(16)],
    ):
        ours = read_and_continued(forward.logits, texts, states)
        expected = read_and_continued(own_forward(model), texts, states)
        assert difference(ours, expected) < {torch.float32: 1e-5, torch.bfloat16: 0.03}[dtype]


@torch.no_grad()
def test_other_modules_are_no_mixers():
    model = family_base(DENSE_HYBRID).model
    own = next(module for module in model.modules() if find_mixer(module) is not None)
    assert find_mixer(model) is None and find_mixer(own.in_proj) is None
    own.activation = "gelu"
    assert find_mixer(own) is None
    own.activation, own.n_groups = "silu", own.n_groups + 1
    assert find_mixer(own) is None


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen3_5_text", "qwen3_next", "olmo_hybrid"])
def test_a_delta_rule_of_other_parts_is_no_mixer(family):
    model = family_base(family).model
    own = next(module for module in model.modules() if find_mixer(module) is not None)
    facts = find_mixer(own)
    assert facts.by_group == (family == "qwen3_next")
    own.num_v_heads += own.num_k_heads
    assert find_mixer(own) is None
    own.num_v_heads -= own.num_k_heads
    own.activation = "gelu"
    assert find_mixer(own) is None
    own.activation, own.beside = "silu", torch.nn.Linear(2, 2)
    assert find_mixer(own) is None
    del own.beside
    assert find_mixer(own) == facts


def test_a_gated_norm_of_groups_is_not_taken_for_one_of_whole_rows():
    model = family_base(DENSE_HYBRID).model
    own = next(module for module in model.modules() if find_mixer(module) is not None)
    own.norm.group_size //= 2
    assert find_mixer(own) is None


def test_blocks_with_an_activation_that_is_no_module_are_tried():
    layer = find_layers(family_base("lfm2").model)[0]
    assert layer.feed_forward.inputs == ("w1", "w3") and layer.feed_forward.output == "w2"
    assert all(layer.mixer is None for layer in find_layers(tiny_model("llama")))
