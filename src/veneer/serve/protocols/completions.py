"""/v1/completions: continues a text, or token ids.

Source: platform.openai.com/docs/api-reference/completions, with vLLM's fields.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Annotated, Any, cast

from veneer.bounds import CHOICES, LOGPROBS, NEW_TOKENS, Number
from veneer.decoding.sampling.sampling import Sampling
from veneer.serve.limits import MOST_IDS, MOST_PROMPTS, MOST_TEXT
from veneer.serve.protocols.answer_formats import ShapedBody, only_shape
from veneer.serve.protocols.answers import (
    AnswerDelta,
    ApiProtocol,
    GeneratedAnswer,
    ResponseHead,
    TokenLogprob,
)
from veneer.serve.protocols.body import BY_TYPE, Length, NotSupported, Num, OnlyTrue
from veneer.serve.protocols.chunks import ChoiceWriter
from veneer.serve.protocols.request import GenerationRequest, TextPrompt
from veneer.serve.protocols.sampling_body import ChoicesBody, TokenId
from veneer.serve.refusals import Fault

_Text = Annotated[str, Length(1, MOST_TEXT)]
_Ids = Annotated[list[TokenId], Length(1, MOST_IDS)]


class CompletionBody(ShapedBody, ChoicesBody):
    """The body of /v1/completions."""

    prompt: Annotated[
        _Text
        | Annotated[list[_Text], Length(1, MOST_PROMPTS)]
        | _Ids
        | Annotated[list[_Ids], Length(1, MOST_PROMPTS)],
        BY_TYPE,
    ]
    """one or several texts, or lists of token ids; no chat template is applied"""
    max_tokens: Annotated[int, Num(Number(int, 0, NEW_TOKENS.most))] = 16
    """longest answer; default 16; 0 with echo: the prompt alone"""
    logprobs: Annotated[int, Num(LOGPROBS)] | None = None
    """return each token's log probability, and that of this many of the likeliest tokens"""
    best_of: Annotated[int, Num(CHOICES)] | None = None
    """must equal n"""
    echo: bool = False
    """answers begin with the prompt, and logprobs with those of its tokens"""
    add_special_tokens: OnlyTrue = True
    """the tokenizer adds its own"""
    messages: NotSupported = None
    """use prompt, or /v1/chat/completions"""
    suffix: NotSupported = None
    """the base continues texts; it cannot fill in the middle"""

    def conflicts(self) -> Iterator[Fault]:
        yield from super().conflicts()
        if self.best_of not in (None, self.n):
            yield Fault("best_of", "is not n: all answers are returned")
        if not self.max_tokens and not self.echo:
            yield Fault("max_tokens", "is 0: an answer needs a token, or echo")

    def sampling(self, **settings: Any) -> Sampling:
        return super().sampling(logprobs=self.logprobs, **settings)

    def generation_request(self) -> GenerationRequest:
        return replace(
            self.request_for(*self._prompts()),
            max_new_tokens=self.max_tokens or 1,
            shape=only_shape(*self.shapes()),
            repeats_prompt=self.echo,
            prompt_only=not self.max_tokens,
        )

    def _prompts(self) -> list[TextPrompt]:
        if isinstance(self.prompt, str):
            return [TextPrompt(text=self.prompt)]
        if isinstance(self.prompt[0], int):
            return [TextPrompt(ids=tuple(self.prompt))]
        return [
            TextPrompt(text=prompt) if isinstance(prompt, str) else TextPrompt(ids=tuple(prompt))
            for prompt in cast(list[str | list[int]], self.prompt)
        ]


class CompletionWriter(ChoiceWriter):
    """Streams each answer's text and its end."""

    response_kind = chunk_kind = "text_completion"

    def __init__(self, head: ResponseHead, request: GenerationRequest) -> None:
        super().__init__(head, request)
        self._lengths: Counter[int] = Counter()  # characters of each answer's tokens

    def answer_fields(self, answer: GeneratedAnswer) -> dict[str, Any]:
        return self.text_fields(answer.text)

    def text_fields(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def logprobs(self, tokens: Sequence[TokenLogprob], offset: int = 0) -> dict[str, Any]:
        lengths = [len(token.text) for token in tokens]
        alternatives = [_by_text(token) for token in tokens]
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": alternatives if self.request.sampling.logprobs else None,
            "text_offset": [*accumulate(lengths[:-1], initial=offset)] if lengths else [],
        }

    def write(self, delta: AnswerDelta) -> Iterator[str]:
        index, logprobs = delta.index, None
        if delta.logprobs:
            logprobs = self.logprobs(delta.logprobs, self._lengths[index])
            self._lengths[index] += sum(len(token.text) for token in delta.logprobs)
        if delta.logprobs or delta.end is not None:
            yield self.chunk(index, self.text_fields(delta.text), logprobs, delta.end)
        elif delta.text:
            yield self.text_chunk(index, delta.text)


def _by_text(token: TokenLogprob) -> dict[str, float | None] | None:
    """Returns the likeliest tokens by their text; of tokens with the same text, the likeliest."""
    if token.logprob is None:
        return None
    by_text: dict[str, float | None] = {}
    for other in token.alternatives:
        by_text.setdefault(other.text, other.logprob)
    return by_text


PROTOCOL = ApiProtocol("cmpl-", CompletionBody, CompletionWriter)
