"""adapter_config.json: what changes the arithmetic is refused by name, what PEFT leaves out has its
defaults."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from veneer.errors import CorruptFileError, RefusedError, SourceError, UnsafeFileError, VeneerError
from veneer.files.strict_json import read_json
from veneer.formats.peft.config import CONFIG_NAME, PeftLoRA, config_json, config_text
from veneer.formats.peft.low_rank import LowRankFile
from veneer.formats.registry import format_of_file

MINIMAL = {"peft_type": "LORA", "target_modules": ["q_proj"]}


def read_file(path: Path) -> tuple[PeftLoRA, list[str]]:
    stored = read_json(path)
    file, ignored = format_of_file(path, stored).read(path, stored)
    assert isinstance(file, LowRankFile)
    return file.fields, ignored


@pytest.fixture
def read(tmp_path):
    def read_fields(fields: dict[str, object] | str):
        text = fields if isinstance(fields, str) else json.dumps(fields)
        (tmp_path / CONFIG_NAME).write_text(text)
        return read_file(tmp_path / CONFIG_NAME)

    return read_fields


def test_missing_fields_take_peft_s_defaults(read):
    config, ignored = read(MINIMAL)
    assert (config.r, config.lora_alpha, config.use_rslora, config.bias) == (8, 8, False, "none")
    assert ignored == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_qalora", True),
        ("layer_replication", [[0, 4], [2, 5]]),
        ("kasa_config", {"beta": 0.1}),
        ("arrow_config", {"top_k": 2}),
        ("use_bdlora", {"nblocks": 2}),
        ("monteclora_config", {"num_samples": 8}),
        ("megatron_config", {"x": 1}),
        ("ensure_weight_tying", True),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_16"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "lora_ga"),
        ("init_lora_weights", "a new one"),
        ("task_type", "SEQ_CLS"),
        ("a_field_of_the_future", True),
    ],
)
def test_what_changes_the_arithmetic_is_refused_by_name(read, field, value):
    with pytest.raises(RefusedError) as caught:
        read({**MINIMAL, field: value})
    assert any(fault.startswith(field) for fault in caught.value.faults)


def test_an_activation_needs_tokens(read):
    config, _ = read({**MINIMAL, "alora_invocation_tokens": [1, 2]})
    assert config.alora_invocation_tokens == [1, 2]
    for wrong in ([], [-1], ["a"], [2**31]):
        with pytest.raises(CorruptFileError):
            read({**MINIMAL, "alora_invocation_tokens": wrong})


def test_all_refusals_are_told_at_once(read):
    with pytest.raises(RefusedError) as caught:
        read({**MINIMAL, "use_qalora": True, "init_lora_weights": "pissa", "new": 1})
    assert len(caught.value.faults) == 3


def test_a_changed_base_is_explained_with_the_way_out(read):
    with pytest.raises(RefusedError, match="path_initial_model_for_weight_conversion"):
        read({**MINIMAL, "init_lora_weights": "pissa"})


def test_fields_without_effect_are_accepted_and_unknown_ones_that_are_off_are_told(read):
    inert = {
        "inference_mode": False,
        "peft_version": "0.9",
        "auto_mapping": {"a": 1},
        "loftq_config": {"x": 1},
        "velora_config": {"x": 1},
        "megatron_core": "megatron.core",
        "qalora_group_size": 16,
        "init_lora_weights": "gaussian",
        "task_type": None,
        "layers_pattern": None,
        "enable_lora": None,
        "merge_weights": False,
    }
    _, ignored = read({**MINIMAL, **inert})
    assert ignored == ["enable_lora", "merge_weights"]


@pytest.mark.parametrize("kind", ["IA3", "ADALORA", "P_TUNING", "VERA", "lora"])
def test_another_method_is_refused_by_its_name(read, kind):
    with pytest.raises(RefusedError, match=f"{kind} is not supported yet"):
        read({**MINIMAL, "peft_type": kind})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"peft_type": "LORA", "lora_alpha": NaN}', "NaN"),
        ('{"peft_type": "LORA", "r": 4, "r": 8}', "duplicate"),
        ('{"r": 4}', "no peft_type"),
        ('{"peft_type": 3}', "no peft_type"),
        ("[]", "a JSON list"),
    ],
)
def test_text_that_is_no_configuration_is_refused(read, text, words):
    with pytest.raises(CorruptFileError, match=words):
        read(text)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"r": 10**9}, "r"),
        ({"r": 0}, "r"),
        ({"r": "8"}, "r"),
        ({"r": 8.5}, "r"),
        ({"r": True}, "r"),
        ({"lora_alpha": -1}, "lora_alpha"),
        ({"lora_alpha": "16"}, "lora_alpha"),
        ({"lora_dropout": 1.5}, "lora_dropout"),
        ({"bias": "some"}, "bias"),
        ({"target_modules": [1]}, "target_modules"),
        ({"target_modules": []}, "target_modules"),
        ({"target_modules": [""]}, "target_modules"),
        ({"modules_to_save": [""]}, "modules_to_save"),
        ({"target_parameters": "x"}, "target_parameters"),
        ({"rank_pattern": {"q": 10**9}}, "rank_pattern"),
        ({"rank_pattern": {"q": 0}}, "rank_pattern"),
        ({"alpha_pattern": {"q": 0}}, "alpha_pattern"),
        ({"alpha_pattern": [1]}, "alpha_pattern"),
        ({"target_modules": [f"m{i}" for i in range(10_001)]}, "target_modules"),
    ],
)
def test_a_field_of_a_wrong_kind_is_named(read, fields, named):
    with pytest.raises(CorruptFileError) as caught:
        read({**MINIMAL, **fields})
    assert any(fault.startswith(named) for fault in caught.value.faults)


@pytest.mark.parametrize(
    "pattern", ["((", "[", "x" * 5000, "a{1,4000}", r"(a)\1", "(?<=a)b", "(?!a)b|c"]
)
@pytest.mark.parametrize(
    "field", ["target_modules", "exclude_modules", "rank_pattern", "layers_pattern"]
)
def test_an_expression_that_is_none_or_cannot_be_matched_in_linear_time_is_not_run(
    read, field, pattern
):
    value: object = {pattern: 4} if field == "rank_pattern" else pattern
    with pytest.raises(UnsafeFileError, match="regular expressions"):
        read({**MINIMAL, field: value})


def test_thousands_of_names_are_read_and_thousands_of_expressions_are_not(read):
    names = {rf"^model\.layers\.{n}\.up": 4 for n in range(5000)}
    assert len(read({**MINIMAL, "rank_pattern": names})[0].rank_pattern) == 5000
    with pytest.raises(UnsafeFileError, match="there are 501 of them"):
        read({**MINIMAL, "rank_pattern": {f".*{n}": 4 for n in range(501)}})


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.(q|v)_proj",
        r"model\.layers\.(0|1[0-9])\.self_attn\.[qk]_proj",
        r"^(?!.*vision).*(?:q_proj|v_proj)$",
        r"(?i).*Q_PROJ",
        "(a+)+$",
        r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|up_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:mlp)\.up)",
    ],
)
def test_the_expressions_people_use_are_run(read, pattern):
    assert read({**MINIMAL, "target_modules": pattern})[0].target_modules == pattern


def test_a_missing_file_is_an_error_of_the_input(tmp_path):
    with pytest.raises(SourceError):
        read_file(tmp_path / CONFIG_NAME)


def test_what_is_written_is_read_back_and_does_not_depend_on_order_of_creation(read):
    one = PeftLoRA(r=4, lora_alpha=7.5, rank_pattern={"^a": 1, "^b": 2}, target_modules=["q_proj"])
    other = PeftLoRA(
        target_modules=["q_proj"], rank_pattern={"^b": 2, "^a": 1}, lora_alpha=7.5, r=4
    )
    text = config_text(config_json(one))
    assert text == config_text(config_json(other))
    found = read(text)[0]
    assert config_json(found) == config_json(one)
    assert '"lora_alpha": 7.5' in text and '"lora_alpha": 16,' in config_text(
        config_json(PeftLoRA(lora_alpha=16.0, target_modules=["q"]))
    )


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4)
    ),
    max_leaves=8,
)
FIELDS = sorted(
    {
        *PeftLoRA.model_fields,
        "use_dora",
        "init_lora_weights",
        "task_type",
        "peft_type",
        "peft_version",
    }
)


@settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(fields=st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=8), JSON, max_size=6))
def test_whatever_stands_in_the_file_the_answer_is_settings_or_a_typed_error(read, fields):
    try:
        config, _ = read({**MINIMAL, **fields})
    except VeneerError:
        return
    assert 1 <= config.r <= 4096 and config.lora_alpha > 0
