"""Patterns that come with a file: what Python's engine says of them, and an answer to every one of
them."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.adapter_files import adapted, edit_config, write
from tests.support.tiny import tiny_model
from veneer.adapters.attach import attach, detach
from veneer.adapters.config import LoRA
from veneer.adapters.placement.routing import Routing
from veneer.cli.main import main
from veneer.errors import ConfigError
from veneer.patterns import FirstMatch, PatternError, first_match, pattern

PATHS = [
    "q_proj",
    "v_proj",
    "lm_head",
    "a.b",
    "model.norm",
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.self_attn.v_proj",
    "model.layers.10.mlp.up_proj",
    "model.layers.10.mlp.experts.down_proj",
    "vision.layers.0.q_proj",
]
SOURCES = [
    "q_proj",
    "proj",
    "_proj",
    "self_attn",
    ".*_proj",
    "q_proj|v_proj",
    "model.layers.0.self_attn.q_proj",
    "(a|b)",
    "^model.layers.0.self_attn.q_proj",
    "^a|b",
    "[qk]_proj",
    r"layers\.\d+\..*",
    r".*\.0\..*",
    "(?i)LM_head",
    "b$|q_proj",
    r"^(?!.*vision).*[qv]_proj",
    r"^(?!.*vision)(?=.*\.0\.)(?:.*q_proj|.*v_proj)$",
    "(?i)^(?!VISION).*proj",
    "(?!vision).*proj",
    r".*\.(?P<name>q|v)_proj",
    r"model\.layers\.(?:0|1\d)\..*?\.(?:q|up)_proj",
]
ENDLESS = [
    ".?" * 40 + "!",
    "(a+)+!",
    "(a|a)*!",
    "(.*)*!",
    "(?:a|b|ab)*c",
    "(x+x+)+y",
    "(?!(a+)+!).*",
]


@pytest.mark.parametrize("source", SOURCES)
def test_a_pattern_means_what_python_s_engine_says_of_whole_paths_and_of_their_ends(source):
    found = pattern(source)
    assert [found.full(path) for path in PATHS] == [
        re.fullmatch(source, path) is not None for path in PATHS
    ]
    if source.startswith(
        ("(?i)", "(?!")
    ):  # within brackets Python takes no flags, and a lookahead elsewhere
        return
    ends = [re.match(rf"(.*\.)?({source})$", path) is not None for path in PATHS]
    assert [found.ends(path) for path in PATHS] == ends


@pytest.mark.parametrize("source", ENDLESS)
def test_no_pattern_takes_for_ever(source):
    for path in ("a" * 4000, "x" * 4000):
        assert not pattern(source).full(path + "?") or source.startswith("(?!")
        if not source.startswith("(?!"):
            assert not pattern(source).ends(path + "?")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("(", "missing )"),
        ("a)|(b", "unexpected )"),
        ("*", "repetition"),
        (r"(a)\1", r"\\1"),
        ("(?<=a)b", "perl operator"),
        ("a(?=b)", "perl operator"),
        ("a{1,4000}", "repetition size"),
        ("((a{90}){90}){90}", "repetition size"),
        ("(?!a", "not closed"),
        ("^(?!a)b|c", "choices"),
    ],
)
def test_what_cannot_be_matched_in_linear_time_is_refused_with_the_reason(source, said, capfd):
    with pytest.raises(PatternError, match=re.escape(said).replace(r"\\\\1", r"\\\\1")):
        pattern(source)
    with pytest.raises(ConfigError):
        LoRA(targets=source)
    assert capfd.readouterr() == ("", "")


def test_a_lookahead_that_says_not_from_where_is_refused_in_rank_and_alpha_patterns():
    for field in ("rank_pattern", "alpha_pattern"):
        with pytest.raises(ConfigError, match=r"write \^"):
            LoRA(**{field: {"(?!a)b": 3}})
        LoRA(**{field: {"^(?!a)b": 3}})


@given(
    st.dictionaries(
        st.sampled_from(
            [*SOURCES[:13], *map(re.escape, PATHS), *(f"^{re.escape(p)}" for p in PATHS)]
        ),
        st.integers(1, 99),
    )
)
def test_the_first_pattern_in_the_file_s_order_wins_whether_it_is_a_name_or_not(patterns):
    for path in PATHS:
        expected = next((v for s, v in patterns.items() if re.match(rf"(.*\.)?({s})$", path)), 8)
        assert FirstMatch(patterns).of(path, 8) == first_match(patterns, path, 8) == expected


def test_a_stranger_s_endless_patterns_hold_up_no_command(tmp_path, capsys):
    base, attachment = adapted(rank_pattern={}, train_modules=[])
    folder = write(tmp_path / "a", base, attachment).path
    (folder / "veneer.json").unlink()
    edit_config(folder, rank_pattern=dict.fromkeys(ENDLESS[:-1], 3), exclude_modules=ENDLESS[0])
    assert main(["adapters", "show", str(folder)]) == 0
    assert "rank 4" in capsys.readouterr().out


def test_flags_within_a_pattern_have_a_meaning_or_are_an_error_and_never_a_traceback():
    model = tiny_model("llama")
    for targets, count in (
        ("(?i).*Q_PROJ", 2),
        (".*(?i)Q_PROJ", 2),
        ("(?i)q_proj", 0),
        (["(?i)q_proj"], 0),
    ):
        settings = LoRA(targets=targets, alpha_pattern={"(?i)Q_proj": 3.0})
        routing = Routing()
        if count:
            made = attach(model, settings, name="a", routing=routing, head=None)
            assert len(made.layers) == count and {
                layer.alpha for layer in made.layers.values()
            } == {3.0}
            detach(model, "a", routing=routing)
        else:
            with pytest.raises(ConfigError, match="nearest: q_proj"):
                attach(model, settings, name="a", routing=routing, head=None)
