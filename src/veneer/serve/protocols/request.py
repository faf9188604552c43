"""What every protocol is translated to, and back from: one value, whatever the body looked like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from veneer.decoding.sampling.sampling import Sampling


@dataclass(frozen=True)
class ChatPrompt:
    """A conversation that the base's template renders; messages, tools and variables as it takes
    them."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TextPrompt:
    """A text, which is tokenised as it stands, or ids."""

    text: str | None = None
    ids: tuple[int, ...] | None = None


Prompt = ChatPrompt | TextPrompt


@dataclass(frozen=True)
class AnswerShape:
    """What the text of an answer must be: a JSON value of a schema, what an expression matches, one
    of some texts.

    kind: json (any object), schema, regex, choice, grammar, tool (a call of one of the tools).
    spec: its content. param: the field that asked for it. most: calls.
    """

    kind: Literal["json", "schema", "regex", "choice", "grammar", "tool"]
    param: str
    spec: Any = None
    most: int = 1


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """prompts       each answered by `choices` answers, all their indices in one row: prompt by
                     prompt
    model            the name that is asked for
    adapters         names with weights, that act instead of the model's own
    max_new_tokens   None: as many as fit
    seed             None: a fresh one
    ignore_eos       the base's own stop tokens stop nothing
    salt             whose keys and values may be shared: those of the same salt alone
    echo             what the answer repeats of the request
    """

    model: str
    prompts: Sequence[Prompt]
    adapters: tuple[tuple[str, float], ...] = ()
    max_new_tokens: int | None = None
    min_new_tokens: int = 0
    choices: int = 1
    sampling: Sampling = field(default_factory=Sampling)
    seed: int | None = None
    stops: tuple[str, ...] = ()
    stop_tokens: tuple[int, ...] = ()
    ignore_eos: bool = False
    shape: AnswerShape | None = None
    parses_calls: bool = False
    salt: str = ""
    stream: bool = False
    stream_usage: bool = False
    echo: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tools(self) -> dict[str, Mapping[str, Any]]:
        """Those that the model was told of, each with the schema of its arguments."""
        told = [
            tool
            for prompt in self.prompts
            if isinstance(prompt, ChatPrompt)
            for tool in prompt.tools or ()
        ]
        functions = [tool.get("function", tool) for tool in told]
        return {function["name"]: function.get("parameters") or {} for function in functions}
