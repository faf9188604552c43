"""Deep models of equal layers: dry-runs a few layers, and extrapolates figures that grow equally
with each.
"""

import copy
from collections import Counter, defaultdict

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from veneer.bases.loading.from_config import build
from veneer.execution.facts.decoder_layer import decoder_layers
from veneer.plan.simulation.tracker import Phase, Work

PERIODS = (1, 2, 3, 4, 6)
"""Lengths of a repeating pattern of layers: all equal, or sliding and full attention in turn."""


def period_of(model: PreTrainedModel, parameters: dict[str, nn.Parameter]) -> int | None:
    """Returns the length of the repeating pattern of layers, None if there is none."""
    layers = decoder_layers(model)
    if layers is None:
        return None
    path = next(name for name, module in model.named_modules() if module is layers)
    kinds = getattr(model.config.get_text_config(), "layer_types", None)
    trained: dict[str, list[object]] = defaultdict(list)
    for name, parameter in parameters.items():
        if name.startswith(f"{path}."):
            number, _, name_in_layer = name.removeprefix(f"{path}.").partition(".")
            trained[number].append((name_in_layer, parameter.shape))
    signatures: list[object] = []
    for at, layer in enumerate(layers):
        shapes = [(name, p.shape, p.dtype) for name, p in layer.named_parameters()]
        kind = kinds[at] if isinstance(kinds, list | tuple) and at < len(kinds) else None
        signatures.append((shapes, trained[str(at)], kind))
    for period in PERIODS:
        if all(signatures[i] == signatures[i % period] for i in range(len(signatures))):
            return period
    return None


def first_layers(config: PreTrainedConfig, dtype: torch.dtype, depth: int) -> PreTrainedModel:
    """Builds the base with its first `depth` layers only."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = depth
    if isinstance(kinds := getattr(text, "layer_types", None), list | tuple):
        text.layer_types = list(kinds)[:depth]
    model = build(config, dtype)
    layers = decoder_layers(model)
    assert layers is not None
    del layers[depth:]  # for a model whose config counts layers under another name
    return model


def grown_phase(one: Phase, two: Phase, three: Phase, steps: int) -> Phase | None:
    """Extrapolates a phase by `steps` equal differences, None if the differences are not equal."""
    figures = []
    for a, b, c in (
        (one.peak_bytes, two.peak_bytes, three.peak_bytes),
        (one.end_bytes, two.end_bytes, three.end_bytes),
        *((one.parts.get(k, 0), two.parts.get(k, 0), three.parts.get(k, 0)) for k in three.parts),
    ):
        if c - b != b - a:
            return None
        figures.append(a + (b - a) * steps)
    peak, end, *parts = figures
    return Phase(one.name, peak, dict(zip(three.parts, parts, strict=True)), end)


def grown_work(one: Work, two: Work, steps: int) -> Work:
    """Extrapolates work by `steps` times the difference from `one` to `two`."""
    products = Counter(
        {k: one.products[k] + (two.products[k] - one.products[k]) * steps for k in two.products}
    )
    return Work(
        products,
        one.own & two.own,
        one.moved_bytes + (two.moved_bytes - one.moved_bytes) * steps,
        one.operations + (two.operations - one.operations) * steps,
        one.host_bytes + (two.host_bytes - one.host_bytes) * steps,
        one.replayed_layers + (two.replayed_layers - one.replayed_layers) * steps,
    )
