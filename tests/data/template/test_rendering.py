"""Templates are rendered as transformers renders them, and refused if they fail."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.templates import assistant, row, user, with_template
from tests.support.tiny import CHATML, tiny_tokenizer
from veneer.data.template.template import ChatTemplate
from veneer.errors import DataError

ODD = {
    "generation tag": (
        "{% for m in messages %}{{ m.role }}:{% generation %}{{ m.content }}{% endgeneration "
        "%};{% endfor %}"
    ),
    "break": (
        "{% for m in messages %}{{ m.content }}{% if loop.index == 2 %}{% break %}{% endif %}{%"
        " endfor %}"
    ),
    "namespace": (
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor"
        " %}{{ ns.n }}"
    ),
    "tojson": "{{ messages | tojson(indent=2) }}{{ dict(a='<&>') | tojson }}",
    "special tokens": "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ unk_token is defined }}",
    "reasoning": "{% for m in messages %}{{ m.reasoning_content }}{{ m.thinking }}{% endfor %}",
    "absent keys": (
        "{% for m in messages %}{{ m.name is defined }}{{ 'tool_calls' in m }}{% endfor %}{{ tools "
        "is none }}"
    ),
    "whitespace control": (
        "{% for m in messages %}\n    {% if m %}\n  {{ m.content }}\n    {% endif %}\n{% endfor"
        " %}\n"
    ),
    "date": "{{ strftime_now('%d %b %Y') }}",
    "generation prompt": "{% if add_generation_prompt %}yes{% else %}no{% endif %}",
}


@pytest.mark.parametrize("source", [CHATML, *ODD.values()], ids=["chatml", *ODD])
def test_a_template_renders_as_transformers_renders_it(source: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = source
    messages = [user("a & b"), assistant("é", name=None, reasoning="hm"), user("c"), assistant("d")]
    for prompt in (False, True):
        expected = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=prompt
        )
        assert ChatTemplate(tokenizer).render(messages, add_generation_prompt=prompt) == expected


HOSTILE = {
    "raise": "{{ raise_exception('roles must alternate') }}",
    "internals": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "attr": "{{ (messages | attr('append'))(1) }}",
    "mutation": "{{ messages.append(1) }}",
    "format": "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
    "namespace": "{% set ns = namespace(__class__=1) %}",
    "range": "{% for i in range(10 ** 9) %}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "no arithmetic": "{{ 1 / 0 }}",
    "syntax": "{% for %}",
    "undefined": "{{ messages[0].content + nothing }}",
}


@pytest.mark.parametrize("source", HOSTILE.values(), ids=HOSTILE)
def test_a_template_that_fails_or_reaches_out_is_an_error_with_its_message(source: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = source
    with pytest.raises(DataError, match=r"D201 rows\.jsonl:1  the chat template "):
        ChatTemplate(tokenizer).encode_row(row(user("a"), assistant("b")), train_on="assistant")


@pytest.mark.parametrize("wrong", [3, 0.5, ["a"], {"default": 3}, {"default": None}])
def test_a_template_that_is_no_text_is_refused_by_what_it_is(wrong: Any) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = wrong
    with pytest.raises(DataError, match="is not text"):
        ChatTemplate(tokenizer)


def test_a_template_that_writes_half_a_character_is_refused() -> None:
    half = with_template(CHATML + "{{ '\\ud83d' }}")
    for ask in (
        lambda: half.encode_row(row(user("a"), assistant("b")), train_on="last"),
        lambda: half.encode_prompt([user("a")]),
        lambda: half.render([user("a")]),
    ):
        with pytest.raises(DataError, match="half a character"):
            ask()
