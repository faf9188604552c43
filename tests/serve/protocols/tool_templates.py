"""How templates of well-known models write tools and calls of them: the parts of each that do, and
nothing else."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from tests.support.tiny import tiny_tokenizer
from veneer.decoding.tool_calls.calls import CallStyle
from veneer.decoding.tool_calls.elements import ElementCalls
from veneer.decoding.tool_calls.forms import BareCall, ListedCalls, NamedCalls, ObjectCalls

HERMES = (
    "{%- if tools %}{{- '<|im_start|>system\\n# Tools\\n<tools>' }}{%- for tool in tools %}{{-"
    " '\\n' }}{{- tool | tojson }}{%- endfor %}{{- '\\n</tools><|im_end|>\\n' }}{%- endif %}{%- for"
    " message in messages %}{{- '<|im_start|>' + message.role }}{%- if message.content %}{{- '\\n'"
    " + message.content }}{%- endif %}{%- for tool_call in message.tool_calls or [] %}{%- if"
    " tool_call.function is defined %}{%- set tool_call = tool_call.function %}{%- endif %}{{-"
    ' \'\\n<tool_call>\\n{"name": "\' }}{{- tool_call.name }}{{- \'", "arguments": \' }}{{-'
    " tool_call.arguments | tojson }}{{- '}\\n</tool_call>' }}{%- endfor %}{{- '<|im_end|>\\n'"
    " }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant' }}{%- endif %}"
)
LLAMA_3 = (
    "{{- '<|begin_of_text|>' }}{%- for message in messages %}{{- '<|start_header_id|>' +"
    " message.role + '<|end_header_id|>\\n\\n' }}{%- if message.role == 'user' and tools %}{{-"
    ' \'Respond in the format {"name": ..., "parameters": ...}.\\n\' }}{%- for t in tools %}{{- t'
    " | tojson(indent=4) }}{{- '\\n\\n' }}{%- endfor %}{%- endif %}{%- if message.tool_calls %}{%-"
    " if not message.tool_calls|length == 1 %}{{- raise_exception('one call at a time') }}{%- endif"
    ' %}{%- set tool_call = message.tool_calls[0].function %}{{- \'{"name": "\' + tool_call.name +'
    " '\", ' }}{{- '\"parameters\": ' }}{{- tool_call.arguments | tojson }}{{- '}' }}{%- else %}{{-"
    " message.content | trim }}{%- endif %}{{- '<|eot_id|>' }}{%- endfor %}{%- if"
    " add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%-"
    " endif %}"
)
MISTRAL = (
    "{%- for message in messages %}{%- if message.role == 'user' %}{%- if tools %}{{-"
    " '[AVAILABLE_TOOLS] ' }}{{- tools | tojson }}{{- '[/AVAILABLE_TOOLS]' }}{%- endif %}{{-"
    " '[INST] ' + message.content + '[/INST]' }}{%- elif message.tool_calls %}{{- '[TOOL_CALLS] ['"
    " }}{%- for tool_call in message.tool_calls %}{%- set out = tool_call.function|tojson %}{{-"
    " out[:-1] }}{%- if tool_call.id|length != 9 %}{{- raise_exception('ids have nine characters')"
    " }}{%- endif %}{{- ', \"id\": \"' + tool_call.id + '\"}' }}{%- if not loop.last %}{{- ', '"
    " }}{%- endif %}{%- endfor %}{{- ']' + eos_token }}{%- else %}{{- ' ' + (message.content or '')"
    " + eos_token }}{%- endif %}{%- endfor %}"
)
MISTRAL_ARGS = (
    MISTRAL.partition("{%- elif")[0]
    + "{%- elif message.tool_calls %}{%- for tool_call in message.tool_calls %}"
    "{{- '[TOOL_CALLS]' + tool_call.function.name + '[CALL_ID]' + tool_call.id + '[ARGS]' }}"
    "{{- tool_call.function.arguments | tojson }}{%- endfor %}{{- eos_token }}"
    "{%- else %}{{- message.content + eos_token }}{%- endif %}{%- endfor %}"
)
GRANITE = (
    "{%- if tools %}{{- tools | tojson }}{%- endif %}{%- for message in messages %}{{-"
    " '<|start_of_role|>' + message.role + '<|end_of_role|>' }}{%- if message.tool_calls %}{{-"
    " '<|tool_call|>[' }}{%- for call in message.tool_calls %}{{- '{\"name\": ' +"
    " call.function.name|tojson + ', \"arguments\": ' + call.function.arguments|tojson + '}' }}{%-"
    " endfor %}{{- ']' }}{%- else %}{{- message.content }}{%- endif %}{{- eos_token + '\\n' }}{%-"
    " endfor %}{%- if add_generation_prompt %}{{- '<|start_of_role|>assistant<|end_of_role|>' }}{%-"
    " endif %}"
)

QWEN_3_CODER = (
    HERMES.partition("{{- '\\n<tool_call>")[0]
    + "{{- '\\n<tool_call>\\n<function=' + tool_call.name + '>\\n' }}"
    "{%- for key, value in tool_call.arguments|items %}{{- '<parameter=' + key + '>\\n' }}"
    "{{- (value if value is string else value | tojson) }}{{- '\\n</parameter>\\n' }}{%- endfor %}"
    "{{- '</function>\\n</tool_call>' }}{%- endfor %}{{- '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant' }}{%- endif %}"
)
GLM = (
    QWEN_3_CODER.partition("{{- '\\n<tool_call>")[0]
    + "{{- '\\n<tool_call>' + tool_call.name + '\\n' }}{%- for key, value in"
    " tool_call.arguments|items %}{{- '<arg_key>' + key + '</arg_key>\\n<arg_value>' }}{{- (value"
    " if value is string else value | tojson) }}{{- '</arg_value>\\n' }}{%- endfor %}{{-"
    " '</tool_call>' }}{%- endfor %}{{- '<|im_end|>\\n' }}{%- endfor %}{%- if"
    " add_generation_prompt %}{{- '<|im_start|>assistant' }}{%- endif %}"
)


@dataclass(frozen=True)
class Written:
    """style: without ids of special tokens. answer: a call of f as the model would write it,
    special tokens as text. two: whether an answer may hold two calls."""

    template: str
    special: tuple[str, ...]
    style: CallStyle
    answer: str
    two: bool = True

    def tokenizer(self) -> PreTrainedTokenizerFast:
        made = tiny_tokenizer()
        made.add_special_tokens({"additional_special_tokens": list(self.special)})
        made.chat_template = self.template
        return made


TEMPLATES = {
    "hermes": Written(
        HERMES,
        (),
        ObjectCalls("<tool_call>", "</tool_call>"),
        '<tool_call>\n{"name": "f", "arguments": {"n": 1}}\n</tool_call>',
    ),
    "llama 3": Written(
        LLAMA_3,
        ("<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
        BareCall("", arguments="parameters"),
        '{"name": "f", "parameters": {"n": 1}}',
        two=False,
    ),
    "mistral": Written(
        MISTRAL,
        ("[TOOL_CALLS]", "[INST]", "[/INST]"),
        ListedCalls("[TOOL_CALLS]"),
        '[TOOL_CALLS] [{"name": "f", "arguments": {"n": 1}, "id": "abcdefghi"}]',
    ),
    "mistral with [ARGS]": Written(
        MISTRAL_ARGS,
        ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"),
        NamedCalls("[TOOL_CALLS]", id_mark="[CALL_ID]", between="[ARGS]"),
        '[TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS]{"n": 1}',
    ),
    "mistral without ids": Written(
        MISTRAL_ARGS.replace(" + '[CALL_ID]' + tool_call.id", ""),
        ("[TOOL_CALLS]", "[ARGS]"),
        NamedCalls("[TOOL_CALLS]", between="[ARGS]"),
        '[TOOL_CALLS]f[ARGS]{"n": 1}',
    ),
    "granite": Written(
        GRANITE,
        ("<|start_of_role|>", "<|end_of_role|>"),
        ListedCalls("<|tool_call|>"),
        '<|tool_call|>[{"name": "f", "arguments": {"n": 1}}]',
    ),
    "qwen 3 coder": Written(
        QWEN_3_CODER,
        (),
        ElementCalls(
            "<tool_call>\n<function=",
            "</tool_call>",
            name_ends=">\n",
            key_opens="<parameter=",
            key_ends=">\n",
            value_ends="\n</parameter>\n",
            tail="</function>\n",
        ),
        "<tool_call>\n<function=f>\n<parameter=n>\n1\n</parameter>\n</function>\n</tool_call>",
    ),
    "glm": Written(
        GLM,
        (),
        ElementCalls(
            "<tool_call>",
            "</tool_call>",
            name_ends="\n",
            key_opens="<arg_key>",
            key_ends="</arg_key>\n<arg_value>",
            value_ends="</arg_value>\n",
        ),
        "<tool_call>f\n<arg_key>n</arg_key>\n<arg_value>1</arg_value>\n</tool_call>",
    ),
}
