"""Encodes prompts on a thread of its own: the base's template in its process, then the tokenizer.

A prompt that is too long is refused before it is queued. Tokenizers change while they encode, so
this one is a copy that nothing else uses.
"""

import asyncio
import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from functools import lru_cache
from typing import Any

from veneer.adapters.preamble import NONE, Preamble
from veneer.data.batching import used_length
from veneer.data.examples import Example
from veneer.data.template.new_tokens import extended
from veneer.data.template.rendering import retry_refused
from veneer.data.template.template import ChatTemplate
from veneer.decoding.tool_calls.call_style import NO_TOOLS, call_style
from veneer.decoding.tool_calls.calls import CallStyle
from veneer.errors import VeneerError
from veneer.evaluation.classify import encode_texts
from veneer.serve.limits import MOST_CLASSIFIED_TOKENS, MOST_PROMPTS_WAITING
from veneer.serve.protocols.request import ChatPrompt, Prompt, TextPrompt
from veneer.serve.refusals import Refusal, refusal_of

TOKENIZERS_KEPT = 8
"""Tokenizers with adapters' new tokens; each holds a whole vocabulary."""


class Prompts:
    """Encodes prompts with the base's template and tokenizer.

    positions: the model's, for prompt and answer together; None: unbounded. ids: number of the
    model's embedding rows.
    """

    def __init__(self, tokenizer: Any, *, positions: int | None, ids: int | None) -> None:
        self.tokenizer = copy.deepcopy(tokenizer)
        self.positions, self.ids = positions, ids
        self.template = ChatTemplate(self.tokenizer)
        self._extended = lru_cache(TOKENIZERS_KEPT)(
            lambda tokens: ChatTemplate(extended(self.tokenizer, tokens))
        )
        self.style: CallStyle | None = call_style(self.template)
        self._longest = max((len(token) for token in self.tokenizer.get_vocab()), default=1)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="veneer-prompts")
        self._waiting = 0

    async def encoded(
        self, prompts: Sequence[Prompt], preamble: Preamble = NONE
    ) -> list[list[int]]:
        """Encodes each prompt. Refusal: the template fails, it is too long, or too many wait."""
        if not preamble.tokens and all(
            isinstance(prompt, TextPrompt) and prompt.ids is not None for prompt in prompts
        ):
            return [self.encode(prompt) for prompt in prompts]  # nothing is tokenised
        return await self._run(lambda: [self.encode(prompt, preamble) for prompt in prompts])

    async def examples(
        self, texts: Sequence[str], preamble: Preamble, prefix_length: int, param: str
    ) -> list[Example]:
        """Encodes texts for a score head as training does.

        prefix_length: positions of the adapter's prefix. param: the field of the texts. Refusal:
        one is too long, all are, or too many requests wait.
        """

        def encode() -> list[Example]:
            for text in texts:
                self._check_length(len(text), param)
            examples = encode_texts(self._template(preamble.tokens), texts)
            self._check_texts([used_length(example) for example in examples], prefix_length, param)
            return examples

        return await self._run(encode, param)

    def _check_texts(self, lengths: Sequence[int], prefix_length: int, param: str) -> None:
        """Raises Refusal if a text has more tokens than positions, or all have too many."""
        places = None if self.positions is None else self.positions - prefix_length
        code = "context_length_exceeded"
        if places is not None and (longest := max(lengths)) > places:
            message = (
                f"{param}: text {lengths.index(longest)} has {longest:,} tokens, and there are"
                f" {places:,} places. Shorten it."
            )
            raise Refusal(400, message, param, code)
        if (tokens := sum(lengths)) > MOST_CLASSIFIED_TOKENS:
            message = (
                f"{param}: the texts have {tokens:,} tokens, {MOST_CLASSIFIED_TOKENS:,} may. Send"
                " fewer at once."
            )
            raise Refusal(400, message, param, code)

    async def strings(self, ids: Sequence[int]) -> list[str]:
        return await self._run(
            lambda: [str(token) for token in self.tokenizer.convert_ids_to_tokens(list(ids))]
        )

    async def text(self, ids: Sequence[int]) -> str:
        """Decodes ids, special tokens included."""
        if (
            wrong := next((i for i in ids if self.ids is not None and i >= self.ids), None)
        ) is not None:
            raise Refusal(400, f"{wrong} is no token: there are {self.ids:,}.", "tokens")
        return await self._run(lambda: str(self.tokenizer.decode(list(ids))))

    async def _run(self, function: Callable[[], Any], param: str = "messages") -> Any:
        if self._waiting >= MOST_PROMPTS_WAITING:
            raise Refusal(
                429, f"{self._waiting:,} prompts wait to be read, {MOST_PROMPTS_WAITING:,} may."
            )
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, function)
        except VeneerError as fault:
            raise refusal_of(fault, param=param) from None
        finally:
            self._waiting -= 1

    def encode(self, prompt: Prompt, preamble: Preamble = NONE) -> list[int]:
        """Encodes a prompt. Raises Refusal, DataError."""
        if isinstance(prompt, ChatPrompt):
            return self._chat(prompt, preamble)
        if prompt.ids is not None:
            ids = list(prompt.ids)
        else:
            text = prompt.text or ""
            self._check_length(len(text))
            ids = list(self._template(preamble.tokens).tokenizer(text)["input_ids"])
        if not ids:
            raise Refusal(400, "The prompt has no tokens.", "prompt")
        known = self.ids
        if known is not None and preamble.tokens:
            known = max(known, len(self._template(preamble.tokens).tokenizer))
        if known is not None and max(ids) >= known:
            raise Refusal(400, f"prompt: {max(ids)} is no token: there are {known:,}.", "prompt")
        return ids

    def _template(self, tokens: tuple[str, ...]) -> ChatTemplate:
        """Returns the template over a tokenizer with these new tokens. Only for the prompts'
        thread."""
        return self._extended(tokens) if tokens else self.template

    def _chat(self, prompt: ChatPrompt, preamble: Preamble) -> list[int]:
        if prompt.tools and self.style is None:
            raise Refusal(400, NO_TOOLS, "tools")
        messages = preamble.opening(prompt.messages)
        self._check_length(sum(len(str(message["content"])) for message in messages))
        retry_refused()  # another conversation may have crashed it
        template = (
            self._template(preamble.tokens)
            .on(date.today())
            .telling({**preamble.variables, **prompt.variables})
        )
        return template.encode_prompt(
            messages, tools=prompt.tools, most_characters=self._most_characters
        )

    @property
    def _most_characters(self) -> int | None:
        """Returns the longest text that can fit, whatever its tokens are."""
        return None if self.positions is None else self.positions * self._longest

    def _check_length(self, characters: int, param: str = "messages") -> None:
        """Refuses a text that cannot fit before a template or a tokenizer reads it."""
        if self._most_characters is not None and characters > self._most_characters:
            raise Refusal(
                400,
                f"The prompt has {characters:,} characters: more than the model's"
                f" {self.positions:,} positions hold.",
                param,
                "context_length_exceeded",
            )

    @staticmethod
    def most_new(ids: Sequence[int], max_new: int | None, places: int, prefix_length: int) -> int:
        """Returns how many new tokens an answer may have.

        places: for prompt and answer together. Refusal: the prompt is too long.
        """
        left = places - len(ids)
        if left < 1 or (max_new or 1) > left:
            asked = f"{len(ids):,} tokens of prompt" + (
                f" and {max_new:,} new ones" if max_new else ""
            )
            behind = f", behind the adapter's prefix of {prefix_length:,}" if prefix_length else ""
            raise Refusal(
                400,
                f"This is too long: {asked}, and there are {places:,} places for both{behind}.",
                "max_tokens" if left >= 1 else "messages",
                "context_length_exceeded",
            )
        return max_new or left

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
