"""Answers to prompts as people write them: rendered, generated and decoded."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

from veneer.data.template.user_prompt import UserPrompt, prompt_ids, prompt_list
from veneer.decoding.generate import generate, limits_of
from veneer.decoding.schedule.lookup import LookupMode
from veneer.decoding.text import TextStream, text_of
from veneer.errors import ConfigError
from veneer.models.frozen_base import FrozenBase


class Answer(str):
    """The text of an answer. cut_after: the number of tokens at which the limit cut it; None if it
    ended by itself."""

    cut_after: int | None

    def __new__(cls, text: str, *, cut_after: int | None = None) -> Self:
        answer = super().__new__(cls, text)
        answer.cut_after = cut_after
        return answer


def answer_prompts(
    base: FrozenBase,
    prompt: UserPrompt | Sequence[UserPrompt],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    system: str | None = None,
    variables: Mapping[str, Any] | None = None,
    lookup: LookupMode = "auto",
    on_text: Callable[[str], None] | None = None,
) -> Answer | list[Answer]:
    """Answers a prompt, or a list of prompts together, with the adapters that act now.

    The arguments are those of Base.generate.
    """
    _refuse_none(temperature=temperature, top_p=top_p, seed=seed, max_new_tokens=max_new_tokens)
    prompts, several = prompt_list(prompt)
    if several and on_text is not None:
        raise ConfigError(
            "on_text takes a single prompt, and several are given",
            next_step="Give one prompt at a time to stream its answer.",
        )

    def send(text: str) -> None:
        if on_text is not None and text:
            on_text(text)

    with base.routing.held():  # a switch in another thread concerns later answers
        tokenizer = base.acting_tokenizer
        stream = TextStream(tokenizer)
        preamble = base.preamble.overridden(system, variables)
        prompts_ids = [prompt_ids(tokenizer, prompt, preamble) for prompt in prompts]
        answer_ids = generate(
            base,
            prompts_ids,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            lookup=lookup,
            on_token=None if on_text is None else lambda token: send(stream.push(token)),
        )
        limits = limits_of(base, prompts_ids, max_new_tokens)
    send(stream.end())
    answers = [
        Answer(text_of(tokenizer, ids), cut_after=limit if len(ids) >= limit else None)
        for ids, limit in zip(answer_ids, limits, strict=True)
    ]
    return answers if several else answers[0]


def _refuse_none(**numbers: object) -> None:
    if missing := [name for name, value in numbers.items() if value is None]:
        raise ConfigError(
            f"{', '.join(missing)} is None, not a number", next_step="Leave it out for the default."
        )
