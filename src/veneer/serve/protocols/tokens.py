"""The bodies of /tokenize and /detokenize, with vLLM's fields."""

from collections.abc import Iterator
from typing import Annotated

from veneer.serve.limits import MOST_IDS, MOST_TEXT
from veneer.serve.protocols.body import NO_EFFECT, Body, Length, NotSupported, OnlyFalse, OnlyTrue
from veneer.serve.protocols.conversation import (
    Messages,
    TemplateVariables,
    conversation,
    dump_messages,
)
from veneer.serve.protocols.request import Prompt, TextPrompt
from veneer.serve.protocols.sampling_body import ModelName, TokenId
from veneer.serve.protocols.tools import Tools
from veneer.serve.refusals import Fault


class TokenizeBody(TemplateVariables):
    """The body of /tokenize."""

    model: ModelName = ""
    """the base, or an adapter, whose conversations may begin differently"""
    prompt: Annotated[str, Length(1, MOST_TEXT)] | None = None
    """a text, without a chat template; or messages"""
    messages: Messages | None = None
    """a conversation; the start of the answer is added"""
    tools: Tools | None = None
    """with messages"""
    return_token_strs: bool = False
    """also return each token's text in the vocabulary"""
    add_generation_prompt: OnlyTrue = True
    """a new answer begins"""
    continue_final_message: OnlyFalse = False
    """a new answer begins"""
    add_special_tokens: Annotated[bool, NO_EFFECT] = True
    """the prompt is tokenised as for an answer"""
    chat_template: NotSupported = None
    """the base's own is used"""

    def conflicts(self) -> Iterator[Fault]:
        yield from super().conflicts()
        if (self.prompt is None) == (self.messages is None):
            yield Fault("prompt", "and messages: give one of them")
        if self.messages is None:
            for name in ("tools", "chat_template_kwargs"):
                if name in self.model_fields_set:
                    yield Fault(name, "are for messages")

    def prompt_to_encode(self) -> Prompt:
        """Returns the prompt to encode. Refusal: 400."""
        if self.messages is None:
            return TextPrompt(text=self.prompt)
        variables = self.chat_template_kwargs
        return conversation(dump_messages(self.messages), self.tools, variables=variables)


class DetokenizeBody(Body):
    """The body of /detokenize."""

    model: ModelName = ""
    """the base, or an adapter"""
    tokens: Annotated[list[TokenId], Length(0, MOST_IDS)]
    """token ids"""
