"""Encodes prompts on a thread of its own: the base's template in its process, then the tokenizer.

A prompt that is too long is refused before it is queued (token_budget.py). The prompts of requests
take turns on the thread. Tokenizers change while they encode, so
this one is a copy that nothing else uses.
"""

import asyncio
import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from functools import lru_cache, partial
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
from veneer.serve.engine.token_budget import TokenBudget
from veneer.serve.limits import MOST_CLASSIFIED_TOKENS, MOST_PROMPT_TOKENS, MOST_PROMPTS_WAITING
from veneer.serve.protocols.request import ChatPrompt, Prompt, TextPrompt
from veneer.serve.refusals import Refusal, refusal_of

TOKENIZERS_KEPT = 8
"""Tokenizers with adapters' new tokens; each holds a whole vocabulary."""
PROMPT = "the prompt"
"""Names a prompt in an error."""


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
        self,
        prompts: Sequence[Prompt],
        preamble: Preamble = NONE,
        *,
        places: int | None = None,
        prefix_length: int = 0,
    ) -> list[list[int]]:
        """Encodes each prompt.

        places: of a prompt and its answer, behind an adapter's prefix of `prefix_length` tokens;
        None: no answer follows. Refusal: the template fails, a prompt is too long or all are, or
        too many wait.
        """
        most = max(MOST_PROMPT_TOKENS, places or self.positions or 0)
        budget = TokenBudget(places, most, "messages", prefix_length=prefix_length)
        encoding = [partial(self.encode, prompt, preamble, budget) for prompt in prompts]
        if not preamble.tokens and all(
            isinstance(prompt, TextPrompt) and prompt.ids is not None for prompt in prompts
        ):
            return [encode() for encode in encoding]  # nothing is tokenised
        return await self._run_all(encoding, "messages")

    async def examples(
        self, texts: Sequence[str], preamble: Preamble, prefix_length: int, param: str
    ) -> list[Example]:
        """Encodes texts for a score head as training does.

        prefix_length: positions of the adapter's prefix. param: the field of the texts. Refusal:
        one is too long, all are, or too many requests wait.
        """
        places = None if self.positions is None else self.positions - prefix_length
        budget = TokenBudget(places, MOST_CLASSIFIED_TOKENS, param, prefix_length=prefix_length)
        for text in texts:
            self._check_length(len(text), param)

        def encode(number: int) -> Example:
            template, text, what = self._template(preamble.tokens), texts[number], f"text {number}"
            budget.check(text, template.tokenizer, what)
            (example,) = encode_texts(template, [text], first=number + 1)
            budget.take(used_length(example), what)
            return example

        encoding = [partial(encode, number) for number in range(len(texts))]
        return await self._run_all(encoding, param)

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

    async def _run(self, function: Callable[[], Any]) -> Any:
        (result,) = await self._run_all([function], "messages")
        return result

    async def _run_all(self, functions: Sequence[Callable[[], Any]], param: str) -> list[Any]:
        """Runs functions one by one on the prompts' thread, other requests' functions between
        them."""
        if self._waiting >= MOST_PROMPTS_WAITING:
            raise Refusal(
                429, f"{self._waiting:,} prompts wait to be read, {MOST_PROMPTS_WAITING:,} may."
            )
        self._waiting += 1
        run = asyncio.get_running_loop().run_in_executor
        try:
            return [await run(self._thread, function) for function in functions]
        except VeneerError as fault:
            raise refusal_of(fault, param=param) from None
        finally:
            self._waiting -= 1

    def encode(
        self, prompt: Prompt, preamble: Preamble = NONE, budget: TokenBudget | None = None
    ) -> list[int]:
        """Encodes a prompt. budget: of its request. Raises Refusal, DataError."""
        ids = self._ids(prompt, preamble, budget)
        if budget is not None:
            budget.take(len(ids), PROMPT)
        if isinstance(prompt, ChatPrompt):
            return ids
        if not ids:
            raise Refusal(400, "The prompt has no tokens.", "prompt")
        known = self.ids
        if known is not None and preamble.tokens:
            known = max(known, len(self._template(preamble.tokens).tokenizer))
        if known is not None and max(ids) >= known:
            raise Refusal(400, f"prompt: {max(ids)} is no token: there are {known:,}.", "prompt")
        return ids

    def _ids(self, prompt: Prompt, preamble: Preamble, budget: TokenBudget | None) -> list[int]:
        if isinstance(prompt, TextPrompt) and prompt.ids is not None:
            return list(prompt.ids)
        template = self._template(preamble.tokens)

        def refuse_long(text: str) -> None:
            self._check_length(len(text))
            if budget is not None:
                budget.check(text, template.tokenizer, PROMPT)

        if isinstance(prompt, ChatPrompt):
            return self._chat(prompt, preamble, template, refuse_long)
        text = prompt.text or ""
        refuse_long(text)
        return list(template.tokenizer(text)["input_ids"])

    def _template(self, tokens: tuple[str, ...]) -> ChatTemplate:
        """Returns the template over a tokenizer with these new tokens. Only for the prompts'
        thread."""
        return self._extended(tokens) if tokens else self.template

    def _chat(
        self,
        prompt: ChatPrompt,
        preamble: Preamble,
        template: ChatTemplate,
        refuse_long: Callable[[str], None],
    ) -> list[int]:
        if prompt.tools and self.style is None:
            raise Refusal(400, NO_TOOLS, "tools")
        messages = preamble.opening(prompt.messages)
        self._check_length(sum(len(str(message["content"])) for message in messages))
        retry_refused()  # another conversation may have crashed it
        variables = {**preamble.variables, **prompt.variables}
        template = template.on(date.today()).telling(variables)
        return template.encode_prompt(messages, tools=prompt.tools, refuse_long=refuse_long)

    def _check_length(self, characters: int, param: str = "messages") -> None:
        """Refuses a text that cannot fit, whatever its tokens are, before a template or a tokenizer
        reads it."""
        if self.positions is not None and characters > self.positions * self._longest:
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
