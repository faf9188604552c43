"""An adapter on a base: the one place that says what stands where."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapters.combinations import TOKENS, Content
from veneer.adapters.config import AdapterConfig
from veneer.adapters.placement.layer import Layer
from veneer.adapters.placement.token_rows import NewTokens
from veneer.adapters.preamble import Preamble
from veneer.wording import html_table


def stands_alone(trained: Sequence[tuple[Tensor, float]]) -> bool:
    """Returns whether one value with weight 1 is the whole sum, so that the base's own value is not
    needed."""
    return len(trained) == 1 and trained[0][1] == 1.0


def summed_change(own: Tensor, trained: Sequence[tuple[Tensor, float]]) -> Tensor:
    """Returns own + sum of weight * (trained - own), summed in float32, in own's type. Parameters
    are summed like this, and so are the outputs of a module that is linear in them. One value with
    weight 1 comes back as it is: to the bit what was trained."""
    if stands_alone(trained):
        return trained[0][0]
    wide = own.to(torch.promote_types(own.dtype, torch.float32))
    return sum((w * (value.to(wide) - wide) for value, w in trained), wide).to(own.dtype)


@dataclass(eq=False)
class Attachment:
    """An adapter on a base.

    layers     path in the base model (experts: path of the 3-D parameter) -> what the method put
               there
    values     full parameter path in the base -> the parameter trained in its place, in the base's
               type
    beside     key of a wrapper (wrapping.key_of) -> what the method put there: the same, as
               wrappers ask for it
    replaced   likewise the parameters that are trained in full, by their names in the module
    trained    modules trained in full
    adaptable  how many places the method could take; adapted: how many it took
    """

    name: str
    config: AdapterConfig
    layers: dict[str, Layer] = field(default_factory=dict)
    values: dict[str, nn.Parameter] = field(default_factory=dict)
    trained: list[str] = field(default_factory=list)
    beside: dict[str, Any] = field(default_factory=dict)
    replaced: dict[str, dict[str, nn.Parameter]] = field(default_factory=dict)
    adaptable: int = 0
    places: int | None = None
    """Places taken where one layer serves several; None: each layer one."""
    tokens: NewTokens | None = None
    """That it brings."""
    preamble: Preamble = field(default_factory=Preamble)
    """Of the conversations it was trained on."""
    laid_out: Any = None
    """Of one that only answers, its values as they are: what decoding/schedule/adapters.py
    prepared, as long as it is here."""

    @property
    def contents(self) -> tuple[Content, ...]:
        """What it contains, new tokens included."""
        return *self.config.contents, *((TOKENS,) if self.tokens is not None else ())

    @property
    def adapted(self) -> int:
        return len(self.layers) if self.places is None else self.places

    def parameters(self) -> dict[str, nn.Parameter]:
        """Every trained tensor by a name of its own, in a fixed order: layer by layer, part by
        part, then values, rows of tokens last."""
        found = {
            f"{path}.{part}": parameter
            for path, layer in self.layers.items()
            for part, parameter in layer.parts().items()
        }
        return found | self.values | (self.tokens.parameters() if self.tokens is not None else {})

    def learning_rate_factors(self) -> dict[str, float]:
        """What the learning rate of each of `parameters()` is multiplied with."""
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
