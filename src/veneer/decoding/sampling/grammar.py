"""What an answer may be, token by token: JSON of a schema, what an expression matches, one of some
texts, a grammar, calls of tools. By llguidance, which comes with the extra `grammar`.

    Grammars      made once for a base: it reads the whole vocabulary, which takes a second or more
    Grammar       one shape, compiled on the thread that asks for it, its first tokens found; makes
                  a constraint for each answer, and says of a finished text what is wrong with it

Shapes are strangers'. Their size, their depth and what is repeated in them are bounded, and what a
token may cost: the decoding thread waits for it. An answer whose grammar runs out of these ends by
itself, with an error.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from veneer.decoding.sampling.json_check import JsonCheck
from veneer.decoding.tool_calls.calls import CallReader, CallStyle
from veneer.errors import ConfigError
from veneer.files.nesting import MAX_JSON_DEPTH, text_too_deep, too_deep
from veneer.patterns import PatternError, compiled

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_CHARACTERS = 65_536
"""Of a schema, a grammar, all choices or all tools together."""
MOST_PATTERN = 8192
MOST_REPEATS = 10_000
"""Of all counts in the braces of a grammar, multiplied: nested ones are written out while tokens
are found."""
MOST_RULES = 500
"""Of a grammar in llama.cpp's notation: llguidance translates it in time that grows with their
square."""
MOST_CALLS = 16
_BLANK = r"[ \n\t\r]{1,32}"
"""Between the parts of a JSON value: bounded, or an answer may be blank for ever."""
_TRIED = 4
"""Tokens that are tried where a shape is compiled: what is built for them is built there, and most
of what grows beyond its bounds does so at once."""
_COUNT = re.compile(r"\{\s*(\d*)\s*(?:,\s*(\d*)\s*)?\}|~\s*(\d+)(?:\s*\.\.\s*(\d+))?")

Check = Callable[[str], list[str]]


class Grammars:
    """tokenizer: of the base. rows: ids that its head knows. stops: ids that end an answer.

    ConfigError: the extra is not installed; the tokenizer is not one that llguidance reads.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, rows: int, stops: Collection[int]
    ) -> None:
        try:
            import jsonschema  # noqa: F401
            from llguidance import LLParserLimits
            from llguidance.hf import from_tokenizer
        except ModuleNotFoundError as fault:
            raise ConfigError(
                "shapes of answers need packages that are not installed",
                [str(fault)],
                "pip install 'veneer[grammar]'",
            ) from fault
        if not stops:
            raise ConfigError(
                "this base has no token that ends an answer, so an answer cannot have a shape"
            )
        try:
            self._tokenizer = from_tokenizer(
                tokenizer,  # type: ignore[arg-type]
                n_vocab=max(rows, len(tokenizer)),
                eos_token=sorted(stops),
            )
        except ValueError as fault:
            raise ConfigError(
                f"{type(tokenizer).__name__} cannot be read for grammars",
                [str(fault)[:300]],
                "Leave shapes out.",
            ) from None
        self._limits = LLParserLimits(
            max_lexer_states=10_000, max_grammar_size=200_000, verbose_errors=False
        )

    def json(self) -> Grammar:
        """Any JSON object."""
        return self.schema({"type": "object"})

    def schema(self, schema: Mapping[str, Any] | bool | str) -> Grammar:
        """A JSON value of it. str: the schema's text. ConfigError: what cannot be followed of
        it."""
        read = _read_schema(schema)
        check = JsonCheck(read)
        return self._made("the schema", self._of_schema(read), check.faults)

    def regex(self, source: str) -> Grammar:
        """All of the text is matched."""
        if len(source) > MOST_PATTERN:
            raise ConfigError(
                f"the expression has {len(source):,} characters, {MOST_PATTERN:,} may be"
            )
        try:
            matches = compiled(f"(?:{source})")
            compiled(source)
        except PatternError as fault:
            raise ConfigError("the expression cannot be followed", [str(fault)]) from None
        from llguidance import LLMatcher

        def check(text: str) -> list[str]:
            return [] if matches.fullmatch(text) else ["the expression does not match it"]

        return self._made("the expression", LLMatcher.grammar_from_regex(source), check)

    def choice(self, texts: Sequence[str]) -> Grammar:
        """One of the texts."""
        if not texts:
            raise ConfigError("there is no choice")
        _check_size("the choices", sum(map(len, texts)))
        lark = "start: " + " | ".join(map(json.dumps, texts))
        return self._made(
            "the choices", lark, lambda text: [] if text in texts else ["it is none of the choices"]
        )

    def grammar(self, source: str) -> Grammar:
        """What a grammar in Lark's or llama.cpp's notation (GBNF) makes."""
        from llguidance import grammar_from

        _check_size("the grammar", len(source))
        if math.prod(_counts(source)) > MOST_REPEATS:
            raise ConfigError(
                f"the counts in the grammar's braces are more than {MOST_REPEATS:,} multiplied",
                next_step="Repeat less, or with * and +.",
            )
        if (rules := source.count("::=")) > MOST_RULES:
            raise ConfigError(
                f"the grammar has {rules:,} rules in llama.cpp's notation, {MOST_RULES} may be"
            )
        try:
            lark = grammar_from("grammar", source)
        except (ValueError, RecursionError) as fault:
            raise ConfigError("the grammar cannot be read", [str(fault)[:300]]) from None
        made = self._made("the grammar", lark, lambda text: [])
        made.check = lambda text: [] if made.makes(text) else ["the grammar does not make it"]
        return made

    def calls(
        self, tools: Mapping[str, Mapping[str, Any]], style: CallStyle, *, most: int = 1
    ) -> Grammar:
        """One call of a tool and up to `most`, where the style has several. tools: name -> schema
        of its arguments."""
        if not tools:
            raise ConfigError("there is no tool to call")
        if not 1 <= most <= MOST_CALLS:
            raise ConfigError(f"{most} calls are asked for; from 1 to {MOST_CALLS} may be")
        read = {
            t: cast(Mapping[str, Any], _read_schema({"type": "object", **s}))
            for t, s in tools.items()
        }
        _check_size(
            "the tools", sum(len(json.dumps([tool, schema])) for tool, schema in read.items())
        )
        checks = {tool: JsonCheck(schema) for tool, schema in read.items()}
        lines = style.grammar(read, most, lambda schema: f"%json {_with_options(schema)}")
        return self._made(
            "the tools", "\n".join(lines), lambda text: _call_faults(text, style, read, checks)
        )

    @staticmethod
    def _of_schema(schema: Mapping[str, Any] | bool) -> str:
        return f"start: %json {_with_options(schema)}"

    def _made(self, what: str, source: str, check: Check) -> Grammar:
        from llguidance import LLMatcher

        matcher = LLMatcher(self._tokenizer, source, log_level=0, limits=self._limits)
        made = Grammar(matcher, self._tokenizer, check)
        tried = matcher.deep_copy()
        new: list[int] = []
        follower = Follower(tried, self._tokenizer.vocab_size)
        for _ in range(_TRIED):
            allowed = follower.allowed(new)
            if tried.is_error() or tried.is_stopped():
                break
            new.append(int(allowed.argmax()))
        if tried.is_error():
            said = tried.get_error().partition("\n")[0]
            raise ConfigError(
                f"{what} cannot be followed", [said[:500] or str(tried.stop_reason())]
            )
        return made


class Grammar:
    """Called, it makes what one answer follows (sampling.Constraint). check: what is wrong with a
    text."""

    def __init__(self, matcher: Any, tokenizer: Any, check: Check) -> None:
        self._matcher, self._tokenizer, self.check = matcher, tokenizer, check

    def __call__(self) -> Follower:
        return Follower(self._matcher.deep_copy(), self._tokenizer.vocab_size)

    def faults(self, text: str) -> list[str]:
        """What is wrong with an answer that was not cut; none: it is what was asked for."""
        return self.check(text)

    def makes(self, text: str) -> bool:
        """Whether the grammar itself lets it pass, in whatever tokens."""
        matcher = self._matcher.deep_copy()
        return bool(
            matcher.consume_tokens(self._tokenizer.tokenize_str(text)) and matcher.is_accepting()
        )


class Follower:
    """One answer's way through a grammar. It goes back where an answer does."""

    def __init__(self, matcher: Any, ids: int) -> None:
        self._matcher, self._ids = matcher, ids
        self._seen: list[int] = []
        self._bits = np.zeros((1, -(-ids // 32)), dtype=np.int32)

    def allowed(self, new: Sequence[int]) -> np.ndarray:
        """(V) bool; nothing, where the grammar has come to its limits."""
        from llguidance.numpy import fill_next_token_bitmask

        self._follow(new)
        if not self._matcher.is_error():
            fill_next_token_bitmask(self._matcher, self._bits)
        if self._matcher.is_error():  # its mask would be the stop token
            return np.zeros(self._ids, dtype=np.bool_)
        return np.unpackbits(self._bits[0].view(np.uint8), bitorder="little")[: self._ids].view(
            np.bool_
        )

    def ended(self, new: Sequence[int]) -> bool:
        self._follow(new)
        return bool(self._matcher.is_stopped() and not self._matcher.is_error())

    def _follow(self, new: Sequence[int]) -> None:
        same = 0
        while same < len(self._seen) and same < len(new) and self._seen[same] == new[same]:
            same += 1
        if same < len(self._seen):
            self._matcher.rollback(len(self._seen) - same)
        self._matcher.consume_tokens(list(new[same:]))
        self._seen = list(new)


def _read_schema(schema: Mapping[str, Any] | bool | str) -> Mapping[str, Any] | bool:
    """Within bounds, and without what llguidance would take for its own options."""
    if isinstance(schema, str):
        _check_size("the schema", len(schema))
        if text_too_deep(schema):
            raise ConfigError(f"the schema is nested deeper than {MAX_JSON_DEPTH} levels")
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as fault:
            raise ConfigError("the schema is no JSON", [str(fault)]) from None
    if isinstance(schema, bool):
        return schema
    if not isinstance(schema, Mapping):
        raise ConfigError("a JSON schema is an object")
    if too_deep(schema):
        raise ConfigError(f"the schema is nested deeper than {MAX_JSON_DEPTH} levels")
    try:
        _check_size("the schema", len(json.dumps(schema, allow_nan=False)))
    except (ValueError, TypeError) as fault:
        raise ConfigError("the schema is no JSON", [str(fault)]) from None
    return {name: value for name, value in schema.items() if name != "x-guidance"}


def _with_options(schema: Mapping[str, Any] | bool) -> str:
    """oneOf as anyOf: whether two of them hold, the check says."""
    own = {"whitespace_pattern": _BLANK, "coerce_one_of": True}
    of: Mapping[str, Any] = (
        schema if isinstance(schema, Mapping) else {} if schema else {"enum": []}
    )
    return json.dumps({"x-guidance": own, **of})


def _check_size(what: str, characters: int) -> None:
    if characters > MOST_CHARACTERS:
        raise ConfigError(f"{what}: {characters:,} characters, {MOST_CHARACTERS:,} may be")


def _counts(source: str) -> list[int]:
    found = []
    for match in _COUNT.finditer(source):
        numbers = [int(each[:9]) for each in match.groups() if each]
        found.append(max([1, *numbers]))
    return found


def _call_faults(
    text: str,
    style: CallStyle,
    tools: Mapping[str, Mapping[str, Any]],
    checks: Mapping[str, JsonCheck],
) -> list[str]:
    reader = CallReader(style, tools)
    (said, calls), (rest, last) = reader.push(text), reader.end()
    if (said + rest).strip():
        return ["it is not calls alone"]
    faults: list[str] = []
    for tool, arguments in (*calls, *last):
        if tool not in checks:
            faults.append("it is no call of one of the tools")
            continue
        try:
            given = json.loads(arguments)
        except (ValueError, RecursionError):
            given = arguments
        faults += [f"{tool}: {fault}" for fault in checks[tool].value_faults(given)]
    return faults if calls or last else ["there is no call"]
