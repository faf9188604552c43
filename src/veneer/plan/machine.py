"""How fast a machine multiplies and moves data: measured here in seconds, or a GPU's published
figures.

A step's time is the sum of its parts, as the dry run counts them (simulation/tracker.py):

    seconds = products / rate  +  moved bytes / bandwidth  +  operations * start

On this machine rates are measured at the step's own shapes, once a week; the share of them that a
step reaches was measured with whole steps (benchmarks/plan_time.py). For a GPU the published dense
rates are used, and an assumed share of them. Units: FLOP and bytes a second.
"""

import os
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date, timedelta

import torch

from veneer.errors import ConfigError
from veneer.files.memory import container_bytes
from veneer.files.remembered import forget, remember
from veneer.kernels.bindings.library import has_amx, has_bf16
from veneer.kernels.dense import products
from veneer.plan.simulation.tracker import Shape, Work

SHAPES_MEASURED = 4
"""Products timed: those with most of the step's FLOP; the others run at the mean of their rates."""
MOST_ROWS = 1024
"""Rows of a timed product at most: more do not change the rate, only the wait."""
ENOUGH_SECONDS, ROUNDS = 0.05, 2
"""Seconds per figure, and rounds over all figures: short enough to answer at once, long enough to
pass slow first calls. Several rounds, so that a slow moment does not decide a figure."""
MEASURED_FOR = timedelta(days=7)
"""Time for which rates are used that were measured on a machine that was free."""
FREE = 0.8
"""Share of its processors that a measurement must get; below it something else was at work, and its
rates are used once."""
DOUBT = 1.5
"""A run that is so many times faster than rates allow shows that they were measured at a bad
moment."""
STEP_SHARE = 0.73
"""Measured over predicted speed of whole steps on a CPU, whose rates are those of products alone:
the median of ten runs of benchmarks/plan_time.py on Zen 4 with torch's products, their predictions
corrected by hand for attention, which was not counted then."""
SHARES_OF_PAIRS, SHARES_OF_TILES = (0.66, 0.75), (0.30, 0.37)
"""The same where products are our own: of bf16 pairs, or on AMX tiles, so fast that what lies
between them is most of a step. The second of each is that of steps whose layers make their calls at
once. Held in docs/plan.md."""
GPU_PRODUCTS_SHARE, GPU_BANDWIDTH_SHARE = 0.5, 0.7
"""Assumed shares of a GPU's published rates; not measured by this project."""

HOST_BYTES_PER_SECOND = 25e9
"""Between a GPU and pinned host memory: PCIe 4 x16, 32 GB/s published; what of it is reached is
assumed."""


@dataclass(frozen=True)
class GPU:
    """Published: dense 16-bit tensor rate in TFLOP/s with float32 sums, memory in GB (decimal) and
    its bandwidth in GB/s."""

    teraflops: float
    memory_gb: float
    gb_per_second: float


GPUS = {
    "T4": GPU(65, 15.8, 320),
    "V100": GPU(125, 34, 900),
    "L4": GPU(121, 24, 300),
    "A10G": GPU(70, 24, 600),
    "A100": GPU(312, 85, 2039),
    "A100-40": GPU(312, 42, 1555),
    "A6000": GPU(155, 51, 768),
    "L40S": GPU(362, 48, 864),
    "RTX3090": GPU(71, 25, 936),
    "RTX4090": GPU(165, 25, 1008),
    "RTX5090": GPU(210, 34, 1792),
    "H100": GPU(989, 85, 3350),
    "H200": GPU(989, 151, 4800),
    "B200": GPU(2250, 193, 8000),
}
"""From the vendors' data sheets; memory as the driver shows it."""


@dataclass(frozen=True)
class AnswerWork:
    """Describes the answers that a model writes together before a step, each of `tokens` tokens."""

    answers: float
    prompt_tokens: float
    tokens: int
    parameters: int
    weight_bytes: int


@dataclass(frozen=True)
class Machine:
    """Holds the speed of a machine. rate: of a product (rows, inner, columns).

    memory_bytes: 0 if unknown. link: bytes a second to other machines, None if unknown. share: of
    these rates that a whole step reaches; replayed_share: that of a step with replayed layers.
    measured: the day, for this machine's own figures; None for published ones. got: share of the
    processors that the measurement got.
    """

    name: str
    memory_bytes: int
    measured: date | None
    rate: Callable[[Shape], float]
    bytes_per_second: float
    start_seconds: float
    share: float
    replayed_share: float
    link: float | None = None
    got: float = 1.0

    @property
    def is_busy(self) -> bool:
        """Whether something else was at work when it was measured."""
        return self.got < FREE

    def seconds(self, work: Work) -> float:
        """Predicts the seconds of one step's forward and backward."""
        products = sum(flops / self.rate(shape) for shape, flops in work.products.items())
        other_seconds = (
            work.moved_bytes / self.bytes_per_second + work.operations * self.start_seconds
        )
        other_seconds += work.host_bytes / HOST_BYTES_PER_SECOND
        return (products + other_seconds) / (
            self.replayed_share if work.replayed_layers else self.share
        )

    def answer_seconds(self, work: AnswerWork) -> float:
        """Predicts the seconds of answers: each token reads all weights once, and each token of a
        prompt or an answer takes two FLOP per weight."""
        width = max(1, round(work.parameters**0.5))
        rate = self.rate((max(1, round(work.answers)), width, width))
        flops = 2 * work.parameters * work.answers * (work.prompt_tokens + work.tokens)
        read_bytes = work.weight_bytes * work.tokens
        return (flops / rate + read_bytes / self.bytes_per_second) / self.share


def named_gpu(name: str) -> Machine:
    """Returns a GPU's published figures. ConfigError for an unknown one."""
    key = next((k for k in GPUS if k.lower() == name.lower().replace(" ", "")), None)
    if key is None:
        raise ConfigError(
            f"no figures for a GPU called {name!r}", next_step=f"One of {', '.join(GPUS)}."
        )
    gpu = GPUS[key]
    rate = gpu.teraflops * 1e12 * GPU_PRODUCTS_SHARE
    return Machine(
        key,
        round(gpu.memory_gb * 1e9),
        None,
        lambda _: rate,
        gpu.gb_per_second * 1e9 * GPU_BANDWIDTH_SHARE,
        5e-6,
        share=1.0,
        replayed_share=1.0,
    )


@dataclass(frozen=True)
class Rates:
    """Holds measured rates: FLOP a second of each shape and of others; bytes a second; start
    seconds; the share of the processors that the measurement got.
    """

    day: date
    of_shapes: tuple[float, ...]
    other: float
    bytes_per_second: float
    start_seconds: float
    got: float = 1.0

    @property
    def holds(self) -> bool:
        """Whether they are recent, and of a machine that was free."""
        return self.got >= FREE and timedelta() <= date.today() - self.day < MEASURED_FOR


def this_machine(work: Work, dtype: torch.dtype, device: str = "cpu") -> Machine:
    """Measures this machine at the shapes that `work` spends most in, about a second; once a
    week, if nothing else is at work.
    """
    torch_device = torch.device(device)
    plain_products = Counter({shape: flops for shape, flops in work.products.items() if all(shape)})
    largest = dict(plain_products.most_common(SHAPES_MEASURED))
    cuda, threads = torch_device.type == "cuda", torch.get_num_threads()
    label = torch.cuda.get_device_name(torch_device) if cuda else f"{threads} threads"
    key = {
        "shapes": [[*shape, flops] for shape, flops in largest.items()],
        **_place(dtype, torch_device),
    }
    rates = remember(
        "rates",
        key,
        Rates,
        lambda: _measured(largest, dtype, torch_device),
        is_valid=lambda found: found.holds,
    )
    of_shapes = dict(zip(largest, rates.of_shapes, strict=True))
    share, replayed_share = _shares(dtype, torch_device)
    machine_name = f"this machine ({threads} thread{'' if threads == 1 else 's'})"
    return Machine(
        name=label if cuda else machine_name,
        memory_bytes=torch.cuda.get_device_properties(torch_device).total_memory
        if cuda
        else memory_bytes(),
        measured=rates.day,
        rate=lambda shape: of_shapes.get(shape, rates.other),
        bytes_per_second=rates.bytes_per_second,
        start_seconds=rates.start_seconds,
        share=share,
        replayed_share=replayed_share,
        got=rates.got,
    )


def doubt_rates(flops_per_second: float, dtype: torch.dtype, device: str = "cpu") -> None:
    """Forgets rates of this machine that do not allow what a run just reached."""
    torch_device = torch.device(device)
    place = _place(dtype, torch_device)
    most_share = max(_shares(dtype, torch_device))

    def is_disproved(key: Mapping[str, object], rates: Rates) -> bool:
        here = all(key.get(name) == value for name, value in place.items())
        return here and flops_per_second > DOUBT * most_share * rates.other

    forget("rates", Rates, is_disproved)


def _place(dtype: torch.dtype, device: torch.device) -> dict[str, object]:
    """Returns what all rates depend on besides shapes."""
    cuda = device.type == "cuda"
    label = torch.cuda.get_device_name(device) if cuda else f"{torch.get_num_threads()} threads"
    return {"dtype": str(dtype), "device": [device.type, label]}


def _shares(dtype: torch.dtype, device: torch.device) -> tuple[float, float]:
    """Returns the shares of the rates that steps reach: share, replayed_share."""
    if dtype is torch.bfloat16 and device.type != "cuda" and has_bf16():
        return SHARES_OF_TILES if has_amx() else SHARES_OF_PAIRS
    return STEP_SHARE, STEP_SHARE


def _measured(shapes: Mapping[Shape, int], dtype: torch.dtype, device: torch.device) -> Rates:
    """Measures products of these shapes, each with the FLOP spent in it."""
    got = processor_share(device)
    rates: dict[Shape, float] = {}
    for timed_shape in [*dict.fromkeys(map(_timed, shapes))] * ROUNDS:
        rates[timed_shape] = max(
            rates.get(timed_shape, 0.0), product_rate(timed_shape, dtype, device)
        )
    of_shapes = tuple(rates[_timed(shape)] for shape in shapes)
    seconds = sum(flops / rate for flops, rate in zip(shapes.values(), of_shapes, strict=True))
    mean_rate = (
        sum(shapes.values()) / seconds if rates else product_rate((512, 512, 512), dtype, device)
    )
    moved, start = bandwidth(dtype, device), start_seconds(device)
    got = min(got, processor_share(device))
    return Rates(date.today(), of_shapes, mean_rate, moved, start, got)


def processor_share(device: torch.device) -> float:
    """Measures the share of the processors that products of this process get: 1 where nothing else
    is at work."""
    if device.type != "cpu":
        return 1.0
    x = torch.full((512, 512), 0.01)
    torch.mm(x, x)
    began, spent = time.perf_counter(), time.process_time()
    while (seconds := time.perf_counter() - began) < ENOUGH_SECONDS:
        torch.mm(x, x)
    return min(1.0, (time.process_time() - spent) / (seconds * torch.get_num_threads()))


def _timed(shape: Shape) -> Shape:
    """Returns the shape that is timed instead: wider products are no faster, and calls must end
    soon.
    """
    rows, inner, columns = shape
    return min(rows, MOST_ROWS), inner, min(columns, max(256, 2**23 // inner))


def product_rate(shape: Shape, dtype: torch.dtype, device: torch.device) -> float:
    """Measures FLOP a second of x (rows, inner) times W (inner, columns), by a frozen layer's
    product.
    """
    rows, inner, columns = shape
    x, w = (
        torch.full(size, 0.01, dtype=dtype, device=device)
        for size in ((rows, inner), (columns, inner))
    )
    return 2 * rows * inner * columns / _best_seconds(lambda: products.linear(x, w, None), device)


def bandwidth(dtype: torch.dtype, device: torch.device) -> float:
    """Measures bytes read and written a second by an elementwise operation."""
    x = torch.full((512, 4096), 0.5, dtype=dtype, device=device)
    out = torch.empty_like(x)
    return 3 * x.nbytes / _best_seconds(lambda: torch.mul(x, x, out=out), device)


def start_seconds(device: torch.device) -> float:
    """Measures the cost of an operation that computes almost nothing."""
    x = torch.zeros(8, device=device)
    return _best_seconds(lambda: x.add(1.0), device)


def _best_seconds(call: Callable[[], object], device: torch.device) -> float:
    best, end = float("inf"), time.perf_counter() + ENOUGH_SECONDS
    for number in range(1000):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
        if number >= 2 and time.perf_counter() > end:
            break
    return best


def memory_bytes() -> int:
    """Returns the memory of this machine or its container, 0 if unknown."""
    container_limit = container_bytes()
    has_sysconf = (
        {"SC_PAGE_SIZE", "SC_PHYS_PAGES"} <= set(os.sysconf_names)
        if hasattr(os, "sysconf")
        else False
    )
    machine_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if has_sysconf else 0
    return (
        machine_bytes
        if container_limit is None or not machine_bytes
        else min(machine_bytes, container_limit)
    )
