"""Attaches a trained prefix (methods/prefix_layer.py) to a model.

The layer is attached to the decoder (the model without its head), not to every attention module.
Its wrapper shifts the positions and passes the keys as one keyword that reaches the attention
function, like the batch's layout. Shapes: M prefix tokens, L layers with a prefix, K key/value
heads, D head size, t = K * D.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapters.config import Prefix
from veneer.adapters.methods.prefix_layer import (
    DEFAULT_TOKENS,
    KeyRecorder,
    PrefixKeys,
    PrefixLayer,
    Projection,
    prefix_table,
)
from veneer.adapters.placement.acting import Applied
from veneer.adapters.placement.rows import rows_of
from veneer.adapters.placement.site import Site
from veneer.adapters.placement.wrapping import AdaptedModule, plain_modules, unwrapped
from veneer.errors import ConfigError
from veneer.model_record import record_of


class PrefixedDecoder(AdaptedModule):
    """The model without its head. Without an active prefix it is called as it is."""

    def get_decoder(self) -> nn.Module:
        """Ends transformers' lookup of a model's decoder at this wrapper."""
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        acting = self.routing.acting
        layers = [self._prefix_of(part.adapters) for part in acting.parts]
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
            inputs: Any = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs_embeds"))
            segments = acting.segments(rows_of(acting, [inputs], {}))
            prefixes = [self._prefix_of(segment.adapters) for segment in segments]
            shifts = torch.tensor([0 if layer is None else layer.tokens for layer in prefixes])
            shifts = shifts.repeat_interleave(torch.tensor([segment.count for segment in segments]))
            positions = positions + shifts.to(positions.device).view(*inputs.shape[:2])
            pairs = [{} if layer is None else layer.keys() for layer in prefixes]
            keys = PrefixKeys(
                [(s.rows, p) for s, p in zip(segments, pairs, strict=True)], positions
            )
        out = self.base(*args, **kwargs, position_ids=positions, veneer_prefix=keys)
        prefixed = {number for layer in layers if layer is not None for number in layer.layers}
        if missed := prefixed - keys.asked:
            raise ConfigError(
                f"the prefix did not reach {len(missed)} of {len(prefixed)} layers of"
                f" {type(self.base).__name__}",
                next_step="Prefix tuning does not work on this model; take lora.",
            )
        return out

    def _prefix_of(self, adapters: Applied) -> "PrefixLayer | None":
        return next((layer for layer, _ in self.layers_of(adapters)), None)


def _positions(ids: Tensor | None, kwargs: dict[str, Any]) -> Tensor:
    """Returns the default positions (1, T) of transformers' models. The cache's name differs
    between versions of transformers."""
    rows = kwargs["inputs_embeds"] if ids is None else ids
    cache = kwargs.get("cache", kwargs.get("past_key_values"))
    past = 0 if cache is None else cache.get_seq_length()
    return torch.arange(past, past + rows.shape[1], device=rows.device)[None]


def record_keys(decoder: nn.Module, ids: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
    """Records the base's keys and values, (T, K, D) each, of ids (T), by layer number.

    Raises ConfigError if the model's attention is not Veneer's (execution/attention.py).
    """
    recorder = KeyRecorder()
    refused = ""
    try:
        with torch.no_grad():
            decoder(input_ids=ids[None], use_cache=False, veneer_keys=recorder)
    except TypeError as fault:
        refused = f" ({str(fault)[:80]})"
    if not recorder.pairs or min(recorder.pairs) < 0:
        raise _unreachable(decoder, f"its attention is not Veneer's{refused}")
    return recorder.pairs


def _unreachable(decoder: nn.Module, why: str) -> ConfigError:
    return ConfigError(
        f"prefix tuning does not work on {type(decoder).__name__}",
        [why],
        "Take lora, which works on every model.",
    )


def prove(decoder: nn.Module, ids: Tensor, pairs: dict[int, tuple[Tensor, Tensor]]) -> None:
    """Checks that a text's keys as a prefix give the same outputs as that text in the cache.

    `pairs` were recorded from ids (T). This shows that keys reach every layer, that positions
    continue after them, and that attention windows count them. The reference is the cache, not one
    forward of the whole text: on SmolLM2-135M in bf16 these two differ by 40% for rare ids. Raises
    ConfigError if outputs differ.
    """
    next_ids, T = ids.flip(0)[None], len(ids)
    keys = PrefixKeys.everywhere(pairs, torch.arange(T, 2 * T, device=ids.device)[None])
    with torch.no_grad():
        first = decoder(input_ids=ids[None], use_cache=True)
        name = _cache_name(first)
        with_cache: dict[str, Any] = {} if name is None else {name: first[name]}
        expected = decoder(
            input_ids=next_ids, position_ids=keys.positions, **with_cache
        ).last_hidden_state
        outputs = decoder(
            input_ids=next_ids, position_ids=keys.positions, use_cache=False, veneer_prefix=keys
        ).last_hidden_state
    if expected.device.type == "meta":
        return
    difference = ((outputs - expected).abs().max() / expected.abs().max().clamp_min(1e-12)).item()
    if not with_cache or difference > (
        1e-3 if expected.dtype in (torch.float32, torch.float64) else 0.05
    ):
        raise _unreachable(
            decoder, f"a text's keys as a prefix give outputs that are {difference:.1e} off"
        )


def decoder_of(model: nn.Module) -> tuple[str, nn.Module]:
    """Returns the path of the model without its head, and the base's module."""
    get: Any = getattr(model, "get_decoder", None)
    decoder = unwrapped(get()) if get is not None else None
    for path, module in plain_modules(model).items():
        if module is decoder and path:
            return path, module
    raise ConfigError(
        f"{type(model).__name__} has no separate decoder to which a prefix could be attached"
    )


@dataclass(frozen=True)
class KeyShape:
    """Shape of a model's keys: numbers of the layers that have keys, heads K, head size D."""

    layers: tuple[int, ...]
    heads: int
    size: int


def key_shape(model: nn.Module) -> KeyShape:
    """Returns the one shape that the keys and values of all layers have, as a forward leaves them
    in the model's cache.

    ConfigError: they differ, and the table has room for one. Weights are not needed: a model on the
    meta device will do, and a model is asked once.
    """
    return record_of(model).part(KeyShape, lambda: _key_shape(decoder_of(model)[1]))


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
    """Name of the cache in a model's output, which differs between versions of transformers."""
    return next((name for name in ("cache", "past_key_values") if name in out), None)


def _device(decoder: nn.Module) -> torch.device:
    return next(decoder.parameters()).device


def build_prefix(site: Site, config: Prefix) -> None:
    """Attaches a prefix whose random keys and values have the standard deviation of the base's.

    models/starts/initial_values.py then starts it from a prompt. Raises ConfigError if the model or
    `layers` do not fit.
    """
    path, decoder = decoder_of(site.model)
    shape = key_shape(site.model)
    ids = torch.arange(8, device=_device(decoder))
    with site.routing.none():
        recorded = record_keys(decoder, ids)
        if unknown := sorted(set(config.layers) - set(shape.layers)):
            raise ConfigError(
                f"a prefix for layers {unknown}: they do not exist",
                [f"the model has layers 0-{max(shape.layers)}"],
                "Correct `layers`, or leave it out.",
            )
        if set(recorded) != set(shape.layers):
            raise _unreachable(
                decoder, f"{len(recorded)} of its {len(shape.layers)} layers use Veneer's attention"
            )
        prove(decoder, ids, recorded)
    layers = sorted(set(config.layers) or shape.layers)
    tokens, size = config.tokens or DEFAULT_TOKENS, shape.heads * shape.size
    deviations = [tensor.float().std() for n in layers for tensor in recorded[n]]
    slices = [
        torch.randn(tokens, size, generator=site.generator).to(ids.device) * deviation
        for deviation in deviations
    ]
    start, projection = prefix_table(slices), None
    if config.projection is not None:
        from_prompt = config.start == "prompt"
        start = start if from_prompt else torch.zeros_like(start)
        projection = Projection(
            tokens, config.projection, size, start.shape[1], site.generator, from_zero=from_prompt
        )
        for parameter in projection.parameters.values():
            parameter.data = parameter.data.to(ids.device)
    dtype = recorded[layers[0]][0].dtype
    site.put(
        path,
        PrefixedDecoder,
        PrefixLayer(
            start,
            layers,
            shape.heads,
            dtype=dtype,
            projection=projection,
            frozen_tokens=config.frozen_tokens or 0,
        ),
    )
    site.attachment.adaptable, site.attachment.places = len(shape.layers), len(layers)
