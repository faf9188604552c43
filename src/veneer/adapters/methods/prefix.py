"""Prefix tuning: keys and values of every layer, trained, that all documents attend to first.

    attention of layer l:  keys [K_l ; own keys]   values [V_l ; own values]      K_l, V_l (M, K, D)

K_l enters as it is: no rotary embedding is applied to it, for what it starts from carries its own.
The documents' positions start at M. Nothing is added to any weight, so a prefix cannot be folded
into one.

The layer stands beside the decoder (the model without its head), not beside every attention: its
wrapper shifts the positions and hands the keys down as one keyword that reaches the attention
function, as the batch's layout does. Knows nothing of transformers, files or tokens. Shapes: M
prefix tokens, L layers with a prefix, K key/value heads, D head size, t = K * D. Source: Li and
Liang 2021, arXiv:2101.00190; the table's layout is PEFT's prompt_embeddings, (M, 2 L t): slice 2l
is K of layer l, 2l + 1 is V.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from veneer.adapters.combinations import PREFIX
from veneer.adapters.config import Prefix
from veneer.adapters.placement.acting import Applied
from veneer.adapters.placement.rows import rows_of
from veneer.adapters.placement.site import Site
from veneer.adapters.placement.wrapping import AdaptedModule, plain_modules, unwrapped
from veneer.errors import ConfigError

PART = "prompt_embeddings"
DEFAULT_TOKENS = 30


Pair = tuple[Tensor, Tensor]
Pairs = Mapping[int, Pair]
"""(K, V) of (M, K, D) each, by layer number; none: no prefix."""


@dataclass
class PrefixKeys:
    """Prefixes on their way through one forward.

    parts       rows of the forward, and what they see first: all of them, in order
    positions   (B, T) or (1, T) of the forward's rows, the prefix counted
    asked       layers that took theirs: each must, or a part of the prefix would be lost without a
                word
    """

    parts: Sequence[tuple[slice, Pairs]]
    positions: Tensor
    asked: set[int] = field(default_factory=set)

    @classmethod
    def everywhere(cls, pairs: Pairs, positions: Tensor) -> "PrefixKeys":
        return cls([(slice(0, sys.maxsize), pairs)], positions)

    def of(self, layer: int, row: int = 0) -> Pair | None:
        """What that row sees first."""
        return next(pair for rows, pair in self.along(layer) if row < rows.stop)

    def along(self, layer: int) -> list[tuple[slice, Pair | None]]:
        """What the rows of each part see first."""
        self.asked.add(layer)
        return [(rows, pairs.get(layer)) for rows, pairs in self.parts]


@dataclass
class KeyRecorder:
    """Takes the keys and values that a forward computes, rotary embedding applied: (T, K, D) by
    layer number."""

    pairs: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def take(self, layer: int, key: Tensor, value: Tensor) -> None:
        """key and value: (1, K, T, D)."""
        self.pairs[layer] = (key[0].transpose(0, 1).detach(), value[0].transpose(0, 1).detach())


class Projection:
    """The MLP through which a prefix may be trained: tanh(E W1^T + b1) W2^T + b2. Only what it
    computes is stored.

    E (M, t), W1 (h, t), W2 (2 L t, h). from_zero: W2 and b2 start at zero, so that it adds nothing
    at first.
    """

    def __init__(
        self,
        tokens: int,
        width: int,
        token_size: int,
        out: int,
        generator: torch.Generator,
        *,
        from_zero: bool,
    ) -> None:
        def uniform(*shape: int, fan_in: int) -> Tensor:
            return torch.rand(shape, generator=generator).mul_(2).sub_(1).mul_(fan_in**-0.5)

        self.parameters = {
            "embedding": nn.Parameter(torch.randn(tokens, token_size, generator=generator)),
            "projection_in": nn.Parameter(uniform(width, token_size, fan_in=token_size)),
            "projection_in_bias": nn.Parameter(uniform(width, fan_in=token_size)),
            "projection_out": nn.Parameter(uniform(out, width, fan_in=width)),
            "projection_out_bias": nn.Parameter(uniform(out, fan_in=width)),
        }
        if from_zero:
            self.parameters["projection_out"].data.zero_()
            self.parameters["projection_out_bias"].data.zero_()

    def __call__(self) -> Tensor:
        E, W1, b1, W2, b2 = self.parameters.values()
        return torch.tanh(E @ W1.T + b1) @ W2.T + b2


class PrefixLayer:
    """start (M, 2 L t) float32: trained itself, or, with a projection, frozen below what the
    projection adds."""

    scaling = 1.0

    def __init__(
        self,
        start: Tensor,
        layers: Sequence[int],
        kv_heads: int,
        *,
        dtype: torch.dtype,
        projection: Projection | None = None,
    ) -> None:
        self.start = nn.Parameter(start, requires_grad=projection is None)
        self.layers = tuple(layers)
        self.kv_heads = kv_heads
        self.dtype = dtype
        """Type that the base computes its keys in."""
        self.projection = projection

    @property
    def tokens(self) -> int:
        """M."""
        return self.start.shape[0]

    @property
    def token_size(self) -> int:
        """t = K * D: values of one token's keys in one layer."""
        return self.start.shape[1] // (2 * len(self.layers))

    def values(self) -> Tensor:
        """(M, 2 L t) float32, as the file holds them."""
        return self.start if self.projection is None else self.start + self.projection()

    def keys(self) -> dict[int, tuple[Tensor, Tensor]]:
        """(K, V) of every layer that has a prefix, each (M, K, D), in the base's type."""
        slices = (
            self.values()
            .to(self.dtype)
            .view(self.tokens, 2 * len(self.layers), self.kv_heads, -1)
            .unbind(1)
        )
        return {layer: (slices[2 * i], slices[2 * i + 1]) for i, layer in enumerate(self.layers)}

    def parts(self) -> dict[str, nn.Parameter]:
        return {PART: self.start} if self.projection is None else dict(self.projection.parameters)

    def stored(self) -> dict[str, Tensor]:
        return {PART: self.values().detach()}

    def folded(self, weight: Tensor) -> Tensor:
        raise ConfigError("a prefix cannot be merged into weights", next_step=PREFIX.instead)


class PrefixedDecoder(AdaptedModule):
    """The model without its head. With no prefix acting it is called as it is: the same bits."""

    def __getattr__(self, name: str) -> Any:
        """transformers reads a decoder's attributes (layers, embed_tokens, config) as if no wrapper
        were there."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def get_decoder(self) -> nn.Module:
        """transformers' best-effort lookup asks the decoder itself last: it is this one, wrapper
        and all."""
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        acting = self.routing.acting
        layers = [self._one_of(part.adapters) for part in acting.parts]
        if not any(layers):
            return self.base(*args, **kwargs)
        positions = kwargs.pop("position_ids", None)
        if positions is None:
            positions = _positions(args[0] if args else kwargs.get("input_ids"), kwargs)
        if acting.whole is not None:
            (layer,) = layers
            assert layer is not None
            positions = positions + layer.tokens
            keys = PrefixKeys.everywhere(layer.keys(), positions)
        else:
            given: Any = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs_embeds"))
            segments = acting.segments(rows_of(acting, [given], {}))
            of_part = [self._one_of(segment.adapters) for segment in segments]
            moved = torch.tensor([0 if layer is None else layer.tokens for layer in of_part])
            moved = moved.repeat_interleave(torch.tensor([segment.count for segment in segments]))
            positions = positions + moved.to(positions.device).view(*given.shape[:2])
            pairs = [{} if layer is None else layer.keys() for layer in of_part]
            keys = PrefixKeys(
                [(s.rows, p) for s, p in zip(segments, pairs, strict=True)], positions
            )
        out = self.base(*args, **kwargs, position_ids=positions, veneer_prefix=keys)
        wanted = {number for layer in layers if layer is not None for number in layer.layers}
        if lost := wanted - keys.asked:
            raise ConfigError(
                f"the prefix did not reach {len(lost)} of {len(wanted)} layers of"
                f" {type(self.base).__name__}",
                next_step="Prefix tuning does not work on this model; take lora.",
            )
        return out

    def _one_of(self, adapters: Applied) -> "PrefixLayer | None":
        return next((layer for layer, _ in self.beside(adapters)), None)


def _positions(ids: Tensor | None, given: dict[str, Any]) -> Tensor:
    """(1, T): what transformers' models make where none are given. The cache's name differs between
    its versions."""
    rows = given["inputs_embeds"] if ids is None else ids
    cache = given.get("cache", given.get("past_key_values"))
    past = 0 if cache is None else cache.get_seq_length()
    return torch.arange(past, past + rows.shape[1], device=rows.device)[None]


def record_keys(decoder: nn.Module, ids: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
    """Keys and values, (T, K, D) each, that the base computes for ids (T) at positions 0..T-1, by
    layer number.

    ConfigError: the model's attention is not Veneer's (models/attention.py), so no prefix would
    reach it.
    """
    recorder = KeyRecorder()
    refused = ""
    try:
        with torch.no_grad():
            decoder(input_ids=ids[None], use_cache=False, veneer_keys=recorder)
    except TypeError as fault:
        refused = f" ({str(fault)[:80]})"
    if not recorder.pairs or min(recorder.pairs) < 0:
        raise _unreachable(decoder, f"its attention is not handed over{refused}")
    return recorder.pairs


def _unreachable(decoder: nn.Module, why: str) -> ConfigError:
    return ConfigError(
        f"prefix tuning does not work on {type(decoder).__name__}",
        [why],
        "Take lora, which works on every model.",
    )


def prove(decoder: nn.Module, ids: Tensor, pairs: dict[int, tuple[Tensor, Tensor]]) -> None:
    """A text's own keys as a prefix give what the model gives with that text in its cache, or
    ConfigError.

    ids (T): the text that `pairs` were recorded from. This checks, on the model at hand, that keys
    arrive in every layer, that positions go on behind them, and that windows count them. The
    yardstick is the cache and not the whole text at once: on SmolLM2-135M in bf16 those two differ
    by 40% where ids are rare ones.
    """
    more, T = ids.flip(0)[None], len(ids)
    keys = PrefixKeys.everywhere(pairs, torch.arange(T, 2 * T, device=ids.device)[None])
    with torch.no_grad():
        first = decoder(input_ids=ids[None], use_cache=True)
        name = _cache_name(first)
        own: dict[str, Any] = {} if name is None else {name: first[name]}
        expected = decoder(input_ids=more, position_ids=keys.positions, **own).last_hidden_state
        found = decoder(
            input_ids=more, position_ids=keys.positions, use_cache=False, veneer_prefix=keys
        ).last_hidden_state
    if expected.device.type == "meta":
        return
    difference = ((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12)).item()
    if not own or difference > (1e-3 if expected.dtype in (torch.float32, torch.float64) else 0.05):
        raise _unreachable(
            decoder, f"a text's own keys, put in front, give a result that is {difference:.1e} off"
        )


def decoder_of(model: nn.Module) -> tuple[str, nn.Module]:
    """The model without its head, as the base has it, and its path."""
    get: Any = getattr(model, "get_decoder", None)
    decoder = unwrapped(get()) if get is not None else None
    for path, module in plain_modules(model).items():
        if module is decoder and path:
            return path, module
    raise ConfigError(
        f"{type(model).__name__} has no decoder of its own that a prefix could stand beside"
    )


@dataclass(frozen=True)
class KeyShape:
    """layers: numbers of those that have keys; heads: K; size: D."""

    layers: tuple[int, ...]
    heads: int
    size: int


def key_shape(model: nn.Module) -> KeyShape:
    """The one shape that the keys and values of all layers have, as a forward leaves them in the
    model's cache.

    ConfigError: they differ, and the table has room for one. Weights are not needed: a model on the
    meta device will do, and a model is asked once.
    """
    _, decoder = decoder_of(model)
    if (known := _KEY_SHAPES.get(decoder)) is None:
        known = _KEY_SHAPES[decoder] = _key_shape(decoder)
    return known


_KEY_SHAPES: WeakKeyDictionary[nn.Module, KeyShape] = WeakKeyDictionary()


def _key_shape(decoder: nn.Module) -> KeyShape:
    with torch.no_grad():
        out = decoder(
            input_ids=torch.zeros(1, 1, dtype=torch.long, device=_device(decoder)), use_cache=True
        )
    name = _cache_name(out)
    layers: list[Any] = [] if name is None else list(out[name].layers)
    if not layers or not all(
        hasattr(layer, "keys") and hasattr(layer, "values") for layer in layers
    ):
        raise _unreachable(decoder, "it keeps no keys and values in its layers' caches")
    shapes = {(t.shape[1], t.shape[3]) for layer in layers for t in (layer.keys, layer.values)}
    if len(shapes) > 1:
        listed = ", ".join(f"{heads} heads of {size}" for heads, size in sorted(shapes))
        raise _unreachable(decoder, f"its keys and values differ in shape: {listed}")
    ((heads, size),) = shapes
    return KeyShape(tuple(range(len(layers))), heads, size)


def _cache_name(out: Any) -> str | None:
    """What transformers calls the cache in a model's output: its versions differ."""
    return next((name for name in ("cache", "past_key_values") if name in out), None)


def _device(decoder: nn.Module) -> torch.device:
    return next(decoder.parameters()).device


def build_prefix(site: Site, config: Prefix) -> None:
    """One layer beside the decoder, its keys and values random with the spread of the base's own.

    models/initial_values.py then starts it from a prompt. ConfigError: the model, or `layers`, does
    not fit.
    """
    path, decoder = decoder_of(site.model)
    shape = key_shape(site.model)
    ids = torch.arange(8, device=_device(decoder))
    with site.routing.none():
        own = record_keys(decoder, ids)
        if unknown := sorted(set(config.layers) - set(shape.layers)):
            raise ConfigError(
                f"a prefix for layers {unknown}: they do not exist",
                [f"the model has layers 0-{max(shape.layers)}"],
                "Correct `layers`, or leave it out.",
            )
        if set(own) != set(shape.layers):
            raise _unreachable(
                decoder, f"{len(own)} of its {len(shape.layers)} layers hand their attention over"
            )
        prove(decoder, ids, own)
    layers = sorted(set(config.layers) or shape.layers)
    tokens, size = config.tokens or DEFAULT_TOKENS, shape.heads * shape.size
    spreads = [tensor.float().std() for n in layers for tensor in own[n]]
    slices = [
        torch.randn(tokens, size, generator=site.generator).to(ids.device) * spread
        for spread in spreads
    ]
    start, projection = _table(slices), None
    if config.projection is not None:
        from_prompt = config.start == "prompt"
        start = start if from_prompt else torch.zeros_like(start)
        projection = Projection(
            tokens, config.projection, size, start.shape[1], site.generator, from_zero=from_prompt
        )
        for parameter in projection.parameters.values():
            parameter.data = parameter.data.to(ids.device)
    dtype = own[layers[0]][0].dtype
    site.put(
        path,
        PrefixedDecoder,
        PrefixLayer(start, layers, shape.heads, dtype=dtype, projection=projection),
    )
    site.attachment.adaptable, site.attachment.places = len(shape.layers), len(layers)


def _table(slices: Sequence[Tensor]) -> Tensor:
    """2 L slices of (M, t), K and V of every layer in turn -> (M, 2 L t)."""
    return torch.stack(tuple(slices), dim=1).flatten(1)


def put_start(layer: PrefixLayer, pairs: dict[int, tuple[Tensor, Tensor]]) -> None:
    """Let the prefix start from these keys and values: (M, K, D) each, by layer number."""
    with torch.no_grad():
        layer.start.copy_(
            _table([tensor.float().flatten(1) for n in layer.layers for tensor in pairs[n]])
        )


def tokens_in_front(layers: Iterable[object]) -> int:
    """Places that the prefixes among these layers take before every document."""
    return sum(layer.tokens for layer in layers if isinstance(layer, PrefixLayer))
