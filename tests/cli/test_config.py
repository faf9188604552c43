"""A run's settings from a file, flags and --set: what reaches RunConfig, and what is refused
how."""

import argparse
import re
from functools import partial
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from veneer import train
from veneer.adapters.config import METHODS, Bottleneck, Full, LoRA
from veneer.cli.config_file import (
    FLAGS,
    describe_setting,
    find_first_parent,
    list_setting_paths,
    read_run_config,
)
from veneer.cli.main import Parser, command_module, main
from veneer.errors import ConfigError
from veneer.objectives.config import OBJECTIVES, TeacherBase
from veneer.training.config import DataConfig, RunConfig, StartFrom
from veneer.vocabulary import FLAGS_ELSEWHERE, KNOWN_ELSEWHERE

NEEDED = {"base": "b", "data": "d.jsonl", "out": "o"}

# A value other than the default for every setting: a new field fails the test until it has a row.
OTHER_VALUES = {
    "base": "other",
    "data.train": "other.jsonl",
    "data.validation": "v.jsonl",
    "data.validation_share": 0.2,
    "data.tokens": "files",
    "data.format": "chat",
    "data.train_on": "last",
    "data.shares_of": "tokens",
    "data.map": {"question": "prompt"},
    "data.long_rows": "drop",
    "replay.rows": "texts.jsonl",
    "replay.weight": 0.5,
    "replay.batch": 3,
    "template.variables": {"enable_thinking": False},
    "method.activation": "<answer>",
    "method.lr_ratio": 4.0,
    "method.init": "olora",
    "method.lora_bias": True,
    "method.svd_iterations": 16,
    "method.name": "full",
    "objective.name": "dpo",
    "objective.beta": 0.2,
    "objective.label_smoothing": 0.3,
    "objective.sft_weight": 0.4,
    "objective.per_token": True,
    "objective.good_weight": 0.6,
    "objective.bad_weight": 0.7,
    "objective.weight": 0.8,
    "objective.divergence": "reverse",
    "objective.teacher_share": 0.2,
    "objective.temperature": 2.0,
    "objective.system": "Be brief.",
    "objective.document": "handbook.md",
    "objective.tools": "tools.json",
    "objective.teacher": TeacherBase(base="larger", quantize="nf4"),
    "objective.own_answers": 0.5,
    "objective.answer_tokens": 64,
    "objective.content": "0a",
    "objective.kind": "labels",
    "objective.labels": ["a", "b"],
    "objective.class_weights": {"a": 2.0},
    "objective.balanced": True,
    "objective.thresholds": {"a": 0.3},
    "from_adapter": [StartFrom(adapter="tickets")],
    "new_tokens": ["<order>"],
    "quantize": "nf4",
    "keep_dense": ["k_proj"],
    "method.rank": 3,
    "method.alpha": 5.0,
    "method.dropout": 0.1,
    "method.rslora": True,
    "method.targets": ["q_proj"],
    "method.exclude": ["k_proj"],
    "method.layers": [0, 2],
    "method.rank_pattern": {"q_proj": 2},
    "method.alpha_pattern": {"q_proj": 2.0},
    "method.bias": "all",
    "method.train_modules": ["lm_head"],
    "dtype": "float32",
    "device": "cpu",
    "steps": 7,
    "epochs": 2.0,
    "batch": 3,
    "micro_batch": 2,
    "length": 99,
    "order": "file",
    "share_prompt": False,
    "learning_rate": 2e-4,
    "schedule": "cosine",
    "warmup": 0.1,
    "weight_decay": 0.01,
    "clip": 0.5,
    "checkpointing": True,
    "offload": True,
    "reduce": "exact",
    "shard": True,
    "optimizer": "adamw8bit",
    "evaluate_every": 4,
    "save_every": 5,
    "show_answers": False,
    "keep": 3,
    "patience": 2,
    "seed": 9,
    "log": ["wandb"],
    "out": "other",
}

WRITTEN = {"from_adapter": "tickets", "objective.teacher": {"base": "larger", "quantize": "nf4"}}
"""What a person writes, where it is short for more."""


def faults_of(tmp_path, text: str, flags=(), sets=()) -> list[str]:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_run_config(file, dict(flags), sets)
    return [
        fault.replace(str(file), "run.yaml") for fault in caught.value.faults or [str(caught.value)]
    ]


def at(config: BaseModel, path: str) -> object:
    value: object = config
    for name in path.split("."):
        value = getattr(value, name)
    return value


def needed(path: str) -> dict[str, str]:
    """The settings that a run needs; for a setting of an objective, an objective that has it."""
    name = path.removeprefix("objective.")
    if name in (path, "name"):
        return NEEDED
    return NEEDED | {"objective": next(o for o, k in OBJECTIVES.items() if name in k.model_fields)}


def test_the_table_of_other_values_has_a_row_for_every_setting():
    assert sorted(OTHER_VALUES) == sorted(".".join(path) for path in list_setting_paths())


@pytest.mark.parametrize("path", OTHER_VALUES)
def test_every_setting_changes_under_set(path):
    value = OTHER_VALUES[path]
    before = read_run_config(None, needed(path))
    written = yaml.safe_dump(WRITTEN.get(path, value), default_flow_style=True)
    after = read_run_config(None, needed(path), [f"{path}={written}"])
    assert at(after, path) == value != at(before, path)
    if not path.endswith(".name"):  # another method is another class: all under it changes
        kind = type(after.objective).model_fields
        others = [
            other
            for other in OTHER_VALUES
            if other != path
            if not other.startswith("objective.") or other.split(".")[1] in kind
        ]
        assert [at(after, other) for other in others] == [at(before, other) for other in others]


@pytest.mark.parametrize("flag", FLAGS)
def test_every_flag_reaches_its_setting(flag):
    path = ".".join(FLAGS[flag])
    value = OTHER_VALUES[path]
    config = read_run_config(
        None, NEEDED | {flag: value if isinstance(value, bool) else WRITTEN.get(path, str(value))}
    )
    assert at(config, path) == value


def test_flags_win_over_the_file_and_set_over_both(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("base: b\ndata: d\nout: o\nbatch: 1\nseed: 1\nlength: 10\n")
    config = read_run_config(file, {"batch": "2", "seed": "2"}, ["seed=3"])
    assert (config.length, config.batch, config.seed) == (10, 2, 3)


def test_short_forms_in_a_file_are_opened_by_flags(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("base: b\ndata: d.jsonl\nmethod: lora\nout: o\n")
    config = read_run_config(file, {"validation": "v.jsonl", "rank": "4"})
    assert config.data == DataConfig(train="d.jsonl", validation="v.jsonl")
    assert config.method == LoRA(rank=4)


def test_adapters_to_go_on_from_are_names_or_carry_weights(tmp_path):
    (file := tmp_path / "run.yaml").write_text(
        "base: b\ndata: d\nout: o\nfrom_adapter: [tickets, {adapter: tone, weight: 0.5}]\n"
    )
    assert read_run_config(file, {}).from_adapter == [
        StartFrom(adapter="tickets"),
        StartFrom(adapter="tone", weight=0.5),
    ]


def test_the_from_flag_takes_a_list_as_its_help_says(tmp_path):
    (tmp_path / "run.yaml").write_text("base: b\ndata: d\nout: o\nfrom_adapter: old\n")
    tickets, tone = StartFrom(adapter="tickets"), StartFrom(adapter="tone", weight=0.5)
    for text, parents in (
        ('["tickets", {"adapter": "tone", "weight": 0.5}]', [tickets, tone]),
        ("[tickets, {adapter: tone, weight: 0.5}]", [tickets, tone]),
        ("{adapter: tone, weight: 0.5}", [tone]),
        ("tickets", [tickets]),
    ):
        assert find_first_parent(text) == parents[0].adapter
        for file in (None, tmp_path / "run.yaml"):
            assert read_run_config(file, {**NEEDED, "from": text}).from_adapter == parents
    for wrong, said in (
        ("[tickets", "--from"),
        ("{weight: 2}", "from_adapter.adapter"),
        ("[{adapter: a, wieght: 2}]", "wieght"),
    ):
        with pytest.raises(ConfigError) as caught:
            read_run_config(None, {**NEEDED, "from": wrong})
        assert (
            len(caught.value.faults) == 1
            and said in caught.value.faults[0]
            and "--from" in caught.value.faults[0]
        )
    assert [find_first_parent(text) for text in ("[tickets", "[]", "{weight: 2}", "[[a]]")] == [
        None
    ] * 4


def test_a_method_named_by_a_flag_replaces_the_files_method_with_its_settings(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("base: b\ndata: d\nmethod: {name: lora, rank: 4}\nout: o\n")
    assert read_run_config(file, {"method": "full"}).method == Full()
    assert read_run_config(file, {"method": "lora"}).method == LoRA(rank=4)


def test_a_method_flag_takes_the_method_with_its_settings_as_its_help_says(tmp_path):
    (tmp_path / "run.yaml").write_text("base: b\ndata: d\nout: o\nmethod: {name: dora, alpha: 3}\n")
    for file in (None, tmp_path / "run.yaml"):
        flags = {**NEEDED, "method": "{name: lora, rank: 8, targets: [q_proj]}", "alpha": "5"}
        assert read_run_config(file, flags).method == LoRA(rank=8, targets=["q_proj"], alpha=5)
    assert read_run_config(
        None, {**NEEDED, "method": "{name: bottleneck, size: 3}"}
    ).method == Bottleneck(size=3)
    qlora = read_run_config(None, {**NEEDED, "method": "{name: qlora, rank: 3}"})
    assert (qlora.method, qlora.quantize) == (LoRA(rank=3), "nf4")
    for wrong, said in (
        ("{name: lora, rank", "--method"),
        ("{name: lora, rnak: 3}", "rank"),
        ("{name: lore}", "lora"),
        ("{rank: 3}", "method.name"),
        ("{name: " * 9_000, "nested"),
    ):
        with pytest.raises(ConfigError) as caught:
            read_run_config(None, {**NEEDED, "method": wrong})
        assert (
            len(caught.value.faults) == 1
            and said in caught.value.faults[0]
            and "--method" in caught.value.faults[0]
        )


def test_a_setting_of_another_method_is_refused():
    with pytest.raises(ConfigError, match="--rank unknown key 'rank' in method"):
        read_run_config(None, NEEDED | {"method": "full", "rank": "4"})


def test_a_resolved_run_file_reads_back_as_the_same_run(tmp_path):
    file = tmp_path / "run.yaml"
    config = read_run_config(None, NEEDED, ["method.rank=3", "data.long_rows=cut"])
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert read_run_config(file, {}) == config


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("bsae: x", "run.yaml:1 unknown key 'bsae': did you mean 'base'?"),
        (
            "method: {name: lora, lora_rank: 3}",
            "run.yaml:1 unknown key 'lora_rank' in method: did you mean 'rank'?",
        ),
        ("rank: 3", "run.yaml:1 unknown key 'rank': did you mean 'method.rank'?"),
        ("lr: 3", "run.yaml:1 unknown key 'lr': did you mean 'learning_rate'?"),
        (
            "data: {new_tokens: [x]}",
            "run.yaml:1 unknown key 'new_tokens' in data: it stands at the top level",
        ),
        (
            "data: {train: a, long_row: cut}",
            "run.yaml:1 unknown key 'long_row' in data: did you mean 'long_rows'?",
        ),
        ("1: 2", "run.yaml:1 1 is"),
        (
            "seed: 1\nbatch: -1",
            "run.yaml:2 batch is -1: should be a whole number from 1 to 1,048,576",
        ),
        ("seed: 1\nseed: 2", "run.yaml:2 'seed' stands there twice, first in line 1"),
        (
            "method: lroa",
            "method is 'lroa', not one of lora, dora, bottleneck, prefix, full: did you mean lora?",
        ),
        ("method: {rank: 3}", "'method.name' is missing"),
        ("schedule: cosin", "schedule is 'cosin', not one of 'linear', 'cosine' or 'constant'"),
        ("method: {name: lora, targets: 5}", "method.targets is 5: should be text or a list"),
        ("method: {name: lora, targets: '('}", "'(' is not a supported regular expression"),
        ("steps: 3\nepochs: 3", "steps and epochs are both given"),
        ("data: {}", "'data.train' is missing"),
        ("data: {train: [{pth: a}]}", "data.train.0: unknown key 'pth'"),
        ("data: {train: a, validation: {}}", "'data.validation.path' is missing"),
        ("data: {train: a, validation: {pth: b}}", "unknown key 'pth' in data.validation"),
        (
            "data: {train: a, validation: {path: [b]}}",
            "data.validation.path is ['b']: should be text",
        ),
    ],
)
def test_a_fault_names_its_place_and_what_was_meant(text, fault, tmp_path):
    assert any(fault in each for each in faults_of(tmp_path, text)), faults_of(tmp_path, text)


@pytest.mark.parametrize(
    ("value", "read"), [("010", 8), ("-0_7", -7), ("12:30:45", 45045), ("1:30.5", 90.5)]
)
def test_numbers_that_yaml_reads_in_another_base_are_refused_wherever_they_stand(
    value, read, tmp_path
):
    fault = f"{value} would be read as {read}: write a decimal number"
    file = tmp_path / "run.yaml"
    for text in (f"steps: 3\nbatch: {value}", f"method: {{name: lora, targets: [{value}]}}"):
        file.write_text(text)
        with pytest.raises(ConfigError, match=re.escape(fault)):
            read_run_config(file, NEEDED)
    with pytest.raises(ConfigError, match=re.escape(fault)):
        read_run_config(None, NEEDED, [f"batch={value}"])


def test_numbers_in_the_usual_spellings_and_texts_in_quotes_are_read_as_they_look():
    sets = ["batch=10", "seed=0", "warmup=0.05", "steps=1_000", "learning_rate=1e-3"]
    config = read_run_config(None, NEEDED, [*sets, "new_tokens=['010', '12:30']"])
    assert (config.batch, config.seed, config.warmup, config.steps) == (10, 0, 0.05, 1000)
    assert (config.learning_rate, config.new_tokens) == (1e-3, ["010", "12:30"])


def test_all_faults_of_file_flags_and_set_come_at_once(tmp_path):
    text = (
        "bsae: b\ndata: {valdation: v}\nsteps: 3\nepochs: 2\nmethod: {name: lora, lora_rank: 2}\n"
    )
    faults = faults_of(tmp_path, text, {"batch": "many"}, ["data.format=xml", "nonsense"])
    for expected in (
        "'base' is missing",
        "unknown key 'bsae'",
        "'data.train' is missing",
        "unknown key 'valdation' in data",
        "steps and epochs are both given",  # a check across fields, though fields are wrong too
        "unknown key 'lora_rank' in method",
        "--batch batch is 'many'",
        "--set data.format data.format is 'xml'",
        "--set nonsense: write --set path=value",
        "'out' is missing",
    ):
        assert sum(expected in fault for fault in faults) == 1, (expected, faults)
    assert len(faults) == 10


def test_a_run_file_may_name_its_folder_below_home(tmp_path):
    (tmp_path / "run.yaml").write_text("base: b\ndata: d.jsonl\nout: ~/runs/a")
    config = read_run_config(tmp_path / "run.yaml", {}, [])
    assert config.out == str(Path.home() / "runs" / "a")


def test_missing_settings_are_explained_by_their_own_docstring():
    with pytest.raises(ConfigError) as caught:
        read_run_config(None, {})
    assert [
        f"C311 command line {name!r} is missing: {describe_setting((name,))}" for name in NEEDED
    ] == sorted(caught.value.faults)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: &x [1]\nbase: *x", "alias"),
        ("base: !!python/object/apply:os.getcwd []", "is not YAML"),
        ("base: [", "is not YAML"),
        ("[" * 1500 + "]" * 1500, "nested deeper than 64 levels"),
        ("[" * 20_000, "nested deeper than 64 levels"),
        ("method:" + " {name:" * 20_000, "nested deeper than 64 levels"),
        ("out: 2024-13-45", "is not YAML"),
        ('base: "\\ud83d"', "half a character"),
        ('"\\udc00\\ud83d": 1\nbase: b\ndata: d\nout: o', "half a character"),
        ("data: " + "[" * 100 + "]" * 100, "nested deeper than 64 levels"),
        ("- a\n- b", "not a mapping"),
    ],
)
def test_hostile_or_broken_yaml_is_an_error_of_the_user(text, said, tmp_path):
    assert said in faults_of(tmp_path, text)[0]


def test_a_run_file_that_is_not_there_or_far_too_large_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot read"):
        read_run_config(tmp_path / "none.yaml", {})
    (tmp_path / "large.yaml").write_text("#" * 1_000_001)
    with pytest.raises(ConfigError, match="is it the run file"):
        read_run_config(tmp_path / "large.yaml", {})


def test_names_from_other_tools_lead_to_settings_that_exist():
    valid = {".".join(path) for path in list_setting_paths()} | {"data", "method"}
    assert set(KNOWN_ELSEWHERE.values()) <= valid
    assert not set(KNOWN_ELSEWHERE) & set(RunConfig.model_fields)


@pytest.mark.parametrize("name", [*KNOWN_ELSEWHERE, *FLAGS_ELSEWHERE])
def test_a_flag_of_another_tool_is_refused_with_one_that_the_command_has(name, capsys):
    said = {}
    for command in ("train", "generate", "merge"):
        assert (
            main([command, f"--{name.replace('_', '-')}", "7", "--nothing-of-the-kind", "1"]) == 2
        )
        said[command] = capsys.readouterr().err
        assert (
            "--nothing-of-the-kind" in said[command]
            and f"See veneer {command} --help" in said[command]
        )
        meant = re.search(rf"--{name.replace('_', '-')}: did you mean (--[^ ?]+)", said[command])
        assert meant is None or meant[1] in flags_of(command)
    if name in KNOWN_ELSEWHERE:
        path = tuple(KNOWN_ELSEWHERE[name].split("."))
        path = {("data",): ("data", "train"), ("method",): ("method", "name")}.get(path, path)
        flag = {path: "--" + flag.replace("_", "-") for flag, path in FLAGS.items()}.get(path)
        assert f": did you mean {flag or '--set ' + '.'.join(path) + '=7'}?" in said["train"]


def flags_of(command: str) -> set[str]:
    parser = argparse.ArgumentParser()
    command_module(command).add_arguments(parser)
    return set(parser._option_string_actions)


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (
            "train --learning_rate 1e-3",
            "unknown flag --learning_rate: did you mean --learning-rate?",
        ),
        ("train --lora-r=8", "--lora-r: did you mean --rank?"),
        ("train --dropout=0.1", "--dropout: did you mean --set method.dropout=0.1?"),
        ("compare --lr", "--lr: did you mean --set learning_rate=...?"),
        ("generate --max-tokens 3 hello", "--max-tokens: did you mean --max-new-tokens?"),
        ("evaluate --model m", "--model: did you mean --base?"),
        ("lint --model m", "--model: did you mean --base?"),  # before what is missing too
        ("data check --model m", "--model: did you mean --base?"),
        ("adapters ls --libary d", "--libary: did you mean --library?"),
        ("plan -o p.html", "unknown flag -o"),
        ("--lr 3", "unknown flag --lr"),
    ],
)
def test_an_unknown_flag_names_the_one_that_was_meant(typed, said, capsys):
    assert main(typed.split()) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed", "flag"),
    [("generate --base b -- --lr", "--lr"), ("merge --adapter a --weights -1 -0.5 --out o", "-1")],
)
def test_what_only_looks_like_a_flag_is_none(typed, flag, capsys):
    parser = Parser()
    words = typed.split()
    command_module(words[0]).add_arguments(parser)
    found = vars(parser.parse_args(words[1:]))
    assert flag in map(str, found.values()) or [-1.0, -0.5] in found.values()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda: LoRA(r=16, dropout=3),
            ["LoRA", "'r': did you mean 'rank'?", "C310 dropout is 3: should be a number"],
        ),
        (lambda: LoRA(16), ["LoRA takes its settings by name", "LoRA(rank=...)"]),
        (lambda: Full(rank=3), ["Full", "unknown key 'rank': there is name"]),
        (
            lambda: train("b", "d", out="o", lr=1e-3, rank=8, long_rows="drop", schedule="cosin"),
            [
                "'lr': did you mean 'learning_rate'?",
                "'rank': did you mean method=LoRA(rank=...)?",
                "'long_rows': did you mean data={'long_rows': ...}?",
                "schedule is 'cosin', not one of",
            ],
        ),
        (
            lambda: RunConfig(data={"train": 3, "val": 1}),
            ["'base' is missing: Hub id", "data.train is 3", "'val' in data"],
        ),
        (
            lambda: RunConfig(**NEEDED, method={"name": "lroa"}),
            ["method is 'lroa', not one of lora, dora"],
        ),
    ],
)
def test_settings_given_in_python_are_refused_in_our_words_all_at_once(make, said):
    with pytest.raises(ConfigError) as caught:
        make()
    assert all(each in str(caught.value) for each in said), str(caught.value)
    assert "pydantic" not in str(caught.value)


WRONG = [
    None,
    3,
    -1,
    0.5,
    float("nan"),
    10**30,
    True,
    "text",
    "",
    [],
    [1],
    ["x"],
    [[]],
    [None],
    {},
    {1: 2},
]
WRONG += [
    {"path": "x.jsonl"},
    [{"path": "x.jsonl"}],
    {"name": "x"},
    {"a": {"b": 1}},
    {"train": "x.jsonl"},
]
"""A value of every kind, and settings in the forms that other settings have."""
IN_LISTS = [("data", "train", "weight"), ("from_adapter", "adapter"), ("from_adapter", "weight")]
EVERY_PATH = sorted(
    {path for method in METHODS for path in list_setting_paths(method)} | set(IN_LISTS)
)
PYDANTIC = re.compile(r"valid (string|dictionary|list|boolean)|instance of|extract fields|Error\b")


def with_value(path, value):
    run = {"base": "b", "data": {"train": "d.jsonl"}, "out": "o"}
    node = run
    for name in path[:-1]:
        node[name] = node[name] if isinstance(node.get(name), dict) else {}
        node = node[name]
    if path[0] == "objective" and len(path) == 2:
        node["name"] = next(o for o, k in OBJECTIVES.items() if path[1] in k.model_fields)
    if path[0] == "method" and len(path) == 2:
        node["name"] = next(method for method in METHODS if path in list_setting_paths(method))
    node[path[-1]] = value
    return run


@pytest.mark.parametrize(
    "path", [*((name,) for name in RunConfig.model_fields), *EVERY_PATH], ids=".".join
)
def test_a_setting_of_the_wrong_kind_is_refused_by_its_name(path, tmp_path):
    file = tmp_path / "run.yaml"
    for value in WRONG:
        run = with_value(path, value)
        file.write_text(yaml.safe_dump(run, sort_keys=False))
        for make in (partial(read_run_config, file, {}), partial(RunConfig.of, run)):
            try:
                make()
            except ConfigError as refused:
                assert refused.faults and all(re.search(r"\w", fault) for fault in refused.faults)
                assert any(name in str(refused) for name in path) and not PYDANTIC.search(
                    str(refused)
                ), str(refused)


def test_an_adapter_in_the_form_of_a_set_is_told_what_there_is(tmp_path):
    (tmp_path / "run.yaml").write_text(
        yaml.safe_dump({**NEEDED, "from_adapter": {"path": "runs/one"}})
    )
    with pytest.raises(ConfigError) as refused:
        read_run_config(tmp_path / "run.yaml", {})
    assert "unknown key 'path' in from_adapter: there is adapter, content, weight" in str(
        refused.value
    )
    assert "'from_adapter.adapter' is missing: Name in the library" in str(refused.value)
