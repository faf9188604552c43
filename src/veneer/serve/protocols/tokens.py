"""/tokenize and /detokenize, as vLLM has them: what a prompt is in ids, and ids in text."""

from __future__ import annotations

from typing import Any

from veneer.bounds import TOKEN
from veneer.serve.limits import MOST_IDS, MOST_TEXT
from veneer.serve.protocols.conversation import MESSAGES, VARIABLES, conversation, variables
from veneer.serve.protocols.fields import Field, Flag, Listed, Num, Only, Refused, Text, read_fields
from veneer.serve.protocols.request import ChatPrompt, GenerationRequest, TextPrompt
from veneer.serve.protocols.sampling_fields import MODEL
from veneer.serve.protocols.tools import TOOLS
from veneer.serve.refusals import Fault, refuse

_MODEL = Field(
    "model", MODEL.kind, "the base, or an adapter, whose conversations may begin otherwise"
)
TOKENIZE = (
    _MODEL,
    Field("prompt", Text(MOST_TEXT, 1), "a text, tokenised as it stands; or messages"),
    Field("messages", MESSAGES, "a conversation, with what opens the answer behind it"),
    Field("tools", TOOLS, "with messages"),
    VARIABLES,
    Field("return_token_strs", Flag(), "what each id is in the vocabulary, too"),
    Field("add_generation_prompt", Only((True,), "an answer is begun"), "", no_effect=True),
    Field("continue_final_message", Only((False,), "an answer is begun anew"), "", no_effect=True),
    Field(
        "add_special_tokens",
        Only((True, False)),
        "as for an answer, whatever it says",
        no_effect=True,
    ),
    Field("chat_template", Refused("the base's own is used"), ""),
)
DETOKENIZE = (_MODEL, Field("tokens", Listed(Num(TOKEN), MOST_IDS), "ids", required=True))


def tokenized(body: dict[str, Any]) -> tuple[GenerationRequest, bool]:
    """What is to be tokenised, and whether the strings are wanted. Refusal: 400."""
    values = read_fields(TOKENIZE, body)
    given = [name for name in ("prompt", "messages") if name in values]
    if len(given) != 1:
        raise refuse([Fault("prompt", "and messages: give one of them")])
    if alone := [
        name
        for name in ("tools", "chat_template_kwargs")
        if name in values and "messages" not in values
    ]:
        raise refuse([Fault(name, "are for messages") for name in alone])
    prompt = TextPrompt(text=values["prompt"]) if "prompt" in values else None
    if prompt is None:
        asked = conversation(values["messages"], values.get("tools"))
        prompts: tuple[Any, ...] = (ChatPrompt(*asked, variables(values)),)
    else:
        prompts = (prompt,)
    return GenerationRequest(model=values.get("model", ""), prompts=prompts), bool(
        values.get("return_token_strs")
    )


def detokenized(body: dict[str, Any]) -> tuple[str, list[int]]:
    """The model, which may be empty, and the ids."""
    values = read_fields(DETOKENIZE, body)
    return values.get("model", ""), [int(token) for token in values["tokens"]]
