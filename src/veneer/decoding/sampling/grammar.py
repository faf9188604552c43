"""Constrains answers token by token: to JSON of a schema, a regular expression, one of some texts,
a grammar, or tool calls. Uses llguidance, which the extra `grammar` installs.

    Grammars      made once for a base: it reads the whole vocabulary, which takes a second or more
    Grammar       one shape, compiled on the calling thread; it makes a constraint for each answer
                  and checks the finished text

Shapes come from strangers. Their size, depth and repetitions are bounded. So is the work for a
token, because the decoding thread waits for it: an answer whose grammar exceeds that ends with an
error.
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
"""Characters of a schema, a grammar, all choices, or all tools."""
MOST_PATTERN = 8192
MOST_REPEATS = 10_000
"""Product of all counts in the braces of a grammar: nested repetitions are expanded while an answer
is sampled."""
MOST_RULES = 500
"""Rules of a grammar in llama.cpp's notation: the time to translate it grows with their square."""
MOST_CALLS = 16
_BLANK = r"[ \n\t\r]{1,32}"
"""Blanks between the parts of a JSON value. Without a bound an answer may be blank for ever."""
_TOKENS_TRIED = 4
"""Tokens that are sampled when a shape is compiled. Their states are built then, and most grammars
that exceed their limits do so at once."""
_COUNT = re.compile(r"\{\s*(\d*)\s*(?:,\s*(\d*)\s*)?\}|~\s*(\d+)(?:\s*\.\.\s*(\d+))?")

Check = Callable[[str], list[str]]


class Grammars:
    """Compiles shapes for one base.

    rows: number of ids that the base's head knows. stops: ids that end an answer. ConfigError: the
    extra is not installed, or llguidance cannot read the tokenizer.
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

    def schema(self, schema: Mapping[str, Any] | bool | str) -> Grammar:
        """Allows the JSON values of a schema, which may be a text. ConfigError: it cannot be
        followed."""
        valid_schema = _read_schema(schema)
        source = f"start: %json {_with_options(valid_schema)}"
        return self._compile("the schema", source, JsonCheck(valid_schema).faults)

    def regex(self, source: str) -> Grammar:
        """Allows texts that the expression matches as a whole."""
        if len(source) > MOST_PATTERN:
            raise ConfigError(
                f"the expression has {len(source):,} characters, at most {MOST_PATTERN:,} are"
                " allowed"
            )
        try:
            matches = compiled(f"(?:{source})")
            compiled(source)
        except PatternError as fault:
            raise ConfigError("the expression cannot be followed", [str(fault)]) from None
        from llguidance import LLMatcher

        def check(text: str) -> list[str]:
            return [] if matches.fullmatch(text) else ["the expression does not match it"]

        return self._compile("the expression", LLMatcher.grammar_from_regex(source), check)

    def choice(self, texts: Sequence[str]) -> Grammar:
        """Allows one of the texts."""
        if not texts:
            raise ConfigError("the list of choices is empty")
        _check_size("the choices", sum(map(len, texts)))
        lark = "start: " + " | ".join(map(json.dumps, texts))
        return self._compile(
            "the choices", lark, lambda text: [] if text in texts else ["it is none of the choices"]
        )

    def grammar(self, source: str) -> Grammar:
        """Allows the texts of a grammar in Lark's or llama.cpp's notation (GBNF)."""
        from llguidance import grammar_from

        _check_size("the grammar", len(source))
        if math.prod(_counts(source)) > MOST_REPEATS:
            raise ConfigError(
                f"the product of the counts in the grammar's braces is over {MOST_REPEATS:,}",
                next_step="Use smaller counts, or * and +.",
            )
        if (rules := source.count("::=")) > MOST_RULES:
            raise ConfigError(
                f"the grammar has {rules:,} rules in llama.cpp's notation, at most {MOST_RULES} are"
                " allowed"
            )
        try:
            lark = grammar_from("grammar", source)
        except (ValueError, RecursionError) as fault:
            raise ConfigError("the grammar cannot be read", [str(fault)[:300]]) from None
        grammar = self._compile("the grammar", lark, lambda text: [])
        grammar.faults = lambda text: [] if grammar.accepts(text) else ["the grammar forbids it"]
        return grammar

    def calls(
        self, tools: Mapping[str, Mapping[str, Any]], style: CallStyle, *, most: int = 1
    ) -> Grammar:
        """Allows one to `most` calls of the tools, if the style has several."""
        if not tools:
            raise ConfigError("there is no tool to call")
        if not 1 <= most <= MOST_CALLS:
            raise ConfigError(f"the number of calls is {most}; it must be 1 to {MOST_CALLS}")
        schemas = {
            tool: cast(Mapping[str, Any], _read_schema({"type": "object", **schema}))
            for tool, schema in tools.items()
        }
        _check_size(
            "the tools", sum(len(json.dumps([tool, schema])) for tool, schema in schemas.items())
        )
        checks = {tool: JsonCheck(schema) for tool, schema in schemas.items()}
        lines = style.grammar(schemas, most, lambda schema: f"%json {_with_options(schema)}")
        return self._compile(
            "the tools", "\n".join(lines), lambda text: _call_faults(text, style, schemas, checks)
        )

    def _compile(self, what: str, source: str, check: Check) -> Grammar:
        from llguidance import LLMatcher

        matcher = LLMatcher(self._tokenizer, source, log_level=0, limits=self._limits)
        trial = matcher.deep_copy()
        new: list[int] = []
        follower = Follower(trial, self._tokenizer.vocab_size)
        for _ in range(_TOKENS_TRIED):
            allowed = follower.allowed(new)
            if trial.is_error() or trial.is_stopped():
                break
            new.append(int(allowed.argmax()))
        if trial.is_error():
            reason = trial.get_error().partition("\n")[0]
            raise ConfigError(
                f"{what} cannot be followed", [reason[:500] or str(trial.stop_reason())]
            )
        return Grammar(matcher, self._tokenizer, check)


class Grammar:
    """Makes a constraint for each answer when it is called (sampling.Constraint).

    faults: returns what is wrong with a finished text; an empty list if nothing is.
    """

    def __init__(self, matcher: Any, tokenizer: Any, faults: Check) -> None:
        self._matcher, self._tokenizer, self.faults = matcher, tokenizer, faults

    def __call__(self) -> Follower:
        return Follower(self._matcher.deep_copy(), self._tokenizer.vocab_size)

    def accepts(self, text: str) -> bool:
        """Whether the grammar allows the text, in any tokens."""
        matcher = self._matcher.deep_copy()
        return bool(
            matcher.consume_tokens(self._tokenizer.tokenize_str(text)) and matcher.is_accepting()
        )


class Follower:
    """Follows one answer through a grammar, also back to an earlier token."""

    def __init__(self, matcher: Any, ids: int) -> None:
        self._matcher, self._ids = matcher, ids
        self._seen: list[int] = []
        self._bits = np.zeros((1, -(-ids // 32)), dtype=np.int32)

    def allowed(self, new: Sequence[int]) -> np.ndarray:
        """Returns (V) bool, the tokens that may come next; none if the grammar exceeds its
        limits."""
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
    """Checks a schema's size and depth, and removes the key that llguidance reads options from."""
    if isinstance(schema, str):
        _check_size("the schema", len(schema))
        if text_too_deep(schema):
            raise ConfigError(f"the schema is nested deeper than {MAX_JSON_DEPTH} levels")
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as fault:
            raise ConfigError("the schema is not JSON", [str(fault)]) from None
    if isinstance(schema, bool):
        return schema
    if not isinstance(schema, Mapping):
        raise ConfigError("a JSON schema is an object")
    if too_deep(schema):
        raise ConfigError(f"the schema is nested deeper than {MAX_JSON_DEPTH} levels")
    try:
        _check_size("the schema", len(json.dumps(schema, allow_nan=False)))
    except (ValueError, TypeError) as fault:
        raise ConfigError("the schema is not JSON", [str(fault)]) from None
    return {name: value for name, value in schema.items() if name != "x-guidance"}


def _with_options(schema: Mapping[str, Any] | bool) -> str:
    """Writes a schema with options of llguidance. It reads oneOf as anyOf; JsonCheck makes the
    difference."""
    options = {"whitespace_pattern": _BLANK, "coerce_one_of": True}
    if isinstance(schema, bool):
        schema = {} if schema else {"enum": []}
    return json.dumps({"x-guidance": options, **schema})


def _check_size(what: str, characters: int) -> None:
    if characters > MOST_CHARACTERS:
        raise ConfigError(
            f"{what}: {characters:,} characters, at most {MOST_CHARACTERS:,} are allowed"
        )


def _counts(source: str) -> list[int]:
    """Returns the larger number of each pair of braces."""
    return [
        max(1, *(int(number[:9] or 1) for number in match.groups(default="")))
        for match in _COUNT.finditer(source)
    ]


def _call_faults(
    text: str,
    style: CallStyle,
    tools: Mapping[str, Mapping[str, Any]],
    checks: Mapping[str, JsonCheck],
) -> list[str]:
    """Returns what is wrong with an answer that must consist of calls."""
    reader = CallReader(style, tools)
    (shown, calls), (rest, last) = reader.push(text), reader.end()
    if (shown + rest).strip():
        return ["it has text beside the calls"]
    faults: list[str] = []
    for tool, arguments in (*calls, *last):
        if tool not in checks:
            faults.append("it calls a tool that the request does not have")
            continue
        try:
            value = json.loads(arguments)
        except (ValueError, RecursionError):
            value = arguments
        faults += [f"{tool}: {fault}" for fault in checks[tool].value_faults(value)]
    return faults if calls or last else ["there is no call"]
