"""A Modelfile gives Ollama the ids that we give the model: its template is read back by
tests/support/go_template.py."""

import random
import re

import pytest

from tests.support.go_template import collated, read_modelfile, render
from tests.support.tiny import CHATML, tiny_tokenizer
from veneer.adapters.preamble import NONE, Preamble
from veneer.data.template.template import ChatTemplate
from veneer.errors import RefusedError
from veneer.merge.export.ollama import modelfile

HEADERS = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set s = messages[0].content | trim %}{%"
    " set messages = messages[1:] %}{% else %}{% set s = '' %}{% endif %}{{"
    " '<|im_start|>system\n\nToday: 26 Jul 2024\n\n' + s + '<|im_end|>' }}{% for m in messages %}{{"
    " '<|im_start|>' + m.role + '\n\n' + (m.content | trim) + '<|im_end|>' }}{% endfor %}{% if"
    " add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}"
)
BRACKETS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ ' [INST] ' + m.content + '"
    " [/INST]' }}{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% else %}{{"
    " raise_exception('no system') }}{% endif %}{% endfor %}"
)
THINKING = CHATML.replace(
    "assistant\\n' }}{%- endif", "assistant\\n<think>\\n\\n</think>\\n\\n' }}{%- endif"
)
ODD = (
    "{% for m in messages %}{{ '{{\"\"\"\u200b\\\\' + m.role + '{' + m.content + '}}' }}{% endfor"
    " %}{{ '{' }}"
)
DEFAULT = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}{{ '<|im_start|>system\nBe"
    " kind.<|im_end|>\n' }}{% endif %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>'"
    " + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
FOLDED = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set first = messages[0].content +"
    " '\n\n' %}{% set messages = messages[1:] %}{% else %}{% set first = '' %}{% endif %}{% for m"
    " in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('they"
    " take turns') }}{% endif %}{{ '<|im_start|>' + ('model' if m.role == 'assistant' else m.role)"
    " + '\n' + (first if loop.first else '') }}{{ m.content | trim + '<|im_end|>\n' }}{% endfor"
    " %}{% if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% endif %}"
)
MARKED = FOLDED.replace(
    "messages[0].content + '\n\n'", "'<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n'"
)
TEMPLATES = {
    "folded": FOLDED,
    "folded, marked": MARKED,
    "folded, no begin": MARKED.replace("{{ bos_token }}", ""),
    "chatml": CHATML,
    "default": DEFAULT,
    "headers": HEADERS,
    "brackets": BRACKETS,
    "thinking": THINKING,
    "odd": ODD,
}
TEXTS = [
    "Hello",
    "naïve größe 漢字 🙂",
    "a\n\nb {{ .Content }} {% x %}",
    "def f():\n\treturn '{}'",
    '"""',
    "1234 + 5 = ?",
]


def conversations(number: int, *, system: bool) -> list[list[dict[str, str]]]:
    draw = random.Random(3)
    found = []
    for _ in range(number):
        turns = (
            [{"role": "system", "content": draw.choice(TEXTS)}]
            if system and draw.random() < 0.5
            else []
        )
        for at in range(2 * draw.randrange(4) + 1):
            text = " ".join(draw.choice(TEXTS) for _ in range(draw.randrange(1, 4)))
            turns.append({"role": "assistant" if at % 2 else "user", "content": text})
        found.append(turns)
    return found


def made(source, preamble=NONE, begins=False):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = source
    if begins:
        from tokenizers.processors import TemplateProcessing

        begin = (tokenizer.bos_token, tokenizer.bos_token_id)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            f"{begin[0]} $A", special_tokens=[begin]
        )
    text, notes = modelfile(
        tokenizer,
        preamble,
        model="m.gguf",
        stops=[tokenizer.eos_token_id],
        positions=512,
        made_of="a\nFROM /etc/b",
    )
    return tokenizer, read_modelfile(text), notes


@pytest.mark.parametrize("name", TEMPLATES)
def test_ollama_s_ids_are_ours_over_fifty_conversations(name):
    begins = "bos_token" in TEMPLATES[name]
    system = None if name in ("brackets", "odd") else 'Say "yes".\n\tOr {{ no }}.'
    tokenizer, said, _ = made(TEMPLATES[name], Preamble(system), begins=begins)
    template = ChatTemplate(tokenizer)
    facts = dict(said)
    assert (
        facts["FROM"] == "./m.gguf"
        and facts["stop"] == tokenizer.eos_token
        and facts["num_ctx"] == "512"
    )
    for messages in conversations(50, system=name != "brackets"):
        text = render(facts["TEMPLATE"], {"Messages": collated(messages, facts.get("SYSTEM"))})
        assert tokenizer(text)["input_ids"] == template.encode_prompt(
            Preamble(system).opening(messages)
        ), messages


def test_what_the_language_cannot_say_is_told():
    _, _, notes = made(HEADERS)
    assert "not as the base's template: spaces around what a user says" in notes
    assert "the base's template takes no system turn: one is left out" in made(BRACKETS)[2]


@pytest.mark.parametrize(
    ("source", "preamble", "said"),
    [
        (None, Preamble(), "no chat template"),
        (CHATML + "{{ strftime_now('%d') }}", Preamble(), "today's date"),
        (
            "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
            Preamble(),
            "not written as it stands",
        ),
        (
            (
                "{% for m in messages %}{{ m.role + m.content + messages | length | string }}{%"
                " endfor %}"
            ),
            Preamble(),
            "not a seq",
        ),
        (BRACKETS, Preamble("Be brief."), "takes none"),
        (CHATML, Preamble("no\u00a0break"), "U\\+00A0 is dropped"),
        (CHATML, Preamble('a """ b'), "three quotation marks"),
    ],
)
def test_a_template_or_a_system_turn_without_words_there_is_refused(source, preamble, said):
    with pytest.raises(RefusedError) as fault:
        made(source, preamble)
    assert re.search(said, str(fault.value))


@pytest.mark.parametrize("text", ['"\nFROM /etc/b', 'a"b', "a\nSYSTEM b", "a\u200bb"])
def test_a_token_that_would_end_its_line_is_refused(text):
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [text]})
    stops = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(text)]
    with pytest.raises(RefusedError, match="a token that ends answers cannot be written"):
        modelfile(tokenizer, NONE, model="m.gguf", stops=stops, positions=512, made_of="a")


def test_what_ends_answers_is_said_as_text():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHATML
    stops = [tokenizer.eos_token_id, *tokenizer(" ")["input_ids"], len(tokenizer) + 5]
    text, _ = modelfile(tokenizer, NONE, model="m.gguf", stops=stops, positions=512, made_of="a")
    assert [value for name, value in read_modelfile(text) if name == "stop"] == [
        tokenizer.eos_token,
        " ",
    ]
