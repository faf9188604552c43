"""Every number that a person gives has its bounds in one place, and nothing beyond them gets
through."""

import argparse
import math
import re
from collections.abc import Sequence
from typing import Annotated, Any, get_args, get_origin

import numpy as np
import pytest
import torch
from pydantic import BaseModel

from tests.support.tiny import tiny_base
from veneer.adapters.config import METHODS, LoRA, Prefix
from veneer.base import Base
from veneer.bounds import (
    COUNT,
    ENERGY,
    PART,
    SEED,
    SHARE,
    TEMPERATURE,
    WEIGHT,
    Number,
    check_numbers,
)
from veneer.cli.config_file import FLAGS, PARTS, list_setting_paths, read_run_config
from veneer.cli.main import COMMANDS, command_module, main
from veneer.errors import LONGEST_LINE, ConfigError
from veneer.formats.bottleneck import BottleneckFields
from veneer.formats.peft.config import PeftLoRA
from veneer.formats.prefix import PeftPrefix
from veneer.merge.combine.combine import Recipe
from veneer.objectives.config import OBJECTIVES
from veneer.training.config import DataConfig, RunConfig

NEEDED = {"base": "b", "data": "d.jsonl", "out": "o"}
NEVER = [
    "nan",
    ".nan",
    "inf",
    ".inf",
    "-.inf",
    "true",
    str(2**63),
    "1e308",
    "-1e308",
    "9" * 400,
    "",
    "x",
    "[1]",
]
"""No number of ours may be any of these, as YAML or as a flag."""
EDGES = ["0", "-1", "-0.0", "1e-400", "0.5", "1e30"]
"""Some numbers may be some of these: then they lie within the bounds."""


def numbers_of(annotation: object) -> list[Number]:
    """The bounds in an annotation, also of the values of lists and dicts."""
    if get_origin(annotation) is Annotated:
        return [each for each in annotation.__metadata__ if isinstance(each, Number)]
    return [number for inner in get_args(annotation) for number in numbers_of(inner)]


def plain_numbers(annotation: object) -> bool:
    """Whether an int or a float stands in an annotation without bounds."""
    if get_origin(annotation) is Annotated:
        return not numbers_of(annotation) and plain_numbers(get_args(annotation)[0])
    return annotation in (int, float) or any(plain_numbers(inner) for inner in get_args(annotation))


def hints(model: type[BaseModel]) -> dict[str, Any]:
    from typing import get_type_hints

    return {
        k: v
        for k, v in get_type_hints(model, include_extras=True).items()
        if k in model.model_fields
    }


def walked(
    parser: argparse.ArgumentParser, words: list[str]
) -> list[tuple[list[str], argparse.Action]]:
    """(words of the command, flag) of every flag, also of a command's own commands."""
    found = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                found += walked(inner, [*words, name])
        elif action.option_strings:
            found.append((words, action))
    return found


def flags_of(command: str) -> list[tuple[list[str], argparse.Action]]:
    parser = argparse.ArgumentParser()
    command_module(command).add_arguments(parser)
    return walked(parser, [command])


NUMBER_FLAGS = [
    (words, action)
    for name in COMMANDS
    for words, action in flags_of(name)
    if isinstance(action.type, Number)
]


def objective_of(path: Sequence[str]) -> dict[str, str]:
    """The first objective that has the setting, as a flag; nothing for other settings."""
    if path[0] != "objective":
        return {}
    return {"objective": next(o for o, k in OBJECTIVES.items() if path[1] in k.model_fields)}


def model_of(method: str, path: Sequence[str]) -> type[BaseModel]:
    """The settings that hold a setting."""
    if path[0] == "objective":
        return OBJECTIVES[objective_of(path)["objective"]]
    return {**PARTS, "method": METHODS[method]}.get(path[0], RunConfig)


NUMBER_SETTINGS = sorted(
    {
        ".".join(path)
        for method in METHODS
        for path in list_setting_paths(method)
        if (model := model_of(method, path)) and numbers_of(hints(model)[path[-1]])
    }
)


@pytest.mark.parametrize(
    ("number", "inside", "outside"),
    [
        (
            COUNT,
            [1, 10**9, np.int64(3)],
            [0, -1, 10**9 + 1, 1.0, 1.5, True, np.True_, "1", None, math.inf],
        ),
        (
            SHARE,
            [0, 0.0, -0.0, 0.999, np.float32(0.5)],
            [1, 1.0, -1e-9, math.nan, math.inf, False, "0.5", 1j],
        ),
        (PART, [1, 1e-12], [0, 1.0001, math.nan, -math.inf]),
        (ENERGY, [0.5], [0, 1]),
        (WEIGHT, [-1.0, 0, 1e6], [1e6 + 1, -math.inf, math.nan, 10**400]),
        (TEMPERATURE, [0, 2], [101, -0.1]),
    ],
)
def test_a_number_holds_what_lies_between_its_ends_and_no_truth_value(number, inside, outside):
    assert [value for value in inside if not number.holds(value)] == []
    assert [value for value in outside if number.holds(value)] == []


def test_lists_of_plain_ints_are_held_at_one_go():
    assert COUNT.holds_ints([3, 1, 10**9]) and TEMPERATURE.holds_ints([2, 0])
    for others in (
        [],
        [1, True],
        [1, 2.0],
        [1, "2"],
        [1, None],
        [0, 1],
        [1, 10**9 + 1],
        [np.int64(3)],
    ):
        assert not COUNT.holds_ints(others), others


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (COUNT, "a whole number from 1 to 1,000,000,000"),
        (SHARE, "a number at least 0 and below 1"),
        (PART, "a number above 0 and at most 1"),
        (WEIGHT, "a number from -1,000,000 to 1,000,000"),
    ],
)
def test_bounds_are_said_in_words(number, said):
    assert number.description == said


def test_all_numbers_of_a_call_are_told_at_once():
    with pytest.raises(ConfigError) as caught:
        check_numbers(
            seed=(SEED, -1), steps=(COUNT, True), share=(SHARE, 0.5), left_out=(COUNT, None)
        )
    assert caught.value.faults == [
        "seed is -1: should be a whole number from 0 to 4,294,967,295",
        "steps is True: should be a whole number from 1 to 1,000,000,000",
    ]


@pytest.mark.parametrize(
    "model", [RunConfig, DataConfig, *METHODS.values(), PeftLoRA, PeftPrefix, BottleneckFields]
)
def test_no_settings_and_no_file_hold_a_number_without_bounds(model):
    free = {"layers_to_transform"}  # only asked whether it holds a layer's number
    assert [
        name for name, kind in hints(model).items() if plain_numbers(kind) and name not in free
    ] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_no_flag_is_a_number_without_bounds(command):
    assert [
        action.option_strings for _, action in flags_of(command) if action.type in (int, float)
    ] == []


LISTS = ("method.layers", "method.activation")
"""Lists of numbers; an activation may be a text too."""


@pytest.mark.parametrize("path", NUMBER_SETTINGS)
@pytest.mark.parametrize("text", NEVER)
def test_a_run_file_takes_no_number_that_cannot_be_meant(path, text):
    method = next(name for name in METHODS if tuple(path.split(".")) in list_setting_paths(name))
    if "pattern" in path:
        text = f"{{q_proj: {text or 'null'}}}"
    elif path in LISTS and text != "[1]":
        text = f"[{text or 'null'}]"
    if (path in LISTS and text == "[1]") or (not text and path not in ("batch", "seed")):
        return  # the list it should be; a null: not given
    with pytest.raises(ConfigError) as caught:
        read_run_config(
            None, NEEDED | {"method": method} | objective_of(path.split(".")), [f"{path}={text}"]
        )
    (fault,) = caught.value.faults
    assert fault.startswith(f"C310 --set {path} ")
    assert re.search("should be (text or )?a", fault)


@pytest.mark.parametrize("path", NUMBER_SETTINGS)
@pytest.mark.parametrize("text", EDGES)
def test_a_run_file_takes_an_edge_only_within_the_bounds(path, text):
    method = next(name for name in METHODS if tuple(path.split(".")) in list_setting_paths(name))
    given = f"{{q_proj: {text}}}" if "pattern" in path else f"[{text}]" if path in LISTS else text
    try:
        config = read_run_config(
            None, NEEDED | {"method": method} | objective_of(path.split(".")), [f"{path}={given}"]
        )
    except ConfigError as fault:
        assert re.search("should be (text or )?a", str(fault))
        return
    value: Any = config
    for name in path.split("."):
        value = getattr(value, name)
    values = (
        list(value.values())
        if isinstance(value, dict)
        else value
        if isinstance(value, list)
        else [value]
    )
    model = model_of(method, path.split("."))
    (number,) = numbers_of(hints(model)[path.split(".")[-1]])
    assert all(number.holds(value) for value in values)


@pytest.mark.parametrize(
    "flag", [name for name, path in FLAGS.items() if ".".join(path) in NUMBER_SETTINGS]
)
def test_train_takes_the_same_numbers_as_flags(flag, capsys):
    for text in ["nan", "inf", "-1", str(2**63), "True", "1e308"]:
        code = main(
            [
                "train",
                "--base",
                "b",
                "--data",
                "d",
                "--out",
                "o",
                f"--{flag.replace('_', '-')}={text}",
            ]
        )
        assert code == 2
        assert "should be a" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "action"),
    NUMBER_FLAGS,
    ids=[f"{' '.join(w)} {a.option_strings[0]}" for w, a in NUMBER_FLAGS],
)
def test_a_flag_takes_no_number_that_cannot_be_meant(words, action, capsys):
    for text in [*NEVER, "-99999999999"]:
        assert main([*words, f"{action.option_strings[0]}={text}"]) == 2
        err = capsys.readouterr().err
        assert f"is not {action.type.description}" in err and "Traceback" not in err


@pytest.mark.parametrize("text", ["nan", "0", "-1", "inf", "1/0", "1,x", "1e308/1e-308", ""])
def test_rates_are_numbers(text, tmp_path, capsys):
    words = [
        "compare",
        "--base",
        "b",
        "--data",
        "d",
        "--methods",
        "lora,full",
        "--out",
        str(tmp_path / "o"),
    ]
    assert main([*words, f"--rates={text}"]) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("text", ["nan", "0", "-1", "inf", "9" * 400 + "GB", "1e9GB", "0.1B"])
def test_a_memory_is_a_size(text, capsys):
    assert main(["plan", "--base", "llama-3.2-1b", f"--memory={text}"]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_step_beyond_every_machine_is_not_planned(capsys):
    words = ["plan", "--base", "llama-3.2-1b", "--batch=1048576", "--length=16777216"]
    assert main(words) == 2
    assert "17,592,186,044,416 tokens" in capsys.readouterr().err


def test_python_arguments_have_the_same_bounds():
    made = tiny_base()
    base = Base(
        model=made.model,
        tokenizer=made.tokenizer,
        source="t",
        name_or_path="t",
        revision=None,
        quantize=None,
    )
    base.attach(LoRA(rank=2), name="a", seed=2**32 - 1)
    for call in (
        lambda: base.attach(LoRA(), name="b", seed=-1),
        lambda: base.attach(LoRA(), name="b", seed=True),
        lambda: base.use("a", [math.nan]),
        lambda: base.use("a", [math.inf]),
        lambda: base.merge("a", [1e30]),
        lambda: Recipe("svd", rank=0).check(),
        lambda: Recipe("dare", density=math.nan, seed=-1).check(),
    ):
        with pytest.raises(ConfigError, match="should be a"):
            call()
    assert list(base.attachments) == ["a"] and base.routing.active == ()


@pytest.mark.parametrize(
    "config", [LoRA(rank=2, init="pissa"), LoRA(rank=2, init="olora"), Prefix(tokens=2)]
)
def test_the_largest_seed_starts_every_method(config):
    made = tiny_base()
    base = Base(
        model=made.model,
        tokenizer=made.tokenizer,
        source="t",
        name_or_path="t",
        revision=None,
        quantize=None,
    )
    base.attach(config, name="a", seed=int(SEED.most))
    base.use("a")
    assert base.generate("hi", max_new_tokens=2, temperature=1.0, seed=int(SEED.most)) is not None


def test_clip_null_leaves_gradients_as_they_are():
    from tests.support.helpers import filled_lora
    from veneer.training.optimizer.buffer import FlatAdamW, FlatParameters

    def first_moment(clip):
        made = filled_lora(tiny_base())
        flat = FlatParameters(made.parameters())
        flat.gradient.fill_(3.0)
        optimizer = FlatAdamW(flat, weight_decay=0.0)
        optimizer.step(learning_rate=1e-3, clip=clip, norm=float(flat.gradient.norm()))
        return optimizer.state()["exp_avg"]

    torch.testing.assert_close(first_moment(None), torch.full_like(first_moment(None), 0.3))
    assert float(first_moment(1.0).norm()) == pytest.approx(0.1)
    assert read_run_config(None, NEEDED, ["clip=null"]).clip is None


def test_settings_made_in_python_are_refused_by_the_same_words():
    with pytest.raises(ConfigError, match="should be a whole number from 1 to 4,096"):
        LoRA(rank=True)


def test_a_line_that_a_strangers_file_makes_long_is_cut():
    said = str(ConfigError("a" * 10**6, ["b" * 10**6, "short"], "Do this."))
    assert len(said) < 3 * LONGEST_LINE and said.endswith("  short\nDo this.")
