"""Finds weights that a model reads itself instead of calling the module that holds them.

An adapter acts where its module is called. Mamba's mixers multiply by `dt_proj.weight` themselves,
and some models use the embedding's table as their head: an adapter of such a module would not act,
or only in part, but would act once merged into the weight. One forward is watched for operations
that get a parameter while no module that holds it is being called. A finding in one layer counts
for all layers, because not every expert gets a token.
"""

import re
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from veneer.adapters.placement.idle import in_any_layer
from veneer.adapters.placement.wrapping import plain_modules
from veneer.private.torch import parameters_of

_SHAPE_ALONE = re.compile(r".*_like|new_.*|(type|view|reshape|expand)_as")
"""Operations that may read only the shape or type of an argument."""


_PEFT_REFUSES = frozenset({"out_proj", "conv1d"})
_OF_MODELS = frozenset({"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"})


def may_be_refused_by_peft(tensors: Iterable[str]) -> bool:
    """Whether a file with these tensors adapts a module that PEFT refuses in some models."""
    return any(not _PEFT_REFUSES.isdisjoint(name.split(".")) for name in tensors)


def refused_by_peft(model: nn.Module) -> frozenset[str]:
    """Returns the paths of modules for which PEFT refuses LoRA: it does not load an adapter with
    one of them.

    In train mode, Mamba's kernels read the weight of a mixer's `out_proj` without calling the
    module. Here models are never in train mode, so the update acts. PEFT 0.21, tuners_utils.py,
    _check_lora_target_modules_mamba.
    """
    if getattr(getattr(model, "config", None), "model_type", None) not in _OF_MODELS:
        return frozenset()
    return frozenset(
        path for path in plain_modules(model) if path.rpartition(".")[2] in _PEFT_REFUSES
    )


def weights_read_past(model: nn.Module, like: nn.Module | None = None) -> frozenset[str]:
    """Returns the paths of the parameters that `model` reads without calling their module.

    model is a causal LM with no adapter acting; `like`, the same model with fewer layers, is run in
    its place. Three tokens are run. Writing into a weight is not reading it (RWKV scales some
    before its first answer). A model on the meta device may fail where experts are chosen by value;
    it is watched until then.
    """
    watched = like or model
    modules = plain_modules(watched)
    watch = _WeightReadRecorder(modules)
    device = next(watched.parameters()).device
    with torch.no_grad(), _at_work(modules, watch), watch:
        try:
            # On the meta device with a cache: without one transformers reads the positions' values.
            watched(
                input_ids=torch.arange(1, 4, device=device)[None], use_cache=device.type == "meta"
            )
        except Exception:  # every model trips in its own way
            if device.type != "meta":
                raise
    read = {in_any_layer(path) for path in watch.past}
    parameters = (
        f"{path}.{name}"
        for path, m in plain_modules(model).items()
        for name, _ in m.named_parameters(recurse=False)
    )
    return frozenset(path for path in parameters if in_any_layer(path) in read)


class _WeightReadRecorder(TorchFunctionMode):
    def __init__(self, modules: dict[str, nn.Module]) -> None:
        super().__init__()
        self.modules = modules
        self.holders: dict[int, list[tuple[nn.Module, str]]] = {}
        self.at_work: list[nn.Module] = []
        self.past: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor | tuple | list) and not _SHAPE_ALONE.fullmatch(func.__name__):
            for tensor in _tensors([*args, *(kwargs or {}).values()]):
                holders = self._holders_of(tensor)
                if tensor is not out and not any(
                    module is called for module, _ in holders for called in self.at_work
                ):
                    self.past.update(path for _, path in holders)
        return out

    def _holders_of(self, tensor: Tensor) -> list[tuple[nn.Module, str]]:
        """Returns the modules that hold a parameter now: a sharded one holds others at work."""
        if not isinstance(tensor, nn.Parameter):
            return []
        if id(tensor) not in self.holders:
            self.holders[id(tensor)] = [
                (module, f"{path}.{name}")
                for path, module in self.modules.items()
                for name, parameter in parameters_of(module).items()
                if parameter is tensor
            ]
        return self.holders[id(tensor)]


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


@contextmanager
def _at_work(modules: dict[str, nn.Module], watch: _WeightReadRecorder) -> Iterator[None]:
    """Within the block, `watch.at_work` lists the modules that this thread is calling."""
    watched = threading.get_ident()

    def begin(module: nn.Module, args: Any) -> None:
        if threading.get_ident() == watched:
            watch.at_work.append(module)

    def end(module: nn.Module, args: Any, output: Any) -> None:
        if threading.get_ident() == watched:
            watch.at_work.pop()

    handles = [module.register_forward_pre_hook(begin, prepend=True) for module in modules.values()]
    handles += [module.register_forward_hook(end, always_call=True) for module in modules.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
