"""/metrics in Prometheus' text format: vLLM's names, which routers read, and our own. Every label
has a bounded number of values.

Source: docs.vllm.ai/en/latest/usage/metrics.html;
prometheus.io/docs/instrumenting/exposition_formats.
"""

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from veneer.decoding.engine import Engine
from veneer.decoding.schedule.block_names import Identity
from veneer.serve.protocols.answers import EndReason, Usage

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
MOST_NAMES = 64
"""Adapters named in a label."""


@dataclass
class Histogram:
    counts: list[int] = field(default_factory=lambda: [0] * (len(SECONDS) + 1))
    total: float = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(SECONDS, seconds)] += 1
        self.total += seconds


@dataclass(frozen=True)
class EngineState:
    """Counts of the engine between two steps."""

    running: int
    waiting: int
    blocks: int
    free_blocks: int
    tokens_per_block: int
    max_adapters: int
    running_adapters: tuple[Identity, ...]
    waiting_adapters: tuple[Identity, ...]


def engine_state(engine: Engine) -> EngineState:
    """Reads the counts. Call it on the engine's thread."""
    scheduler = engine.scheduler
    running, waiting = scheduler.running, scheduler.waiting
    blocks = scheduler.blocks
    return EngineState(
        len(running),
        len(waiting),
        blocks.num_blocks,
        blocks.available,
        blocks.tokens_per_block,
        scheduler.limits.max_adapters,
        tuple({s.request.adapter: None for s in running if s.request.adapter}),
        tuple({s.request.adapter: None for s in waiting if s.request.adapter}),
    )


class Metrics:
    """Counts requests, answers and tokens, on the event loop."""

    def __init__(self, model: str, routes: Sequence[str]) -> None:
        self._model, self._routes = model, frozenset(routes)
        self._answers: Counter[tuple[str, int]] = Counter()
        self._ended: Counter[str] = Counter()
        self._tokens: Counter[str] = Counter()
        self._first, self._whole = Histogram(), Histogram()

    def count_http(self, path: str, status: int) -> None:
        """Counts an HTTP request, whatever its status."""
        self._answers[path if path in self._routes else "other", status] += 1

    def count_prompt(self, tokens: int) -> None:
        self._tokens["prompt"] += tokens

    def count_first_token(self, seconds: float) -> None:
        self._first.add(seconds)

    def count_answer(self, reason: EndReason | None, seconds: float, usage: Usage) -> None:
        """Counts a request that has ended. reason: None if it failed or the client has gone."""
        self._ended[reason or "abort"] += 1
        self._tokens["cached"] += usage.cached
        self._tokens["new"] += usage.new
        self._whole.add(seconds)

    def lines(
        self,
        state: EngineState,
        names: Mapping[str, str],
        memory: Mapping[str, int],
        extra: Mapping[str, float],
    ) -> Iterator[str]:
        """Yields the lines of the text.

        names: names of adapters by content. memory: bytes of the adapters in memory, by name.
        extra: further gauges by name.
        """
        model = {"model_name": self._model}
        used = 1 - state.free_blocks / state.blocks
        yield from _metric("vllm:num_requests_running", "gauge", [(model, state.running)])
        yield from _metric("vllm:num_requests_waiting", "gauge", [(model, state.waiting)])
        yield from _metric("vllm:kv_cache_usage_perc", "gauge", [(model, used)])
        cache = {
            **model,
            "block_size": str(state.tokens_per_block),
            "num_gpu_blocks": str(state.blocks),
        }
        yield from _metric("vllm:cache_config_info", "gauge", [(cache, 1)])
        adapters = {
            "max_lora": str(state.max_adapters),
            "running_lora_adapters": _named(state.running_adapters, names),
            "waiting_lora_adapters": _named(state.waiting_adapters, names),
        }
        yield from _metric("vllm:lora_requests_info", "gauge", [(adapters, time.time())])
        for name, key in (
            ("prompt_tokens", "prompt"),
            ("generation_tokens", "new"),
            ("prefix_cache_queries", "prompt"),
            ("prefix_cache_hits", "cached"),
        ):
            yield from _metric(f"vllm:{name}_total", "counter", [(model, self._tokens[key])])
        ends = [
            ({**model, "finished_reason": reason}, count)
            for reason, count in sorted(self._ended.items())
        ]
        yield from _metric("vllm:request_success_total", "counter", ends)
        yield from _histogram("vllm:time_to_first_token_seconds", model, self._first)
        yield from _histogram("vllm:e2e_request_latency_seconds", model, self._whole)
        yield from answers_lines(self._answers)
        sizes: list[tuple[Mapping[str, str], float]] = [
            ({"adapter": name}, count) for name, count in memory.items()
        ]
        yield from _metric("veneer:adapter_in_memory_bytes", "gauge", sizes[:MOST_NAMES])
        for name, value in sorted(extra.items()):
            yield from _metric(f"veneer:{name}", "gauge", [({}, value)])


def joined(lines: Iterable[str]) -> str:
    """Joins lines to a text, which ends with a line break."""
    return "\n".join(lines) + "\n"


def answers_lines(answers: Mapping[tuple[str, int], int]) -> Iterator[str]:
    """Writes how often each (path, status) was answered."""
    samples = [
        ({"path": path, "status": str(status)}, count)
        for (path, status), count in sorted(answers.items())
    ]
    yield from _metric("veneer:http_answers_total", "counter", samples)


def merged(texts: Mapping[str, str]) -> Iterator[str]:
    """Merges the metrics of several replicas; each sample gets a label `replica`."""
    groups: dict[str, list[str]] = {}
    for replica, text in sorted(texts.items()):
        samples: list[str] = []
        for line in text.splitlines():
            if line.startswith("#"):
                samples = groups.setdefault(line, [])
            else:
                name, value = line.rsplit(" ", 1)
                label = _labels({"replica": replica})
                samples.append(
                    f"{name[:-1]},{label[1:]} {value}"
                    if name.endswith("}")
                    else f"{name}{label} {value}"
                )
    for head, samples in groups.items():
        if samples:
            yield from (head, *samples)


def _named(adapters: Sequence[Identity], names: Mapping[str, str]) -> str:
    """Joins names by commas, where routers split them."""
    known = [names.get(content, content[:12]) for identity in adapters for content, _ in identity]
    return ",".join(sorted(set(known))[:MOST_NAMES])


def _metric(
    name: str, kind: str, samples: Sequence[tuple[Mapping[str, str], float]]
) -> Iterator[str]:
    yield f"# TYPE {name} {kind}"
    for labels, value in samples:
        yield (
            f"{name}{_labels(labels)} {value:g}"
            if value < 10**6
            else f"{name}{_labels(labels)} {value:.17g}"
        )


def _histogram(name: str, labels: Mapping[str, str], histogram: Histogram) -> Iterator[str]:
    yield f"# TYPE {name} histogram"
    reached = 0
    for end, count in zip((*map(str, SECONDS), "+Inf"), histogram.counts, strict=True):
        reached += count
        yield f"{name}_bucket{_labels({**labels, 'le': end})} {reached}"
    yield f"{name}_sum{_labels(labels)} {histogram.total:g}"
    yield f"{name}_count{_labels(labels)} {reached}"


def _labels(labels: Mapping[str, str]) -> str:
    if not labels:
        return ""
    inner = ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items())
    return f"{{{inner}}}"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
