"""Mixers that pass a state from token to token: their facts, and the proof of their steps."""

import pytest
import torch

from tests.families.models import DENSE_HYBRID, family_base
from tests.support.tiny import tiny_model
from veneer.decoding.proof import decodes_packed
from veneer.execution import decode_step
from veneer.execution.decode_step import forward_by_layers
from veneer.execution.facts.decoder_layer import find_layers
from veneer.execution.facts.layer_facts import ShortConvolution, StateSpace
from veneer.execution.facts.mixer_facts import find_mixer
from veneer.kernels.decoding import state_step

MIXERS = {
    "lfm2": (ShortConvolution, "window"),
    "bamba": (StateSpace, "space"),
    DENSE_HYBRID: (StateSpace, "space"),
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


@torch.no_grad()
def test_other_modules_are_no_mixers():
    model = family_base(DENSE_HYBRID).model
    own = next(module for module in model.modules() if find_mixer(module) is not None)
    assert find_mixer(model) is None and find_mixer(own.in_proj) is None
    own.activation = "gelu"
    assert find_mixer(own) is None
    own.activation, own.n_groups = "silu", own.n_groups + 1
    assert find_mixer(own) is None


def test_a_gated_norm_of_groups_is_not_taken_for_one_of_whole_rows():
    model = family_base(DENSE_HYBRID).model
    own = next(module for module in model.modules() if find_mixer(module) is not None)
    own.norm.group_size //= 2
    assert find_mixer(own) is None


def test_blocks_with_an_activation_that_is_no_module_are_tried():
    layer = find_layers(family_base("lfm2").model)[0]
    assert layer.feed_forward.inputs == ("w1", "w3") and layer.feed_forward.output == "w2"
    assert all(layer.mixer is None for layer in find_layers(tiny_model("llama")))
