"""Defines the base classes of methods: facts that follow from a method and its settings.

The methods are in config.py.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, Protocol, Self

from veneer.adapters.combinations import Content
from veneer.files.settings import StrictSettings

USUAL_WIDTH = 2000


class RateBasis(Protocol):
    """Holds what a method's default learning rate is computed from. A base is one
    (models/frozen_base.py)."""

    @property
    def hidden_size(self) -> int: ...

    @property
    def weight_rms(self) -> float:
        """Returns the root mean square of the weights of the linear layers, without the head."""
        ...


class MethodConfig(StrictSettings):
    """Base class of methods: properties of a method besides its settings.

    trains_base  whether it trains the base's own weights, which must be dense, so that the result
                 is a model and not an adapter
    usual_rate   peak learning rate at a hidden size of USUAL_WIDTH
    rate_falls   exponent by which that rate falls in wider models: Tinker's rule for Llama,
                 from sweeps of LoRA over 35 models (tinker-cookbook, hyperparam_utils.py). Full
                 fine-tuning takes a tenth of that (Schulman et al. 2025, "LoRA Without
                 Regret"). docs/benchmarks.md compares both with searches at hidden size 576
    rate_of_weights  default peak learning rate as a share of the root mean square of the base's
                 linear weights, from docs/recipes.md; None: the default goes by width alone
    of_document  settings that start it from a document that a teacher reads
    """

    trains_base: ClassVar[bool] = False
    of_document: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    usual_rate: ClassVar[float]
    rate_falls: ClassVar[float] = 0.781
    rate_of_weights: ClassVar[float | None] = None

    name: str = ""
    """Name in the run file; every method has one."""

    def default_learning_rate(self, base: RateBasis) -> float:
        """Returns the default peak rate of these settings on a base, rounded to two digits."""
        if self.rate_of_weights is None:
            return self.rate_by_width(base.hidden_size)
        return float(f"{self.rate_of_weights * self.share_of_rate * base.weight_rms:.1e}")

    def rate_by_width(self, hidden_size: int) -> float:
        """Returns the peak rate of these settings by the hidden size alone, rounded to two
        digits."""
        rate = self.usual_rate * self.share_of_rate * (USUAL_WIDTH / hidden_size) ** self.rate_falls
        return float(f"{rate:.1e}")

    def for_learning_rate(self, given: float | None) -> Self:
        """Returns the settings with those resolved that depend on whether a learning rate is
        given."""
        return self

    @property
    def share_of_rate(self) -> float:
        """Returns the factor of the usual rate with these settings."""
        return 1.0

    @property
    def contents(self) -> tuple[Content, ...]:
        """Returns the contents of an adapter with these settings, without new tokens
        (combinations.py)."""
        return ()

    @property
    def folds(self) -> bool:
        """Whether an adapter can be merged into the base's dense weights."""
        return all(content.merges for content in self.contents)

    @property
    def instead_of_folding(self) -> str:
        """Returns the next step in the error of an adapter that cannot be merged."""
        return next((content.instead for content in self.contents if not content.merges), "")

    @property
    def drops_out(self) -> bool:
        """Whether training draws dropout masks."""
        return False

    @property
    def starts_from_teacher(self) -> bool:
        """Whether its first values come from the text that a teacher reads."""
        return False

    @property
    def keeps_values(self) -> bool:
        """Whether some of its values stay as they start."""
        return False

    @property
    def acts_from(self) -> str | Sequence[int]:
        """Returns the text, or its token ids, from which on an adapter acts; empty: it acts on all
        tokens."""
        return ""

    @property
    def two_factors(self) -> bool:
        """Whether its update of a module is scaling * B A and nothing else, so that other code may
        factor it again."""
        return False

    @property
    def update_rank(self) -> int | None:
        """Returns the rank of its updates; None if they have none."""
        return None

    def of_rank(self, rank: int) -> Self:
        """Returns the settings with another rank and alpha in proportion; unchanged if updates have
        no rank."""
        return self

    def rate_of(self, part: str) -> float:
        """Returns the factor of the learning rate of the tensor `part` of a layer."""
        return 1.0


class AdapterConfig(MethodConfig):
    """Base class of methods that add layers to a frozen base; the result is an adapter folder.

    through_attention  whether it acts inside attention, so that Veneer must compute attention
                       (execution/attention.py)
    """

    through_attention: ClassVar[bool] = False
