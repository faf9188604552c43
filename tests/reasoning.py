"""Chat templates of our own in the manner of today's reasoning models, over ChatML's tokens."""

from __future__ import annotations

from transformers import PreTrainedTokenizerFast

from tests.tiny import tiny_tokenizer

DROPS_EARLIER = (
    "{%- set ns = namespace(last=-1) %}"
    "{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for m in messages %}"
    "{%- set said = m.content or '' %}{%- set thought = m.reasoning_content or '' %}"
    "{%- if m.role == 'assistant' and not thought and '</think>' in said %}"
    "{%- set thought = said.split('</think>')[0].split('<think>')[-1].strip() %}"
    "{%- set said = said.split('</think>')[-1].lstrip('\\n') %}{%- endif %}"
    "{{ '<|im_start|>' + m.role + '\\n' }}"
    "{%- if m.role == 'assistant' and loop.index0 > ns.last and (loop.last or thought) %}"
    "{{ '<think>\\n' + thought + '\\n</think>\\n\\n' }}{%- endif %}"
    "{{ said }}"
    "{%- for call in m.tool_calls or [] %}{{ '<tool_call>' + (call.function or call) | tojson + '</tool_call>' }}"
    "{%- endfor %}{{ '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{%- endif %}"
)
"""Reasoning of answers in front of the last question is left out; without thinking the prompt has an empty block."""


def reasoning_tokenizer(source: str = DROPS_EARLIER) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = source
    return tokenizer
