"""Loads the library of compiled kernels (kernels/native/*.c), once; None if there is none.

Every caller keeps a plain torch path beside its kernel and takes it without the library. The files
*_calls.py declare the functions (declarations.py), and tape/tape.py replays calls. Python checks
the arguments (checks.py), because C does not.
"""

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any, Literal

from veneer.errors import ConfigError
from veneer.kernels.sources import digest

OFF = "VENEER_NO_NATIVE"
"""Environment variable: set to 1, the plain paths run everywhere."""
BUILT_ELSEWHERE = "VENEER_NATIVE"
"""Environment variable: the file of another build of the kernels, for example one with sanitizers
(tests/kernels/bindings/test_sanitized.py)."""

MAX_ISA = "VENEER_MAX_CPU_ISA"
"""Environment variable: the newest instructions that compiled functions may use, one of LIMITS. It
is read once, when the library is loaded. torch has its own limits, ATEN_CPU_CAPABILITY and
ONEDNN_MAX_CPU_ISA: with all three set, a processor acts as an older one."""

LIMITS = {"plain": 0, "avx2": 2, "avx512": 3, "avx512_bf16": 4}
"""avx512 excludes the products of bf16 pairs and the byte permutes of newer processors; avx512_bf16
includes these, and excludes AMX tiles."""

_SOFTLY = 1
"""OpenMP's omp_pause_soft."""

_POINTER, _INT = ctypes.c_void_p, ctypes.c_int
SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "veneer_sources": (ctypes.c_char_p, []),
    "veneer_use_openmp": (None, [_POINTER] * 4),
    "veneer_limit": (None, [_INT]),
    "veneer_level": (_INT, []),
    "veneer_has_vectors": (_INT, []),
    "veneer_has_bf16": (_INT, []),
    "veneer_has_bfdot": (_INT, []),
    "veneer_has_amx": (_INT, []),
    "veneer_replay": (_INT, [_POINTER]),
}
"""Every function of the library that is called -> (return type, argument types)."""


def add_signature(name: str, returns: Any, takes: list[Any]) -> None:
    SIGNATURES[name] = returns, takes
    if library.cache_info().currsize and (loaded := library()) is not None:
        _sign(loaded, name)


def _sign(loaded: Any, name: str) -> None:
    if hasattr(loaded, name):  # some exist on one kind of processor
        function = getattr(loaded, name)
        function.restype, function.argtypes = SIGNATURES[name]


Place = Literal["cpu", "cuda"]


@dataclass
class StepCounts:
    """Counts of a planned step.

    flops            operations of our kernels
    replayed_layers  layers whose calls are replayed (kernels/tape/layer_tape.py)
    iterations       iterations of a loop that the present one stands for (`chunk_starts`)
    is_kernel        whether torch's product now stands for a kernel of ours (`counted_as_kernel`)
    """

    flops: int = 0
    replayed_layers: int = 0
    iterations: int = 1
    is_kernel: bool = False


planned_counts: ContextVar[tuple[Place, StepCounts] | None] = ContextVar("planning", default=None)
"""(device that is planned for, counts) while planning, else None."""


@contextmanager
def planning(place: Place = "cpu") -> Iterator[None]:
    """Within the block tensors without storage (meta) take the paths of tensors on this device, and
    no kernel is called. So a plan can count what a step would allocate."""
    token = planned_counts.set((place, StepCounts()))
    try:
        yield
    finally:
        planned_counts.reset(token)


def note_flops(count: Callable[[], int]) -> None:
    """Adds the operations of a kernel to a plan. count is called only while planning."""
    if (planned := planned_counts.get()) is not None:
        planned[1].flops += count() * planned[1].iterations


def chunk_starts(starts: range) -> Iterator[int]:
    """Yields where the chunks of a loop start. While planning, the second chunk stands for all but
    the first and the last: they allocate and compute the same. The first chunk differs, because no
    chunk before it has left tensors; the last may be shorter."""
    planned = planned_counts.get()
    if planned is None or len(starts) < 4:
        yield from starts
        return
    yield starts[0]
    planned[1].iterations = len(starts) - 2
    try:
        yield starts[1]
    finally:
        planned[1].iterations = 1
    yield starts[-1]


@contextmanager
def counted_as_kernel() -> Iterator[None]:
    """Within the block a product of torch stands for a kernel of ours. Only while planning."""
    planned = planned_counts.get()
    assert planned is not None
    planned[1].is_kernel = True
    try:
        yield
    finally:
        planned[1].is_kernel = False


def current_counts() -> StepCounts:
    """Returns the counts of the plan in progress; empty ones if nothing is planned."""
    planned = planned_counts.get()
    return StepCounts() if planned is None else planned[1]


def count_replayed_layer() -> None:
    """Counts a layer whose calls would be replayed, while planning."""
    if (planned := planned_counts.get()) is not None:
        planned[1].replayed_layers += 1


def take_counts() -> StepCounts:
    """Returns the counts since the last call, and resets flops and replayed_layers; empty counts if
    nothing is planned."""
    if (planned := planned_counts.get()) is None:
        return StepCounts()
    counts = planned[1]
    taken = replace(counts)
    counts.flops = counts.replayed_layers = 0
    return taken


def on_cpu(tensor: Any) -> bool:
    """Whether a tensor is on the CPU, so that compiled functions take it; while planning, whether
    it is planned for the CPU."""
    planned = planned_counts.get()
    return bool(tensor.is_cpu if planned is None else tensor.is_meta and planned[0] == "cpu")


def on_cuda(tensor: Any) -> bool:
    """Whether a tensor is on CUDA; while planning, whether it is planned for CUDA."""
    planned = planned_counts.get()
    return bool(tensor.is_cuda if planned is None else tensor.is_meta and planned[0] == "cuda")


@cache
def library() -> Any:
    """Returns the library with its threads connected to torch's, or None: not compiled, not
    loadable, or switched off. Raises ConfigError if it was built from other sources."""
    if os.environ.get(OFF):
        return None
    here = Path(__file__).parents[1]
    elsewhere = os.environ.get(BUILT_ELSEWHERE)
    names = (
        [elsewhere]
        if elsewhere
        else [f"_native{suffix}" for suffix in reversed(EXTENSION_SUFFIXES)]
    )
    files = [path for name in names if (path := here / name).is_file()]
    if not files:
        return None
    try:
        loaded = ctypes.CDLL(str(files[0]))
    except OSError:
        return None
    for name in SIGNATURES:
        _sign(loaded, name)
    if not elsewhere:
        _refuse_other_sources(loaded, files[0])
    if named := os.environ.get(MAX_ISA):
        if named not in LIMITS:
            raise ConfigError(
                f"{MAX_ISA} is {named!r}",
                next_step=f"One of {', '.join(LIMITS)}; or leave it unset.",
            )
        loaded.veneer_limit(LIMITS[named])
    kernels: Any = loaded
    # Read thousands of times a step, so C is asked once.
    kernels.multiplies_bf16 = hasattr(loaded, "veneer_entropy") and bool(loaded.veneer_has_bf16())
    kernels.has_bf16_products = kernels.multiplies_bf16 or bool(loaded.veneer_has_bfdot())
    functions = _openmp()
    if functions is not None:
        loaded.veneer_use_openmp(*functions)
    return kernels


def _refuse_other_sources(loaded: Any, file: Path) -> None:
    """Raises ConfigError if the library was built from other C sources than those beside it.

    Its functions could then take other arguments than they are called with.
    """
    built_from = loaded.veneer_sources().decode() if hasattr(loaded, "veneer_sources") else ""
    if built_from != digest():
        raise ConfigError(
            f"the compiled kernels in {file} were built from other C sources than these",
            next_step="Build them again: pip install -e . in a checkout, else pip install"
            " --force-reinstall veneer.",
        )


@cache
def compiled_function(name: str) -> Any:
    """Returns a function of the library. Raises AttributeError if it is not compiled here."""
    return getattr(library(), name)


def level() -> int:
    """Returns 3 for AVX-512, 2 for AVX2, 0 for plain C, -1 without the library."""
    kernels = library()
    return -1 if kernels is None else int(kernels.veneer_level())


def has_vectors() -> bool:
    """Whether compiled functions multiply and add vectors in one instruction (AVX2, NEON)."""
    kernels = library()
    return kernels is not None and bool(kernels.veneer_has_vectors())


def has_bf16() -> bool:
    """Whether compiled functions of a training step multiply bf16 pairs."""
    kernels = library()
    return kernels is not None and kernels.multiplies_bf16


def has_bf16_products() -> bool:
    """Whether compiled products of many rows, and attention, multiply bf16: `has_bf16`, or BFMMLA
    on ARM."""
    kernels = library()
    return kernels is not None and kernels.has_bf16_products


def has_floats() -> bool:
    """Whether there are compiled functions for float32. Even without AVX2 they take at most half of
    torch's time."""
    return library() is not None


def has_float_products() -> bool:
    """Whether compiled products of float32 are faster than torch's, which have no kernels for AVX2
    as good as those for AVX-512."""
    return level() == 2


def has_amx() -> bool:
    """Whether bf16 products with enough rows use AMX tiles."""
    kernels = library()
    return kernels is not None and bool(kernels.veneer_has_amx())


def end_helpers() -> None:
    """Ends the OpenMP helper threads of this thread. Its next parallel call starts new ones.

    Call it in a thread that leaves the computing to another one. libgomp counts the helpers of all
    threads. If there are more than processors, no helper stays awake between calls: a decoding
    step of some 200 calls took 21 ms instead of 15.
    """
    for path in _openmp_libraries("libgomp*"):
        with suppress(OSError, AttributeError):
            ctypes.CDLL(str(path)).omp_pause_resource_all(_SOFTLY)


def _openmp() -> tuple[int, ...] | None:
    """Returns the addresses of the four OpenMP functions that parallel.c needs, from the library
    that torch uses."""
    names = ("GOMP_parallel", "omp_get_max_threads", "omp_get_thread_num", "omp_in_parallel")
    for path in _openmp_libraries("libgomp*", "libomp*", "libiomp*"):
        try:
            loaded = ctypes.CDLL(str(path))
            addresses = [
                ctypes.cast(getattr(loaded, name), ctypes.c_void_p).value for name in names
            ]
        except (OSError, AttributeError):
            continue
        if all(addresses):
            return tuple(int(address or 0) for address in addresses)
    return None


def _openmp_libraries(*patterns: str) -> list[Path]:
    import torch

    folder = Path(torch.__file__).parent / "lib"
    return sorted(path for pattern in patterns for path in folder.glob(pattern))
