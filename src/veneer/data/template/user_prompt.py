"""Reads prompts as Python code gives them: a text, the messages of a conversation, or a list."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from veneer.adapters.preamble import Preamble
from veneer.data.examples import RowFault
from veneer.data.files.formats import to_conversation
from veneer.data.template.template import ChatTemplate
from veneer.errors import ConfigError
from veneer.files.nesting import is_text, walk
from veneer.wording import kind_of

UserPrompt = str | Sequence[Mapping[str, Any]]


def prompt_list(prompt: Any) -> tuple[list[UserPrompt], bool]:
    """Returns the prompts, and whether they came as a list."""
    if isinstance(prompt, str):
        return [prompt], False
    items = _items(prompt)
    if any(isinstance(item, Mapping) for item in items):
        return [items], False
    return items, True


def prompt_ids(tokenizer: Any, prompt: UserPrompt, preamble: Preamble) -> list[int]:
    """Returns the ids that generation starts from. ConfigError: it is not a prompt, or it needs a
    chat template and the base has none."""
    messages = prompt_messages(tokenizer, prompt, preamble)
    if tokenizer.chat_template is None:
        return list(tokenizer(prompt)["input_ids"])
    return ChatTemplate(tokenizer, variables=preamble.variables).encode_prompt(messages)


def prompt_messages(tokenizer: Any, prompt: UserPrompt, preamble: Preamble) -> list[dict[str, Any]]:
    """Returns the messages before the answer; a text is one user message. Raises ConfigError like
    prompt_ids."""
    if not all(is_text(value) for value, _ in walk(prompt) if isinstance(value, str)):
        raise ConfigError("the prompt is not UTF-8", next_step="Give it as UTF-8 text.")
    messages = None if isinstance(prompt, str) else _messages(prompt)
    if tokenizer.chat_template is None:
        if messages is not None:
            raise ConfigError("this base has no chat template: give the prompt as a string")
        if preamble:
            raise ConfigError(
                "this base has no chat template: it takes neither a system turn nor variables"
            )
    return preamble.opening(messages or [{"role": "user", "content": prompt}])


def _messages(prompt: Any) -> list[dict[str, Any]]:
    """Reads messages as those of a row are read."""
    messages = _items(prompt)
    if wrong_items := [item for item in messages if not isinstance(item, Mapping)]:
        raise _not_a_prompt(wrong_items[0])
    try:
        return to_conversation([dict(message) for message in messages], None)[0]
    except RowFault as fault:
        raise ConfigError(
            "the messages are no conversation", [fault.message], fault.next_step
        ) from None


def _items(prompt: Any) -> list[Any]:
    if isinstance(prompt, bytes | Mapping) or not isinstance(prompt, Iterable):
        raise _not_a_prompt(prompt)
    return [*prompt]


def _not_a_prompt(value: object) -> ConfigError:
    step = (
        "Give a text, or a list of messages: [{'role': 'user', 'content': '…'}]; several as a list"
        " of such."
    )
    return ConfigError(f"a prompt is {kind_of(value)}, and no text or conversation", next_step=step)
