"""What is wrong with a body: pydantic's errors in our words, each with the path of its field."""

import difflib
from collections.abc import Iterable
from itertools import islice

from pydantic import ValidationError
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError

from veneer.serve.limits import MOST_FAULTS
from veneer.serve.refusals import MOST_SHOWN, Fault, Refusal, brief, refuse

Location = tuple[int | str, ...]
"""The path of a fault in the body, such as ("messages", 0, "role")."""
_MESSAGES = {
    "string_type": "{value} is not text",
    "bool_type": "{value} is not true or false",
    "list_type": "{value} is not a list",
    "dict_type": "{value} is not an object",
    "literal_error": "{value} is not {expected}",
    "string_too_short": "it has {length:,} characters: at least {min_length:,}",
    "string_too_long": "it has {length:,} characters: at most {max_length:,}",
    "string_unicode": "it holds half a character, cut off in an escape",
    "missing": "is missing",
}
"""By the types of pydantic's errors."""


def invalid(faults: Iterable[tuple[Location, str]]) -> ValidationError:
    """Makes an error that pydantic adds to those of the other fields."""
    return ValidationError.from_exception_data(
        "body",
        [
            InitErrorDetails(
                type=PydanticCustomError("fault", "{what}", {"what": what}), loc=place, input=None
            )
            for place, what in faults
        ],
    )


def known_faults(error: ValidationError) -> list[tuple[Location, str]]:
    """Describes the first MOST_FAULTS faults, and one more to show that there are more."""
    details = islice(error.errors(include_url=False), MOST_FAULTS + 1)
    return [(detail["loc"], _describe(detail)) for detail in details]


def _describe(detail: ErrorDetails) -> str:
    if detail["type"] == "fault":
        return detail["msg"]
    value = detail["input"]
    length = len(value) if isinstance(value, str) else 0
    message = _MESSAGES[detail["type"]]
    return message.format(value=brief(value), length=length, **detail.get("ctx", {}))


def refusal_for(error: ValidationError) -> Refusal:
    """Makes a 400 of the first MOST_FAULTS faults."""
    return refuse([Fault(_path(place), what) for place, what in known_faults(error)])


def _path(place: Location) -> str:
    """Writes a path as messages[0].role."""
    path = ""
    for step in place:
        if isinstance(step, int):
            path += f"[{step}]"
        elif step != "[key]":  # pydantic's word for an object's key
            path += f".{brief(step, quoted=False)}"
    return path.removeprefix(".")


def unknown_field(name: str, fields: Iterable[str]) -> tuple[Location, str]:
    """Describes a field that the request does not have, with the name that was probably meant."""
    near = difflib.get_close_matches(name, fields, n=1) if len(name) <= MOST_SHOWN else []
    hint = f" Did you mean {near[0]}?" if near else ""
    return (brief(name, quoted=False),), f"is not a field of this request.{hint}"
