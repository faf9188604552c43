"""Why a row cannot be encoded: what its template leaves out or writes, and how that is shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from veneer.data.examples import Problem, RowRef
from veneer.data.template.control_names import TokenFault
from veneer.data.template.rendering import Template
from veneer.data.template.sandbox import TemplateFault
from veneer.files.nesting import is_text

RENDERS_TOOLS = "Qwen/Qwen2.5-0.5B-Instruct or Qwen/Qwen3-0.6B"
_WINDOW = 160  # characters of a rendering shown around the place where two part
_TAIL = 16  # characters of a message that must stand in the rendering


class Unfit(Exception):
    """Why a row cannot be encoded; becomes a Problem."""

    def __init__(self, code: str, message: str, next_step: str = "", detail: str = "") -> None:
        super().__init__(message)
        self.code, self.message, self.next_step, self.detail = code, message, next_step, detail

    def at(self, ref: RowRef) -> Problem:
        return Problem(
            self.code, ref.file, self.message, (ref.line,), self.next_step, detail=self.detail
        )


def unfit(fault: Exception) -> Unfit:
    """Why a row cannot be encoded, whoever says it."""
    if isinstance(fault, Unfit):
        return fault
    return Unfit("D201" if isinstance(fault, TemplateFault) else "D202", str(fault))


def check_contents(messages: Sequence[dict[str, Any]], text: str) -> None:
    """A template for contents of another shape (lists of parts) renders strings to nothing, without
    an error."""
    # The end alone, and not reasoning in front of it, which many templates leave out on purpose.
    ends = [
        (
            ""
            if message["role"] == "tool"
            else (message.get("content") or "").rpartition("</think>")[2].strip()[-_TAIL:]
        )
        for message in messages
    ]
    if left_out := _left_out(ends, text, most=1):
        number, end = ends.index(left_out[0]) + 1, left_out[0]
        raise Unfit("D214", f"the chat template leaves out what message {number} says: …{end!r}")


def check_tools(
    messages: Sequence[dict[str, Any]],
    tools: Sequence[dict[str, Any]] | None,
    text: str,
    template: Template,
) -> None:
    """Tools and calls that the template leaves out would be silently lost: also those whose name
    the text has for another reason."""
    calls = [call for message in messages for call in message.get("tool_calls") or []]
    lost: set[str] = set()
    for kind, functions in (("tools", tools or []), ("calls", calls)):
        names = [function.get("function", function).get("name") for function in functions]
        texts = [name for name in names if isinstance(name, str)]
        lost.update(
            texts if names and kind in template.leaves_out else _left_out(texts, text, most=5)
        )
    if lost:
        raise Unfit(
            "D214",
            f"the chat template does not render tools: {', '.join(sorted(lost)[:5])} left out",
            "Write the tools into the system message and the calls into the answers, or use a base"
            f" whose template renders tools, such as {RENDERS_TOOLS}.",
        )


def _left_out(parts: Sequence[str], text: str, *, most: int) -> list[str]:
    """Parts that do not stand in the text, up to `most`. One pass, where the others stand in it in
    their order."""
    lost: list[str] = []
    place = 0
    for part in dict.fromkeys(parts):
        found = text.find(part, place)
        place = found if found >= 0 else text.find(part)
        if place < 0:
            lost.append(part)
            place = 0
            if len(lost) == most:
                break
    return lost


def check_text(text: str) -> None:
    """Raises unless the text can be tokenised."""
    if not is_text(text):
        raise TemplateFault("the chat template writes half a character")
    if "\\udbff" in text.lower():
        raise TokenFault(
            "the chat template escapes characters, which breaks control tokens' names in it: remove"
            " them"
        )


def parting(first: str, a: str, second: str, b: str) -> str:
    """Two texts around the place where they part, one under the other."""
    at = next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )
    start = max(0, at - _WINDOW // 2)
    lines = [f"the same for {at:,} characters, then:"]
    for name, text in ((first, a), (second, b)):
        lines.append(
            f"{name:>8}  {'…' if start else ''}{text[start:at]!r} >>> {text[at : at + _WINDOW]!r}"
        )
    return "\n".join(lines)
