"""Deep models of equal layers: a few of the layers, and figures that grow by the same amount with
each."""

import copy
from collections import Counter, defaultdict

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from veneer.bases.loading.from_config import build
from veneer.execution.decoder_layer import decoder_layers
from veneer.plan.tracker import Phase, Work

PERIODS = (1, 2, 3, 4, 6)
"""How often a pattern of layers may repeat: every layer alike, or sliding and full attention in
turn."""


def period_of(model: PreTrainedModel, parameters: dict[str, nn.Parameter]) -> int | None:
    """After how many layers the pattern of layers repeats; None where it does not."""
    layers = decoder_layers(model)
    if layers is None:
        return None
    path = next(name for name, module in model.named_modules() if module is layers)
    kinds = getattr(model.config.get_text_config(), "layer_types", None)
    trained: dict[str, list[object]] = defaultdict(list)
    for name, parameter in parameters.items():
        if name.startswith(f"{path}."):
            number, _, within = name.removeprefix(f"{path}.").partition(".")
            trained[number].append((within, parameter.shape))
    signs: list[object] = []
    for at, layer in enumerate(layers):
        own = [(name, p.shape, p.dtype) for name, p in layer.named_parameters()]
        kind = kinds[at] if isinstance(kinds, list | tuple) and at < len(kinds) else None
        signs.append((own, trained[str(at)], kind))
    for period in PERIODS:
        if all(signs[i] == signs[i % period] for i in range(len(signs))):
            return period
    return None


def first_layers(config: PreTrainedConfig, dtype: torch.dtype, depth: int) -> PreTrainedModel:
    """The first `depth` layers of the base between its embedding and its head."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = depth
    if isinstance(kinds := getattr(text, "layer_types", None), list | tuple):
        text.layer_types = list(kinds)[:depth]
    model = build(config, dtype)
    layers = decoder_layers(model)
    assert layers is not None
    del layers[depth:]  # of a model that counts its layers otherwise
    return model


def grown_phase(one: Phase, two: Phase, three: Phase, steps: int) -> Phase | None:
    """`one` grown by `steps` times the difference to `two`; None where `three` does not differ as
    much again."""
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
    """`one` grown by `steps` times the difference to `two`."""
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
