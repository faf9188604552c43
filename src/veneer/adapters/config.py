"""The methods' settings: what a run file says under `method`. No torch here: `--help` reads this.

Sources: LoRA, Hu et al. 2021, arXiv:2106.09685; rsLoRA, Kalajdzievski 2023, arXiv:2312.03732; DoRA,
Liu et al. 2024, arXiv:2402.09353; LoRA+, Hayou et al. 2024, arXiv:2402.12354; prefix tuning, Li and
Liang 2021, arXiv:2101.00190.
"""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from veneer.adapters import combinations
from veneer.adapters.combinations import Content
from veneer.bounds import ALPHA, LAYER, PLACES, POWER_ITERATIONS, RANK, RATIO, SCALING, SHARE, WIDTH
from veneer.files.settings import StrictSettings
from veneer.patterns import pattern

USUAL_WIDTH = 2000


class MethodConfig(StrictSettings):
    """Base class of methods: properties of a method besides its settings.

    trains_base            it trains the base's own weights, which must be dense; its result is a
                           model, not an adapter
    usual_rate             peak learning rate, at a hidden size of USUAL_WIDTH, of a run that names
                           none
    rate_falls             exponent with which that falls in wider models: Tinker's rule for Llama,
                           from sweeps of LoRA over 35 models (tinker-cookbook,
                           hyperparam_utils.py); full fine-tuning a tenth of LoRA (Schulman et al.
                           2025, "LoRA Without Regret"). Held against searches at hidden size 576 in
                           docs/benchmarks.md
    """

    trains_base: ClassVar[bool] = False
    usual_rate: ClassVar[float]
    rate_falls: ClassVar[float] = 0.781

    name: str = ""
    """What the run file calls it; every method has one."""

    def default_learning_rate(self, hidden_size: int) -> float:
        """Peak rate with these settings on a base of this hidden size where a run names none; two
        digits."""
        rate = self.usual_rate * self.share_of_rate * (USUAL_WIDTH / hidden_size) ** self.rate_falls
        return float(f"{rate:.1e}")

    @property
    def share_of_rate(self) -> float:
        """Factor of the method's usual rate with these settings."""
        return 1.0

    @property
    def contents(self) -> tuple[Content, ...]:
        """The contents of an adapter with these settings, without new tokens (combinations.py)."""
        return ()

    @property
    def folds(self) -> bool:
        """Whether it can become part of the base's dense weights."""
        return all(content.merges for content in self.contents)

    @property
    def instead_of_folding(self) -> str:
        """Next step in the error of an adapter that cannot be merged."""
        return next((content.instead for content in self.contents if not content.merges), "")

    @property
    def drops_out(self) -> bool:
        """Whether training draws masks of dropout."""
        return False

    @property
    def two_factors(self) -> bool:
        """Whether what it adds at a place is scaling * B A and nothing else: others then take it
        apart and write it anew."""
        return False

    @property
    def update_rank(self) -> int | None:
        """Rank of its updates. None if they have none."""
        return None

    def of_rank(self, rank: int) -> Self:
        """The same with updates of another rank, alpha in proportion; as it is where they have
        none."""
        return self

    def rate_of(self, part: str) -> float:
        """Factor of the learning rate of a layer's trained tensor `part`."""
        return 1.0


class AdapterConfig(MethodConfig):
    """A method that puts layers beside a frozen base; its result is an adapter folder.

    through_attention  it acts inside attention: the base must have handed that over
                       (execution/attention.py) first
    """

    through_attention: ClassVar[bool] = False


class LowRank(AdapterConfig):
    """Settings that LoRA and its variants share."""

    rank: Annotated[int, RANK] = 16
    """R, the width of the update; a linear layer trains rank * (in + out) parameters."""
    alpha: Annotated[float, ALPHA] = 32.0
    """Numerator of the scaling; no unit."""
    dropout: Annotated[float, SHARE] = 0.0
    """Share of the inputs of A set to zero while training; of an embedding, whose inputs are ids,
    none. Rows of a step that begin alike are dropped alike there. 0 trains fastest."""
    rslora: bool = False
    """scaling = alpha / sqrt(rank) instead of alpha / rank."""
    targets: str | list[str] = "all-linear"
    """all-linear (every linear layer but the output head, fused experts included; without weights
    that the model multiplies by past their module, as Mamba does by dt_proj.weight, and without
    Mamba's out_proj, where PEFT refuses LoRA), a list of module names or name endings, or one
    regular expression that matches the whole module path."""
    exclude: list[str] = Field(default_factory=list)
    """Module names, name endings or regular expressions that are left alone though `targets` names
    them."""
    layers: list[Annotated[int, LAYER]] = Field(default_factory=list)
    """Only these layer numbers (0 is the first); empty: all. Has no effect on a module outside the
    layers."""
    rank_pattern: dict[str, Annotated[int, RANK]] = Field(default_factory=dict)
    """Regular expression of the end of a module path -> rank; the first that matches wins."""
    alpha_pattern: dict[str, Annotated[float, ALPHA]] = Field(default_factory=dict)
    """Regular expression of the end of a module path -> alpha; the first that matches wins."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Train the base's biases too: of every module (all) or of the targeted ones (lora_only)."""
    train_modules: list[str] = Field(default_factory=list)
    """Modules (names or endings) trained in full beside the update, for instance lm_head."""
    lr_ratio: Annotated[float, RATIO] = 1.0
    """Learning rate of B over that of A (LoRA+; its authors take 16); learning_rate is A's, by
    default lower by the square root of this; 1: off."""

    @model_validator(mode="after")
    def _patterns_compile(self) -> "LowRank":
        sources = [*self.rank_pattern, *self.alpha_pattern, *self.exclude]
        if isinstance(self.targets, str) and self.targets != "all-linear":
            sources.append(self.targets)
        for source in sources:
            pattern(source)  # raises a ValueError that says why
        for source in (*self.rank_pattern, *self.alpha_pattern):
            pattern(source).ends("")
        if isinstance(self.targets, list) and not self.targets:
            raise ValueError("targets is empty: nothing would be trained")
        return self

    @property
    def drops_out(self) -> bool:
        return self.dropout > 0

    @property
    def contents(self) -> tuple[Content, ...]:
        modules = (combinations.MODULES,) if self.train_modules else ()
        biases = (combinations.BIASES,) if self.bias != "none" else ()
        return combinations.UPDATE, *modules, *biases

    @property
    def share_of_rate(self) -> float:
        """LoRA+: the geometric mean of A's rate and B's stays the method's."""
        return float(self.lr_ratio**-0.5)

    @property
    def update_rank(self) -> int | None:
        return self.rank

    def of_rank(self, rank: int) -> Self:
        return self.model_copy(update={"rank": rank, "alpha": self.alpha * rank / self.rank})

    def stored_strength(self, rank: int, alpha: float) -> tuple[int, float]:
        """Rank and alpha that the file says of a layer: the same scaling, whatever rank is
        stored."""
        return rank, alpha

    def rate_of(self, part: str) -> float:
        return self.lr_ratio if part == "B" else 1.0


class LoRA(LowRank):
    """y = base(x) + scaling * (x A^T) B^T, with scaling = alpha / rank (rsLoRA: alpha /
    sqrt(rank))."""

    usual_rate = 5e-4

    name: Literal["lora"] = "lora"
    init: Literal["default", "pissa", "olora", "eva", "loftq"] = "default"
    """Where A and B start: default (A random, B zero); pissa, olora: from the weight, the base left
    as it is and the file twice the rank; eva: A from what the layers see of the rows; loftq: from
    what 4 bits lost of the weight."""
    lora_bias: bool = False
    """Train a vector c beside B, as PEFT's lora_bias: scaling * (B A x + c). Linear layers only;
    merging wants layers with a bias."""
    svd_iterations: Annotated[int, POWER_ITERATIONS] | None = None
    """Power iterations of a fast randomised SVD with init pissa, for instance 16; default: the
    exact SVD. No effect with another init."""

    @property
    def contents(self) -> tuple[Content, ...]:
        return *super().contents, *((combinations.OFFSETS,) if self.lora_bias else ())

    @property
    def share_of_rate(self) -> float:
        """A quarter where the factors start as large as the weight: OLoRA fell far behind at the
        whole (docs/benchmarks.md)."""
        return super().share_of_rate * (0.25 if self.init in ("pissa", "olora") else 1.0)

    @property
    def two_factors(self) -> bool:
        return not self.lora_bias

    def stored_strength(self, rank: int, alpha: float) -> tuple[int, float]:
        if self.init not in ("pissa", "olora"):
            return rank, alpha
        return 2 * rank, alpha * (2**0.5 if self.rslora else 2)


class DoRA(LowRank):
    """Rows of W + scaling * B A brought to a trained length; linear layers and embeddings. Costs a
    little more than LoRA."""

    usual_rate = 5e-4

    name: Literal["dora"] = "dora"

    @property
    def contents(self) -> tuple[Content, ...]:
        return *super().contents, combinations.MAGNITUDES


class Bottleneck(AdapterConfig):
    """A small network behind or beside the blocks of every decoder layer, added to what they
    give."""

    usual_rate = 1e-3

    name: Literal["bottleneck"] = "bottleneck"
    placement: Literal["houlsby", "pfeiffer", "parallel"] = "parallel"
    """houlsby: behind attention and feed-forward; pfeiffer: behind the feed-forward; parallel:
    beside it."""
    size: Annotated[int, WIDTH] | None = None
    """S, width of the small network; a block of width D trains 2 * S * D + S + D. Default: D /
    reduction."""
    reduction: Annotated[int, WIDTH] | None = None
    """D / S instead of `size`; 16 if neither is given."""
    activation: Literal["relu", "gelu", "swish", "tanh"] = "relu"
    """Between the two layers; swish is also called SiLU."""
    norm: bool = False
    """Begin with a trained layer norm."""
    scaling: Annotated[float, SCALING] | None = None
    """Factor of what is added; 4 with placement parallel if not given, else 1."""
    dropout: Annotated[float, SHARE] = 0.0
    """Share of the inputs set to zero while training; 0 trains fastest."""
    layers: list[Annotated[int, LAYER]] = Field(default_factory=list)
    """Only these layers (0 is the first); empty: all."""

    @property
    def contents(self) -> tuple[Content, ...]:
        return (combinations.BOTTLENECKS,)

    @property
    def drops_out(self) -> bool:
        return self.dropout > 0

    @property
    def effective_scaling(self) -> float:
        default = 4.0 if self.placement == "parallel" else 1.0
        return default if self.scaling is None else self.scaling

    def bottleneck_size(self, width: int) -> int:
        """S on a model that is `width` wide."""
        return self.size or max(1, width // (self.reduction or 16))

    @model_validator(mode="after")
    def _one_size(self) -> "Bottleneck":
        if self.size is not None and self.reduction is not None:
            raise ValueError("size and reduction are both given: give one")
        return self


class Prefix(AdapterConfig):
    """Keys and values of every layer, trained, that all documents attend to first."""

    through_attention = True
    usual_rate = 1.5e-2  # keys and values are as large in wide models as in narrow ones
    rate_falls = 0.0

    name: Literal["prefix"] = "prefix"
    tokens: Annotated[int, PLACES] | None = None
    """M, places before every document; trains tokens * 2 * K * D parameters a layer (K key/value
    heads of D). Default: as many as the prompt it starts from has, at most 64; 30 with start:
    random."""
    start: Literal["prompt", "random"] = "prompt"
    """prompt: the keys and values that the base computes for a real prompt; random: normal values
    as widely spread."""
    prompt: str | None = None
    """Text it starts from; default: what all training rows begin with, or a plain instruction where
    that is little."""
    projection: Annotated[int, WIDTH] | None = None
    """Width of an MLP through which the prefix is trained; only what it computes is stored.
    Default: none."""
    layers: list[Annotated[int, LAYER]] = Field(default_factory=list)
    """Only these layers (0 is the first); empty: all. PEFT reads no prefix of some layers."""

    @property
    def contents(self) -> tuple[Content, ...]:
        return (combinations.PREFIX,)

    @property
    def share_of_rate(self) -> float:
        """Through an MLP a thirtieth: at a third it left the base's loss far behind
        (docs/benchmarks.md)."""
        return 1.0 if self.projection is None else 1 / 30

    @model_validator(mode="after")
    def _prompt_is_used(self) -> "Prefix":
        if self.prompt is not None and self.start == "random":
            raise ValueError("prompt is given, and start: random does not read it: leave one out")
        return self


class Full(MethodConfig):
    """Every weight of the base trains; the result is a model folder, not an adapter."""

    trains_base = True
    usual_rate = 5e-5

    name: Literal["full"] = "full"


Method = Annotated[LoRA | DoRA | Bottleneck | Prefix | Full, Field(discriminator="name")]
METHODS: dict[str, type[MethodConfig]] = {
    "lora": LoRA,
    "dora": DoRA,
    "bottleneck": Bottleneck,
    "prefix": Prefix,
    "full": Full,
}
