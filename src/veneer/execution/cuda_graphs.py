"""Decoding steps on CUDA as graphs: captured once, launched whole from then on, for a step is some
thousand launches.

A graph stands for all steps of as many rows and blocks, and of the same adapters on the same rows.
Rows and blocks are filled up to powers of two, and what changes from step to step (ids, positions,
lengths, tables) lies in one buffer, which the graph reads where it lies. A step is captured when it
has come WORTH times, and what the graph then gives is held against the same step launched call by
call. What cannot be captured stays so: a warning says why.

Knows nothing of requests. Shapes: N rows, B blocks of a table, V ids.
"""

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from veneer.adapters.placement.acting import Acting, BatchPart
from veneer.adapters.placement.attachment import Attachment
from veneer.execution.agreement import MODEL, difference
from veneer.execution.paged import PagedKeys, RowsStep
from veneer.execution.proofs.steps import Run
from veneer.kernels.attention.paged_rows import BlockTables
from veneer.quant.scratch import held_buffers

WORTH = 4
"""Times that a step is launched call by call: a capture costs three more."""
MOST = 32
"""Graphs that are kept, those used last."""
MOST_SEEN = 1000
HEAD = 3
"""Columns of a row before its table: id, position, length."""

_log = logging.getLogger("veneer.decoding")


class RefusedError(Exception):
    """A step cannot be captured; the message says why."""


class Recorder(Protocol):
    def record(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Returns a function that repeats the work of `run` on the same memory, and returns its
        tensor. RefusedError."""


class CudaRecorder:
    """CUDA's own. All graphs share one pool: what one gave is read before the next is launched.
    Other threads go on meanwhile, and may wait and allocate: they load adapters."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                # what is made once is made outside of the graph: compiled kernels, tables of
                # adapters
                run()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                out = run()
        except (
            RuntimeError
        ) as fault:  # what CUDA refuses, a wait above all, has no class of its own
            raise RefusedError(str(fault).partition("\n")[0][:200]) from fault

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay


def recorder_here() -> Recorder | None:
    return CudaRecorder() if torch.cuda.is_available() else None


Key = tuple[int, int, tuple[BatchPart, ...]]
"""Rows, columns of their buffer, and what acts."""


@dataclass(frozen=True)
class _Graph:
    """inputs: what it reads. holds: memory of others that it reads and writes."""

    inputs: Tensor
    replay: Callable[[], Tensor]
    holds: tuple[Any, ...]


class Graphs:
    """run: a model's forward over blocks. keys: whose last block is nobody's, for rows that fill
    up. recorder: None: every step is launched call by call."""

    def __init__(
        self, device: torch.device, keys: PagedKeys, run: Run, recorder: Recorder | None
    ) -> None:
        self._device, self._keys, self._run, self._recorder = device, keys, run, recorder
        self._seen: Counter[Key] = Counter()
        self.kept: OrderedDict[Key, _Graph] = OrderedDict()
        self.refused: dict[Key, str] = {}

    def logits(self, inputs: Tensor, acting: Acting) -> Tensor:
        """(N, V), good until the next call. acting: held by the caller."""
        key = *inputs.shape, acting.parts
        if key not in self.kept and not self._captured(key, inputs, acting):
            return self._launched(inputs)
        self.kept.move_to_end(key)
        graph = self.kept[key]
        graph.inputs.copy_(inputs)
        return graph.replay()

    def let_go(self, held: Collection[Attachment]) -> None:
        """No others act from now on: what was captured with them goes."""
        for known in (self.kept, self._seen, self.refused):
            for key in [key for key in known if not _adapters(key) <= set(held)]:
                del known[key]

    def _launched(self, inputs: Tensor) -> Tensor:
        step = RowsStep(self._keys, BlockTables(inputs[:, HEAD:], inputs[:, HEAD - 1]))
        return self._run(inputs[:, : HEAD - 1].T, step, None)

    def _captured(self, key: Key, inputs: Tensor, acting: Acting) -> bool:
        if len(self._seen) > MOST_SEEN:  # mixes that come once each
            self._seen.clear()
            self.refused.clear()
        self._seen[key] += 1
        if self._recorder is None or key in self.refused or self._seen[key] <= WORTH:
            return False
        own = inputs.clone()
        try:
            replay = self._recorder.record(lambda: self._launched(own))
            expected = self._launched(own)
            if (worst := difference(replay(), expected)) > MODEL.limits[expected.dtype]:
                raise RefusedError(f"its graph differs by {worst:.1e}")
        except RefusedError as fault:
            if str(fault) not in self.refused.values():
                _log.warning(
                    "a step of answers is launched call by call, not as a CUDA graph: %s", fault
                )
            self.refused[key] = str(fault)
            return False
        self.kept[key] = _Graph(own, replay, (acting, held_buffers()))
        if len(self.kept) > MOST:
            self.kept.popitem(last=False)
        return True


def _adapters(key: Key) -> set[Attachment]:
    return {adapter for part in key[2] for adapter, _ in part.adapters}
