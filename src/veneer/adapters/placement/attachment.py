"""An attached adapter: its layers and trained values by their places in the base."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapters.combinations import HEAD, TOKENS, Content
from veneer.adapters.config import MethodConfig
from veneer.adapters.placement.layer import Layer
from veneer.adapters.placement.score_head import PART as SCORE
from veneer.adapters.placement.score_head import ScoreHead
from veneer.adapters.placement.token_rows import NewTokens
from veneer.adapters.preamble import Preamble
from veneer.wording import html_table


def stands_alone(trained: Sequence[tuple[Tensor, float]]) -> bool:
    """Whether the sum is a single value with weight 1, so that the base's value is not needed."""
    return len(trained) == 1 and trained[0][1] == 1.0


def summed_change(base: Tensor, trained: Sequence[tuple[Tensor, float]]) -> Tensor:
    """base + sum of weight * (trained - base), summed in float32, in the base's type.

    Holds for parameters and for outputs of a module that is linear in them. A single value with
    weight 1 is returned as it is, equal to the bit to what was trained.
    """
    if stands_alone(trained):
        return trained[0][0]
    wide = base.to(torch.promote_types(base.dtype, torch.float32))
    return sum((w * (value.to(wide) - wide) for value, w in trained), wide).to(base.dtype)


@dataclass(eq=False)
class Attachment:
    """An adapter that is attached to a base.

    layers          path in the base model (experts: path of the 3-D parameter) -> layer
    values          full parameter path in the base -> the parameter trained in its place, in the
                    base's type
    wrapper_layers  key of a wrapper (wrapping.key_of) -> layer; the same layers
    replaced        key of a wrapper -> parameters trained in full, by their names in the module
    trained         modules trained in full
    adaptable       number of places that the method could adapt
    """

    name: str
    config: MethodConfig
    layers: dict[str, Layer] = field(default_factory=dict)
    values: dict[str, nn.Parameter] = field(default_factory=dict)
    trained: list[str] = field(default_factory=list)
    wrapper_layers: dict[str, Any] = field(default_factory=dict)
    replaced: dict[str, dict[str, nn.Parameter]] = field(default_factory=dict)
    adaptable: int = 0
    places: int | None = None
    """Number of adapted places if one layer serves several; None: one per layer."""
    tokens: NewTokens | None = None
    """New tokens of the adapter."""
    invocation: tuple[int, ...] = ()
    """Token ids from whose last occurrence in the prompt on it acts (activation.py); empty: it acts
    on all tokens."""
    score: ScoreHead | None = None
    """Head of an adapter that classifies; None: the adapter answers with the base's head."""
    preamble: Preamble = field(default_factory=Preamble)
    """Preamble of the conversations that it was trained on."""
    laid_out: Any = None
    """Factors that decoding/schedule/adapters.py laid out, if the adapter only answers and does not
    change."""

    @property
    def contents(self) -> tuple[Content, ...]:
        """Contents of the adapter, new tokens and a head included."""
        tokens = (TOKENS,) if self.tokens is not None else ()
        return *self.config.contents, *tokens, *((HEAD,) if self.score is not None else ())

    @property
    def adapted(self) -> int:
        return len(self.layers) if self.places is None else self.places

    def parameters(self) -> dict[str, nn.Parameter]:
        """Returns every trained tensor by a unique name, in a fixed order: layers, values, new
        tokens, the head."""
        parameters = {
            f"{path}.{part}": parameter
            for path, layer in self.layers.items()
            for part, parameter in layer.parts().items()
        }
        tokens = {} if self.tokens is None else self.tokens.parameters()
        head = {} if self.score is None else {SCORE: self.score.weight}
        return parameters | self.values | tokens | head

    def learning_rate_factors(self) -> dict[str, float]:
        """Factor of the learning rate of each of `parameters()`."""
        factors = dict.fromkeys(self.parameters(), 1.0)
        for path, layer in self.layers.items():
            for part in layer.parts():
                factors[f"{path}.{part}"] = self.config.rate_of(part)
        return factors

    def _repr_html_(self) -> str:
        facts = [
            ("method", self.config.name),
            ("trained values", f"{self.num_parameters():,}"),
            ("places", f"{self.adapted:,} of {self.adaptable:,}"),
        ]
        facts += [("system turn", self.preamble.system)] if self.preamble.system is not None else []
        return html_table(f"adapter {self.name}", facts)

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters().values())
