"""The request that every protocol's body is translated to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from veneer.decoding.sampling.sampling import Sampling


@dataclass(frozen=True)
class ChatPrompt:
    """A conversation for the base's chat template; its messages, tools and variables have the
    template's form."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TextPrompt:
    """A text, which is tokenised as it is, or token ids."""

    text: str | None = None
    ids: tuple[int, ...] | None = None


Prompt = ChatPrompt | TextPrompt


ShapeKind = Literal["schema", "regex", "choice", "grammar", "tool"]


@dataclass(frozen=True)
class AnswerShape:
    """A form that an answer's text must have, such as a JSON schema or one of some texts.

    kind: tool is a call of one of the tools. param: the field that requires the shape. spec: the
    schema, expression, texts, grammar or tools. most: most calls.
    """

    kind: ShapeKind
    param: str
    spec: Any
    most: int = 1


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """Prompts to answer, and how.

    model            the name in the request
    prompts          each gets `choices` answers; answers are numbered prompt by prompt
    adapters         names with weights, in place of the model's own adapter
    max_new_tokens   None: as many as fit
    seed             None: a random one
    ignore_eos       the base's own stop tokens do not end an answer
    salt             only requests of the same salt share cached prompts
    repeats_prompt   answers begin with their prompts, and their logprobs with those of the prompt
    prompt_only      answers have no new token
    echo             fields of the request that the response repeats
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
    salt: str = ""
    repeats_prompt: bool = False
    prompt_only: bool = False
    stream: bool = False
    stream_usage: bool = False
    echo: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tools(self) -> dict[str, Mapping[str, Any]]:
        """Returns the JSON schema of each offered tool's arguments, by name."""
        tools = [
            tool
            for prompt in self.prompts
            if isinstance(prompt, ChatPrompt)
            for tool in prompt.tools or ()
        ]
        functions = [tool.get("function", tool) for tool in tools]
        return {function["name"]: function.get("parameters") or {} for function in functions}
