"""Every field of every config that changes what transformers computes;
tests/bases/test_config_fields.py holds a sample."""

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.soak.counts import chosen
from tests.support.models.config_fields import small_family, sweep


@pytest.mark.parametrize(
    "name", chosen(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), "config_fields", ci=0)
)
def test_every_field_that_changes_what_transformers_computes_changes_it_here_alike(name, tmp_path):
    try:
        small_family(name)
    except Exception as reason:  # tests/families/declared.py says why
        pytest.skip(str(reason))
    assert sweep(name, tmp_path).faults == []
