"""Explains why a row cannot be encoded: what its template leaves out or cannot render."""

from collections.abc import Sequence
from typing import Any

from veneer.data.examples import RowFault
from veneer.data.template.control_names import TokenFault
from veneer.data.template.rendering import Template
from veneer.data.template.sandbox import TemplateFault
from veneer.files.nesting import is_text
from veneer.wording import first_difference

RENDERS_TOOLS = "Qwen/Qwen2.5-0.5B-Instruct or Qwen/Qwen3-0.6B"
_WINDOW = 160  # characters shown around the first difference of two renderings
_TAIL = 16  # characters of a message that must occur in the rendering


def unfit(fault: Exception) -> RowFault:
    """Converts any fault of a row to a RowFault."""
    if isinstance(fault, RowFault):
        return fault
    return RowFault("D201" if isinstance(fault, TemplateFault) else "D202", str(fault))


def check_contents(messages: Sequence[dict[str, Any]], text: str) -> None:
    """Checks that the rendering contains each message.

    A template for contents of another shape (lists of parts) renders strings to nothing, without an
    error. Raises RowFault.
    """
    # Only the end: many templates leave out reasoning in front of it on purpose.
    ends = [
        (
            ""
            if message["role"] == "tool"
            else (message.get("content") or "").rpartition("</think>")[2].strip()[-_TAIL:]
        )
        for message in messages
    ]
    if left_out := _missing_parts(ends, text, most=1):
        number, end = ends.index(left_out[0]) + 1, left_out[0]
        raise RowFault(
            "D214", f"the chat template leaves out the text of message {number}: …{end!r}"
        )


def check_tools(
    messages: Sequence[dict[str, Any]],
    tools: Sequence[dict[str, Any]] | None,
    text: str,
    template: Template,
) -> None:
    """Checks that the rendering contains the names of all tools and calls. Raises RowFault."""
    calls = [call for message in messages for call in message.get("tool_calls") or []]
    missing: set[str] = set()
    for kind, functions in (("tools", tools or []), ("calls", calls)):
        names = [function.get("function", function).get("name") for function in functions]
        texts = [name for name in names if isinstance(name, str)]
        missing.update(
            texts if names and kind in template.leaves_out else _missing_parts(texts, text, most=5)
        )
    if missing:
        raise RowFault(
            "D214",
            f"the chat template does not render tools: {', '.join(sorted(missing)[:5])} left out",
            "Write the tools into the system message and the calls into the answers, or use a base"
            f" whose template renders tools, such as {RENDERS_TOOLS}.",
        )


def _missing_parts(parts: Sequence[str], text: str, *, most: int) -> list[str]:
    """Returns parts that do not occur in the text, up to `most`; one pass if they occur in
    order."""
    missing: list[str] = []
    position = 0
    for part in dict.fromkeys(parts):
        next_position = text.find(part, position)
        position = next_position if next_position >= 0 else text.find(part)
        if position < 0:
            missing.append(part)
            position = 0
            if len(missing) == most:
                break
    return missing


def check_text(text: str) -> None:
    """Raises TemplateFault or TokenFault unless the text can be tokenised."""
    if not is_text(text):
        raise TemplateFault("the chat template writes half a character")
    if "\\udbff" in text.lower():
        raise TokenFault(
            "the chat template escapes characters, which breaks control tokens' names in it: remove"
            " them"
        )


def show_difference(first: str, a: str, second: str, b: str) -> str:
    """Shows two texts around their first difference, one below the other."""
    at = first_difference(a, b)
    start = max(0, at - _WINDOW // 2)
    lines = [f"the same for {at:,} characters, then:"]
    for name, text in ((first, a), (second, b)):
        lines.append(
            f"{name:>8}  {'…' if start else ''}{text[start:at]!r} >>> {text[at : at + _WINDOW]!r}"
        )
    return "\n".join(lines)
