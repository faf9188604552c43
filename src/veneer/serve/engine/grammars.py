"""Compiles the shape of an answer into a grammar (decoding/sampling/grammar.py).

The first shape reads the base's vocabulary, which takes a second or more. Shapes are compiled on
the calling thread, never on the one that decodes.
"""

import threading
from collections.abc import Callable

from veneer.decoding.sampling.grammar import Grammar, Grammars
from veneer.decoding.tool_calls.call_style import NO_TOOLS
from veneer.decoding.tool_calls.calls import CallStyle
from veneer.serve.protocols.request import AnswerShape
from veneer.serve.refusals import Refusal


class ShapeGrammars:
    """Compiles shapes, each when it is called for.

    read_vocabulary: called for the first shape. style: how the base's template writes calls.
    """

    def __init__(self, read_vocabulary: Callable[[], Grammars], style: CallStyle | None) -> None:
        self._read_vocabulary, self._style = read_vocabulary, style
        self._grammars: Grammars | None = None
        self._lock = threading.Lock()

    def __call__(self, shape: AnswerShape) -> Grammar:
        """Compiles a shape. Refusal, ConfigError: it cannot be followed."""
        with self._lock:
            if self._grammars is None:
                self._grammars = self._read_vocabulary()
        grammars, spec = self._grammars, shape.spec
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
