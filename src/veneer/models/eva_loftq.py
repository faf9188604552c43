"""LoRA that starts from more than the weight beside it: from the rows (EVA), or from the weight
before 4 bits (LoftQ).

eva     rows of the training data run through the base; A starts as the directions in which each
        layer's inputs are largest, B at zero: nothing changes yet. Every layer keeps its rank
        (EVA's redistribution is not done).
loftq   the original weights are read once more, tensor by tensor; A and B start where they bring
        the 4-bit weight nearest to the original. The quantised weights themselves stay as they are.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from veneer.adapters.config import LoRA
from veneer.adapters.methods.initial_factors import leading_directions, loftq_start
from veneer.adapters.methods.lora import LoRALayer
from veneer.adapters.placement.attachment import Attachment
from veneer.adapters.placement.wrapping import plain_modules
from veneer.bases.folder.model_folder import weight_files
from veneer.bases.folder.tensor_files import StoredTensor, stored_tensors
from veneer.bases.names.sources import locate
from veneer.data.examples import Example
from veneer.errors import ConfigError
from veneer.execution.attention import decoder
from veneer.linear import frozen_linear
from veneer.models.frozen_base import FrozenBase
from veneer.models.start import AdapterStart
from veneer.quant.config import FOUR_BITS, weight_format
from veneer.shards import make_whole

EVA_TOKENS = 4096
"""Tokens of the training rows that are looked at: the directions hardly move after that."""


def start_lora(
    config: LoRA, base: FrozenBase, examples: Sequence[Example], *, seed: int
) -> AdapterStart:
    """ConfigError: the start that the settings ask for cannot be made here."""
    if faults := _faults(config, base, examples):
        raise ConfigError("the adapter cannot start as its settings ask", faults)

    def put(attachment: Attachment) -> str | None:
        layers = {path: cast(LoRALayer, layer) for path, layer in attachment.layers.items()}
        if config.init == "eva":
            tokens = _start_eva(base, layers, examples, seed=seed)
            return f"A starts from what each layer sees of {tokens:,} tokens of the rows"
        if config.init == "loftq":
            left = _start_loftq(base, layers)
            return f"A and B start where {left:.0%} of what 4 bits lost of the weights is left"
        return None

    return AdapterStart(config, put)


def _faults(config: LoRA, base: FrozenBase, examples: Sequence[Example]) -> list[str]:
    if config.init == "eva" and not examples:
        return [
            "init eva starts from training rows, and there are none: train with it, or take another"
            " init"
        ]
    if config.init == "loftq" and not weight_format(base.quantize).has_original:
        held = "dense" if base.quantize is None else base.quantize
        return [
            f"init loftq brings back what 4 bits lost, and this base is {held}: set quantize:"
            f" {FOUR_BITS}"
        ]
    return []


def _start_eva(
    base: FrozenBase, layers: Mapping[str, LoRALayer], examples: Sequence[Example], *, seed: int
) -> int:
    modules = plain_modules(base.model)
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, Tensor] = {}
    # The rows are kept with what they gave: an object made later in their place must not pass for
    # them.
    seen: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def hook(path: str, rank: int) -> Any:
        def look(_module: nn.Module, given: tuple[Tensor, ...]) -> None:
            rows = given[0].flatten(0, -2)
            key = id(given[0]), rank  # q, k and v of a layer see the same rows
            if (
                key not in seen
            ):  # more directions than are asked for, or the order of the rows would matter
                kept = min(4 * rank + 16, rows.shape[1])
                directions = leading_directions(
                    rows, found.get(path), rank=kept, generator=generator
                )
                seen[key] = given[0], directions
            found[path] = seen[key][1]

        return look

    hooks = [
        modules[path].register_forward_pre_hook(hook(path, layer.rank))
        for path, layer in layers.items()
    ]
    tokens = 0
    try:
        with torch.no_grad(), base.routing.none():
            for example in examples:
                ids = torch.as_tensor(example.ids, dtype=torch.long, device=base.device)[None]
                (decoder(base.model) or base.model)(input_ids=ids, use_cache=False)
                seen.clear()
                tokens += ids.shape[1]
                if tokens >= EVA_TOKENS:
                    break
    finally:
        for each in hooks:
            each.remove()
    for path, layer in layers.items():
        if path not in found:
            continue  # an output head is not reached: it keeps its random start
        directions = found[path][: layer.rank]
        if len(directions) < layer.rank:
            continue  # wider than its inputs: it keeps its random start
        lengths = torch.linalg.vector_norm(directions, dim=1, keepdim=True)
        A = torch.where(lengths > 0, directions / lengths, layer.A.detach())
        layer.begin_at(A, torch.zeros_like(layer.B), subtract=False)
    return tokens


def _start_loftq(base: FrozenBase, layers: Mapping[str, LoRALayer]) -> float:
    """The share of ||W - Q||, over all layers, that the start leaves."""
    stored = stored_tensors(weight_files(locate(base.source).folder))
    modules = plain_modules(base.model)
    originals = {path: _original(path, stored) for path in layers}
    if lost := [path for path, tensor in originals.items() if tensor is None]:
        raise ConfigError(
            f"init loftq does not find the original weight of {len(lost)} layers in the files of"
            f" {base.source}",
            lost[:8],
            "Take another init, or name in `targets` the layers whose weights stand in the files"
            " under their own names.",
        )
    before = after = 0.0
    for path, layer in layers.items():
        frozen = frozen_linear(modules[path])
        tensor = originals[path]
        assert frozen is not None and tensor is not None
        make_whole(modules[path])
        quantised = frozen.dense_weight(torch.float32).cpu()
        original = _turned(tensor[...].float(), quantised)
        A, B = loftq_start(original, quantised, rank=layer.rank, scaling=layer.scaling)
        layer.begin_at(A, B, subtract=False)
        lost_now = original - quantised
        before += lost_now.square().sum().item()
        after += (lost_now - layer.scaling * B @ A).square().sum().item()
    return float((after / before) ** 0.5) if before else 0.0


def _turned(original: Tensor, quantised: Tensor) -> Tensor:
    """A Conv1D's weight lies the other way in the files; a square one tells by its distance
    alone."""
    ways = [way for way in (original, original.T) if way.shape == quantised.shape]
    return min(ways, key=lambda way: (way - quantised).square().sum().item())


def _original(path: str, stored: Mapping[str, StoredTensor]) -> StoredTensor | None:
    """A checkpoint may leave out the name of the model's body: GPT-2's `h.0.attn.c_attn.weight`."""
    name = f"{path}.weight"
    return stored.get(name) or stored.get(name.partition(".")[2])
