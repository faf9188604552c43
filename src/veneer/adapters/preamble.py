"""What an adapter's conversations have in common: how they begin, and what their template was told.

Kept with the adapter, so that it is asked as it was taught.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from veneer.errors import ConfigError
from veneer.files.nesting import is_text, too_deep, walk

MOST_VARIABLES = 64
_TAKEN = {
    "messages": "the conversation stands in the rows",
    "tools": "they stand in the rows, or are given with the prompt",
    "add_generation_prompt": "it is the question of where an answer begins",
}


@dataclass(frozen=True)
class Preamble:
    """system: the turn that a conversation without one gets; None: none. variables: of the chat
    template. tokens: texts that are tokens of the adapter's own."""

    system: str | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)
    tokens: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return self.system is not None or bool(self.variables)

    def asked(
        self, system: str | None = None, variables: Mapping[str, Any] | None = None
    ) -> Preamble:
        """With what somebody says instead: a system turn ("": none), variables (None: left out)."""
        chosen = self.system if system is None else system or None
        return replace(
            self, system=chosen, variables=given({**self.variables, **(variables or {})})
        )

    def opening(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The messages, behind the system turn unless they have one."""
        if self.system is None or (messages and messages[0].get("role") == "system"):
            return messages
        return [{"role": "system", "content": self.system}, *messages]


NONE = Preamble()


def shared(preambles: Iterable[Preamble]) -> Preamble:
    """What all of them say alike: of adapters that act together, of which one may bring tokens."""
    first, *others = [*preambles] or [Preamble()]
    system = first.system if all(each.system == first.system for each in others) else None
    alike = {
        name: value
        for name, value in first.variables.items()
        if all(name in each.variables and each.variables[name] == value for each in others)
    }
    return Preamble(
        system, alike, next((each.tokens for each in (first, *others) if each.tokens), ())
    )


def given(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Those that have a value."""
    return {name: value for name, value in variables.items() if value is not None}


def variable_faults(variables: Mapping[str, Any]) -> list[str]:
    """Why a template cannot be told these."""
    if len(variables) > MOST_VARIABLES:
        return [f"there are {len(variables):,}, {MOST_VARIABLES} may be"]
    faults = [f"{name}: {why}" for name, why in _TAKEN.items() if name in variables]
    faults += [
        f"{str(name)[:40]!r} is no name of a variable"
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
    """Raises ConfigError with all that is wrong."""
    if faults := variable_faults(variables):
        raise ConfigError("these variables cannot be given to a chat template", faults)
