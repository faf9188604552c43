"""Settings that a person writes: what every model of them has, and what is wrong with them in
words.

No torch here: `--help` reads this. A setting has a path: ("method", "rank") is the rank of the
run's method.
"""

from collections.abc import Callable, Mapping, Sequence
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, Union, cast, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from veneer.errors import ConfigError
from veneer.files.strict_json import illegible
from veneer.vocabulary import CHOICES_ELSEWHERE, NOT_NEEDED, KeyPath, nearest, nearest_word

Place = tuple[KeyPath, str]
"""Where a fault is, and of which kind: a field of two types fails once for each, and that is one
fault."""


if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
else:
    ModelMetaclass = type(BaseModel)  # pydantic keeps its name to itself


class _Told(ModelMetaclass):
    """What somebody makes in Python is refused in our words; within other settings pydantic goes on
    gathering."""

    def __call__(cls, *values: Any, **settings: Any) -> Any:  # noqa: N805  # a class is its self
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
            raise refused(model, fault, settings) from None


class Settings(BaseModel, metaclass=_Told):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """These settings; ConfigError with a line for each that is wrong."""
        try:
            return cls.model_validate(values)
        except ValidationError as fault:
            raise refused(cls, fault, values) from None

    @field_validator("*")
    @classmethod
    def _legible(cls, value: Any, info: ValidationInfo) -> Any:
        """What a run's files could not hold, or not give back, is refused before there is a run."""
        said = value.model_dump() if isinstance(value, BaseModel) else value
        if faults := illegible(said, info.field_name or ""):
            raise ValueError(f"{'; '.join(faults)} holds a NUL or is not UTF-8: give another name")
        return value


def refused(
    model: type[BaseModel], fault: ValidationError, values: Mapping[str, Any]
) -> ConfigError:
    """What settings that were given in Python are refused with."""

    def in_python(path: KeyPath) -> str:
        """rank; method=LoRA(rank=...); data={'long_rows': ...}"""
        if len(path) == 1:
            return repr(path[0])
        variants = [each for each in parts(model)[path[0]] if path[1] in each.model_fields]
        several = len(parts(model)[path[0]]) > 1
        inner = f"{variants[0].__name__}({path[1]}=...)" if several else f"{{{path[1]!r}: ...}}"
        return f"{path[0]}={inner}"

    ours = [*((name,) for name in parts(model)), *paths(model)]
    found = faults_of(model, fault, values, ours, in_python)
    return ConfigError(
        f"{model.__name__}: these settings are not right",
        [" ".join(each) for each in found.values()],
    )


def parts(model: type[BaseModel]) -> dict[str, list[type[BaseModel]]]:
    """The fields that hold settings of their own, each with what it may hold."""
    found = {name: _models(field.annotation) for name, field in model.model_fields.items()}
    return {name: models for name, models in found.items() if models}


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) not in (Union, UnionType, Annotated, list):
        return []
    return [model for inner in get_args(annotation) for model in _models(inner)]


def paths(model: type[BaseModel]) -> list[KeyPath]:
    """The path of every setting. Where a field may hold several, the first that has a name stands
    for them."""
    inner = parts(model)
    found: dict[KeyPath, None] = {}
    for name in model.model_fields:
        below: list[KeyPath] = [
            (name, each) for part in inner.get(name, []) for each in part.model_fields
        ]
        found.update(dict.fromkeys(below or [(name,)]))
    return list(found)


def fields_below(model: type[BaseModel], around: KeyPath) -> list[str]:
    """Names of the settings that a field's settings, or those of a list's items, may have."""
    models = [model]
    for name in around:
        models = [part for each in models for part in parts(each).get(name, [])]
    return sorted({name for each in models for name in each.model_fields})


def field_at(model: type[BaseModel], path: KeyPath) -> FieldInfo:
    """The field of a path; of several that a field may hold, of the first that has it."""
    *around, name = path
    for part in around:
        model = next(each for each in parts(model)[part] if name in each.model_fields)
    return model.model_fields[name]


def words_at(model: type[BaseModel], path: KeyPath) -> tuple[str, ...]:
    """The words that a field takes, where it takes words of a list."""
    return _words(field_at(model, path).annotation)


def _words(annotation: Any) -> tuple[str, ...]:
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return tuple(word for inner in get_args(annotation) for word in _words(inner))


def described(model: type[BaseModel], path: KeyPath) -> str:
    """The sentence under a field, as one line."""
    description = field_at(model, path).description
    assert description, f"{path} has no docstring"
    return " ".join(description.split())


def faults_of(
    model: type[BaseModel],
    fault: ValidationError,
    values: Mapping[str, Any],
    ours: Sequence[KeyPath],
    written: Callable[[KeyPath], str],
) -> dict[Place, tuple[str, str]]:
    """Where each fault is -> (its code, what is wrong). ours: names that may have been meant;
    written: as they are."""
    by_place: dict[Place, list[ErrorDetails]] = {}
    for detail in fault.errors(include_url=False):
        kind = detail["type"]
        known = kind in ("extra_forbidden", "missing", "value_error", "union_tag_not_found")
        by_place.setdefault((_place(detail, values), kind if known else ""), []).append(detail)
    return {
        place: _said(model, details, place[0], ours, written) for place, details in by_place.items()
    }


def _place(detail: ErrorDetails, values: Mapping[str, Any]) -> KeyPath:
    """The place of an error in the values, without the types and tags that pydantic tried on the
    way."""
    node: Any = values
    path: list[str] = []
    for each in map(str, detail["loc"]):
        if not isinstance(node, Mapping):
            break
        keys = [key for key in node if str(key) == each]
        if keys:
            path.append(each)
            node = node[keys[0]]
        elif detail["type"] == "missing" and each == str(detail["loc"][-1]):
            path.append(each)
    return tuple(path)


def _within_list(rest: Sequence[int | str]) -> list[str]:
    """Of the rest of a place what lies in a list: which of its items, and where in that."""
    begin = next((i for i, each in enumerate(rest) if isinstance(each, int)), len(rest))
    return [str(each) for each in rest[begin:]]


def _said(
    model: type[BaseModel],
    details: Sequence[ErrorDetails],
    path: KeyPath,
    ours: Sequence[KeyPath],
    written: Callable[[KeyPath], str],
) -> tuple[str, str]:
    detail = details[0]
    within_list = _within_list(detail["loc"][len(path) :])
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
        told = (
            f": {described(model, path)}" if len(path) <= 2 else ""
        )  # what lies deeper is a set's
        return "C311", f"{name!r} is missing{told}"
    if kind == "union_tag_not_found":
        tags = [each.model_fields["name"].default for each in parts(model)[path[-1]]]
        return "C311", f"'{name}.name' is missing: {' or '.join(tags)}"
    if kind == "value_error":
        return "C315", str(context["error"])
    if kind == "union_tag_invalid":
        tags = context["expected_tags"].replace("'", "")
        near = nearest_word(context["tag"], tags.split(", "), CHOICES_ELSEWHERE)
        guess = f": did you mean {near}?" if near else ""
        return "C310", f"{name} is {context['tag']!r}, not one of {tags}{guess}"
    given = repr(detail["input"])
    given = given if len(given) <= 60 else given[:59] + "…"
    if kind == "literal_error":
        near = (
            nearest_word(str(detail["input"]), words_at(model, path), CHOICES_ELSEWHERE)
            if path
            else None
        )
        guess = f": did you mean {near!r}?" if near else ""
        return "C310", f"{name} is {given}, not one of {context['expected']}{guess}"
    first, *others = dict.fromkeys(_wrong(each) for each in details)
    wrong = " or ".join([first, *(each.removeprefix("should be ") for each in others)])
    return "C310", f"{name} is {given}: {wrong}"


def _hint(
    model: type[BaseModel],
    path: KeyPath,
    ours: Sequence[KeyPath],
    written: Callable[[KeyPath], str],
    value: object,
) -> str:
    """What to do about an unknown key."""
    around = path[:-1]
    if path[-1] in NOT_NEEDED:
        return f": leave it out ({NOT_NEEDED[path[-1]]})"
    if (meant := nearest(path, ours, value)) is not None:
        return f": did you mean {repr(meant[-1]) if meant[:-1] == around else written(meant)}?"
    here = sorted(each[-1] for each in ours if each[:-1] == around) or fields_below(model, around)
    return f": there is {', '.join(here)}" if 0 < len(here) <= MAX_LISTED else ""


MAX_LISTED = 12
"""Settings that an error lists; where there are more, `--help` does."""
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
"""Kinds of pydantic's errors -> the type that was expected, in the words of YAML."""


def _wrong(detail: ErrorDetails) -> str:
    if detail["type"] == "invalid_key":
        return "its keys should be text"
    expected = EXPECTED.get(detail["type"])
    return detail["msg"].removeprefix("Input ") if expected is None else f"should be {expected}"
