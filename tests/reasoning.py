"""Chat templates of our own in the manner of today's reasoning models, over ChatML's tokens."""

from __future__ import annotations

from transformers import PreTrainedTokenizerFast

from tests.tiny import tiny_tokenizer

TOOLS = "{%- if tools %}{{ '<|im_start|>system\\n' + tools | tojson + '<|im_end|>\\n' }}{%- endif %}"

DROPS_EARLIER = (
    TOOLS + "{%- set ns = namespace(last=-1) %}"
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

TURN = "{{ '<|im_start|>' + m.role + '\\n' }}"
CALLS = (
    "{%- for call in m.tool_calls or [] %}{{ '<call>' + (call.function or call) | tojson + '</call>' }}{%- endfor %}"
)
THOUGHT = "{%- set thought = m.reasoning_content or '' %}{%- set said = m.content or '' %}"

KEEPS = (
    TOOLS + "{%- for m in messages %}" + THOUGHT + TURN + "{%- if thought %}{{ '<think>' + thought + '</think>' }}"
    "{%- endif %}{{ said }}" + CALLS + "{{ '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"
)
"""All reasoning stays where it was."""

OPENS = (
    TOOLS + "{%- for m in messages %}" + THOUGHT + TURN + "{%- if m.role == 'assistant' %}"
    "{{ '<think>\\n' + (thought if loop.last else '') + '\\n</think>\\n' }}{%- endif %}{{ said }}"
    + CALLS
    + "{{ '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}"
    "{%- if enable_thinking is defined and not enable_thinking %}{{ '\\n</think>\\n' }}{%- endif %}{%- endif %}"
)
"""The prompt opens the reasoning; of earlier answers an empty block is left."""

CHANNELS = (
    "{{ '<|im_start|>system\\nReasoning: ' + (reasoning_effort | default('medium')) + '<|im_end|>\\n' }}"
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

BY_SYSTEM = (
    "{%- set quiet = enable_thinking is defined and not enable_thinking %}"
    "{{ '<|im_start|>system\\n' + ('/no_think' if quiet else '/think') }}"
    "{%- if messages[0].role == 'system' %}{{ messages[0].content }}{%- endif %}{{ '<|im_end|>\\n' }}"
    + TOOLS
    + "{%- for m in messages %}{%- if m.role != 'system' %}"
    + THOUGHT
    + TURN
    + "{%- if m.role == 'assistant' %}"
    "{{ '<think>' + ('' if quiet else thought) + '</think>' if quiet or thought else '' }}{%- endif %}"
    "{{ said }}" + CALLS + "{{ '<|im_end|>\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' + ('<think></think>' if quiet else '') }}{%- endif %}"
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
