"""An accelerator that is only pretended: values are computed on the CPU, and every tensor says that
it lies elsewhere.

    with Accelerator("cuda") as there: model.to(there.device)      # or load_base(...,
        device="cuda") ...                         # the project's own code, unchanged; all of it
        sees .device == cuda:0

Which place a tensor belongs to is noted on its storage, so views and in-place operations need no
    care. Two modes see
everything: one the calls from Python (`.device`, `.to`, factories), one the operations below
    autograd, backward
included. Mixed          an operation got tensors of two places where a real device refuses it, a
    generator of another place, or memory's address (compiled CPU kernels) reads          places in
    the code where the host waits for a value: .item(), bool(), .cpu(), nonzero, masks as indices
    uploads        places in the code where it waits for a copy from host memory
Not seen: streams, the order of work, kernels of the device itself, an address asked of a storage.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import MethodWrapperType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
CPU = torch.device("cpu")
READS = {
    aten._local_scalar_dense,
    aten.nonzero,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.masked_select,
    aten.equal,
    aten.bincount,
}
"""Operations whose answer the host waits for: a value, or the shape of the result."""
INDEXING = {aten.index, aten.index_put_, aten.index_put, aten._index_put_impl_, aten._unsafe_index}
MOVES = {aten.copy_, aten._to_copy, aten.set_}
FROM_HOST = {torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor}
"""Functions that carry values of the host to the device they are given."""
HOST_ONLY = {Tensor.numpy, Tensor.__array__}
FACTS = {
    "get_device_capability": lambda _=None: (9, 0),
    "get_device_properties": lambda _=None: SimpleNamespace(multi_processor_count=2),
    "mem_get_info": lambda _=None: (2**36, 2**36),
    "get_rng_state": lambda _=None: torch.random.get_rng_state(),
    "set_rng_state": lambda *_: None,
}
"""What is asked of CUDA itself: by transformers while it loads a model and multiplies experts, by
torch's fork_rng."""
_T: Any = Tensor
PLACES = {_T.device, _T.is_cuda, _T.is_mps, _T.is_cpu}


class Mixed(AssertionError):
    """What a real device would have refused."""


@dataclass
class Waits:
    """Where the host waited, one entry a wait: the innermost line of the project, or of
    transformers."""

    reads: list[str] = field(default_factory=list)
    uploads: list[str] = field(default_factory=list)

    @property
    def counts(self) -> tuple[int, int]:
        return len(self.reads), len(self.uploads)


class Accelerator:
    """name: with its index. lacks: types of numbers that it does not have (mps: float64). current:
    CUDA's device."""

    def __init__(self, name: str = "cuda:0", *, lacks: tuple[torch.dtype, ...] = ()) -> None:
        self.device, self.lacks, self.current = torch.device(name), lacks, 0
        self._waits = Waits()
        self._modes = ExitStack()

    def __enter__(self) -> Accelerator:
        if self.device.type == "cuda":
            exchange = {
                "_exchange_device": self._exchange,
                "_maybe_exchange_device": self._exchange,
            }
            self._modes.enter_context(
                patch.multiple(torch.cuda, current_device=lambda: self.current, **exchange, **FACTS)
            )
        calls, push = _Calls(self), torch._C._autograd._push_saved_tensors_default_hooks

        def seen(
            hook: Any,
        ) -> Any:  # what is saved is handed out in the middle of a call, where no mode is on
            def call(tensor: Any) -> Any:
                with nullcontext() if calls in _get_current_function_mode_stack() else calls:
                    return hook(tensor)

            return call

        name = "_push_saved_tensors_default_hooks"
        hooks = patch.object(
            torch._C._autograd, name, lambda pack, unpack: push(seen(pack), seen(unpack))
        )
        for mode in (hooks, _Operations(self), calls):
            self._modes.enter_context(mode)
        return self

    def __exit__(self, *failure: object) -> None:
        self._modes.close()

    @contextmanager
    def counting(self) -> Iterator[Waits]:
        """Waits within the block."""
        before, self._waits = self._waits, Waits()
        try:
            yield self._waits
        finally:
            self._waits = before

    def _exchange(self, index: int) -> int:
        before, self.current = self.current, index if index >= 0 else self.current
        return before

    def holds(self, tensor: Tensor) -> bool:
        return self.owns(_storage(tensor))

    def owns(self, storage: Any) -> bool:
        return getattr(storage, "elsewhere", None) == self.device

    def take(self, tensor: Tensor) -> Tensor:
        if tensor.dtype in self.lacks:
            raise Mixed(f"{self.device.type} has no {tensor.dtype}")
        _storage(tensor).elsewhere = self.device
        return tensor

    def named(self, place: Any) -> bool:
        return place is not None and torch.device(place).type == self.device.type

    def read(self, what: object) -> None:
        self._waits.reads.append(f"{what} at {_line()}")

    def upload(self, what: object) -> None:
        self._waits.uploads.append(f"{what} at {_line()}")


def _storage(tensor: Tensor) -> Any:
    with torch._C.DisableTorchFunction():
        return tensor.untyped_storage()


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yields the tensors among what an operation takes or gives: lists and dicts, no trees."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)


def _line() -> str:
    frame, found = sys._getframe(2), ""
    while frame is not None:
        path = frame.f_code.co_filename
        if "/veneer/" in path:
            return f"{Path(path).name}:{frame.f_lineno}"
        if not found and "/torch/" not in path and Path(path).name != Path(__file__).name:
            found = f"{Path(path).name}:{frame.f_lineno}"
        frame = frame.f_back
    return found


class _Calls(TorchFunctionMode):
    """What Python says of places: answered for the pretended device, which torch itself never hears
    of."""

    def __init__(self, there: Accelerator) -> None:
        self.there = there

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        there = self.there
        if isinstance(func, MethodWrapperType) and func.__name__ == "__get__":
            return self._attribute(func, args)
        first, kwargs = (
            args[0] if args and isinstance(args[0], Tensor) else None,
            dict(kwargs or {}),
        )
        held = first is not None and there.holds(first)
        if func is Tensor.backward:  # the way back runs the project's own code: in this mode
            with self:
                return _engine_run_backward(
                    (first,),
                    (torch.ones_like(args[0]),),
                    False,
                    False,
                    (),
                    allow_unreachable=True,
                    accumulate_grad=True,
                )
        to_c = func is Tensor.data_ptr and "/veneer/kernels/" in sys._getframe(1).f_code.co_filename
        if held and (func in HOST_ONLY or to_c):
            raise Mixed(f"{func.__name__} of a tensor on {there.device} at {_line()}")
        if func is Tensor.get_device and held:
            return there.device.index
        if func is Tensor.tolist and held:
            there.read("tolist")
        if func in (Tensor.to, Tensor.cpu, Tensor.cuda) and not args[0].is_meta:
            return self._moved(func, args, kwargs)
        if func is torch.nn.Parameter.__deepcopy__ or func is Tensor.__deepcopy__:
            copied = func(*args, **kwargs)
            return there.take(copied) if held else copied
        kwargs.pop("pin_memory", None)
        place = kwargs.get("device")
        if place is None or torch.device(place).type == "meta":
            out = func(*args, **kwargs)
            if func is Tensor.new_tensor and held:
                there.upload("new_tensor")
            return out
        out = func(*args, **{**kwargs, "device": CPU})
        if there.named(place):
            if func in FROM_HOST and not (isinstance(args[0], Tensor) and there.holds(args[0])):
                there.upload(func.__name__)
            if kwargs.get("generator") is not None:
                raise Mixed(
                    f"{func.__name__} on {there.device} draws from a generator of the CPU at"
                    f" {_line()}"
                )
            return there.take(out)
        if there.holds(out):  # zeros_like(x, device="cpu") is no wait
            del _storage(out).elsewhere
        return out

    def _attribute(self, get: Any, args: Any) -> Any:
        there, of = self.there, get.__self__
        if of in PLACES and there.holds(args[0]):
            return there.device if of is _T.device else of is getattr(_T, f"is_{there.device.type}")
        return get(*args)

    def _moved(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Tensor.to, with the place taken out of what torch is asked."""
        there, (tensor, *others) = self.there, args
        if func is Tensor.cpu:
            others = [CPU]
        elif func is not Tensor.to:
            others = [there.device]
        place, rest = kwargs.pop("device", None), []
        for other in others:
            if isinstance(other, Tensor):
                place, kwargs["dtype"] = (there.device if there.holds(other) else CPU), other.dtype
            elif isinstance(other, torch.device | str | int) and not isinstance(other, bool):
                place = other
            elif isinstance(other, torch.dtype):
                kwargs["dtype"] = other
            elif other is not None:
                rest.append(other)
        kwargs.update(zip(("non_blocking", "copy"), rest, strict=False))
        if place is not None and torch.device(place).type == "meta":
            return func(tensor, place, **kwargs)
        to, away = place is not None and there.named(place), there.holds(tensor)
        if place is None or to == away:
            return Tensor.to(tensor, CPU, **kwargs)
        kwargs["copy"] = True
        assert not (tensor.requires_grad and torch.is_grad_enabled()), (
            "no gradient crosses places here"
        )
        out = Tensor.to(tensor, CPU, **kwargs)
        if not kwargs.get("non_blocking"):
            (there.upload if to else there.read)("to")
        if to:
            return there.take(out)
        del _storage(out).elsewhere
        return out


class _Operations(TorchDispatchMode):
    """Every operation on values: do its tensors lie in one place, and does the host wait for it?"""

    def __init__(self, there: Accelerator) -> None:
        super().__init__()
        self.there = there

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        there, kwargs, packet = self.there, kwargs or {}, func._overloadpacket
        given = [*_tensors(args), *_tensors(kwargs)]
        storages = [_storage(tensor) for tensor in given]
        held = any(map(there.owns, storages))
        if held:
            host = [
                tensor
                for tensor, storage in zip(given, storages, strict=True)
                if not there.owns(storage)
            ]
            self._check(func, packet, args, kwargs, given, host)
        if packet is aten.histc and not given[0].is_floating_point():
            out = func(args[0].float(), *args[1:], **kwargs).to(
                given[0].dtype
            )  # a CPU counts floats alone
        elif func is aten.mm.dtype:  # which a CPU lacks
            out = args[0].to(args[2]) @ args[1].to(args[2])
        else:
            out = func(*args, **kwargs)
        if packet in (aten.copy_, aten.set_):
            return out
        if held:
            own = {storage._cdata for storage in storages}
            for tensor in _tensors(out):
                if not tensor.is_meta and _storage(tensor)._cdata not in own:
                    there.take(tensor)
        return out

    def _check(self, func: Any, packet: Any, args: Any, kwargs: Any, given: Any, host: Any) -> None:
        there = self.there
        if packet is aten.copy_:
            blocking = not (args[2] if len(args) > 2 else kwargs.get("non_blocking"))
            if host and blocking:
                (there.upload if there.holds(args[0]) else there.read)("copy_")
            return
        if packet in INDEXING:
            indices = [i for i in args[1] if i is not None]
            if not there.holds(args[0]):
                raise Mixed(
                    f"{func}: indices on {there.device} into a tensor of the CPU at {_line()}"
                )
            if any(not there.holds(i) for i in indices):
                there.upload(packet)
            if any(i.dtype in (torch.bool, torch.uint8) for i in indices):
                there.read(f"{packet} by a mask")
            host = [t for t in host if t.dim() and not any(t is i for i in indices)]
        elif torch.Tag.pointwise in func.tags or packet in (
            aten.fill_,
            aten.masked_fill,
            aten.masked_fill_,
            aten.where,
        ):
            host = [t for t in host if t.dim()]  # numbers: torch takes them from anywhere
        if host:
            shapes = [
                f"{tuple(t.shape)} {'there' if there.holds(t) else 'on the CPU'}" for t in given
            ]
            raise Mixed(f"{func} mixes places: {', '.join(shapes)} at {_line()}")
        if kwargs.get("generator") is not None:
            raise Mixed(f"{func} on {there.device} draws from a generator of the CPU at {_line()}")
        if packet in READS or (
            packet is aten.repeat_interleave and kwargs.get("output_size") is None
        ):
            there.read(packet)
