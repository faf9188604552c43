"""Mixers that pass a state from token to token: their facts, and the proof of their steps."""

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from tests.families.models import DENSE_HYBRID, SCALED_HYBRID, family_base
from tests.support.tiny import tiny_model, tiny_tokenizer
from veneer.decoding.proof import decodes_packed
from veneer.execution import decode_step
from veneer.execution.agreement import difference
from veneer.execution.attention import packed_states
from veneer.execution.decode_step import forward_by_layers, own_forward
from veneer.execution.facts.decoder_layer import find_layers
from veneer.execution.facts.layer_facts import DeltaRule, ShortConvolution, StateSpace
from veneer.execution.facts.mixer_facts import find_mixer
from veneer.execution.proofs.steps import read_and_continued
from veneer.execution.states import state_layers
from veneer.execution.train_parts import FusedAttention, FusedGate
from veneer.execution.train_step import fused, replacements
from veneer.kernels.decoding import state_step
from veneer.kernels.layout import BatchLayout
from veneer.models.frozen_base import FrozenBase

MIXERS = {
    "lfm2": (ShortConvolution, "window"),
    "bamba": (StateSpace, "space"),
    DENSE_HYBRID: (StateSpace, "space"),
    "qwen3_5_text": (DeltaRule, "delta"),
    "falcon_h1": (StateSpace, "space"),
    SCALED_HYBRID: (StateSpace, "space"),
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
PARALLEL = "falcon_h1", SCALED_HYBRID
"""Families with attention and a mixer in each layer."""


def switched(family):
    """Returns a base whose attention takes packed rows."""
    base = family_base(family)
    assert decodes_packed(base)
    return base


ODD_HEADS = [("qwen3_5_text", (3, 9)), ("qwen3_next", (1, 3)), ("olmo_hybrid", (3, 3))]
"""Key and value heads of delta rules."""


@pytest.mark.parametrize("family", MIXERS)
def test_layers_with_a_mixer_are_understood(family):
    layers = find_layers(switched(family).model)
    assert [layer.unknown for layer in layers] == [None] * len(layers)
    mixers = [layer.mixer for layer in layers if layer.mixer is not None]
    assert mixers and all(type(mixer) is MIXERS[family][0] for mixer in mixers)
    both = [layer.mixer is not None and layer.attention is not None for layer in layers]
    assert both == [family in PARALLEL] * len(layers)
    assert all(layer.feed_forward is not None for layer in layers)


@pytest.mark.parametrize("family", MIXERS)
def test_a_step_that_gives_other_values_is_not_taken(family, monkeypatch):
    base, name = switched(family), MIXERS[family][1]
    assert not isinstance(forward_by_layers(base.model), str)
    right = getattr(state_step, name)
    wrong = lambda *given, **named: right(*given, **named).roll(1, -1)  # noqa: E731
    monkeypatch.setattr(state_step, name, wrong)
    monkeypatch.setattr(decode_step, "structure_proof", lambda *given: given[-1]())
    assert "its parts called one by one" in forward_by_layers(base.model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("family", "heads"), ODD_HEADS)
def test_delta_rules_and_gated_attention_of_odd_sizes_are_those_of_the_model(family, heads, dtype):
    keys, values = heads
    config = CONFIG_MAPPING[family](linear_num_key_heads=keys, linear_num_value_heads=values, **ODD)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    base = FrozenBase(model, tiny_tokenizer(), family, family)
    assert decodes_packed(base) and all(layer.unknown is None for layer in find_layers(model))
    forward, states = forward_by_layers(model), state_layers(model)
    assert not isinstance(forward, str), forward
    for texts in (
        [[7, 9, 4, 3]],
        [[number + 3, *range(9, 12 + number % 5)] for number in range(16)],
    ):
        ours = read_and_continued(forward.logits, texts, states)
        expected = read_and_continued(own_forward(model), texts, states)
        assert difference(ours, expected) < {torch.float32: 1e-5, torch.bfloat16: 0.03}[dtype]


def test_multipliers_of_a_layer_are_facts():
    for layer in find_layers(switched(SCALED_HYBRID).model):
        assert layer.scales == (1.2, 0.8, 0.6) and layer.attention.key_scale == 0.6
        block = layer.feed_forward
        assert (block.gate_scale, block.scale) == (0.7, 0.4) and block.has_scales
        assert layer.mixer.in_scale == 1.3 and layer.mixer.factors == "mup_vector"
        assert layer.mixer.norm is None and layer.mixer.gate_first


def test_parts_with_multipliers_train_as_their_own_code_does():
    model = switched(SCALED_HYBRID).model
    table = model.get_input_embeddings().weight.requires_grad_(True)
    ids, layout = torch.arange(3, 26)[None], BatchLayout.of(4, [9, 10], torch.device("cpu"))
    positions = torch.cat([torch.arange(4), torch.arange(4, 13), torch.arange(4, 14)])[None]

    def states_and_gradient():
        states, _ = packed_states(model, ids, positions, layout)
        weights = torch.randn(states.shape, generator=torch.Generator().manual_seed(0))
        return states, *torch.autograd.grad((states * weights).sum(), table)

    plain, stand_ins = states_and_gradient(), replacements(model)
    assert {FusedAttention, FusedGate} <= set(map(type, stand_ins.values()))
    with fused(model, stand_ins):
        torch.testing.assert_close(states_and_gradient(), plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("part", ["layer", "attention", "feed_forward"])
def test_a_multiplier_of_another_name_is_seen_by_what_the_part_computes(part):
    """What is not known by its name changes what the part gives, so that no facts agree."""
    base = switched("falcon_h1")
    layer = base.model.model.layers[0]
    holder = {"layer": layer, "attention": layer.self_attn, "feed_forward": layer.feed_forward}
    own = holder[part]

    class Doubled(type(own)):
        def forward(self, *given, **named):
            first, *others = x if isinstance(x := super().forward(*given, **named), tuple) else (x,)
            return (first * 2, *others) if part != "feed_forward" else first * 2

    own.__class__ = Doubled
    facts, other = find_layers(base.model)
    assert other.unknown is None
    assert facts.feed_forward is None if part == "feed_forward" else facts.unknown is not None


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
