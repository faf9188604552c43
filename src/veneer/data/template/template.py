"""Rows to token ids and loss mask, through the base's chat template. A row goes once through each
of

    control_names.py    names of control tokens in what its messages say are hidden
    rendering.py        the template writes the conversation, and its beginnings
    turns.py            where the answers stand in what it wrote (long_turns.py: in a long prompt)
    tokens.py           the ids, cut exactly there

A tokenizer without a template takes plain text, and prompt/completion rows: prompt, completion and
the end token joined. Plain text rows are tokenised as they stand, control tokens included.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import date
from itertools import zip_longest
from typing import Any

from veneer.adapters.preamble import check_variables, given
from veneer.data.examples import Problem, RoleRun, Row, RowRef, TrainOn, refusal
from veneer.data.template.control_names import Sentinels, TokenFault
from veneer.data.template.long_turns import prompt_borders
from veneer.data.template.reasoning import Reasons
from veneer.data.template.rendering import Conversation, Template, beginnings, rendering
from veneer.data.template.sandbox import TemplateFault, prepared
from veneer.data.template.tokens import Cut, TextTokens, Tokens
from veneer.data.template.turns import Plan, plan_chat
from veneer.data.template.unfit import Unfit, check_contents, check_text, check_tools, unfit
from veneer.errors import DataError, DoesNotFitError

_CHUNK = 1024  # rows tokenised at once: enough to keep the cores busy, and a bound on memory

Begun = tuple[Conversation, int] | Unfit | None
"""What the template is to render, and how many control tokens' names are hidden in it; None: no
template."""
Messages = Sequence[dict[str, Any]]
Tools = list[dict[str, Any]] | None


@dataclass(frozen=True)
class Encoded:
    """A row in tokens, or its first messages up to an answer.

    control   names of control tokens found in its text
    upto      messages in it; None: all, or plain text
    reasons   what of reasoning each answer that is learnt begins with
    """

    ids: list[int]
    trained: list[bool]
    roles: tuple[RoleRun, ...]
    control: int
    upto: int | None = None
    reasons: tuple[Reasons, ...] = ()


class ChatTemplate:
    """The chat template of one tokenizer (a transformers tokenizer backed by the tokenizers
    library).

    today      the date that templates may write; the same for the life of the object
    variables  what the template is told beside the conversation (enable_thinking, ...); None is not
               given
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
                f"the tokenizer's chat template is no text ({', '.join(kinds)})",
                next_step=(
                    "Mend chat_template in tokenizer_config.json, or take it from where the base"
                    " was made."
                ),
            )
        self.source: str = (
            json.dumps(template, sort_keys=True) if isinstance(template, dict) else template or ""
        )
        """The template's text; empty if the tokenizer has none."""
        self._names = Sentinels(tokenizer, self.source)
        self._tokens = TextTokens(tokenizer, self._names)
        self._templates: dict[tuple[str, date], Template] = {}
        self._text_arguments: dict[int, bool] = {}
        self.variables: dict[str, Any] = {}
        self._hidden: dict[str, Any] = {}
        if variables:
            self._tell(variables)
        self._begin = self._put_in_front()
        self.stop_ids = self._find_stop_ids()
        """Ids that end an answer: the end-of-text token, and what the template ends an assistant
        turn with."""

    @property
    def writes_date(self) -> bool:
        """Whether the template asks for the date, so that other days give other tokens."""
        return "strftime_now" in self.source

    def on(self, today: date) -> ChatTemplate:
        """The same on another day: for a process that runs for longer than one."""
        if today == self.today or not self.writes_date:
            return self
        other = copy.copy(self)
        other.today = today
        return other

    def telling(self, variables: Mapping[str, Any]) -> ChatTemplate:
        """The same with other variables beside its own. Raises DataError for one that the template
        does not read."""
        if not variables:
            return self
        other = copy.copy(self)
        other._tell({**self.variables, **variables})
        return other

    def _tell(self, variables: Mapping[str, Any]) -> None:
        check_variables(variables)
        self.variables = given(variables)
        unread = [name for name in self.variables if not re.search(rf"\b{name}\b", self.source)]
        if unread:
            headline = f"the chat template reads no variable {', '.join(unread)}"
            raise DataError(
                headline,
                next_step="Leave it out, or look into the base's chat_template for its name.",
            )
        try:
            self._hidden = self._names.hidden(self.variables)
        except TokenFault as fault:
            raise DataError(f"a template variable cannot be written: {fault}") from None

    def fingerprint(self) -> str:
        """SHA-256 of the template's text, hexadecimal."""
        return hashlib.sha256(self.source.encode()).hexdigest()

    def render(
        self, messages: Messages, *, tools: Tools = None, add_generation_prompt: bool = False
    ) -> str:
        """The conversation as text. Raises DataError with what the template says if it refuses."""
        try:
            conversation = self._conversation([prepared(message) for message in messages], tools)
            text = conversation.text(len(messages), add_generation_prompt=add_generation_prompt)
            check_text(text)
            return text
        except (TemplateFault, TokenFault) as fault:
            raise DataError(str(fault)) from None

    def encode_prompt(
        self, messages: Messages, *, tools: Tools = None, most_characters: int | None = None
    ) -> list[int]:
        """The ids that generation starts from: the conversation and what opens the assistant's
        turn.

        For the messages in front of a trained turn, these are the first ids of that row.
        most_characters: of the rendered text; a longer one is not tokenised. Raises DataError,
        DoesNotFitError.
        """
        try:
            hidden, hidden_tools, _ = self._names.hide(messages, tools)
            if not self.source:
                return [*self._begin, *self._encoded(Cut(self._alone(hidden, hidden_tools))).ids]
            conversation = self._conversation(hidden, hidden_tools)
            text = conversation.text(len(hidden), add_generation_prompt=True)
            if most_characters is not None and len(text) > most_characters:
                raise DoesNotFitError(
                    f"the prompt has {len(text):,} characters: the model's positions hold"
                    f" {most_characters:,} at most"
                )
            check_text(text)
            check_tools(messages, tools, self._names.show(text), conversation.template)
            check_contents(hidden, text)
            return self._encoded(Cut(text, prompt_borders(conversation, text))).ids
        except (Unfit, TemplateFault, TokenFault) as fault:
            raise DataError(f"the conversation cannot be encoded: {fault}") from None

    def encode_row(self, row: Row, *, train_on: TrainOn) -> tuple[list[int], list[bool]]:
        """(ids, trained) of a row that is one example, trained[0] always False. Raises
        DataError."""
        (found,) = self.encode_rows([row], train_on=train_on)
        if isinstance(found, Problem):
            raise refusal("the row cannot be encoded", [found])
        if len(found) > 1:
            raise DataError(
                f"the row becomes {len(found)} examples, one for an answer",
                next_step="Encode it as such.",
            )
        return found[0].ids, found[0].trained

    def encode_rows(
        self, rows: Sequence[Row], *, train_on: TrainOn
    ) -> list[list[Encoded] | Problem]:
        """Each row's tokens, or why it has none: of most one example; several where the template
        renders earlier answers otherwise than they were given."""
        chunks = [rows[at : at + _CHUNK] for at in range(0, len(rows), _CHUNK)]
        results: list[list[Encoded] | Problem] = []
        with ThreadPoolExecutor(1) as beside:
            waiting = [self._rendering(chunk, beside) for chunk in chunks[:1]]
            for chunk, following in zip_longest(chunks, chunks[1:]):
                chats, wait = waiting.pop()
                wait()
                if following is not None:  # is rendered, in a process of its own, meanwhile
                    waiting.append(self._rendering(following, beside))
                results += self._encode_chunk(chunk, chats, train_on)
        return results

    def _rendering(
        self, rows: Sequence[Row], beside: Executor
    ) -> tuple[list[Begun], Callable[[], None]]:
        """What the template writes of each row, and of what each begins with, once it was waited
        for."""
        chats = [self._begun(row) for row in rows]
        begun = [chat[0] for chat in chats if isinstance(chat, tuple)]
        return chats, rendering([(chat, beginnings(chat.messages)) for chat in begun], beside)

    def _encode_chunk(
        self, rows: Sequence[Row], chats: Sequence[Begun], train_on: TrainOn
    ) -> list[list[Encoded] | Problem]:
        plans = [self._planned(row, chat, train_on) for row, chat in zip(rows, chats, strict=True)]
        tokens = iter(
            self._tokens.encode(
                [plan.cut for found in plans if isinstance(found, list) for plan in found]
            )
        )
        results: list[list[Encoded] | Problem] = []
        for row, found in zip(rows, plans, strict=True):
            if isinstance(found, Unfit):
                results.append(found.at(row.ref))
                continue
            coded = [next(tokens) for _ in found]
            fault = next((each for each in coded if isinstance(each, TokenFault)), None)
            if fault is not None:
                results.append(Unfit("D202", str(fault)).at(row.ref))
                continue
            made = [
                _masked(t, p) for t, p in zip(coded, found, strict=True) if isinstance(t, Tokens)
            ]
            if row.unfinished:
                made[-1] = self._without_end(made[-1], coded[-1], found[-1])
            results.append(made)
        return results

    def _begun(self, row: Row) -> Begun:
        if row.text is not None or not self.source:
            return None
        try:
            messages, tools, control = self._names.hide(row.messages, row.tools)
            return self._conversation(messages, tools), control
        except (Unfit, TemplateFault, TokenFault) as fault:
            return unfit(fault)

    def _planned(self, row: Row, chat: Begun, train_on: TrainOn) -> list[Plan] | Unfit:
        try:
            if isinstance(chat, Unfit):
                return chat
            if row.text is not None:
                return [self._plan_text(row.text)]
            if chat is None:
                return [self._plan_joined(row, train_on)]
            return plan_chat(row, *chat, train_on, self._names.show)
        except (Unfit, TemplateFault, TokenFault) as fault:
            return unfit(fault)

    def _plan_text(self, text: str) -> Plan:
        bos, eos = self.tokenizer.bos_token, self.tokenizer.eos_token
        begin = () if bos and text.startswith(bos) else self._begin
        end = () if eos is None or text.endswith(eos) else (self.tokenizer.eos_token_id,)
        control = self._names.count(text)
        return Plan(Cut(text), ((0, len(text)),), (("text", len(text)),), control, begin, end)

    def _plan_joined(self, row: Row, train_on: TrainOn) -> Plan:
        """Prompt and completion without a template."""
        if row.format != "prompt_completion":
            raise Unfit(
                "D201",
                f"format {row.format} needs a chat template, and this tokenizer has none",
                "Use format text, or prompt_completion with strings (joined as they are, with the"
                " end token behind), or an instruction-tuned base.",
            )
        hidden, tools, control = self._names.hide(row.messages, row.tools)
        if row.messages[-1].get("weight") == 0 or hidden[-1]["role"] != "assistant":
            raise Unfit("D205", "the last message is not one to learn")
        prompt, completion = self._alone(hidden[:-1], tools), hidden[-1]["content"]
        text = prompt + completion
        span = (0 if train_on == "all" else len(prompt), len(text))
        eos = self.tokenizer.eos_token_id
        roles = (("user", len(prompt)), ("assistant", len(text)))
        borders = (len(prompt),) if prompt else ()
        return Plan(
            Cut(text, borders), (span,), roles, control, self._begin, () if eos is None else (eos,)
        )

    def _without_end(self, made: Encoded, tokens: Tokens | TokenFault, plan: Plan) -> Encoded:
        """What stops its last answer, or its text, is not learnt."""
        if not plan.spans or isinstance(tokens, TokenFault):
            return made
        first = len(plan.begin) + {0: 0, **tokens.at}[plan.spans[-1][0]]
        stop = next(
            (n for n in reversed(range(first, len(made.ids))) if made.ids[n] in self.stop_ids),
            len(made.ids),
        )
        return replace(made, trained=[*made.trained[:stop], *[False] * (len(made.ids) - stop)])

    def _alone(self, messages: Messages, tools: Tools) -> str:
        """The text of a single user message, which is all that can be asked without a template."""
        if len(messages) != 1 or messages[0]["role"] != "user" or tools:
            raise Unfit(
                "D201",
                "a conversation of several messages needs a chat template, and this tokenizer has"
                " none",
            )
        return str(messages[0]["content"])

    def _encoded(self, cut: Cut) -> Tokens:
        (found,) = self._tokens.encode([cut])
        if isinstance(found, TokenFault):
            raise found
        return found

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
        if any(message.get("tool_calls") for message in messages) and self._takes_text(template):
            messages = [_with_text_arguments(message) for message in messages]
        return Conversation(template, messages, tools, self._hidden)

    def _takes_text(self, template: Template) -> bool:
        """Whether a template wants arguments of calls as JSON text, as the OpenAI API sends
        them."""
        if template.number not in self._text_arguments:
            call = {
                "id": "call00001",
                "type": "function",
                "function": {"name": "look", "arguments": {"n": 1}},
            }
            turns: list[dict[str, Any]] = [{"role": "user", "content": "a"}]
            turns.append({"role": "assistant", "content": "", "tool_calls": [call]})
            as_text = [_with_text_arguments(turn) for turn in turns]
            renders = []
            for probe in (turns, as_text):
                try:
                    renders.append(
                        Conversation(template, probe, None).text(2, add_generation_prompt=False)
                        != ""
                    )
                except TemplateFault:
                    renders.append(False)
            self._text_arguments[template.number] = renders == [False, True]
        return self._text_arguments[template.number]

    def _put_in_front(self) -> tuple[int, ...]:
        """Ids that the tokenizer puts in front of a plain text by itself (the begin token, for most
        that have one)."""
        (bare,) = self._tokens.ids(["a"])
        dressed = self.tokenizer("a").input_ids
        return tuple(dressed[: dressed.index(bare[0])]) if bare and bare[0] in dressed else ()

    def _find_stop_ids(self) -> tuple[int, ...]:
        eos = self.tokenizer.eos_token_id
        stops = [] if eos is None else [eos]
        probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        (found,) = self.encode_rows([Row(RowRef("probe", 1), probe)], train_on="last")
        if not isinstance(found, Problem):
            special = {
                n for n, token in self.tokenizer.added_tokens_decoder.items() if token.special
            }
            special |= set(self.tokenizer.all_special_ids)
            after: list[int] = []  # special tokens behind the answer, nearest last
            for number in reversed(found[-1].ids):
                if number in special:
                    after.append(number)
                elif self._tokens.decode([number]).strip():
                    break
            stops += after[-1:]
        return tuple(dict.fromkeys(stops))


def _with_text_arguments(message: dict[str, Any]) -> dict[str, Any]:
    """The message, the arguments of its calls as JSON text."""
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        function = call.get("function", call)
        text = json.dumps(function.get("arguments", {}), ensure_ascii=False)
        function = {**function, "arguments": text}
        calls.append({**call, "function": function} if "function" in call else function)
    return {**message, "tool_calls": calls}


def _masked(tokens: Tokens, plan: Plan) -> Encoded:
    """Characters to tokens: the mask, and whose each token is."""
    shift = len(plan.begin)
    ids = [*plan.begin, *tokens.ids, *plan.end]
    at = {0: 0, **tokens.at}
    trained = [False] * len(ids)
    for start, end in plan.spans:
        trained[shift + at[start] : shift + at[end]] = [True] * (at[end] - at[start])
    trained[len(ids) - len(plan.end) :] = [True] * len(plan.end)
    trained[:1] = [False]
    runs = [RoleRun(role, shift + at[end]) for role, end in plan.roles if end in at]
    if runs:
        runs[-1] = RoleRun(runs[-1].role, len(ids))
    return Encoded(ids, trained, tuple(runs), plan.control, plan.upto, plan.reasons)
