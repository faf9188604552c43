"""What of Go's text/template and of Ollama's reader of Modelfiles our exports use, written from
their documentation: actions are cut out of the text first, then run. Anything else raises."""

import re
from typing import Any

_ACTION = re.compile(r'\{\{(- )?((?:[^"}]|"(?:[^"\\]|\\.)*"|\}(?!\}))*?)( -)?\}\}', re.DOTALL)
_TOKEN = re.compile(r'\s*("(?:[^"\\]|\\.)*"|[()]|:=|,|[^\s(),]+)')
Node = tuple[str, Any]


def render(source: str, data: dict[str, Any]) -> str:
    nodes, rest, _ = _parse(_lexed(source), 0)
    assert rest is None, f"unexpected {rest}"
    return _run(nodes, {".": data})


def _lexed(source: str) -> list[Node]:
    found: list[Node] = []
    at = 0
    for match in _ACTION.finditer(source):
        text = source[at : match.start()]
        assert "{{" not in text, f"not understood: {text!r}"
        found.append(("text", text.rstrip() if match[1] else text))
        found.append(("action", match[2].strip()))
        at = match.end()
        if match[3]:
            at += len(source[at:]) - len(source[at:].lstrip())
    assert "{{" not in source[at:], source[at:]
    return [*found, ("text", source[at:])]


def _parse(tokens: list[Node], at: int) -> tuple[list[Node], str | None, int]:
    """Nodes up to else or end; which of them it was; where the next begins."""
    nodes: list[Node] = []
    while at < len(tokens):
        kind, text = tokens[at]
        at += 1
        if kind == "text":
            nodes.append((kind, text))
        elif text == "end" or text.startswith("else"):
            return nodes, text, at
        elif text.startswith("if "):
            node, at = _branches(text[3:], tokens, at)
            nodes.append(node)
        elif text.startswith("range "):
            body, closed, at = _parse(tokens, at)
            assert closed == "end"
            nodes.append(("range", (text[6:], body)))
        else:
            nodes.append(("say", text))
    return nodes, None, at


def _branches(condition: str, tokens: list[Node], at: int) -> tuple[Node, int]:
    body, closed, at = _parse(tokens, at)
    other: list[Node] = []
    if closed == "else":
        other, closed, at = _parse(tokens, at)
    elif closed is not None and closed.startswith("else if "):
        node, at = _branches(closed[8:], tokens, at)
        other, closed = [node], "end"
    assert closed == "end"
    return ("if", (condition, body, other)), at


def _run(nodes: list[Node], names: dict[str, Any]) -> str:
    said = ""
    for kind, what in nodes:
        if kind == "text":
            said += what
        elif kind == "say":
            said += str(_value(what, names))
        elif kind == "if":
            condition, body, other = what
            said += _run(body if _value(condition, names) else other, names)
        else:
            number, element, listed = re.fullmatch(r"(\$\w+), (\$\w+) := (\S+)", what[0]).groups()
            for index, each in enumerate(_value(listed, names)):
                said += _run(what[1], {**names, ".": each, number: index, element: each})
    return said


def _value(expression: str, names: dict[str, Any]) -> Any:
    value, rest = _call(_TOKEN.findall(expression), names)
    assert not rest, rest
    return value


def _call(tokens: list[str], names: dict[str, Any]) -> tuple[Any, list[str]]:
    values = []
    head, rest = tokens[0], tokens
    functions = {"eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "and": lambda a, b: a and b}
    if head in functions:
        rest = tokens[1:]
    while rest and rest[0] != ")":
        if rest[0] == "(":
            value, rest = _call(rest[1:], names)
            rest = rest[1:]
        else:
            value, rest = _operand(rest[0], names), rest[1:]
        values.append(value)
    if head in functions:
        return functions[head](*values), rest
    assert len(values) == 1, tokens
    return values[0], rest


def _operand(word: str, names: dict[str, Any]) -> Any:
    if word.startswith('"'):
        escaped = r"\\U([0-9a-f]{8})"
        assert "\\" not in re.sub(escaped, "", word), word
        return re.sub(escaped, lambda m: chr(int(m[1], 16)), word[1:-1])
    if word.startswith("."):
        return names["."][word[1:]]
    return names[word] if word.startswith("$") else int(word)


def read_modelfile(text: str) -> list[tuple[str, str]]:
    """(instruction, what it says) in order, as ollama's parser.go reads them."""
    found, at = [], 0
    while at < len(text):
        if text[at] in "\n ":
            at += 1
        elif text[at] == "#":
            at = text.index("\n", at)
        else:
            name, at = text[at : text.index(" ", at)], text.index(" ", at) + 1
            if name == "PARAMETER":
                name, at = text[at : text.index(" ", at)], text.index(" ", at) + 1
            quote = next((q for q in ('"""', '"') if text.startswith(q, at)), "")
            end = text.index(quote + "\n", at + len(quote))
            value = text[at + len(quote) : end]
            found.append((name, "".join(c for c in value if c.isprintable() or c in "\n\r\t")))
            at = end + len(quote)
    return found


def collated(messages: list[dict[str, str]], system: str | None) -> list[dict[str, str]]:
    """As Ollama gives them to a template: behind the model's own system turn, those of one role
    joined."""
    if system is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    found: list[dict[str, str]] = []
    for message in messages:
        if found and found[-1]["role"] == message["role"]:
            found[-1] = {**message, "content": found[-1]["content"] + "\n\n" + message["content"]}
        else:
            found.append(message)
    return [{"Role": message["role"], "Content": message["content"]} for message in found]
