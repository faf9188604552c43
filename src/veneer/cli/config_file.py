"""A run's settings from a YAML file, flags and `--set path=value`, checked all at once.

Later ones win: file, then flags, then --set. Every fault names where it stands (file and line, or
the flag) and, for an unknown key, the nearest valid one. YAML goes through `yaml.safe_load`; before
that the text is composed once, to find duplicate keys and the line of each key, and to refuse
aliases, which nobody needs here and with which a few lines grow to gigabytes.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from veneer.adapters.config import METHODS
from veneer.errors import ConfigError
from veneer.files.nesting import is_text, walk, yaml_fault
from veneer.files.settings import (
    description_at,
    explain_faults,
    field_at,
    part_models,
    setting_paths,
)
from veneer.training.config import RunConfig
from veneer.vocabulary import KeyPath

MAX_FILE_BYTES = 1_000_000

FLAGS: dict[str, KeyPath] = {
    "base": ("base",),
    "data": ("data", "train"),
    "validation": ("data", "validation"),
    "from": ("from_adapter",),
    "objective": ("objective", "name"),
    "method": ("method", "name"),
    "quantize": ("quantize",),
    "dtype": ("dtype",),
    "rank": ("method", "rank"),
    "alpha": ("method", "alpha"),
    "steps": ("steps",),
    "epochs": ("epochs",),
    "batch": ("batch",),
    "micro_batch": ("micro_batch",),
    "length": ("length",),
    "learning_rate": ("learning_rate",),
    "checkpointing": ("checkpointing",),
    "shard": ("shard",),
    "seed": ("seed",),
    "out": ("out",),
}

_YAML_FLAGS: dict[str, tuple[KeyPath, str]] = {
    "method": (("method",), "{"),
    "objective": (("objective",), "{"),
    "from": (("from_adapter",), "[{"),
}
"""Flags that also take a YAML value: the setting that the value replaces, and the characters that
such a value may begin with."""

NAMES: tuple[KeyPath, ...] = (("method", "name"), ("objective", "name"))
"""Settings that choose which other settings there are."""

PARTS = part_models(RunConfig)
"""Settings that hold settings, beside the method."""


@dataclass
class UncheckedSettings:
    """Values as they were given, and where: origins[("method", "rank")] = "run.yaml:7" or
    "--rank"."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[KeyPath, str] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def put(self, path: KeyPath, value: Any, origin: str) -> None:
        """Sets one value, making the mappings on the way; short forms (data: FILE) are opened."""
        node = self.values
        for depth, key in enumerate(path[:-1], 1):
            child = node.get(key)
            if not isinstance(child, dict):
                child = {} if child is None else _expand_short_form(path[:depth], child)
                if path[:depth] == ("method",) and path != ("method", "name"):
                    child.setdefault("name", "lora")  # --rank 8 alone: the default method's rank
                node[key] = child
            node = child
        if path in NAMES and node.get("name") not in (None, value):
            node.clear()  # settings of another method or objective mean nothing to this one
        node[path[-1]] = value
        self.origins[path] = origin

    @property
    def source(self) -> str:
        """Names the run file and the flags, for errors."""
        return f"{self.origins[()]} and the flags" if () in self.origins else "the flags"

    def origin(self, path: KeyPath) -> str:
        """Returns where the value at `path` came from, or the nearest mapping around it."""
        for depth in range(len(path), 0, -1):
            if path[:depth] in self.origins:
                return self.origins[path[:depth]]
        return self.origins.get((), "command line")


def read_run_config(
    file: str | Path | None,
    flags: Mapping[str, Any],
    sets: Sequence[str] = (),
    columns: Mapping[str, str | None] | None = None,
) -> RunConfig:
    """Returns the run that file, flags (None: not given), --set and columns (--map) describe
    together.

    Raises ConfigError with every fault of all three.
    """
    return resolve_run(read_settings(file), flags, sets, columns or {})


def resolve_run(
    settings: UncheckedSettings,
    flags: Mapping[str, Any],
    sets: Sequence[str],
    columns: Mapping[str, str | None],
) -> RunConfig:
    """Returns the run that settings of a file, flags, --set and columns describe together."""
    override(settings, flags, sets, columns)
    config, faults = validate(settings)
    if config is None or settings.faults:
        raise ConfigError(
            f"{settings.source} do not describe a run",
            settings.faults + faults,
            "`veneer explain settings` lists the settings.",
        )
    return config


def override(
    settings: UncheckedSettings,
    flags: Mapping[str, Any],
    sets: Sequence[str],
    columns: Mapping[str, str | None],
) -> None:
    """Overrides settings by flags (None: not given), then columns (--map), then --set."""
    for name in FLAGS:  # in this order: a method is named before its settings are given
        if (value := flags.get(name)) is not None:
            _put_flag(settings, name, value)
    for column, new_name in columns.items():
        settings.put(("data", "map", column), new_name, f"--map {column}={new_name}")
    for text in sets:
        _apply_set(settings, text)


def find_first_parent(text: str) -> str | None:
    """Returns the adapter that `--from` names first; None if its list is malformed, which
    read_run_config reports."""
    settings = UncheckedSettings()
    _put_flag(settings, "from", text)
    value = settings.values.get("from_adapter")
    first = next(iter(value), None) if isinstance(value, list) else value
    adapter = first.get("adapter") if isinstance(first, dict) else first
    return adapter if isinstance(adapter, str) else None


def describe_setting(path: KeyPath) -> str:
    """Returns the sentence under a field, as one line: the command line's help is written there,
    once."""
    return description_at(RunConfig, path[:1] if path in NAMES else path)


def summarize_setting(path: KeyPath) -> str:
    """Returns a flag's help: the description up to its first colon or semicolon, in lower case, and
    the default."""
    summary = re.split(r"[;:](?: |$)|\.(?: |$)", describe_setting(path))[0]
    if summary[1:2].islower():
        summary = summary[0].lower() + summary[1:]
    default = field_at(RunConfig, path).default
    plain = (
        isinstance(default, int | float | str)
        and not isinstance(default, bool)
        and path[-1] != "name"
    )
    return f"{summary}; default: {default}" if plain else summary


def read_settings(file: str | Path | None) -> UncheckedSettings:
    """Reads the values of a run file and where each stands; none without a file. Raises
    ConfigError."""
    settings = UncheckedSettings()
    if file is None:
        return settings
    file = Path(file)
    try:
        if file.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(
                f"{file} is larger than {MAX_FILE_BYTES:,} bytes: is it the run file?"
            )
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as fault:
        raise ConfigError(f"cannot read the run file {file}: {fault}") from None
    values = parse_yaml(text, str(file), settings)
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(
            f"{file} is not a mapping of settings", [], "Write one `key: value` a line."
        )
    settings.values = values
    settings.origins[()] = str(file)
    return settings


def parse_yaml(text: str, name: str, settings: UncheckedSettings) -> Any:
    """Parses YAML by safe_load; refuses duplicate keys and aliases; records the keys' lines."""
    try:
        if fault := yaml_fault(text):
            raise ConfigError(f"{name}{fault}")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is not None:
            _walk(node, (), name, settings)
        value = yaml.safe_load(text)
    except yaml.MarkedYAMLError as fault:
        where = f"{name}:{fault.problem_mark.line + 1}" if fault.problem_mark else name
        raise ConfigError(f"{where} is not YAML: {fault.problem}") from None
    except RecursionError:
        raise ConfigError(f"{name} is not YAML that can be read: it is nested too deep") from None
    except (
        yaml.YAMLError,
        ValueError,
    ) as fault:  # ValueError: 2024-13-45 looks like a date and is none
        raise ConfigError(f"{name} is not YAML that can be read: {fault}") from None
    if half := [inner for inner, _ in walk(value) if isinstance(inner, str) and not is_text(inner)]:
        raise ConfigError(
            f"{name} holds half a character in {half[0][:40]!r}: cut off in an escape"
        )
    return value


def _walk(node: yaml.Node, path: KeyPath, name: str, settings: UncheckedSettings) -> None:
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _walk(item, (*path, str(index)), name, settings)
    if isinstance(node, yaml.ScalarNode):
        _refuse_other_bases(node, name)
    if not isinstance(node, yaml.MappingNode):
        return
    first_lines: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if isinstance(key, yaml.ScalarNode):
            key_path = (*path, key.value)
            if key.value in first_lines:
                first = first_lines[key.value]
                settings.faults.append(
                    f"C313 {name}:{line} {'.'.join(key_path)!r} stands there twice, first in line"
                    f" {first}: keep one"
                )
            first_lines[key.value] = line
            settings.origins[key_path] = f"{name}:{line}"
            _walk(value, key_path, name, settings)


def _refuse_other_bases(node: yaml.ScalarNode, name: str) -> None:
    """Raises ConfigError for numbers that YAML 1.1 reads in base 8 or 60: 010 and 12:30."""
    is_number = node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
    if is_number and re.fullmatch("[-+]?0[0-7_]+|.*:.*", node.value):
        raise ConfigError(
            f"{name}:{node.start_mark.line + 1} {node.value} would be read as"
            f" {yaml.safe_load(node.value)}: write a decimal number, or a text in quotes"
        )


def _put_flag(settings: UncheckedSettings, name: str, value: Any) -> None:
    """Sets the value of one flag, which may be written in YAML where _YAML_FLAGS names the flag."""
    origin = "--" + name.replace("_", "-")
    path, openings = _YAML_FLAGS.get(name, ((), ""))
    if openings and value.lstrip()[:1] in tuple(openings):
        put_yaml(settings, path, value, origin)
    else:
        settings.put(FLAGS[name], value, origin)


def _apply_set(settings: UncheckedSettings, assignment: str) -> None:
    path, sign, text = assignment.partition("=")
    if not sign or not all(path.split(".")):
        settings.faults.append(
            f"C314 --set {assignment}: write --set path=value, for instance --set"
            " data.long_rows=drop"
        )
        return
    put_yaml(settings, tuple(path.split(".")), text, f"--set {path}")


def put_yaml(settings: UncheckedSettings, path: KeyPath, text: str, origin: str) -> None:
    """Sets the value at a path from YAML text."""
    try:
        value = parse_yaml(text, origin, UncheckedSettings())
    except ConfigError as fault:
        settings.faults.append(f"C314 {fault.headline}")
        return
    settings.put(path, value, origin)


def _expand_short_form(path: KeyPath, value: Any) -> dict[str, Any]:
    """`data: rows.jsonl` as {train: rows.jsonl}, `method: lora` as {name: lora}."""
    short_forms: dict[KeyPath, str] = {
        ("data",): "train",
        ("method",): "name",
        ("objective",): "name",
    }
    short = short_forms.get(path)
    return {short: value} if short else {}


def validate(settings: UncheckedSettings) -> tuple[RunConfig | None, list[str]]:
    """Returns the config, or every fault. Checks across fields run only where the fields are sound,
    so faulty values are taken out and the rest is checked again until nothing new is found."""
    values = copy_values(settings.values)
    faults: list[str] = []
    while True:
        try:
            config = RunConfig.model_validate(values)
        except ValidationError as error:
            new_faults = explain_faults(
                RunConfig, error, values, _names(settings.values), lambda path: repr(".".join(path))
            )
            faults += [
                f"{code} {settings.origin(path)} {message}"
                for (path, _), (code, message) in new_faults.items()
            ]
            for path, kind in new_faults:
                _remove_fault(values, path, missing=kind == "missing")
        else:
            return (None if faults else config), faults


def _remove_fault(values: dict[Any, Any], path: KeyPath, *, missing: bool) -> None:
    """Takes the faulty value out; where one is needed, puts one that passes."""
    if (
        not path
    ):  # a check across fields of the run: it has no cause without those that are optional
        required = {name for name, field in RunConfig.model_fields.items() if field.is_required()}
        for name in [name for name in values if name not in required]:
            del values[name]
        return
    node = values
    for key in path[:-1]:
        if key not in node:  # another fault has taken it out
            return
        node = node[key]
    models: dict[KeyPath, type[BaseModel]] = {
        (): RunConfig,
        **{(name,): part for name, part in PARTS.items()},
    }
    model = models.get(path[:-1])
    fields = model.model_fields if model else {}
    if missing or (path[-1] in fields and fields[path[-1]].is_required()):
        node[path[-1]] = "placeholder"
    else:
        for key in [key for key in node if str(key) == path[-1]]:
            del node[key]


def _names(values: Mapping[str, Any]) -> list[KeyPath]:
    """Returns the settings that an unknown key may mean, with those of the chosen method."""
    method = values.get("method")
    chosen = str(method.get("name") if isinstance(method, dict) else method)
    return [
        *((name,) for name in PARTS),
        ("method",),
        *list_setting_paths(chosen if chosen in METHODS else "lora"),
    ]


def list_setting_paths(method: str = "lora") -> list[KeyPath]:
    """Returns the path of every setting: the run's own, data's, those of a method, and those of
    all objectives."""
    paths: list[KeyPath] = []
    for name in RunConfig.model_fields:
        models: dict[str, type[BaseModel]] = {**PARTS, "method": METHODS[method]}
        if name == "objective":
            paths += [path for path in setting_paths(RunConfig) if path[0] == name]
            continue
        inner = models.get(name)
        paths += [(name, below) for below in inner.model_fields] if inner else [(name,)]
    return paths


def copy_values(value: Any) -> Any:
    """Copies mappings and lists of settings."""
    if isinstance(value, dict):
        return {key: copy_values(item) for key, item in value.items()}
    return [copy_values(item) for item in value] if isinstance(value, list) else value
