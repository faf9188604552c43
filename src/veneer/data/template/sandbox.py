"""Compiles a chat template to a function in jinja2's immutable sandbox.

Templates get the same names, filters and tags as in transformers
(`transformers/utils/chat_template_utils.py`, 5.24), so that a row renders as
`tokenizer.apply_chat_template` renders it; tests compare the two. One difference: the date that a
template may write is fixed at compile time, or a run that continues tomorrow would train on other
tokens.

The sandbox keeps a template from reaching Python's internals. It bounds neither time nor memory:
for that, templates run in a separate process (worker.py, the only caller of this module).
"""

import json
from collections.abc import Callable
from datetime import date
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

# (messages, tools, add_generation_prompt, variables) -> text
Render = Callable[[list[dict[str, Any]], "list[dict[str, Any]] | None", bool, dict[str, Any]], str]

_REASONING = ("reasoning_content", "thinking", "reasoning")


class TemplateFault(Exception):
    """A template did not compile, or refused the messages; the text says why."""


def compile_template(source: str, special_tokens: dict[str, Any], today: date) -> Render:
    """Compiles the template to a function of messages that `prepared` returned.

    special_tokens: variables of the template (bos_token, ...). Both this function and the one it
    returns raise TemplateFault.
    """
    environment = _environment(today)
    try:
        template = environment.from_string(source)
    except (TemplateError, RecursionError) as error:
        raise TemplateFault(f"the chat template does not compile: {error}") from None

    def render(
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        add_generation_prompt: bool,
        variables: dict[str, Any],
    ) -> str:
        conversation = {
            "messages": messages,
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return template.render(
                {**special_tokens, "documents": None, **variables, **conversation}
            )
        except Exception as error:  # a stranger's program may raise anything
            text = str(error) or type(error).__name__
            raise TemplateFault(f"the chat template refuses it: {text}") from None

    return render


def prepared(message: dict[str, Any]) -> dict[str, Any]:
    """Removes nulls and `weight` from a message, and adds its reasoning under each name that
    templates read."""
    message = {
        key: value for key, value in message.items() if value is not None and key != "weight"
    }
    reasoning = next((message[name] for name in _REASONING if name in message), None)
    return (
        message
        if reasoning is None
        else {"thinking": reasoning, **message, "reasoning_content": reasoning}
    )


def _environment(today: date) -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(
        raise_exception=_raise,
        strftime_now=lambda format: today.strftime(format),
        dict=_Dict(),
        namespace=_TemplateNamespace,
    )
    return environment


class _Generation(Extension):
    """Accepts `{% generation %}` blocks around assistant text; trained spans come from turns.py."""

    tags = {"generation"}  # noqa: RUF012  jinja2 declares it as an instance's

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Writes JSON without jinja's HTML escapes, which no model was trained on."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


class _Dict:
    """Provides `dict(...)` without the type's attributes."""

    def __call__(self, *pairs: Any, **named: Any) -> dict[Any, Any]:
        return dict(*pairs, **named)


class _TemplateNamespace(Namespace):
    """Refuses names with an underscore, which could shadow jinja2's attributes."""

    def __init__(*arguments: Any, **named: Any) -> None:  # so that namespace(self=...) works
        self, pairs = arguments[0], arguments[1:]
        values = dict(*pairs, **named)
        for name in values:
            _TemplateNamespace._check(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _TemplateNamespace._check(name)
        Namespace.__setitem__(self, name, value)

    @staticmethod
    def _check(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a namespace of a chat template cannot hold {name!r}")
