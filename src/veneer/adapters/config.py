"""Settings of the methods, which a run file gives under `method`. `--help` reads this file, so it
does not import torch.

Sources: LoRA, Hu et al. 2021, arXiv:2106.09685; rsLoRA, Kalajdzievski 2023, arXiv:2312.03732; DoRA,
Liu et al. 2024, arXiv:2402.09353; LoRA+, Hayou et al. 2024, arXiv:2402.12354; prefix tuning, Li and
Liang 2021, arXiv:2101.00190.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from veneer.adapters import combinations
from veneer.adapters.combinations import Content
from veneer.adapters.method_config import AdapterConfig as AdapterConfig
from veneer.adapters.method_config import MethodConfig as MethodConfig
from veneer.bounds import (
    ALPHA,
    FROZEN_PLACES,
    LAYER,
    PLACES,
    POWER_ITERATIONS,
    RANK,
    RATIO,
    SCALING,
    SHARE,
    TOKEN,
    WIDTH,
)
from veneer.patterns import pattern

DEFAULT_RATIO = 4.0
"""LoRA+ ratio where no learning rate is given: docs/recipes.md."""


class LowRank(AdapterConfig):
    """Settings that LoRA and its variants share."""

    rate_of_weights = 0.0135

    rank: Annotated[int, RANK] = 16
    """Rank of the update; a linear layer trains rank * (in + out) parameters."""
    alpha: Annotated[float, ALPHA] = 32.0
    """Numerator of the scaling alpha / rank."""
    dropout: Annotated[float, SHARE] = 0.0
    """Share of the inputs of A that training sets to zero; 0 trains fastest. Rows with the same
    beginning get the same mask there. Embeddings have no dropout."""
    rslora: bool = False
    """scaling = alpha / sqrt(rank) instead of alpha / rank."""
    targets: str | list[str] = "all-linear"
    """all-linear (every linear layer except the output head, fused experts included), a list of
    module names or name endings, or a regular expression that matches the whole module path.
    all-linear leaves out weights that the model reads without calling their module (Mamba's
    dt_proj), and Mamba's out_proj, on which PEFT refuses LoRA."""
    exclude: list[str] = Field(default_factory=list)
    """Module names, name endings or regular expressions to leave out of `targets`."""
    layers: list[Annotated[int, LAYER]] = Field(default_factory=list)
    """Numbers of the layers to adapt, from 0; empty: all. Modules outside the layers are not
    affected."""
    rank_pattern: dict[str, Annotated[int, RANK]] = Field(default_factory=dict)
    """Ranks by regular expression for the end of a module path; the first match wins."""
    alpha_pattern: dict[str, Annotated[float, ALPHA]] = Field(default_factory=dict)
    """Alphas by regular expression for the end of a module path; the first match wins."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Also train biases of the base: of all modules (all) or of the targeted ones (lora_only)."""
    train_modules: list[str] = Field(default_factory=list)
    """Modules (names or endings) to train in full as well, for instance lm_head."""
    lr_ratio: Annotated[float, RATIO] | None = None
    """LoRA+: learning rate of B divided by that of A, which is learning_rate; 1: off. Default: 4 if
    learning_rate is left out, else 1. A's default rate is lower by the square root of this
    ratio."""

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
        """LoRA+: keeps the geometric mean of the rates of A and B at the usual rate."""
        return float(self.rate_of("B") ** -0.5)

    @property
    def update_rank(self) -> int | None:
        return self.rank

    def of_rank(self, rank: int) -> Self:
        return self.model_copy(update={"rank": rank, "alpha": self.alpha * rank / self.rank})

    def stored_strength(self, rank: int, alpha: float) -> tuple[int, float]:
        """Returns rank and alpha as a layer's file states them, with the same scaling."""
        return rank, alpha

    def for_learning_rate(self, given: float | None) -> Self:
        ratio = DEFAULT_RATIO if given is None else 1.0
        return self.model_copy(update={} if self.lr_ratio is not None else {"lr_ratio": ratio})

    def rate_of(self, part: str) -> float:
        return self.lr_ratio or 1.0 if part == "B" else 1.0


class LoRA(LowRank):
    """Adds a low-rank update: y = base(x) + scaling * (x A^T) B^T, with scaling = alpha / rank
    (rsLoRA: alpha / sqrt(rank))."""

    usual_rate = 5e-4

    name: Literal["lora"] = "lora"
    init: Literal["default", "pissa", "olora", "eva", "loftq"] = "default"
    """Initial values: default (A random, B zero); pissa and olora: from a decomposition of the
    weight, stored at twice the rank so that the base stays as it is; eva: A from the principal
    directions of the layers' inputs; loftq: from the error of the 4-bit weights."""
    lora_bias: bool = False
    """Also train a vector c, as PEFT's lora_bias does: scaling * (B A x + c). Linear layers only;
    to be merged, they need a bias."""
    svd_iterations: Annotated[int, POWER_ITERATIONS] | None = None
    """With init pissa: power iterations of a fast randomised SVD, for instance 16; default: the
    exact SVD."""
    activation: str | list[Annotated[int, TOKEN]] = ""
    """Text (or its token ids) from which on the adapter acts: aLoRA, as PEFT's
    alora_invocation_tokens. Tokens before its last occurrence in the prompt are the base's, so
    adapters share their keys and values. Empty: the adapter acts on all tokens. Linear layers
    only."""

    @model_validator(mode="after")
    def _acts_after_activation(self) -> "LoRA":
        if self.activation:
            faults = combinations.beside_activation(self.contents)
            if self.init == "loftq":
                faults.append("init: loftq corrects the base, which acts alone before the text")
            if faults:
                raise ValueError(f"activation does not go with {', '.join(faults)}")
        return self

    @property
    def acts_from(self) -> str | Sequence[int]:
        return self.activation

    @property
    def contents(self) -> tuple[Content, ...]:
        offsets = (combinations.OFFSETS,) if self.lora_bias else ()
        return *super().contents, *offsets, *((combinations.ACTIVATION,) if self.activation else ())

    @property
    def share_of_rate(self) -> float:
        """Returns 1/4 if the factors start as large as the weight: at the whole rate OLoRA fell far
        behind (docs/benchmarks.md)."""
        return super().share_of_rate * (0.25 if self.init in ("pissa", "olora") else 1.0)

    @property
    def two_factors(self) -> bool:
        return not self.lora_bias

    def stored_strength(self, rank: int, alpha: float) -> tuple[int, float]:
        if self.init not in ("pissa", "olora"):
            return rank, alpha
        return 2 * rank, alpha * (2**0.5 if self.rslora else 2)


class DoRA(LowRank):
    """LoRA with a trained magnitude per output row: the rows of W + scaling * B A are scaled to it.
    For linear layers and embeddings; costs a little more than LoRA."""

    usual_rate = 5e-4

    name: Literal["dora"] = "dora"

    @property
    def contents(self) -> tuple[Content, ...]:
        return *super().contents, combinations.MAGNITUDES


class Bottleneck(AdapterConfig):
    """Adds the output of a small network after, or parallel to, the blocks of each decoder
    layer."""

    usual_rate = 1e-3

    name: Literal["bottleneck"] = "bottleneck"
    placement: Literal["houlsby", "pfeiffer", "parallel"] = "parallel"
    """houlsby: after attention and after the feed-forward; pfeiffer: after the feed-forward;
    parallel: parallel to the feed-forward."""
    size: Annotated[int, WIDTH] | None = None
    """Width S of the small network; a block of width D trains 2 * S * D + S + D parameters.
    Default: D / reduction."""
    reduction: Annotated[int, WIDTH] | None = None
    """D / S, instead of `size`; default: 16."""
    activation: Literal["relu", "gelu", "swish", "tanh"] = "relu"
    """Activation between the two layers; swish is also called SiLU."""
    norm: bool = False
    """Normalise the input by a trained layer norm."""
    scaling: Annotated[float, SCALING] | None = None
    """Factor of the output; default: 4 with placement parallel, else 1."""
    dropout: Annotated[float, SHARE] = 0.0
    """Share of the inputs that training sets to zero; 0 trains fastest."""
    layers: list[Annotated[int, LAYER]] = Field(default_factory=list)
    """Numbers of the layers to adapt, from 0; empty: all."""

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
        """Returns S for a block of this width."""
        return self.size or max(1, width // (self.reduction or 16))

    def resolved(self, width: int) -> Self:
        """Returns the settings with the size and scaling that blocks of this width have."""
        size, scaling = self.bottleneck_size(width), self.effective_scaling
        return self.model_copy(update={"size": size, "reduction": None, "scaling": scaling})

    @model_validator(mode="after")
    def _one_size(self) -> "Bottleneck":
        if self.size is not None and self.reduction is not None:
            raise ValueError("size and reduction are both given: give one")
        return self


class Prefix(AdapterConfig):
    """Trains keys and values in front of every sequence, in each layer."""

    through_attention = True
    usual_rate = 1.5e-2  # keys and values are as large in wide models as in narrow ones
    rate_falls = 0.0
    of_document = MappingProxyType({"start": "teacher", "frozen_tokens": 1})

    name: Literal["prefix"] = "prefix"
    tokens: Annotated[int, PLACES] | None = None
    """Length M of the prefix; trains tokens * 2 * K * D parameters a layer (K key/value heads of
    size D). Default: the length of the prompt, at most 64, or 512 with start teacher; with start
    random: 30."""
    start: Literal["prompt", "teacher", "random"] = "prompt"
    """Initial values: prompt (the keys and values that the base computes for `prompt`), teacher
    (those of the first tokens that the teacher reads in front of every row) or random (normal
    values of the same spread)."""
    prompt: str | None = None
    """Text for start: prompt; default: the common beginning of all training rows, or a plain
    instruction if that is short."""
    projection: Annotated[int, WIDTH] | None = None
    """Train the prefix through an MLP of this width; only its output is stored. Default: no MLP."""
    layers: list[Annotated[int, LAYER]] = Field(default_factory=list)
    """Numbers of the layers to adapt, from 0; empty: all. PEFT needs a prefix of all layers."""
    frozen_tokens: Annotated[int, FROZEN_PLACES] | None = None
    """First tokens of the prefix that do not train; the adapter is then PEFT's CARTRIDGE, which
    keeps one, because every text looks at its first token. Default: all tokens train."""

    @property
    def contents(self) -> tuple[Content, ...]:
        return (combinations.PREFIX,)

    @property
    def starts_from_teacher(self) -> bool:
        return self.start == "teacher"

    @property
    def keeps_values(self) -> bool:
        return bool(self.frozen_tokens)

    @property
    def share_of_rate(self) -> float:
        """Returns 1/30 with an MLP: at a third, the loss became worse than that of the base
        (docs/benchmarks.md)."""
        return 1.0 if self.projection is None else 1 / 30

    @model_validator(mode="after")
    def _check_combinations(self) -> "Prefix":
        if self.prompt is not None and self.start != "prompt":
            raise ValueError(f"start: {self.start} does not use prompt: leave one of them out")
        if self.frozen_tokens is None:
            return self
        if self.tokens is not None and self.frozen_tokens > self.tokens:
            raise ValueError(
                f"frozen_tokens {self.frozen_tokens} are more than the {self.tokens} tokens"
            )
        if self.projection is not None or self.layers:
            raise ValueError(
                "frozen_tokens belong to PEFT's CARTRIDGE, which has all layers and no projection:"
                " leave layers and projection out"
            )
        return self


class Full(MethodConfig):
    """Trains every weight of the base; the result is a model folder, not an adapter."""

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


def adapter_settings(values: Mapping[str, Any]) -> AdapterConfig:
    """Reads stored settings of an adapter; `name` among them names its method."""
    settings = METHODS[values["name"]].model_validate(values)
    assert isinstance(settings, AdapterConfig), f"{settings.name} makes no adapter"
    return settings
