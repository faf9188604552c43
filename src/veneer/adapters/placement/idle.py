"""Places of a model that no gradient of its logits reaches: what stands beside them would never
train.

A tower for images is not even called where there is text alone. An index that picks the tokens to
attend to is made of products, and what leaves it are numbers of tokens; a part may be computed
without gradients, or for something else than the logits. Found by the graph of one forward: every
module's output is made to ask for its gradient, as what an adapter adds to it would, and the graph
is walked back from the logits. What holds of one layer holds of all, if it holds of every one that
was called.
"""

import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapters.placement.wrapping import plain_modules


def in_any_layer(path: str) -> str:
    """The path with every number left open: model.layers.#.mlp.up_proj."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "#", path)


def places_without_gradient(model: nn.Module, ids: Tensor) -> frozenset[str]:
    """Paths, numbers left open, of the modules with weights that no gradient comes back to from
    what `model` makes of ids (B, T): it comes to none of what they give, or they are not called,
    nor is their weight taken.

    The text should be longer than every window: what short texts leave out is not looked at.
    """
    outputs: dict[str, list[Any]] = {}
    with torch.enable_grad(), _watched(plain_modules(model), outputs):
        logits = model(input_ids=ids, use_cache=False).logits
    reached = set(_graph(logits.grad_fn))
    without = {path for path, nodes in outputs.items() if not reached & set(nodes)}
    return frozenset(without | _not_taken(model, ids, outputs.keys()))


def _not_taken(model: nn.Module, ids: Tensor, called: Collection[str]) -> set[str]:
    """Of the modules that are not called, those whose weights the logits do not follow either."""
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
        taken = {
            weights.get(node.variable)
            for node in _graph(logits.grad_fn)
            if hasattr(node, "variable")
        }
    finally:
        for parameter in weights:
            parameter.requires_grad_(False)
    return set(weights.values()) - taken


def _graph(last: Any) -> Iterator[Any]:
    seen, waiting = set(), [last]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            waiting += [before for before, _ in node.next_functions]


@contextmanager
def _watched(modules: dict[str, nn.Module], outputs: dict[str, list[Any]]) -> Iterator[None]:
    """Within the block every output of a module with weights of its own asks for its gradient; its
    node is entered."""
    own = {path: m for path, m in modules.items() if any(True for _ in m.parameters(recurse=False))}
    handles = [
        m.register_forward_hook(_noting(in_any_layer(path), outputs)) for path, m in own.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _noting(path: str, outputs: dict[str, list[Any]]) -> Callable[[nn.Module, Any, Any], Any]:
    def asking(given: Any) -> Any:
        if not isinstance(given, Tensor) or not given.is_floating_point():
            return given
        given = (given if given.requires_grad else given.detach().requires_grad_(True)).clone()
        outputs[path] += (
            [] if given.grad_fn is None else [given.grad_fn]
        )  # none: computed without gradients
        return given  # a copy, which models may write into

    def note(module: nn.Module, args: Any, output: Any) -> Any:
        outputs.setdefault(path, [])
        return tuple(map(asking, output)) if type(output) is tuple else asking(output)

    return note
