"""Builds LoRA and DoRA adapters: chooses the modules and ranks, and initialises the factors."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from veneer.adapters.config import DoRA, LoRA, LowRank
from veneer.adapters.methods.adapted_embedding import AdaptedEmbedding, AdaptedMatrix
from veneer.adapters.methods.adapted_linear import AdaptedLinear
from veneer.adapters.methods.dora import DoRALayer
from veneer.adapters.methods.expert_stack import expert_parameters, is_gated_stack
from veneer.adapters.methods.experts import AdaptedExperts
from veneer.adapters.methods.initial_factors import Factors, olora_start, pissa_start
from veneer.adapters.methods.lora import Kind, LoRALayer
from veneer.adapters.methods.targets import Targets, find_targets
from veneer.adapters.placement.reads import refused_by_peft, weights_read_past
from veneer.adapters.placement.site import Site
from veneer.adapters.placement.wrapping import AdaptedModule, SwappedModule
from veneer.errors import ConfigError
from veneer.linear import (
    FrozenLinear,
    embedding_as_linear,
    frozen_linear,
    is_plain_embedding,
    matrix_shape,
    type_in_products,
)
from veneer.patterns import first_match
from veneer.sharded import whole, whole_module


def build_lora(site: Site, config: LoRA) -> None:
    """Attaches LoRA layers. Raises ConfigError if the settings do not fit the model."""
    targets = _targets(site, config)
    not_linear = [*targets.embeddings, *targets.experts, *targets.routers]
    if config.init != "default" and not_linear:
        raise ConfigError(
            f"init {config.init} takes linear layers; these targets are embeddings, fused experts"
            " or routers",
            not_linear,
            "List the linear layers in `targets`, or leave init at default.",
        )
    if config.lora_bias and not_linear:
        raise ConfigError(
            "lora_bias takes linear layers; these targets are embeddings, fused experts or routers",
            not_linear,
            "List the linear layers in `targets`, or leave lora_bias out.",
        )
    if config.activation and (unsplit := [*not_linear, *_heads(site, targets)]):
        raise ConfigError(
            "activation takes linear layers inside the model; these targets are embeddings, fused"
            " experts, routers or the output head",
            unsplit,
            "Exclude them (method.exclude), or leave activation out.",
        )
    added_to_weight = [
        path
        for path in targets.experts
        if not is_gated_stack(site.modules[path.rpartition(".")[0]])
    ] + targets.routers
    if config.dropout and added_to_weight:
        raise ConfigError(
            "dropout needs the inputs of a module; the update of these is added to the weight",
            added_to_weight,
            "Set method.dropout: 0, or exclude them (method.exclude).",
        )
    for path in targets.linears:
        layer, frozen = _linear_layer(site, config, path)
        if (start := _START.get(config.init)) is not None:
            with whole_module(site.modules[path]):
                weight = frozen.dense_weight(torch.float32)
            A0, B0 = start(weight, layer, config, site.generator)
            layer.begin_at(A0.to(frozen.device), B0.to(frozen.device))
        if config.lora_bias:
            layer.offset = nn.Parameter(torch.zeros(frozen.out_features, device=frozen.device))
        site.put(path, AdaptedLinear, layer)
    for path in targets.embeddings:
        site.put(path, AdaptedEmbedding, _embedding_layer(site, config, path))
    for path in targets.experts:
        owner, _, parameter = path.rpartition(".")
        E, O, I = expert_parameters(site.modules[owner])[parameter]
        r = first_match(config.rank_pattern, path, config.rank)
        device = site.modules[owner].get_parameter(parameter).device
        A, B = site.kaiming(E, r, I), torch.zeros(E, O, r)
        layer = _layer(site, config, "experts", path, A, B, device=device, dropout=config.dropout)
        site.put_stack(owner, parameter, AdaptedExperts, layer)
    for path in targets.routers:
        weight = site.modules[path].get_parameter("weight")
        O, I = weight.shape
        r = first_match(config.rank_pattern, path, config.rank)
        A, B = site.kaiming(r, I), torch.zeros(O, r)
        layer = _layer(site, config, "linear", path, A, B, device=weight.device)
        site.put(path, AdaptedMatrix, layer)
    _train_in_full(site, targets)


def _heads(site: Site, targets: Targets) -> list[str]:
    """Returns the output head's path if it is a target."""
    return [path for path in targets.linears if site.modules[path] is site.head]


def _pissa(weight: Tensor, layer: LoRALayer, config: LoRA, generator: torch.Generator) -> Factors:
    return pissa_start(
        weight,
        rank=layer.rank,
        scaling=layer.scaling,
        iterations=config.svd_iterations,
        generator=generator,
    )


def _olora(weight: Tensor, layer: LoRALayer, config: LoRA, generator: torch.Generator) -> Factors:
    return olora_start(weight, rank=layer.rank)


_START: dict[str, Callable[[Tensor, LoRALayer, LoRA, torch.Generator], Factors]] = {
    "pissa": _pissa,
    "olora": _olora,
}
"""Starts that need only the weight. models/starts/initial_values.py has those that need rows or the
original weight."""


def build_dora(site: Site, config: DoRA) -> None:
    """Attaches DoRA layers. Raises ConfigError if the settings do not fit the model."""
    targets = _targets(site, config)
    if unsupported := [*targets.experts, *targets.routers]:
        raise ConfigError(
            "DoRA takes linear layers and embeddings; these targets are fused experts or routers",
            unsupported,
            "List the other layers in `targets`, or take method lora.",
        )
    for path in targets.linears:
        layer, frozen = _linear_layer(site, config, path)
        with whole_module(site.modules[path]):
            dora = DoRALayer(layer, frozen)
        site.put(path, AdaptedLinear, dora)
    for path in targets.embeddings:
        table = embedding_as_linear(site.modules[path])
        site.put(path, AdaptedEmbedding, DoRALayer(_embedding_layer(site, config, path), table))
    _train_in_full(site, targets)


def _targets(site: Site, config: LowRank) -> Targets:
    if (read_past := site.read_past) is None:
        with site.routing.none():
            read_past = weights_read_past(site.model)
    targets = find_targets(
        site.modules,
        config,
        head=site.head,
        read_past=read_past,
        idle=site.idle,
        refused=refused_by_peft(site.model),
    )
    site.attachment.trained = targets.trained
    site.attachment.adaptable = targets.adaptable
    return targets


def _linear_layer(site: Site, config: LowRank, path: str) -> tuple[LoRALayer, FrozenLinear]:
    frozen = frozen_linear(site.modules[path])
    assert frozen is not None
    r = first_match(config.rank_pattern, path, config.rank)
    A, B = site.kaiming(r, frozen.in_features), torch.zeros(frozen.out_features, r)
    layer = _layer(site, config, "linear", path, A, B, device=frozen.device, dropout=config.dropout)
    return layer, frozen


def _embedding_layer(site: Site, config: LowRank, path: str) -> LoRALayer:
    """Starts A at zero and B at random, as PEFT: columns of A are looked up, B projects them."""
    table = site.modules[path].get_parameter("weight")
    r = first_match(config.rank_pattern, path, config.rank)
    A, B = torch.zeros(r, table.shape[0]), torch.randn(table.shape[1], r, generator=site.generator)
    return _layer(site, config, "embedding", path, A, B, device=table.device)


def _layer(
    site: Site,
    config: LowRank,
    kind: Kind,
    path: str,
    A: Tensor,
    B: Tensor,
    *,
    device: torch.device,
    dropout: float = 0.0,
) -> LoRALayer:
    """Returns the next layer of the attachment, with A and B on `device`."""
    alpha = first_match(config.alpha_pattern, path, config.alpha)
    key = len(site.attachment.layers)
    return LoRALayer(
        kind,
        A.to(device),
        B.to(device),
        alpha=alpha,
        rslora=config.rslora,
        dropout=dropout,
        key=key,
    )


def _train_in_full(site: Site, targets: Targets) -> None:
    """Trains the biases and whole modules that the settings name."""
    trained = {
        path: [n for n, _ in site.modules[path].named_parameters()] for path in targets.trained
    }
    for path, names in [*((p, ["bias"]) for p in targets.biases), *trained.items()]:
        module = site.modules[path]
        for parameter in names:
            own = whole(module.get_parameter(parameter)).detach()
            value = nn.Parameter(own.to(type_in_products(module, own), copy=True))
            site.replace(path, _kind(module), parameter, value)


def _kind(module: nn.Module) -> type[AdaptedModule]:
    if frozen_linear(module) is not None:
        return AdaptedLinear
    if is_plain_embedding(module):
        return AdaptedEmbedding
    if matrix_shape(module) is not None:
        return AdaptedMatrix
    return AdaptedExperts if expert_parameters(module) else SwappedModule
