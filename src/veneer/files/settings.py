"""Defines strict settings models, and explains their faults in plain words.

Imports no torch, because `--help` reads it. A setting has a path: ("method", "rank") is the rank of
the run's method.
"""

from collections.abc import Callable, Mapping, Sequence
from types import UnionType
from typing import Annotated, Any, Literal, Self, Union, cast, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from veneer.errors import ConfigError
from veneer.files.strict_json import illegible
from veneer.private.pydantic import ModelMetaclass
from veneer.vocabulary import CHOICES_ELSEWHERE, NOT_NEEDED, KeyPath, nearest, nearest_word

FaultKey = tuple[KeyPath, str]
"""Path and kind of a fault: a field of two types fails once for each, which is one fault."""


class _SettingsMeta(ModelMetaclass):
    """Reports faults of settings made in Python in plain words; nested settings let pydantic
    collect them."""

    def __call__(cls, *values: Any, **settings: Any) -> Any:  # noqa: N805  # a metaclass
        model = cast(type[BaseModel], cls)
        if values:
            step = (
                "For instance"
                f" {cls.__name__}"
                f"({next(name for name in model.model_fields if name != 'name')}=...)."
            )
            raise ConfigError(f"{cls.__name__} takes its settings by name", next_step=step)
        try:
            return super().__call__(**settings)
        except ValidationError as fault:
            raise settings_error(model, fault, settings) from None


class StrictSettings(BaseModel, metaclass=_SettingsMeta):
    """Immutable settings without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Makes these settings. Raises ConfigError with a line for each fault."""
        try:
            return cls.model_validate(values)
        except ValidationError as fault:
            raise settings_error(cls, fault, values) from None

    @field_validator("*")
    @classmethod
    def _refuse_illegible(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuses texts that a run's files could not store."""
        plain = value.model_dump() if isinstance(value, BaseModel) else value
        if faults := illegible(plain, info.field_name or ""):
            raise ValueError(
                f"{'; '.join(faults)} holds a NUL or is not UTF-8: choose another name"
            )
        return value


def settings_error(
    model: type[BaseModel], fault: ValidationError, values: Mapping[str, Any]
) -> ConfigError:
    """Makes the error for faulty settings that were given in Python."""

    def in_python(path: KeyPath) -> str:
        """rank; method=LoRA(rank=...); data={'long_rows': ...}"""
        if len(path) == 1:
            return repr(path[0])
        variants = [kind for kind in nested_models(model)[path[0]] if path[1] in kind.model_fields]
        several = len(nested_models(model)[path[0]]) > 1
        inner = f"{variants[0].__name__}({path[1]}=...)" if several else f"{{{path[1]!r}: ...}}"
        return f"{path[0]}={inner}"

    ours = [*((name,) for name in nested_models(model)), *setting_paths(model)]
    faults = explain_faults(model, fault, values, ours, in_python)
    return ConfigError(
        f"{model.__name__}: these settings are invalid",
        [" ".join(entry) for entry in faults.values()],
    )


def nested_models(model: type[BaseModel]) -> dict[str, list[type[BaseModel]]]:
    """Returns the fields that hold nested settings, each with the models it may hold."""
    models_by_field = {
        name: _models(field.annotation) for name, field in model.model_fields.items()
    }
    return {name: models for name, models in models_by_field.items() if models}


def part_models(model: type[BaseModel]) -> dict[str, type[BaseModel]]:
    """Returns the fields that always hold settings of the same model, with that model."""
    annotations = {name: field.annotation for name, field in model.model_fields.items()}
    return {
        name: annotation
        for name, annotation in annotations.items()
        if isinstance(annotation, type) and issubclass(annotation, BaseModel)
    }


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) not in (Union, UnionType, Annotated, list):
        return []
    return [model for inner in get_args(annotation) for model in _models(inner)]


def setting_paths(model: type[BaseModel]) -> list[KeyPath]:
    """Returns the path of every setting. A field of several models lists each name once."""
    inner = nested_models(model)
    all_paths: dict[KeyPath, None] = {}
    for name in model.model_fields:
        nested_paths: list[KeyPath] = [
            (name, field) for part in inner.get(name, []) for field in part.model_fields
        ]
        all_paths.update(dict.fromkeys(nested_paths or [(name,)]))
    return list(all_paths)


def fields_below(model: type[BaseModel], parent: KeyPath) -> list[str]:
    """Returns the names of the settings that a nested field, or the items of a list, may have."""
    models = [model]
    for name in parent:
        models = [child for current in models for child in nested_models(current).get(name, [])]
    return sorted({name for current in models for name in current.model_fields})


def field_at(model: type[BaseModel], path: KeyPath) -> FieldInfo:
    """Returns the field of a path; of several nested models, the first that has it."""
    *parents, name = path
    for parent in parents:
        model = next(
            candidate
            for candidate in nested_models(model)[parent]
            if name in candidate.model_fields
        )
    return model.model_fields[name]


def words_at(model: type[BaseModel], path: KeyPath) -> tuple[str, ...]:
    """Returns the words of a field that takes a choice of words."""
    return _words(field_at(model, path).annotation)


def _words(annotation: Any) -> tuple[str, ...]:
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return tuple(word for inner in get_args(annotation) for word in _words(inner))


def description_at(model: type[BaseModel], path: KeyPath) -> str:
    """Returns the description of a field, as one line."""
    description = field_at(model, path).description
    assert description, f"{path} has no docstring"
    return " ".join(description.split())


def explain_faults(
    model: type[BaseModel],
    fault: ValidationError,
    values: Mapping[str, Any],
    ours: Sequence[KeyPath],
    written: Callable[[KeyPath], str],
) -> dict[FaultKey, tuple[str, str]]:
    """Maps each faulty path and kind to (its code, what is wrong).

    ours: names that may have been meant; written: formats a path as the user writes it
    """
    by_place: dict[FaultKey, list[ErrorDetails]] = {}
    for detail in fault.errors(include_url=False):
        kind = detail["type"]
        known = kind in ("extra_forbidden", "missing", "value_error", "union_tag_not_found")
        by_place.setdefault((_path_of_error(detail, values), kind if known else ""), []).append(
            detail
        )
    return {
        key: _explain_fault(model, details, key[0], ours, written)
        for key, details in by_place.items()
    }


def _path_of_error(detail: ErrorDetails, values: Mapping[str, Any]) -> KeyPath:
    """Returns the path of an error in the values, without pydantic's types and tags."""
    node = values
    path: list[str] = []
    for segment in map(str, detail["loc"]):
        if not isinstance(node, Mapping):
            break
        keys = [key for key in node if str(key) == segment]
        if keys:
            path.append(segment)
            node = node[keys[0]]
        elif detail["type"] == "missing" and segment == str(detail["loc"][-1]):
            path.append(segment)
    return tuple(path)


def _list_position(rest: Sequence[int | str]) -> list[str]:
    """Returns the part of a location that lies in a list: the item's number and what follows."""
    first = next((i for i, entry in enumerate(rest) if isinstance(entry, int)), len(rest))
    return [str(entry) for entry in rest[first:]]


def _explain_fault(
    model: type[BaseModel],
    details: Sequence[ErrorDetails],
    path: KeyPath,
    ours: Sequence[KeyPath],
    written: Callable[[KeyPath], str],
) -> tuple[str, str]:
    detail = details[0]
    within_list = _list_position(detail["loc"][len(path) :])
    name = ".".join(
        [*path, *([] if within_list[-1:] == [*path[-1:]] else within_list)]
    )  # one set, without its list
    kind, context, last = (
        detail["type"],
        detail.get("ctx", {}),
        str(detail["loc"][-1]) if detail["loc"] else "",
    )
    if kind in ("extra_forbidden", "missing") and path[-1:] != (last,):  # in a list
        within, unknown = name.removesuffix(f".{last}"), kind == "extra_forbidden"
        if unknown:
            return (
                "C312",
                f"{within}: unknown key {last!r}: there is {', '.join(fields_below(model, path))}",
            )
        return "C311", f"{within}: {last!r} is missing"
    if kind == "extra_forbidden":
        around = ".".join(path[:-1])
        hint = _hint(model, path, ours, written, detail["input"])
        return "C312", f"unknown key {path[-1]!r}{f' in {around}' if around else ''}{hint}"
    if kind == "missing":
        description = (
            f": {description_at(model, path)}" if len(path) <= 2 else ""
        )  # deeper paths belong to data sets
        return "C311", f"{name!r} is missing{description}"
    if kind == "union_tag_not_found":
        tags = [
            detail_of_type.model_fields["name"].default
            for detail_of_type in nested_models(model)[path[-1]]
        ]
        return "C311", f"'{name}.name' is missing: {' or '.join(tags)}"
    if kind == "value_error":
        return "C315", str(context["error"])
    if kind == "union_tag_invalid":
        tags = context["expected_tags"].replace("'", "")
        suggestion = nearest_word(context["tag"], tags.split(", "), CHOICES_ELSEWHERE)
        guess = f": did you mean {suggestion}?" if suggestion else ""
        return "C310", f"{name} is {context['tag']!r}, not one of {tags}{guess}"
    shown_value = repr(detail["input"])
    shown_value = shown_value if len(shown_value) <= 60 else shown_value[:59] + "…"
    if kind == "literal_error":
        suggestion = (
            nearest_word(str(detail["input"]), words_at(model, path), CHOICES_ELSEWHERE)
            if path
            else None
        )
        guess = f": did you mean {suggestion!r}?" if suggestion else ""
        return "C310", f"{name} is {shown_value}, not one of {context['expected']}{guess}"
    first, *others = dict.fromkeys(_expectation(detail_of_type) for detail_of_type in details)
    wrong = " or ".join(
        [first, *(detail_of_type.removeprefix("should be ") for detail_of_type in others)]
    )
    return "C310", f"{name} is {shown_value}: {wrong}"


def _hint(
    model: type[BaseModel],
    path: KeyPath,
    ours: Sequence[KeyPath],
    written: Callable[[KeyPath], str],
    value: object,
) -> str:
    """Suggests what to do about an unknown key."""
    parent = path[:-1]
    if path[-1] in NOT_NEEDED:
        return f": remove it ({NOT_NEEDED[path[-1]]})"
    if (meant := nearest(path, ours, value)) is not None:
        if meant == path[-1:]:
            return ": it stands at the top level"
        return f": did you mean {repr(meant[-1]) if meant[:-1] == parent else written(meant)}?"
    siblings = sorted(
        known_path[-1] for known_path in ours if known_path[:-1] == parent
    ) or fields_below(model, parent)
    return f": there is {', '.join(siblings)}" if 0 < len(siblings) <= MAX_LISTED else ""


MAX_LISTED = 12
"""Most settings that an error lists; `--help` lists more."""
EXPECTED = {
    "string_type": "text",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping of settings",
    "model_attributes_type": "a mapping of settings",
    "union_tag_not_found": "a mapping of settings with a name",
}
"""Kind of pydantic's error -> the expected type, in the words of YAML."""


def _expectation(detail: ErrorDetails) -> str:
    if detail["type"] == "invalid_key":
        return "its keys should be text"
    expected = EXPECTED.get(detail["type"])
    return detail["msg"].removeprefix("Input ") if expected is None else f"should be {expected}"
