"""Initial values of LoRA from the training rows (EVA) or from the weights before 4 bits (LoftQ).

eva     A starts as the principal directions of each layer's inputs on training rows, B at zero, so
        that no output changes. Every layer keeps its rank: EVA's redistribution is not done.
loftq   A and B approximate the difference between the original and the 4-bit weight. The original
        weights are read again, tensor by tensor; the 4-bit weights stay as they are.
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
from veneer.models.starts.computed import AdapterStart
from veneer.quant.config import FOUR_BITS, weight_format
from veneer.sharded import whole_module

EVA_TOKENS = 4096
"""Tokens of training rows to run through the base: the directions hardly change after that."""


def start_lora(
    config: LoRA, base: FrozenBase, examples: Sequence[Example], *, seed: int
) -> AdapterStart:
    """Returns the start of an adapter with these settings. ConfigError if it is impossible here."""
    if faults := _faults(config, base, examples):
        raise ConfigError("these initial values are not possible here", faults)

    def put(attachment: Attachment) -> str | None:
        layers = {path: cast(LoRALayer, layer) for path, layer in attachment.layers.items()}
        if config.init == "eva":
            tokens = _start_eva(base, layers, examples, seed=seed)
            return f"A starts from the inputs of each layer, over {tokens:,} tokens of the rows"
        if config.init == "loftq":
            remaining = _start_loftq(base, layers)
            return f"A and B start so that {remaining:.0%} of the 4-bit error is left"
        return None

    return AdapterStart(config, put)


def _faults(config: LoRA, base: FrozenBase, examples: Sequence[Example]) -> list[str]:
    if config.init == "eva" and not examples:
        return [
            "init eva needs training rows, and there are none: use it in a training run, or take"
            " another init"
        ]
    if config.init == "loftq" and not weight_format(base.quantize).has_original:
        held = "dense" if base.quantize is None else base.quantize
        return [
            f"init loftq corrects the error of 4-bit weights, and this base is {held}: set"
            f" quantize: {FOUR_BITS}"
        ]
    return []


def _start_eva(
    base: FrozenBase, layers: Mapping[str, LoRALayer], examples: Sequence[Example], *, seed: int
) -> int:
    modules = plain_modules(base.model)
    generator = torch.Generator().manual_seed(seed)
    directions_of: dict[str, Tensor] = {}
    # Holds the inputs too, so that no later tensor gets the id of a freed one.
    computed: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def hook(path: str, rank: int) -> Any:
        def update(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            rows = inputs[0].flatten(0, -2)
            key = id(inputs[0]), rank  # q, k and v of a layer have the same inputs
            if key not in computed:
                # More directions than needed, else the order of the rows would matter.
                count = min(4 * rank + 16, rows.shape[1])
                directions = leading_directions(
                    rows, directions_of.get(path), rank=count, generator=generator
                )
                computed[key] = inputs[0], directions
            directions_of[path] = computed[key][1]

        return update

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
                computed.clear()
                tokens += ids.shape[1]
                if tokens >= EVA_TOKENS:
                    break
    finally:
        for handle in hooks:
            handle.remove()
    for path, layer in layers.items():
        if path not in directions_of:
            continue  # the forward pass does not reach an output head: its A stays random
        directions = directions_of[path][: layer.rank]
        if len(directions) < layer.rank:
            continue  # its rank exceeds the width of its inputs: its A stays random
        lengths = torch.linalg.vector_norm(directions, dim=1, keepdim=True)
        A = torch.where(lengths > 0, directions / lengths, layer.A.detach())
        layer.begin_at(A, torch.zeros_like(layer.B), subtract=False)
    return tokens


def _start_loftq(base: FrozenBase, layers: Mapping[str, LoRALayer]) -> float:
    """Sets A and B; returns the share of ||W - Q|| that is left, over all layers."""
    stored = stored_tensors(weight_files(locate(base.source).folder))
    modules = plain_modules(base.model)
    originals = {path: _original(path, stored) for path in layers}
    if missing := [path for path, tensor in originals.items() if tensor is None]:
        raise ConfigError(
            f"init loftq does not find the original weight of {len(missing)} layers in the files of"
            f" {base.source}",
            missing[:8],
            "Take another init, or name in `targets` only layers whose weights are in the files"
            " under their module's name.",
        )
    before = after = 0.0
    for path, layer in layers.items():
        frozen = frozen_linear(modules[path])
        tensor = originals[path]
        assert frozen is not None and tensor is not None
        with whole_module(modules[path]):
            quantised = frozen.dense_weight(torch.float32).cpu()
        original = _oriented(tensor[...].float(), quantised)
        A, B = loftq_start(original, quantised, rank=layer.rank, scaling=layer.scaling)
        layer.begin_at(A, B, subtract=False)
        error = original - quantised
        before += error.square().sum().item()
        after += (error - layer.scaling * B @ A).square().sum().item()
    return float((after / before) ** 0.5) if before else 0.0


def _oriented(original: Tensor, quantised: Tensor) -> Tensor:
    """Transposes the weight of a Conv1D, which files store the other way. Of a square weight, the
    orientation nearer to the quantised one is right."""
    orientations = [W for W in (original, original.T) if W.shape == quantised.shape]
    return min(orientations, key=lambda W: (W - quantised).square().sum().item())


def _original(path: str, stored: Mapping[str, StoredTensor]) -> StoredTensor | None:
    """Finds a weight, also if the file leaves out the name of the model's body, as GPT-2's
    `h.0.attn.c_attn.weight`."""
    name = f"{path}.weight"
    return stored.get(name) or stored.get(name.partition(".")[2])
