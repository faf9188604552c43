"""Bottleneck layers: a small two-layer network after or parallel to a block of each decoder layer.

    houlsby, pfeiffer   y + scaling * Up(act(Down(y)))    y: output of the block, no residual yet
    parallel            y + scaling * Up(act(Down(x)))    x: input of the feed-forward block

houlsby adapts attention and feed-forward, the others only the feed-forward. Up and its bias start
at zero, so a fresh layer changes no bit. Parameters are float32; products are in the base's type.
Several adapters that act together all get the base's y, and their updates add up. A mixture of
experts counts as one block. Blocks are found by transformers' names for them. Shapes: M rows, D
hidden size, S size of the bottleneck. Sources: Houlsby et al. 2019, arXiv:1902.00751; Pfeiffer et
al. 2020, arXiv:2005.00247; He et al. 2022, arXiv:2110.04366.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from veneer.adapters.combinations import BOTTLENECKS
from veneer.adapters.config import Bottleneck
from veneer.adapters.methods.targets import layer_number
from veneer.adapters.placement.acting import Applied, TokenKeys
from veneer.adapters.placement.rows import cut, put
from veneer.adapters.placement.site import Site
from veneer.adapters.placement.wrapping import AdaptedModule
from veneer.errors import ConfigError
from veneer.kernels.dense.lora import dropped
from veneer.linear import frozen_linear

ATTENTION = ("self_attn", "attn", "self_attention", "attention")
FEED_FORWARD = ("mlp", "feed_forward", "block_sparse_moe", "ffn")
_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "swish": F.silu,
    "tanh": torch.tanh,
}


class BottleneckLayer:
    """The network of one block, float32: down (S, D), down_bias (S), up (D, S), up_bias (D); with
    norm: norm_weight, norm_bias (D).

    before  it reads the block's input instead of its output
    key     number of the layer: two layers never share a dropout mask
    """

    def __init__(self, down: Tensor, config: Bottleneck, *, key: int) -> None:
        size, width = down.shape
        zeros, device = torch.zeros, down.device
        self._parts = {
            "down": nn.Parameter(down),
            "down_bias": nn.Parameter(zeros(size, device=device)),
            "up": nn.Parameter(zeros(width, size, device=device)),
            "up_bias": nn.Parameter(zeros(width, device=device)),
        }
        if config.norm:
            self._parts["norm_weight"] = nn.Parameter(torch.ones(width, device=device))
            self._parts["norm_bias"] = nn.Parameter(zeros(width, device=device))
        self.scaling = config.effective_scaling
        self.before = config.placement == "parallel"
        self.activation = _ACTIVATIONS[config.activation]
        self.dropout = config.dropout
        self.key = key

    def parts(self) -> dict[str, nn.Parameter]:
        return dict(self._parts)

    def stored(self) -> dict[str, Tensor]:
        return {name: part.detach() for name, part in self._parts.items()}

    def folded(self, weight: Tensor) -> Tensor:
        raise ConfigError("a bottleneck layer cannot be merged", next_step=BOTTLENECKS.instead)

    def update(self, x: Tensor, keys: TokenKeys | None) -> Tensor:
        """Computes the update before scaling, (..., D). keys: one dropout key per row."""
        part = self._parts
        if "norm_weight" in part:
            wide = torch.promote_types(x.dtype, torch.float32)
            weight, bias = part["norm_weight"].to(wide), part["norm_bias"].to(wide)
            x = F.layer_norm(x.to(wide), x.shape[-1:], weight, bias).to(x.dtype)
        if self.dropout and keys is not None:
            x = dropped(x, keys.mask(self.key, self.dropout))
        down = F.linear(x, part["down"].to(x.dtype), part["down_bias"].to(x.dtype))
        return F.linear(self.activation(down), part["up"].to(x.dtype), part["up_bias"].to(x.dtype))


class AdaptedBlock(AdaptedModule):
    """An attention or feed-forward block. The base computes all rows at once; updates are added to
    each part's rows."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = self.base(*args, **kwargs)
        acting = self.routing.acting
        whole = acting.whole
        if whole == () or not any(self.layers_of(part.adapters) for part in acting.parts):
            return out
        x = args[0] if args else kwargs["hidden_states"]
        plain = out[0] if isinstance(out, tuple) else out
        if whole is not None:
            y = self._add_updates(x, plain, whole, acting.keys)
        else:
            rows = plain.numel() // plain.shape[-1]
            segments = [s for s in acting.segments(rows) if self.layers_of(s.adapters)]
            outputs = [
                self._add_updates(
                    cut(x, s.rows, rows),
                    cut(plain, s.rows, rows),
                    s.adapters,
                    None if acting.keys is None else acting.keys.of(s.rows),
                )
                for s in segments
            ]
            y = put(plain, [s.rows for s in segments], outputs, rows)
        return (y, *out[1:]) if isinstance(out, tuple) else y

    def _add_updates(
        self, x: Tensor, plain: Tensor, adapters: Applied, keys: TokenKeys | None
    ) -> Tensor:
        y = plain
        for layer, weight, layer_keys in self.drawing(adapters, keys):
            update = layer.update(x if layer.before else plain, layer_keys)
            y = torch.add(y, update, alpha=layer.scaling * weight)
        return y


def find_blocks(modules: Mapping[str, nn.Module], config: Bottleneck) -> list[str]:
    """Returns the paths of the blocks that the settings name, in the model's order.

    Raises ConfigError if a layer has no such block, a block adds the residual itself, or one of
    `layers` does not exist.
    """
    block_kinds: list[tuple[Literal["attention", "feed-forward"], Sequence[str]]] = [
        ("feed-forward", FEED_FORWARD)
    ]
    if config.placement == "houlsby":
        block_kinds.insert(0, ("attention", ATTENTION))
    inside = {id(module) for module in _language_model(modules[""]).modules()}
    layers = {
        f"{path}.{number}": layer
        for path, stack in modules.items()
        if isinstance(stack, nn.ModuleList) and id(stack) in inside
        for number, layer in enumerate(stack)
        if {*ATTENTION, *FEED_FORWARD} & {name for name, _ in modules_below(path, number, modules)}
    }
    numbers = {layer_number(path) for path in layers}
    faults = {f"layer {n} does not exist": None for n in config.layers if n not in numbers}
    paths = []
    for path, layer in layers.items():
        if config.layers and layer_number(path) not in config.layers:
            continue
        below = [name for name, _ in modules_below(path, None, modules)]
        for kind, names in block_kinds:
            name = next((name for name in names if name in below), None)
            if name is None:
                faults[
                    f"{type(layer).__name__} has no {kind} block: it holds {', '.join(below)}"
                ] = None
            elif "residual" in inspect.signature(modules[f"{path}.{name}"].forward).parameters:
                block = type(modules[f"{path}.{name}"]).__name__
                faults[f"{block} adds the residual itself: nothing can stand before it"] = None
            else:
                paths.append(f"{path}.{name}")
    if faults or not paths:
        raise ConfigError(
            "bottleneck layers do not fit the model",
            list(faults) or ["no decoder layer with an attention or feed-forward block was found"],
            "Choose other layers or another placement, or take lora, which works on every model.",
        )
    return paths


def _language_model(model: nn.Module) -> nn.Module:
    """Returns the language model without vision or audio towers, whose layers look alike."""
    get = getattr(model, "get_decoder", None)
    return model if get is None else get()


def modules_below(
    path: str, number: int | None, modules: Mapping[str, nn.Module]
) -> list[tuple[str, nn.Module]]:
    """Returns the direct children of modules[path], or of its element `number`."""
    owner = path if number is None else f"{path}.{number}"
    return [
        (n.removeprefix(owner + "."), m)
        for n, m in modules.items()
        if n.rpartition(".")[0] == owner
    ]


def hidden_size(head: nn.Module | None) -> int:
    """Width of the blocks' outputs: that of the output head's inputs."""
    frozen = None if head is None else frozen_linear(head)
    if frozen is None:
        raise ConfigError(
            "bottleneck layers need to know how wide the model is, and it has no linear output"
            " head",
            next_step="Take lora, which works on every model.",
        )
    return frozen.in_features


def build_bottleneck(site: Site, config: Bottleneck) -> None:
    paths, width = find_blocks(site.modules, config), hidden_size(site.head)
    size = config.bottleneck_size(width)
    site.attachment.config = config.resolved(width)
    for path in paths:
        device = next(site.modules[path].parameters()).device
        down = site.kaiming(size, width).to(device)
        site.put(path, AdaptedBlock, BottleneckLayer(down, config, key=len(site.attachment.layers)))
    all_layers = config.model_copy(update={"layers": []})
    site.attachment.adaptable = (
        len(find_blocks(site.modules, all_layers)) if config.layers else len(paths)
    )
