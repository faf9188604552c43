"""From the shape that a request asks for to what allows each of its tokens
(decoding/sampling/grammar.py).

The base's vocabulary is read for the first shape that is asked for, a second or more, and shapes
are compiled on the thread that asks: never on the one that decodes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from veneer.decoding.sampling.grammar import Grammar, Grammars
from veneer.decoding.tool_calls.calls import CallStyle
from veneer.serve.protocols.call_style import NO_TOOLS
from veneer.serve.protocols.request import AnswerShape
from veneer.serve.refusals import Refusal


class ShapeGrammars:
    """made: what reads the vocabulary. style: how the base's template writes calls of tools."""

    def __init__(self, made: Callable[[], Grammars], style: CallStyle | None) -> None:
        self._made, self._style = made, style
        self._grammars: Grammars | None = None
        self._lock = threading.Lock()

    def __call__(self, shape: AnswerShape) -> Grammar:
        """Refusal, ConfigError: what cannot be followed of it."""
        with self._lock:
            if self._grammars is None:
                self._grammars = self._made()
        grammars, spec = self._grammars, shape.spec
        if shape.kind == "json":
            return grammars.json()
        if shape.kind == "schema":
            return grammars.schema(spec)
        if shape.kind == "regex":
            return grammars.regex(spec)
        if shape.kind == "choice":
            return grammars.choice(spec)
        if shape.kind == "grammar":
            return grammars.grammar(spec)
        return self._calls(grammars, shape)

    def _calls(self, grammars: Grammars, shape: AnswerShape) -> Grammar:
        if self._style is None:
            raise Refusal(400, NO_TOOLS, "tools")
        tools = {function["name"]: function.get("parameters") or {} for function in shape.spec}
        return grammars.calls(tools, self._style, most=shape.most)
