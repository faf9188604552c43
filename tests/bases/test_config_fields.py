"""A sample of the fields of configs that change what is computed.

tests/soak/models/test_config_fields.py changes them all."""

import pytest

import veneer
from tests.support.models.config_fields import changed_values, small_family, sweep
from veneer.bases.identity.config_fields import computing_fields

SAMPLE = {
    "gemma2": ("final_logit_softcapping", "query_pre_attn_scalar"),
    "granite": ("logits_scaling", "residual_multiplier"),
    "llama": ("rms_norm_eps", "rope_parameters.rope_type"),
    "roberta": ("pad_token_id",),
    "xglm": ("pad_token_id",),
}


@pytest.mark.parametrize("name", SAMPLE)
def test_a_field_that_changes_what_transformers_computes_changes_it_here_alike(name, tmp_path):
    found = sweep(name, tmp_path, SAMPLE[name])
    assert sorted([*found.computed, *found.refused]) == sorted(SAMPLE[name])
    assert found.faults == []


@pytest.mark.parametrize("name", ["dots3_note_text", "gemma4_text"])
def test_fields_that_single_layers_have_otherwise_belong_to_what_is_computed(name):
    model = small_family(name)
    paths = {path for part in computing_fields(model).values() for path in part}
    assert any(path.startswith("per_layer_config.") for path in paths)


def test_a_field_that_is_ignored_is_a_fault(tmp_path, monkeypatch):
    """The comparison itself: of a base whose norms have the epsilon that they had before."""
    load = veneer.load

    def as_before(source, **settings):
        base = load(source, **settings)
        for module in base.model.modules():
            if hasattr(module, "variance_epsilon"):
                module.variance_epsilon = 1e-6
        return base

    monkeypatch.setattr(veneer, "load", as_before)
    faults = sweep("llama", tmp_path, ("rms_norm_eps",)).faults
    assert any("logits differ" in fault for fault in faults) and any(
        "in training" in fault for fault in faults
    )


@pytest.mark.parametrize("value", [True, 3, 0.5, "silu", "default", [1.0, 2.0], [3, 4]])
def test_other_values_are_other_values(value):
    assert changed_values("field", value) and value not in changed_values("field", value)
