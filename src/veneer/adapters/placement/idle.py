"""Finds modules that no gradient of the logits reaches: an adapter there would never train.

A vision tower is not called for text. An indexer that picks the tokens to attend to returns token
numbers. Other parts are computed without gradients, or not for the logits. One forward is run in
which every module's output requires a gradient, and its graph is walked back from the logits. A
module counts as idle if it is idle in every layer that was called.
"""

import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapters.placement.wrapping import plain_modules


def in_any_layer(path: str) -> str:
    """Returns the path with its numbers replaced: model.layers.#.mlp.up_proj."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "#", path)


def places_without_gradient(model: nn.Module, ids: Tensor) -> frozenset[str]:
    """Returns the paths (`in_any_layer`) of the modules with weights that no gradient of the logits
    of ids (B, T) reaches, neither through their outputs nor through their weights.

    The text should be longer than every attention window.
    """
    outputs: dict[str, list[Any]] = {}
    with torch.enable_grad(), _record_outputs(plain_modules(model), outputs):
        logits = model(input_ids=ids, use_cache=False).logits
    reached = set(_graph(logits.grad_fn))
    without = {path for path, nodes in outputs.items() if not reached & set(nodes)}
    return frozenset(without | _unread_weights(model, ids, outputs.keys()))


def _unread_weights(model: nn.Module, ids: Tensor, called: Collection[str]) -> set[str]:
    """Modules that are not called and whose weights the logits do not depend on."""
    weights = {
        parameter: in_any_layer(path)
        for path, module in plain_modules(model).items()
        if in_any_layer(path) not in called
        for parameter in module.parameters(recurse=False)
        if parameter.is_floating_point() and not parameter.requires_grad
    }
    if not weights:
        return set()
    try:
        for parameter in weights:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            logits = model(input_ids=ids, use_cache=False).logits
        read = {
            weights.get(node.variable)
            for node in _graph(logits.grad_fn)
            if hasattr(node, "variable")
        }
    finally:
        for parameter in weights:
            parameter.requires_grad_(False)
    return set(weights.values()) - read


def _graph(last: Any) -> Iterator[Any]:
    seen, waiting = set(), [last]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            waiting += [before for before, _ in node.next_functions]


@contextmanager
def _record_outputs(modules: dict[str, nn.Module], outputs: dict[str, list[Any]]) -> Iterator[None]:
    """Within the block, outputs of modules that hold weights require a gradient, and their graph
    nodes are added to `outputs`."""
    with_weights = {
        path: module
        for path, module in modules.items()
        if any(True for _ in module.parameters(recurse=False))
    }
    handles = [
        module.register_forward_hook(_output_recorder(in_any_layer(path), outputs))
        for path, module in with_weights.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _output_recorder(
    path: str, outputs: dict[str, list[Any]]
) -> Callable[[nn.Module, Any, Any], Any]:
    def require_gradient(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        copy = (value if value.requires_grad else value.detach().requires_grad_(True)).clone()
        if copy.grad_fn is not None:  # None: computed without gradients
            outputs[path].append(copy.grad_fn)
        return copy  # which models may write into

    def record(module: nn.Module, args: Any, output: Any) -> Any:
        outputs.setdefault(path, [])
        if type(output) is tuple:
            return tuple(map(require_gradient, output))
        return require_gradient(output)

    return record
