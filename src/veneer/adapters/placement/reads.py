"""Which weights a model takes from the modules that hold them, instead of calling those modules.

What stands beside a module acts where the module is called. Mamba's mixers multiply by
`dt_proj.weight` themselves, and some models use the embedding's table as their head: a layer beside
such a module would act in no forward, or in a part of it, and merged into the weight it would.
Found by watching one forward: every operation that is given a parameter while no module that holds
it is at work. What holds of one layer holds of all: not every expert sees a token.
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

_SHAPE_ALONE = re.compile(r".*_like|new_.*|(type|view|reshape|expand)_as")
"""Operations that may take an argument for its shape or type."""


_PEFT_REFUSES = frozenset({"out_proj", "conv1d"})
_OF_MODELS = frozenset({"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"})


def may_be_refused_by_peft(tensors: Iterable[str]) -> bool:
    """Whether a file with these tensors adapts a module that PEFT refuses in some models; the base
    says which."""
    return any(not _PEFT_REFUSES.isdisjoint(name.split(".")) for name in tensors)


def refused_by_peft(model: nn.Module) -> frozenset[str]:
    """Paths of the modules beside which PEFT refuses LoRA: it does not load an adapter that has one
    there.

    Mamba's own kernels multiply by the weight of a mixer's `out_proj` past the module while the
    model is in train mode. Here it never is, so an update acts. PEFT 0.21, tuners_utils.py,
    _check_lora_target_modules_mamba.
    """
    if getattr(getattr(model, "config", None), "model_type", None) not in _OF_MODELS:
        return frozenset()
    return frozenset(
        path for path in plain_modules(model) if path.rpartition(".")[2] in _PEFT_REFUSES
    )


def weights_read_past(model: nn.Module, like: nn.Module | None = None) -> frozenset[str]:
    """Paths of the parameters that `model`, a causal LM with no adapter acting, takes without
    calling their module.

    like: the same with fewer layers, which is watched in its place.

    What writes into a weight (RWKV divides some before its first answer) does not read it. Three
    tokens are run. A model without values (meta device) may not get to the end, as nothing says
    which expert a token goes to: it is watched up to there.
    """
    watched = like or model
    modules = plain_modules(watched)
    watch = _WeightReadRecorder(modules)
    device = next(watched.parameters()).device
    with torch.no_grad(), _at_work(modules, watch), watch:
        try:
            # Without values only with a cache: else transformers looks into the positions, which
            # have none there.
            watched(
                input_ids=torch.arange(1, 4, device=device)[None], use_cache=device.type == "meta"
            )
        except Exception:  # every model trips in its own way
            if device.type != "meta":
                raise
    seen = {in_any_layer(path) for path in watch.past}
    held = (
        f"{path}.{name}"
        for path, m in plain_modules(model).items()
        for name, _ in m.named_parameters(recurse=False)
    )
    return frozenset(path for path in held if in_any_layer(path) in seen)


class _WeightReadRecorder(TorchFunctionMode):
    def __init__(self, modules: dict[str, nn.Module]) -> None:
        super().__init__()
        self.holders: dict[int, list[tuple[nn.Module, str]]] = {}
        for path, module in modules.items():
            for name, parameter in module.named_parameters(recurse=False):
                self.holders.setdefault(id(parameter), []).append((module, f"{path}.{name}"))
        self.at_work: list[nn.Module] = []
        self.past: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor | tuple | list) and not _SHAPE_ALONE.fullmatch(func.__name__):
            for given in _tensors([*args, *(kwargs or {}).values()]):
                holders = self.holders.get(id(given), [])
                if given is not out and not any(
                    module is each for module, _ in holders for each in self.at_work
                ):
                    self.past.update(path for _, path in holders)
        return out


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


@contextmanager
def _at_work(modules: dict[str, nn.Module], watch: _WeightReadRecorder) -> Iterator[None]:
    """Within the block `watch` knows which modules are being called; by this thread, others may be
    answering."""
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
