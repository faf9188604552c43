"""A run's settings from a YAML file, flags and `--set path=value`, checked all at once.

Later ones win: file, then flags, then --set. Every fault names where it stands (file and line, or the
flag) and, for an unknown key, the nearest valid one. YAML goes through `yaml.safe_load`; before that
the text is composed once, to find duplicate keys and the line of each key, and to refuse aliases,
which nobody needs here and with which a few lines grow to gigabytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from veneer.adapters.config import METHODS
from veneer.errors import ConfigError
from veneer.files.nesting import is_text, walk, yaml_fault
from veneer.train.config import DataConfig, RunConfig, TemplateConfig

KeyPath = tuple[str, ...]  # ("method", "rank")

MAX_FILE_BYTES = 1_000_000

FLAGS: dict[str, KeyPath] = {
    "base": ("base",),
    "data": ("data", "train"),
    "validation": ("data", "validation"),
    "from": ("from_adapter",),
    "method": ("method", "name"),
    "quantize": ("quantize",),
    "rank": ("method", "rank"),
    "alpha": ("method", "alpha"),
    "steps": ("steps",),
    "epochs": ("epochs",),
    "batch": ("batch",),
    "length": ("length",),
    "learning_rate": ("learning_rate",),
    "checkpointing": ("checkpointing",),
    "shard": ("shard",),
    "seed": ("seed",),
    "out": ("out",),
}

PARTS: dict[str, type[BaseModel]] = {"data": DataConfig, "template": TemplateConfig}
"""Settings that hold settings, beside the method."""

# What other tools call our fields: closer to what was meant than the nearest spelling is.
KNOWN_ELSEWHERE = {
    "batch_size": "batch",
    "chat_template_kwargs": "template.variables",
    "enable_thinking": "template.variables",
    "adapter": "from_adapter",
    "adapter_name_or_path": "from_adapter",
    "dataset": "data",
    "gradient_checkpointing": "checkpointing",
    "iters": "steps",
    "lora_alpha": "method.alpha",
    "lora_dropout": "method.dropout",
    "lora_r": "method.rank",
    "lora_rank": "method.rank",
    "lr": "learning_rate",
    "max_grad_norm": "clip",
    "max_length": "length",
    "max_seq_length": "length",
    "max_steps": "steps",
    "model": "base",
    "model_name_or_path": "base",
    "num_train_epochs": "epochs",
    "output_dir": "out",
    "per_device_train_batch_size": "batch",
    "r": "method.rank",
    "target_modules": "method.targets",
    "warmup_ratio": "warmup",
}


@dataclass
class Settings:
    """Values as they were given, and where: origins[("method", "rank")] = "run.yaml:7" or "--rank"."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[KeyPath, str] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def put(self, path: KeyPath, value: Any, origin: str) -> None:
        """Sets one value, making the mappings on the way; short forms (data: FILE) are opened."""
        node = self.values
        for depth, key in enumerate(path[:-1], 1):
            child = node.get(key)
            if not isinstance(child, dict):
                child = {} if child is None else _opened(path[:depth], child)
                if path[:depth] == ("method",) and path != ("method", "name"):
                    child.setdefault("name", "lora")  # --rank 8 alone: the default method's rank
                node[key] = child
            node = child
        if path == ("method", "name") and node.get("name") not in (None, value):
            node.clear()  # another method: the settings of the one in the file mean nothing to it
        node[path[-1]] = value
        self.origins[path] = origin

    def origin(self, path: KeyPath) -> str:
        """Where the value at `path` came from, or the nearest mapping around it."""
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
    """The run that file, flags (None: not given), --set and columns (--map) describe together.

    Raises ConfigError with every fault of all three.
    """
    settings = Settings()
    if file is not None:
        _read_file(settings, Path(file))
    for name in FLAGS:  # in this order: a method is named before its settings are given
        if (value := flags.get(name)) is not None:
            flag = "--" + name.replace("_", "-")
            if name == "method" and value.lstrip().startswith("{"):
                _put_yaml(settings, ("method",), value, flag)  # a method with its settings, in place of the file's
            else:
                settings.put(FLAGS[name], value, flag)
    for column, to in (columns or {}).items():
        settings.put(("data", "map", column), to, f"--map {column}={to}")
    for each in sets:
        _read_set(settings, each)
    config, faults = _validated(settings)
    if config is None or settings.faults:
        where = f"{file} and the flags" if file is not None else "the flags"
        raise ConfigError(
            f"{where} do not describe a run", settings.faults + faults, "`veneer train --help` lists the settings."
        )
    return config


def field_help(path: KeyPath) -> str:
    """The sentence under a field, as one line: the command line's help is written there, once."""
    model: type[BaseModel] = RunConfig
    if path[0] in PARTS and len(path) > 1:
        model, path = PARTS[path[0]], path[1:]
    elif path[0] == "method" and len(path) > 1 and path[1] != "name":
        model, path = METHODS["lora"], path[1:]
    description = model.model_fields[path[0]].description
    assert description, f"{path} has no docstring"
    return " ".join(description.split())


def _read_file(settings: Settings, file: Path) -> None:
    try:
        if file.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(f"{file} is larger than {MAX_FILE_BYTES:,} bytes: is it the run file?")
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as fault:
        raise ConfigError(f"cannot read the run file {file}: {fault}") from None
    values = parse_yaml(text, str(file), settings)
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(f"{file} is not a mapping of settings", [], "Write one `key: value` a line.")
    settings.values = values
    settings.origins[()] = str(file)


def parse_yaml(text: str, name: str, settings: Settings) -> Any:
    """yaml.safe_load, with duplicate keys and aliases refused and the lines of the keys remembered."""
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
    except (yaml.YAMLError, ValueError) as fault:  # ValueError: 2024-13-45 looks like a date and is none
        raise ConfigError(f"{name} is not YAML that can be read: {fault}") from None
    if half := [inner for inner, _ in walk(value) if isinstance(inner, str) and not is_text(inner)]:
        raise ConfigError(f"{name} holds half a character in {half[0][:40]!r}: cut off in an escape")
    return value


def _walk(node: yaml.Node, path: KeyPath, name: str, settings: Settings) -> None:
    if isinstance(node, yaml.SequenceNode):
        for index, each in enumerate(node.value):
            _walk(each, (*path, str(index)), name, settings)
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if isinstance(key, yaml.ScalarNode):
            below = (*path, key.value)
            if key.value in seen:
                first = seen[key.value]
                settings.faults.append(
                    f"C313 {name}:{line} {'.'.join(below)!r} stands there twice, first in line {first}: keep one"
                )
            seen[key.value] = line
            settings.origins[below] = f"{name}:{line}"
            _walk(value, below, name, settings)


def _read_set(settings: Settings, each: str) -> None:
    path, sign, text = each.partition("=")
    if not sign or not all(path.split(".")):
        settings.faults.append(f"C314 --set {each}: write --set path=value, for instance --set data.long_rows=drop")
        return
    _put_yaml(settings, tuple(path.split(".")), text, f"--set {path}")


def _put_yaml(settings: Settings, path: KeyPath, text: str, origin: str) -> None:
    try:
        value = parse_yaml(text, origin, Settings())
    except ConfigError as fault:
        settings.faults.append(f"C314 {fault.headline}")
        return
    settings.put(path, value, origin)


def _opened(path: KeyPath, value: Any) -> dict[str, Any]:
    """`data: rows.jsonl` as {train: rows.jsonl}, `method: lora` as {name: lora}."""
    short_forms: dict[KeyPath, str] = {("data",): "train", ("method",): "name"}
    short = short_forms.get(path)
    return {short: value} if short else {}


def _validated(settings: Settings) -> tuple[RunConfig | None, list[str]]:
    """The config, or every fault. Checks across fields run only where the fields are sound, so faulty
    values are taken out and the rest is checked again until nothing new is found."""
    values = _copy(settings.values)
    faults: list[str] = []
    while True:
        try:
            config = RunConfig.model_validate(values)
        except ValidationError as error:
            by_place: dict[tuple[KeyPath, str], list[ErrorDetails]] = {}
            for detail in error.errors(include_url=False):
                kind = detail["type"]
                # A field of two types (a name or a list) fails once for each: that is one fault.
                known = kind in ("extra_forbidden", "missing", "value_error", "union_tag_not_found")
                by_place.setdefault((_path(detail, values), kind if known else ""), []).append(detail)
            faults += [_fault(details, path, settings) for (path, _), details in by_place.items()]
            for path, kind in by_place:
                _mend(values, path, missing=kind == "missing")
        else:
            return (None if faults else config), faults


def _path(detail: ErrorDetails, values: Mapping[str, Any]) -> KeyPath:
    """The place of an error in the values, without the types that pydantic tried on the way."""
    path = [str(each) for each in detail["loc"]]
    if len(path) > 1 and path[0] == "method" and path[1] in METHODS:
        del path[1]
    node: Any = values
    for depth, key in enumerate(path):
        if not isinstance(node, dict):
            return tuple(path[:depth])
        node = next((value for each, value in node.items() if str(each) == key), None)
    return tuple(path)


def _mend(values: dict[Any, Any], path: KeyPath, *, missing: bool) -> None:
    """Takes the faulty value out; where one is needed, puts one that passes."""
    if not path:  # a check across fields of the run: it has no cause without those that are optional
        required = {name for name, field in RunConfig.model_fields.items() if field.is_required()}
        for name in [name for name in values if name not in required]:
            del values[name]
        return
    node = values
    for key in path[:-1]:
        node = node[key]
    models: dict[KeyPath, type[BaseModel]] = {(): RunConfig, **{(name,): part for name, part in PARTS.items()}}
    model = models.get(path[:-1])
    fields = model.model_fields if model else {}
    if missing or (path[-1] in fields and fields[path[-1]].is_required()):
        node[path[-1]] = "placeholder"
    else:
        for key in [key for key in node if str(key) == path[-1]]:
            del node[key]


def _fault(details: Sequence[ErrorDetails], path: KeyPath, settings: Settings) -> str:
    detail = details[0]
    kind, name, origin = detail["type"], ".".join(path), settings.origin(path)
    if kind == "extra_forbidden":
        place = f" in {'.'.join(path[:-1])}" if len(path) > 1 else ""
        return f"C312 {origin} unknown key {path[-1]!r}{place}{_nearest(path, settings.values)}"
    if kind == "missing":
        return f"C311 {origin} {name!r} is missing: {field_help(path)}"
    if kind == "union_tag_not_found":
        return f"C311 {origin} 'method.name' is missing: {' or '.join(METHODS)}"
    context = detail.get("ctx", {})
    if kind == "value_error":
        return f"C315 {origin} {context['error']}"
    if kind == "union_tag_invalid":
        return f"C310 {origin} method is {context['tag']!r}, not one of {', '.join(METHODS)}"
    given = repr(detail["input"])
    given = given if len(given) <= 60 else given[:59] + "…"
    if kind == "literal_error":
        return f"C310 {origin} {name} is {given}, not one of {context['expected']}"
    wrong = " or ".join(each["msg"].removeprefix("Input ") for each in details)
    return f"C310 {origin} {name} is {given}: {wrong}"


def _nearest(path: KeyPath, values: Mapping[str, Any]) -> str:
    """What an unknown key was meant to be: one spelt like it here, another tool's name for one of ours,
    one of that name elsewhere, or else one that resembles it."""
    *around, key = path
    method = values.get("method")
    chosen = str(method.get("name") if isinstance(method, dict) else method)
    valid = [*((name,) for name in PARTS), ("method",), *setting_paths(chosen if chosen in METHODS else "lora")]
    here = [each[-1] for each in valid if list(each[:-1]) == around]
    elsewhere = [".".join(each) for each in valid if each[-1] == key]
    known = (
        [KNOWN_ELSEWHERE[key].removeprefix("".join(f"{each}." for each in around))] if key in KNOWN_ELSEWHERE else []
    )
    close = get_close_matches(key, here, n=1, cutoff=0.8)
    for meant in [*close, *known, *elsewhere, *get_close_matches(key, here, n=1, cutoff=0.5)]:
        return f": did you mean {meant!r}?"
    return f": there is {', '.join(sorted(here))}" if here else ""


def setting_paths(method: str = "lora") -> list[KeyPath]:
    """The path of every setting: the run's own, data's, and those of a method."""
    paths: list[KeyPath] = []
    for name in RunConfig.model_fields:
        models: dict[str, type[BaseModel]] = {**PARTS, "method": METHODS[method]}
        inner = models.get(name)
        paths += [(name, below) for below in inner.model_fields] if inner else [(name,)]
    return paths


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(each) for key, each in value.items()}
    return [_copy(each) for each in value] if isinstance(value, list) else value
