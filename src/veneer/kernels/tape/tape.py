"""A tape: calls into compiled functions, recorded once and replayed by one call into C
(native/common/tape.c).

    with record(recorder): y = ...      computes y; the recorder hears of all calls and tensors
    tape = Tape(calls)
    tape.replay()                       makes the same calls again, in their order

As with a CUDA graph, the same functions read and write the same memory again. `replay_at` puts
other addresses in place of those that were recorded. Views cost nothing. Anything else that torch
computes within the block would be missing in a replay, so the recorder rejects it. The calls were
checked when they were recorded (bindings/arguments.py); callers make sure that memory is still
valid.

step_tape.py records the layers of a decoding step, layer_tape.py a decoder layer that trains.
"""

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from veneer.kernels.bindings.arguments import CallError, call, observe_calls
from veneer.kernels.bindings.declarations import structure
from veneer.private.interpreter import referent_of
from veneer.private.torch import TorchDispatchMode

STEP_FUNCTIONS = (
    "veneer_few_rows",
    "veneer_few_rows_updated",
    "veneer_step_norm",
    "veneer_step_rotate",
    "veneer_step_gate",
    "veneer_paged_attention",
    "veneer_nf4_product",
    "veneer_packed_rows",
    "veneer_step_embed",
    "veneer_step_angles",
    "veneer_step_cap",
    "veneer_step_copy",
    "veneer_expert_route",
    "veneer_expert_sort",
    "veneer_expert_product",
    "veneer_expert_sum",
    "veneer_state_window",
    "veneer_state_space",
    "veneer_state_delta",
)
LAYER_FUNCTIONS = (
    "veneer_product",
    "veneer_rank_down",
    "veneer_rank_up",
    "veneer_rank_gradient",
    "veneer_block_norm_forward",
    "veneer_block_norm_backward",
    "veneer_block_gate_forward",
    "veneer_block_gate_backward",
    "veneer_block_heads",
    "veneer_block_heads_joined",
    "veneer_attention_forward",
    "veneer_attention_backward",
    "veneer_attention_summed",
    "veneer_attention_shared",
    "veneer_zeros",
    "veneer_gate_forward",
)
"""Each takes a struct, and at most two numbers beside it."""
FUNCTIONS = (*STEP_FUNCTIONS, *LAYER_FUNCTIONS)
"""In the order in which native/common/tape.c numbers them."""
MOST_ARGUMENTS = 10
_NUMBERS = {name: number for number, name in enumerate(FUNCTIONS)}
_CREATES = {"empty", "new_empty", "empty_like", "empty_strided"}
_VIEWS = set(
    "view _unsafe_view slice select unsqueeze squeeze expand as_strided t transpose permute split"
    " split_with_sizes detach alias".split()
)


class TapeCall(ctypes.Structure):
    _fields_ = [("function", ctypes.c_int64), ("arguments", ctypes.c_int64 * MOST_ARGUMENTS)]


TapeAddress = structure("TapeAddress", "at, base, offset")
"""An address `at` bytes behind the first struct, to be replaced by that of `offset` bytes behind
bases[base]."""
_Replay = structure(
    "Replay",
    "calls: pointer; num_calls; structs, addresses: pointer; num_addresses; bases: pointer; error",
)


class Tape:
    """Calls; their structs, whose positions are the calls' first arguments; and the addresses in
    these structs. Without structs, the calls read those that Python passed."""

    def __init__(
        self, calls: Sequence[TapeCall], structs: bytes = b"", addresses: Sequence[Any] = ()
    ) -> None:
        self._calls = (TapeCall * len(calls))(*calls)
        self._structs = structs
        self._addresses = (TapeAddress * len(addresses))(*addresses)

    def replay(self, first: int, stop: int) -> None:
        """Makes some of the calls. Raises MemoryError if one of them gets no memory."""
        start = ctypes.addressof(self._calls) + first * ctypes.sizeof(TapeCall)
        replay_calls(start, stop - first)

    def replay_at(self, bases: Sequence[int]) -> None:
        """Makes all calls with the addresses in a copy of the structs replaced."""
        calls = type(self._calls).from_buffer_copy(self._calls)
        structs = (ctypes.c_char * len(self._structs)).from_buffer_copy(self._structs)
        values = (ctypes.c_int64 * len(bases))(*bases)
        tape = _Replay(num_calls=len(calls), num_addresses=len(self._addresses))
        tape.calls, tape.structs = ctypes.addressof(calls), ctypes.addressof(structs)
        tape.addresses, tape.bases = ctypes.addressof(self._addresses), ctypes.addressof(values)
        _replay(tape)


def replay_calls(address: int, count: int) -> None:
    """Makes the calls of an array of TapeCall at this address, one after the other."""
    _replay(_Replay(calls=address, num_calls=count))


def function_number(name: str) -> int:
    return _NUMBERS[name]


def _replay(tape: Any) -> None:
    if error := call("veneer_replay", ctypes.byref(tape)):
        if error < 0:
            raise CallError("a tape calls a function that C does not know")
        raise MemoryError("no memory to replay a tape")


def tape_call(name: str, *arguments: Any) -> TapeCall:
    """Turns the arguments of a call into numbers: None into 0, and a struct into its address."""
    values = (ctypes.c_int64 * MOST_ARGUMENTS)(*map(_number, arguments))
    return TapeCall(_NUMBERS[name], values)


def _number(argument: Any) -> int:
    struct = referent_of(argument)
    if struct is not None:
        return ctypes.addressof(struct)
    return 0 if argument is None else argument


class Recorder:
    """Hears of the calls and of the new tensors of a block. unsupported_call: the first operation
    that a tape cannot replay; None: there was none."""

    unsupported_call: str | None = None

    def add_call(self, name: str, arguments: tuple[Any, ...]) -> None:
        """Hears of a call before it is made."""
        raise NotImplementedError

    def add_tensor(self, name: str, tensor: Tensor) -> Tensor:
        """Returns the tensor to use in place of this one, which has no values yet."""
        raise NotImplementedError

    def reject(self, name: str) -> None:
        self.unsupported_call = self.unsupported_call or name


class _Observer(TorchDispatchMode):
    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name in _CREATES and result.numel():
            return self._recorder.add_tensor(name, result)
        if name not in _CREATES and name not in _VIEWS:
            self._recorder.reject(name)
        return result


@contextmanager
def record(recorder: Recorder) -> Iterator[None]:
    """Tells the recorder what this thread computes within the block, which has no gradients."""
    with observe_calls(recorder.add_call), _Observer(recorder), torch.no_grad():
        yield
