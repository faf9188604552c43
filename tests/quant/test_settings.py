"""What a run file may say about weight formats: qlora is a short form, and full fine-tuning takes
none."""

import pytest

from veneer.bases.loading.builders import builder_for
from veneer.cli.config_file import read_run_config
from veneer.errors import ConfigError
from veneer.quant.config import DENSE, FORMATS, weight_format
from veneer.training.config import RunConfig

NEEDED = {"base": "b", "data": "rows.jsonl", "out": "out"}


@pytest.mark.parametrize("method", ["qlora", {"name": "qlora", "rank": 4}])
def test_qlora_is_lora_over_nf4(method):
    config = RunConfig(**NEEDED, method=method)
    assert config.method.name == "lora"
    assert config.quantize == "nf4"
    assert config.method.rank == (4 if isinstance(method, dict) else 16)


def test_qlora_keeps_the_format_that_is_named_beside_it():
    assert read_run_config(None, NEEDED | {"method": "qlora", "quantize": "fp4"}).quantize == "fp4"
    assert read_run_config(None, NEEDED | {"method": "qlora", "rank": "3"}).method.rank == 3


def test_a_method_whose_name_is_no_text_is_refused(tmp_path):
    (tmp_path / "run.yaml").write_text("method: {name: [qlora]}")
    with pytest.raises(ConfigError, match="method"):
        read_run_config(tmp_path / "run.yaml", NEEDED)


def test_full_fine_tuning_of_packed_weights_is_refused():
    with pytest.raises(ConfigError) as caught:
        read_run_config(None, NEEDED | {"method": "full", "quantize": "nf4"})
    assert "weights held as nf4 cannot train" in str(caught.value)


def test_an_unknown_format_is_refused_before_anything_is_read():
    with pytest.raises(ConfigError, match="int3"):
        builder_for("int3")


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_has_a_builder_and_keeps_what_it_declares(name):
    declared = weight_format(name)
    assert builder_for(name) is not None
    if declared.keeps_dense:
        assert builder_for(name, ["lm_head"]) is not None
    else:
        with pytest.raises(ConfigError, match="keep_dense does not work"):
            builder_for(name, ["lm_head"])


def test_what_no_format_declares_a_dense_base_is():
    assert weight_format(None) == DENSE
    assert builder_for(None) is None
