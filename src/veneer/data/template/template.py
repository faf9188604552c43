"""Encodes rows to token ids and a loss mask with the base's chat template.

A row passes through each of

control_names.py    hides names of control tokens in its messages
rendering.py        renders the conversation and its beginnings
turns.py            finds the answers in the rendering (long_turns.py: in a long prompt)
tokens.py           tokenises it, split exactly there
encoded_row.py      marks the tokens of the answers

A tokenizer without a template accepts plain text, and prompt/completion rows: prompt, completion
and the end token joined. Plain text rows are tokenised as they are, control tokens included.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from datetime import date
from itertools import zip_longest
from typing import Any

from veneer.adapters.preamble import check_variables, without_none
from veneer.data.examples import Problem, Row, RowFault, RowRef, TrainOn, refusal
from veneer.data.template.call_arguments import needs_text_arguments, with_text_arguments
from veneer.data.template.control_names import Sentinels, TokenFault
from veneer.data.template.encoded_row import EncodedRow, mask_tokens, without_end
from veneer.data.template.long_turns import prompt_borders
from veneer.data.template.rendering import Conversation, Template, beginnings, start_rendering
from veneer.data.template.sandbox import TemplateFault, prepared
from veneer.data.template.tokens import MarkedText, TextTokenizer, TokenizedText
from veneer.data.template.turns import RenderedRow, plan_chat
from veneer.data.template.unfit import check_contents, check_text, check_tools, unfit
from veneer.errors import DataError

_CHUNK = 1024  # rows tokenised together: enough to use all cores, few enough for memory

PreparedChat = tuple[Conversation, int] | RowFault | None
"""The conversation to render, and the number of control tokens' names hidden in it; None: no
template."""
Messages = Sequence[dict[str, Any]]
Tools = list[dict[str, Any]] | None


class ChatTemplate:
    """The chat template of one tokenizer (a transformers tokenizer backed by the tokenizers
    library).

    today      the date that templates may write; fixed for the life of the object
    variables  template variables (enable_thinking, ...); those that are None are left out
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        today: date | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise DataError(
                f"{type(tokenizer).__name__} is not backed by the tokenizers library",
                next_step="Use a base with a tokenizer.json.",
            )
        self.tokenizer = tokenizer
        self.today = today or date.today()
        template = tokenizer.chat_template
        named = [*template.values()] if isinstance(template, dict) else [template or ""]
        if kinds := sorted({type(text).__name__ for text in named if not isinstance(text, str)}):
            raise DataError(
                f"the tokenizer's chat template is not text ({', '.join(kinds)})",
                next_step=(
                    "Correct chat_template in tokenizer_config.json, or copy it from the original"
                    " model."
                ),
            )
        self.source: str = (
            json.dumps(template, sort_keys=True) if isinstance(template, dict) else template or ""
        )
        """The template's text; empty if the tokenizer has none."""
        self._names = Sentinels(tokenizer, self.source)
        self._tokens = TextTokenizer(tokenizer, self._names)
        self._templates: dict[tuple[str, date], Template] = {}
        self._text_arguments: dict[int, bool] = {}
        self.variables: dict[str, Any] = {}
        self._hidden: dict[str, Any] = {}
        if variables:
            self._set_variables(variables)
        self._begin_ids = self._find_begin_ids()
        self.stop_ids = self._find_stop_ids()
        """Ids that end an answer: the end-of-text token, and the token that ends an
        assistant turn."""

    @property
    def writes_date(self) -> bool:
        """Whether the template writes the date, so that other days give other tokens."""
        return "strftime_now" in self.source

    def on(self, today: date) -> ChatTemplate:
        """Returns the same template on another day, for processes that run for days."""
        if today == self.today or not self.writes_date:
            return self
        changed = copy.copy(self)
        changed.today = today
        return changed

    def telling(self, variables: Mapping[str, Any]) -> ChatTemplate:
        """Returns the same template with more variables. Raises DataError for one that it does not
        read."""
        if not variables:
            return self
        changed = copy.copy(self)
        changed._set_variables({**self.variables, **variables})
        return changed

    def _set_variables(self, variables: Mapping[str, Any]) -> None:
        check_variables(variables)
        self.variables = without_none(variables)
        unread = [name for name in self.variables if not re.search(rf"\b{name}\b", self.source)]
        if unread:
            headline = f"the chat template reads no variable {', '.join(unread)}"
            raise DataError(
                headline, next_step="Remove it, or find its name in the base's chat_template."
            )
        try:
            self._hidden = self._names.hidden(self.variables)
        except TokenFault as fault:
            raise DataError(f"a template variable cannot be written: {fault}") from None

    def fingerprint(self) -> str:
        """Returns the SHA-256 of the template's text, hexadecimal."""
        return hashlib.sha256(self.source.encode()).hexdigest()

    def render(
        self, messages: Messages, *, tools: Tools = None, add_generation_prompt: bool = False
    ) -> str:
        """Renders the conversation as text. Raises DataError with the template's message if it
        refuses."""
        try:
            conversation = self._conversation([prepared(message) for message in messages], tools)
            text = conversation.text(len(messages), add_generation_prompt=add_generation_prompt)
            check_text(text)
            return text
        except (TemplateFault, TokenFault) as fault:
            raise DataError(str(fault)) from None

    def encode_prompt(
        self,
        messages: Messages,
        *,
        tools: Tools = None,
        refuse_long: Callable[[str], None] = lambda text: None,
    ) -> list[int]:
        """Returns the ids that generation starts from: the conversation and the opening of the
        answer.

        For the messages before a trained turn, these are the first ids of that row.
        refuse_long: gets the rendered text before it is tokenised, and raises if it is too long.
        Raises DataError.
        """
        try:
            hidden, hidden_tools, _ = self._names.hide(messages, tools)
            if not self.source:
                text = self._single_user_text(hidden, hidden_tools)
                refuse_long(self._names.show(text))
                return [*self._begin_ids, *self._encode_or_raise(MarkedText(text)).ids]
            conversation = self._conversation(hidden, hidden_tools)
            text = conversation.text(len(hidden), add_generation_prompt=True)
            refuse_long(self._names.show(text))
            check_text(text)
            check_tools(messages, tools, self._names.show(text), conversation.template)
            check_contents(hidden, text)
            return self._encode_or_raise(MarkedText(text, prompt_borders(conversation, text))).ids
        except (RowFault, TemplateFault, TokenFault) as fault:
            raise DataError(f"the conversation cannot be encoded: {fault}") from None

    def encode_row(self, row: Row, *, train_on: TrainOn) -> tuple[list[int], list[bool]]:
        """Encodes a row that is one example: (ids, trained), trained[0] always False. Raises
        DataError."""
        (encoded,) = self.encode_rows([row], train_on=train_on)
        if isinstance(encoded, Problem):
            raise refusal("the row cannot be encoded", [encoded])
        if len(encoded) > 1:
            raise DataError(
                f"the row becomes {len(encoded)} examples, one for each answer",
                next_step="Use encode_rows.",
            )
        return encoded[0].ids, encoded[0].trained

    def encode_rows(
        self, rows: Sequence[Row], *, train_on: TrainOn
    ) -> list[list[EncodedRow] | Problem]:
        """Encodes each row to its examples, or to the Problem that prevents it.

        Most rows become one example. A row becomes several if the template renders earlier answers
        differently later.
        """
        chunks = [rows[at : at + _CHUNK] for at in range(0, len(rows), _CHUNK)]
        results: list[list[EncodedRow] | Problem] = []
        with ThreadPoolExecutor(1) as executor:
            pending = [self._start_rendering_rows(chunk, executor) for chunk in chunks[:1]]
            for chunk, next_chunk in zip_longest(chunks, chunks[1:]):
                chats, wait = pending.pop()
                wait()
                if next_chunk is not None:  # rendered in another process meanwhile
                    pending.append(self._start_rendering_rows(next_chunk, executor))
                results += self._encode_chunk(chunk, chats, train_on)
        return results

    def _start_rendering_rows(
        self, rows: Sequence[Row], executor: Executor
    ) -> tuple[list[PreparedChat], Callable[[], None]]:
        """Starts to render each row and its beginnings. Returns the chats, and a function that
        waits."""
        chats = [self._prepare_chat(row) for row in rows]
        renderable = [chat[0] for chat in chats if isinstance(chat, tuple)]
        return chats, start_rendering(
            [(chat, beginnings(chat.messages)) for chat in renderable], executor
        )

    def _encode_chunk(
        self, rows: Sequence[Row], chats: Sequence[PreparedChat], train_on: TrainOn
    ) -> list[list[EncodedRow] | Problem]:
        rendered_rows = [
            self._render_row(row, chat, train_on) for row, chat in zip(rows, chats, strict=True)
        ]
        tokens = iter(
            self._tokens.encode(
                [
                    rendered.cut
                    for examples in rendered_rows
                    if isinstance(examples, list)
                    for rendered in examples
                ]
            )
        )
        results: list[list[EncodedRow] | Problem] = []
        for row, examples in zip(rows, rendered_rows, strict=True):
            if isinstance(examples, RowFault):
                results.append(examples.at(row.ref))
                continue
            encoded: list[EncodedRow] = []
            fault = None
            for rendered in examples:
                tokenized = next(tokens)
                if isinstance(tokenized, TokenFault):
                    fault = fault or tokenized
                    continue
                encoded.append(mask_tokens(tokenized, rendered))
                if row.unfinished and rendered is examples[-1]:
                    encoded[-1] = without_end(encoded[-1], tokenized, rendered, self.stop_ids)
            results.append(RowFault("D202", str(fault)).at(row.ref) if fault else encoded)
        return results

    def _prepare_chat(self, row: Row) -> PreparedChat:
        if row.text is not None or not self.source:
            return None
        try:
            messages, tools, control = self._names.hide(row.messages, row.tools)
            return self._conversation(messages, tools), control
        except (RowFault, TemplateFault, TokenFault) as fault:
            return unfit(fault)

    def _render_row(
        self, row: Row, chat: PreparedChat, train_on: TrainOn
    ) -> list[RenderedRow] | RowFault:
        try:
            if isinstance(chat, RowFault):
                return chat
            if row.text is not None:
                return [self._render_text(row.text, ends=row.label is None)]
            if chat is None:
                return [self._render_joined(row, train_on)]
            return plan_chat(row, *chat, train_on, self._names.show)
        except (RowFault, TemplateFault, TokenFault) as fault:
            return unfit(fault)

    def _render_text(self, text: str, *, ends: bool) -> RenderedRow:
        """Renders a plain text. ends: whether the end token follows it"""
        bos, eos = self.tokenizer.bos_token, self.tokenizer.eos_token
        begin = () if bos and text.startswith(bos) else self._begin_ids
        ended = not ends or eos is None or text.endswith(eos)
        end = () if ended else (self.tokenizer.eos_token_id,)
        control = self._names.count(text)
        return RenderedRow(
            MarkedText(text), ((0, len(text)),), (("text", len(text)),), control, begin, end
        )

    def _render_joined(self, row: Row, train_on: TrainOn) -> RenderedRow:
        """Joins prompt and completion without a template."""
        if row.format != "prompt_completion":
            raise RowFault(
                "D201",
                f"format {row.format} needs a chat template, and this tokenizer has none",
                "Use format text, or prompt_completion with strings (joined as they are, followed"
                " by the end token), or an instruction-tuned base.",
            )
        hidden, tools, control = self._names.hide(row.messages, row.tools)
        if row.messages[-1].get("weight") == 0 or hidden[-1]["role"] != "assistant":
            raise RowFault("D205", "the last message is not trained on")
        prompt, completion = self._single_user_text(hidden[:-1], tools), hidden[-1]["content"]
        text = prompt + completion
        span = (0 if train_on == "all" else len(prompt), len(text))
        eos = self.tokenizer.eos_token_id
        roles = (("user", len(prompt)), ("assistant", len(text)))
        borders = (len(prompt),) if prompt else ()
        return RenderedRow(
            MarkedText(text, borders),
            (span,),
            roles,
            control,
            self._begin_ids,
            () if eos is None else (eos,),
        )

    def _single_user_text(self, messages: Messages, tools: Tools) -> str:
        """Returns the text of a single user message, all that a tokenizer without a template can
        encode."""
        if len(messages) != 1 or messages[0]["role"] != "user" or tools:
            raise RowFault(
                "D201",
                "a conversation of several messages needs a chat template, and this tokenizer has"
                " none",
            )
        return str(messages[0]["content"])

    def _encode_or_raise(self, marked: MarkedText) -> TokenizedText:
        (tokenized,) = self._tokens.encode([marked])
        if isinstance(tokenized, TokenFault):
            raise tokenized
        return tokenized

    def _conversation(self, messages: Messages, tools: Tools) -> Conversation:
        if not self.source:
            raise TemplateFault("this tokenizer has no chat template")
        try:
            source = self.tokenizer.get_chat_template(tools=tools)
        except ValueError as error:  # several templates, none of them the default
            raise TemplateFault(str(error)) from None
        template = self._templates.get((source, self.today))
        if template is None:
            template = Template(source, self.tokenizer.special_tokens_map, self.today)
            self._templates[source, self.today] = template
        if any(message.get("tool_calls") for message in messages):
            if template.number not in self._text_arguments:
                self._text_arguments[template.number] = needs_text_arguments(template)
            if self._text_arguments[template.number]:
                messages = [with_text_arguments(message) for message in messages]
        return Conversation(template, messages, tools, self._hidden)

    def _find_begin_ids(self) -> tuple[int, ...]:
        """Returns the ids that the tokenizer puts before a plain text (usually the begin token)."""
        (bare,) = self._tokens.ids(["a"])
        with_begin = self.tokenizer("a").input_ids
        return (
            tuple(with_begin[: with_begin.index(bare[0])]) if bare and bare[0] in with_begin else ()
        )

    def _find_stop_ids(self) -> tuple[int, ...]:
        eos = self.tokenizer.eos_token_id
        stops = [] if eos is None else [eos]
        probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        (encoded,) = self.encode_rows([Row(RowRef("probe", 1), probe)], train_on="last")
        if not isinstance(encoded, Problem):
            special = {
                n for n, token in self.tokenizer.added_tokens_decoder.items() if token.special
            }
            special |= set(self.tokenizer.all_special_ids)
            after: list[int] = []  # special tokens after the answer, nearest last
            for number in reversed(encoded[-1].ids):
                if number in special:
                    after.append(number)
                elif self._tokens.decode([number]).strip():
                    break
            stops += after[-1:]
        return tuple(dict.fromkeys(stops))
