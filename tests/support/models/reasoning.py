"""Chat templates of our own in the manner of today's reasoning models, over ChatML's tokens."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

from transformers import PreTrainedTokenizerFast

from tests.support.tiny import tiny_tokenizer
from veneer.data.examples import Problem, Row, RowRef
from veneer.data.template.template import ChatTemplate

TOOLS = (
    "{%- if tools %}{{ '<|im_start|>system\\n' + tools | tojson + '<|im_end|>\\n' }}{%- endif %}"
)

DROPS_EARLIER = (
    TOOLS
    + "{%- set ns = namespace(last=-1) %}{%- for m in messages %}{%- if m.role == 'user' %}{%- set"
    " ns.last = loop.index0 %}{%- endif %}{%- endfor %}{%- for m in messages %}{%- set said ="
    " m.content or '' %}{%- set thought = m.reasoning_content or '' %}{%- if m.role =="
    " 'assistant' and not thought and '</think>' in said %}{%- set thought ="
    " said.split('</think>')[0].split('<think>')[-1].strip() %}{%- set said ="
    " said.split('</think>')[-1].lstrip('\\n') %}{%- endif %}{{ '<|im_start|>' + m.role + '\\n'"
    " }}{%- if m.role == 'assistant' and loop.index0 > ns.last and (loop.last or thought) %}{{"
    " '<think>\\n' + thought + '\\n</think>\\n\\n' }}{%- endif %}{{ said }}{%- for call in"
    " m.tool_calls or [] %}{{ '<tool_call>' + (call.function or call) | tojson + '</tool_call>'"
    " }}{%- endfor %}{{ '<|im_end|>\\n' }}{%- endfor %}{%- if add_generation_prompt %}{{"
    " '<|im_start|>assistant\\n' }}{%- if enable_thinking is defined and enable_thinking is false"
    " %}{{ '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"
)
"""Reasoning of answers in front of the last question is left out; without thinking the prompt has
an empty block."""

TURN = "{{ '<|im_start|>' + m.role + '\\n' }}"
CALLS = (
    "{%- for call in m.tool_calls or [] %}{{ '<call>' + (call.function or call) | tojson +"
    " '</call>' }}{%- endfor %}"
)
THOUGHT = "{%- set thought = m.reasoning_content or '' %}{%- set said = m.content or '' %}"

KEEPS = (
    TOOLS
    + "{%- for m in messages %}"
    + THOUGHT
    + TURN
    + "{%- if thought %}{{ '<think>' + thought + '</think>' }}{%- endif %}{{ said }}"
    + CALLS
    + "{{ '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"
)
"""All reasoning stays where it was."""

OPENS = (
    TOOLS + "{%- for m in messages %}" + THOUGHT + TURN + "{%- if m.role == 'assistant' %}"
    "{{ '<think>\\n' + (thought if loop.last else '') + '\\n</think>\\n' }}{%- endif %}{{ said }}"
    + CALLS
    + "{{ '<|im_end|>\\n' }}{%- endfor %}{%- if add_generation_prompt %}{{"
    " '<|im_start|>assistant\\n<think>\\n' }}{%- if enable_thinking is defined and not"
    " enable_thinking %}{{ '\\n</think>\\n' }}{%- endif %}{%- endif %}"
)
"""The prompt opens the reasoning; of earlier answers an empty block is left."""

CHANNELS = (
    "{{ '<|im_start|>system\\nReasoning: ' + (reasoning_effort | default('medium')) +"
    " '<|im_end|>\\n' }}"
    + TOOLS
    + "{%- for m in messages %}"
    + THOUGHT
    + "{%- if m.role == 'assistant' %}"
    "{%- if thought and (loop.last or m.tool_calls) %}"
    "{{ '<|im_start|>assistant\\nanalysis:' + thought + '<|im_end|>\\n' }}{%- endif %}"
    "{{ '<|im_start|>assistant\\n' + ('commentary:' if m.tool_calls else 'final:') + said }}"
    + CALLS
    + "{{ '<|im_end|>\\n' }}{%- else %}"
    + TURN
    + "{{ said + '<|im_end|>\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"
)
"""Reasoning is a message of its own, kept where tools were called."""

FORGETS = (
    "{%- for m in messages %}"
    + THOUGHT
    + TURN
    + "{{ said.split('</think>')[-1].lstrip() + CLOSES }}{%- endfor %}".replace(
        "CLOSES", "'<|im_end|>\\n'"
    )
    + "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{%- endif %}"
)
"""The prompt opens reasoning, and no answer that is given shows any."""

BY_SYSTEM = (
    "{%- set quiet = enable_thinking is defined and not enable_thinking %}{{"
    " '<|im_start|>system\\n' + ('/no_think' if quiet else '/think') }}{%- if messages[0].role =="
    " 'system' %}{{ messages[0].content }}{%- endif %}{{ '<|im_end|>\\n' }}"
    + TOOLS
    + "{%- for m in messages %}{%- if m.role != 'system' %}"
    + THOUGHT
    + TURN
    + "{%- if m.role == 'assistant' %}{{ '<think>' + ('' if quiet else thought) + '</think>' if"
    " quiet or thought else '' }}{%- endif %}{{ said }}"
    + CALLS
    + "{{ '<|im_end|>\\n' }}{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{"
    " '<|im_start|>assistant\\n' + ('<think></think>' if quiet else '') }}{%- endif %}"
)
"""The system turn says whether it reasons."""

TEMPLATES = {
    "drops earlier": DROPS_EARLIER,
    "keeps": KEEPS,
    "opens": OPENS,
    "channels": CHANNELS,
    "by system": BY_SYSTEM,
}


def reasoning_tokenizer(source: str = DROPS_EARLIER) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = source
    return tokenizer


QUIET = {"enable_thinking": False}
CALL = {"type": "function", "function": {"name": "look", "arguments": {"n": 1}}}
TOOL = [
    {
        "type": "function",
        "function": {"name": "look", "description": "Looks.", "parameters": {"type": "object"}},
    }
]


def conversation(turns: int, *, reasons: bool, tools: bool, system: bool) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = [{"role": "system", "content": "Be brief."}] if system else []

    def answer(text: str, **more: Any) -> dict[str, Any]:
        thought = {"reasoning_content": f"thinking of {text}"} if reasons else {}
        return {"role": "assistant", "content": text, **thought, **more}

    for turn in range(turns):
        messages.append({"role": "user", "content": f"question {turn}"})
        if tools:
            messages += [
                answer("", tool_calls=[CALL]),
                {"role": "tool", "content": f"found {turn}"},
            ]
        messages.append(answer(f"answer {turn}"))
    return messages


def rendered(tokenizer: Any, messages: list[dict[str, Any]], prompt: bool, **more: Any) -> str:
    """As transformers renders it."""
    return str(
        tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=prompt, **more
        )
    )


def check_by_brute_force(source: str) -> Counter[str]:
    """Every answer once: what stands in front is the prompt that the model will get, and what is
    learnt its answer.

    Returns how many conversations were learnt, and how many refused by which code.
    """
    tokenizer = reasoning_tokenizer(source)
    found: Counter[str] = Counter()
    for turns, reasons, tools, system, quiet in itertools.product([1, 3], *[[True, False]] * 4):
        if quiet and "enable_thinking" not in source:
            continue
        template = ChatTemplate(tokenizer, variables=QUIET if quiet else {})
        messages = conversation(turns, reasons=reasons, tools=tools, system=system)
        found[_checked(template, messages, TOOL if tools else None)] += 1
    return found


def _checked(
    template: ChatTemplate, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None
) -> str:
    (found,) = template.encode_rows(
        [Row(RowRef("rows.jsonl", 1), messages, tools)], train_on="assistant"
    )
    if isinstance(found, Problem):
        return found.code
    tokenizer, told = template.tokenizer, {"tools": tools, **template.variables}
    learnt = 0
    for n in [n for n, message in enumerate(messages) if message["role"] == "assistant"]:
        texts = (
            rendered(tokenizer, messages[:n], True, **told),
            rendered(tokenizer, messages[: n + 1], False, **told),
        )
        if not texts[1].startswith(texts[0]):  # the prompt opens reasoning that no rendering shows
            start = texts[0].rindex("<think>")
            answer = f"thinking of {messages[n]['content']}\n</think>\n\n"
            texts = texts[0], texts[0] + answer + texts[1][start:]
        before, whole = (tokenizer(text, add_special_tokens=False).input_ids for text in texts)
        assert template.encode_prompt(messages[:n], tools=tools) == before
        (own,) = [
            example
            for example in found
            if example.ids[: len(whole)] == whole and all(example.trained[len(before) : len(whole)])
        ]
        assert not own.trained[len(before) - 1]
        learnt += len(whole) - len(before)
    assert learnt == sum(sum(example.trained) for example in found)
    return "learnt"
