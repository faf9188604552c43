"""The common beginning of an adapter's conversations: system turn and template variables.

Stored with the adapter, so that requests look like its training rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from veneer.errors import ConfigError
from veneer.files.nesting import is_text, too_deep, walk
from veneer.wording import kind_of

MOST_VARIABLES = 64
_RESERVED = {
    "messages": "the conversation comes from the rows",
    "tools": "they come from the rows or the request",
    "add_generation_prompt": "Veneer sets it where an answer begins",
}


@dataclass(frozen=True)
class Preamble:
    """The defaults of a conversation.

    system     system turn of conversations that have none; None: no default
    variables  variables of the chat template
    tokens     texts of the adapter's new tokens
    """

    system: str | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)
    tokens: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return self.system is not None or bool(self.variables)

    def overridden(
        self, system: str | None = None, variables: Mapping[str, Any] | None = None
    ) -> Preamble:
        """Overrides the system turn ("" removes it) and variables (None removes one).

        Raises ConfigError for a system turn that is no text, or variables that are no dict.
        """
        if system is not None and not isinstance(system, str):
            raise ConfigError(
                f"system is {kind_of(system)}, not text",
                next_step='Give a text; "" is no system turn.',
            )
        if variables is not None and not isinstance(variables, Mapping):
            raise ConfigError(
                f"variables is {kind_of(variables)}, not a dict",
                next_step="Give them as {name: value}.",
            )
        chosen = self.system if system is None else system or None
        return replace(
            self, system=chosen, variables=without_none({**self.variables, **(variables or {})})
        )

    def opening(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Puts the system turn in front of the messages unless they have one."""
        if self.system is None or (messages and messages[0].get("role") == "system"):
            return messages
        return [{"role": "system", "content": self.system}, *messages]


NONE = Preamble()


def shared(preambles: Iterable[Preamble]) -> Preamble:
    """Returns what the preambles of adapters that act together have in common. One of them may have
    new tokens."""
    first, *rest = [*preambles] or [Preamble()]
    system = first.system if all(preamble.system == first.system for preamble in rest) else None
    variables = {
        name: value
        for name, value in first.variables.items()
        if all(
            name in preamble.variables and preamble.variables[name] == value for preamble in rest
        )
    }
    return Preamble(
        system,
        variables,
        next((preamble.tokens for preamble in (first, *rest) if preamble.tokens), ()),
    )


def without_none(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Drops variables whose value is None."""
    return {name: value for name, value in variables.items() if value is not None}


def variable_faults(variables: Mapping[str, Any]) -> list[str]:
    """Returns reasons why a chat template cannot take these variables."""
    if len(variables) > MOST_VARIABLES:
        return [f"there are {len(variables):,}, at most {MOST_VARIABLES} are allowed"]
    faults = [f"{name}: {why}" for name, why in _RESERVED.items() if name in variables]
    faults += [
        f"{str(name)[:40]!r} is not a variable name"
        for name in variables
        if not (isinstance(name, str) and name.isidentifier() and len(name) <= 64)
        or name.startswith("_")
    ]
    if too_deep(dict(variables)):
        faults.append("a value is nested too deep")
    elif any(isinstance(inner, str) and not is_text(inner) for inner, _ in walk(dict(variables))):
        faults.append("a value holds half a character")
    return faults


def check_variables(variables: Mapping[str, Any]) -> None:
    """Raises ConfigError with every fault."""
    if faults := variable_faults(variables):
        raise ConfigError("these variables cannot be given to a chat template", faults)
