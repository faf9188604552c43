"""The training loop: batches in, an adapter's values out, nothing lost on the way.

    before step 1   the optimizer's moments are made and the longest batch runs forward and backward once, its
                    gradient thrown away: what does not fit says so now; the held-out rows are evaluated once,
                    for the comparison afterwards
    a step          micro-batches summed with one normaliser, the norm checked, then clip, AdamW, publish
    an evaluation   loss on the held-out rows, a sample answer, a checkpoint; the best one stays

A loss or gradient that is not finite stops the run before the weights are touched. All order and randomness
come from (seed, epoch, step), so a resumed run continues bit for bit.
Knows nothing of methods: it trains the tensors it is given.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from veneer.adapters.acting import TokenKeys
from veneer.adapters.routing import Routing
from veneer.data.batching import Batch, plan_epoch, used_length
from veneer.data.examples import Example
from veneer.errors import CorruptFileError, DivergedError, Interrupted, fits_memory
from veneer.models.step import Paths, batch_loss, batches_of, evaluation_loss
from veneer.train.checkpoint import (
    checkpoint_path,
    load_checkpoint,
    load_values,
    numbers,
    prune,
    read_state,
    save_checkpoint,
)
from veneer.train.config import RunConfig
from veneer.train.interrupt import Interrupt
from veneer.train.offload import offload_for, offloaded
from veneer.train.optim import FlatParameters, learning_rate_at
from veneer.train.optimizers import make_optimizer
from veneer.train.origin import Origin
from veneer.train.records import Records, peak_memory_bytes, process_memory_bytes
from veneer.train.screen import Screen

FEWER_VALUES = "Train fewer values (an adapter instead of full, a smaller --rank), or --set optimizer=adamw8bit."
FEWER_ROWS = "Take fewer rows at once, --set micro_batch=N, or a smaller --length."


@dataclass
class Progress:
    """Where a run stands; what a checkpoint's state.json holds. Losses in nats per trained token."""

    step: int = 0
    epoch: int = 0
    index: int = 0
    """Batches of this epoch already taken."""
    best_loss: float | None = None
    best_step: int | None = None
    evaluations_without_better: int = 0
    first_loss: float | None = None
    last_loss: float | None = None
    timed_seconds: float = 0.0
    """Steps only, the first of every process left out."""
    timed_examples: int = 0
    timed_tokens: int = 0
    total_seconds: float = 0.0
    trained_tokens: int = 0
    losses: dict[str, float] = field(default_factory=dict)
    """Held-out loss of each checkpoint that there is, by its step, and of this one."""
    sample: dict[str, Any] = field(default_factory=dict)
    """The sample row's answer before training."""


@dataclass
class Job:
    """What the loop needs of a run. learning_rate: peak; evaluate_every and save_every: steps."""

    model: PreTrainedModel
    paths: Paths
    routing: Routing
    flat: FlatParameters
    train: Sequence[Example]
    validation: Sequence[Example]
    config: RunConfig
    learning_rate: float
    steps: int
    share_prompt: bool
    out: Path
    answer: Callable[[], dict[str, Any]] | None
    """Answers the sample row with the model as it stands: {prompt, expected, answer}."""

    @property
    def evaluate_every(self) -> int:
        return self.config.evaluate_every or max(1, math.ceil(self.steps / 5))


@dataclass(frozen=True)
class State:
    """What state.json holds."""

    origin: Origin
    progress: Progress


class Loop:
    def __init__(self, job: Job, records: Records, screen: Screen, *, origin: Origin, resume_from: Path | None) -> None:
        self.job, self.records, self.screen, self.origin = job, records, screen, origin
        self.damaged_best: dict[str, Any] | None = None
        """The best checkpoint, where it was damaged and another had to be taken."""
        with fits_memory("on the optimizer's moments", next_step=FEWER_VALUES):
            self.optimizer = make_optimizer(job.config.optimizer, job.flat, weight_decay=job.config.weight_decay)
        self.progress = Progress()
        self.device = job.flat.values.device
        weights = [*job.model.parameters(), *job.model.buffers(), job.flat.values]
        self.offload = offload_for(self.device, weights) if job.config.offload else None
        self._lengths = [used_length(e) for e in job.train]
        self._epoch_plan: tuple[int, list[list[int]]] | None = None
        if resume_from is not None:
            with fits_memory(f"on reading {resume_from}", next_step="Free memory, then resume again."):
                tensors, _ = load_checkpoint(resume_from)
                self.optimizer.load(tensors)
            self.progress = load_state(resume_from).progress

    def run(self) -> str:
        """Train to the end; 'done' or 'early_stop'. Raises Interrupted after saving, DivergedError, DoesNotFitError."""
        job, at = self.job, self.progress
        self._longest_batch()
        if at.step == 0:
            self._evaluate()
        first = True
        with Interrupt() as interrupt:
            while at.step < job.steps and not self._out_of_patience():
                seconds = self._step(timed=not first)
                at.total_seconds += seconds
                first = False
                due = at.step % job.evaluate_every == 0 or at.step == job.steps
                if due:
                    self._evaluate()
                if due or at.step % (job.config.save_every or job.steps) == 0 or interrupt.asked:
                    self._save()
                if interrupt.asked and at.step < job.steps:
                    raise Interrupted(
                        f"stopped at step {at.step} of {job.steps}; checkpoint saved",
                        next_step=f"Continue with: veneer train --resume {job.out}",
                    )
        self._take_best()
        return "early_stop" if self._out_of_patience() else "done"

    def _out_of_patience(self) -> bool:
        patience = self.job.config.patience
        return patience is not None and self.progress.evaluations_without_better >= patience

    def release(self) -> None:
        """Drop the optimizer and the gradient, which take more than the values; no further step can be taken."""
        del self.optimizer
        self.job.flat.release()

    def _plan(self, epoch: int) -> list[list[int]]:
        if self._epoch_plan is None or self._epoch_plan[0] != epoch:
            config = self.job.config
            plan = plan_epoch(self._lengths, batch=config.batch, seed=config.seed, epoch=epoch, order=config.order)
            self._epoch_plan = epoch, plan
        return self._epoch_plan[1]

    def _next_rows(self) -> list[int]:
        at = self.progress
        if at.index >= len(self._plan(at.epoch)):
            at.epoch, at.index = at.epoch + 1, 0
        rows = self._plan(at.epoch)[at.index]
        at.index += 1
        return rows

    def _micro_batches(self, rows: list[int]) -> Iterator[Batch]:
        job, size = self.job, self.job.config.rows_at_once
        parts = (rows[start : start + size] for start in range(0, len(rows), size))
        yield from batches_of(job.model, job.paths, job.train, parts, share_prompt=job.share_prompt)

    def _backward(self, rows: list[int]) -> tuple[float, list[Batch]]:
        """Gradient of the mean over the step's trained tokens, into the flat buffer; the loss; its batches."""
        job = self.job
        total = float(sum(int(job.train[i].trained.sum()) for i in rows))
        loss, batches = 0.0, []
        for number, batch in enumerate(self._micro_batches(rows)):
            keys = TokenKeys(batch.dropout_rows, self.progress.step * 4096 + number)
            with job.routing.drawing(keys):
                with offloaded(self.offload):
                    part = batch_loss(job.model, job.paths, job.routing, batch, total=total)
                part.backward()
            value = part.item()
            batches.append(batch)
            if not math.isfinite(value):
                raise self._diverged("loss", value, [batch])
            loss += value
        return loss, batches

    def _step(self, *, timed: bool) -> float:
        job, at = self.job, self.progress
        start = time.perf_counter()
        rate = learning_rate_at(
            at.step, steps=job.steps, peak=job.learning_rate, warmup=job.config.warmup, schedule=job.config.schedule
        )
        rows = self._next_rows()
        with self._fits(rows):
            loss, batches = self._backward(rows)
        with fits_memory(f"on the optimizer's step {at.step + 1}", next_step=self._freed(FEWER_VALUES)):
            norm = self.optimizer.gradient_norm()
            if not math.isfinite(norm):
                raise self._diverged("gradient norm", norm, batches)
            self.optimizer.step(learning_rate=rate, clip=job.config.clip, norm=norm)
        seconds = time.perf_counter() - start
        at.step += 1
        at.first_loss = loss if at.first_loss is None else at.first_loss
        at.last_loss = loss
        tokens = sum(b.tokens for b in batches)
        trained = sum(b.trained_tokens for b in batches)
        at.trained_tokens += trained
        if timed:
            at.timed_seconds += seconds
            at.timed_examples += len(rows)
            at.timed_tokens += tokens
        record = {
            "kind": "step",
            "step": at.step,
            "loss": loss,
            "gradient_norm": norm,
            "learning_rate": rate,
            "tokens": tokens,
            "trained_tokens": trained,
            "computed_tokens": sum(b.computed_tokens for b in batches),
            "seconds": seconds,
            "memory_bytes": process_memory_bytes(),
        }
        self.records.write(record)
        self.screen.step(record)
        return seconds

    def _longest_batch(self) -> None:
        """Run the costliest batch of the first epoch once and forget it: too large shows now, not in hour three."""
        plan = self._plan(self.progress.epoch)
        costliest = max(plan, key=lambda rows: sum(self._lengths[i] for i in rows))
        # What diverges is told again, with its step, when the batch's turn comes.
        with self._fits(costliest), suppress(DivergedError):
            self._backward(costliest)
        self.job.flat.gradient.zero_()
        gigabytes = peak_memory_bytes(str(self.device)) / 1e9
        longest = max(self._lengths[i] for i in costliest)
        self.screen.message(f"longest batch ok: {len(costliest)} rows, up to {longest} tokens, {gigabytes:.2f} GB")

    def _fits(self, rows: list[int]) -> AbstractContextManager[None]:
        tokens = sum(self._lengths[i] for i in rows)
        return fits_memory(
            f"on a batch of {len(rows)} rows, {tokens} tokens",
            [str(self.job.train[i].ref) for i in rows][:8],
            "Try --checkpointing, a smaller --set micro_batch=N, or a smaller --length.",
        )

    def _freed(self, otherwise: str) -> str:
        """What to do: a run that has a checkpoint goes on from there, with its own settings."""
        if not numbers(self.job.out / "checkpoints"):
            return otherwise
        return f"Free memory, then continue from the last checkpoint: veneer train --resume {self.job.out}"

    def _diverged(self, what: str, value: float, batches: Sequence[Batch]) -> DivergedError:
        self.job.flat.gradient.zero_()
        at = self.progress
        rows = [str(example.ref) for batch in batches for example in batch.examples]
        return DivergedError(
            f"T601 the {what} is {value} at step {at.step + 1}; the weights are those of step {at.step}",
            [f"rows of this batch: {', '.join(rows)}"],
            f"Try a lower --learning-rate (now {self.job.learning_rate:g}), or look at these rows; "
            f"checkpoints up to here are in {self.job.out / 'checkpoints'}.",
        )

    def _evaluate(self) -> None:
        job, at = self.job, self.progress
        start = time.perf_counter()
        loss = None
        with fits_memory(f"on the evaluation at step {at.step}", next_step=self._freed(FEWER_ROWS)):
            if job.validation:
                nats, tokens = evaluation_loss(
                    job.model, job.paths, job.routing, job.validation, batch=job.config.rows_at_once
                )
                loss = nats / tokens
            sample = job.answer() if job.answer is not None else None
        if sample is not None:
            if at.step == 0:
                at.sample = {"before": sample["answer"]}
            sample = {**sample, "before": at.sample.get("before")}
        # Not (loss < best) would let a NaN be the best for ever: only a finite loss can be better.
        better = loss is not None and math.isfinite(loss) and (at.best_loss is None or loss < at.best_loss)
        better = better and at.step > 0  # the untrained base is no checkpoint
        if loss is not None and math.isfinite(loss) and at.step > 0:
            at.losses[str(at.step)] = loss
        if better:
            at.best_loss, at.best_step, at.evaluations_without_better = loss, at.step, 0
        elif at.step > 0 and loss is not None:
            at.evaluations_without_better += 1
        if loss is None and sample is None:
            return
        record = {
            "kind": "evaluation",
            "step": at.step,
            "loss": loss,
            "best": better,
            "seconds": time.perf_counter() - start,
            "sample": sample,
        }
        self.records.write(record)
        self.screen.evaluation(record)

    def _save(self) -> None:
        at, folder = self.progress, self.job.out / "checkpoints"
        there = {str(step) for step in (*numbers(folder), at.step)}
        at.losses = {step: loss for step, loss in at.losses.items() if step in there}
        self.records.sync()  # a checkpoint on the disk never knows of steps that the records there do not
        state = {"origin": self.origin.to_dict(), "progress": vars(at)}
        with fits_memory(f"on the checkpoint of step {at.step}", next_step=self._freed(FEWER_VALUES)):
            save_checkpoint(folder, at.step, self.optimizer.state(), state)
        prune(folder, keep=self.job.config.keep, best=at.best_step)

    def _take_best(self) -> None:
        """The values with the lowest held-out loss; where their checkpoint is damaged, the next best that is whole."""
        at = self.progress
        if at.best_step is None or at.best_step == at.step:
            return
        folder = self.job.out / "checkpoints"
        # The values alone: the moments, twice as large, are of no use any more.
        try:
            values = load_values(checkpoint_path(folder, at.best_step))
        except CorruptFileError as fault:
            self._take_next_best(fault)
            return
        self._take(values)
        self.screen.message(f"the values of step {at.best_step} are kept: the lowest held-out loss, {at.best_loss:.4f}")

    def _take_next_best(self, fault: CorruptFileError) -> None:
        at = self.progress
        self.damaged_best = {"step": at.best_step, "loss": at.best_loss, "faults": fault.faults}
        self.screen.message(f"{fault.headline}, the best one: {'; '.join(fault.faults)}")
        at.losses.pop(str(at.best_step), None)
        at.best_step = at.best_loss = None
        for loss, step in sorted((loss, int(step)) for step, loss in at.losses.items()):
            if step != at.step:
                try:
                    self._take(load_values(checkpoint_path(self.job.out / "checkpoints", step)))
                except CorruptFileError:
                    continue
            at.best_step, at.best_loss = step, loss
            break
        kept = f"those of step {at.best_step}, held-out loss {at.best_loss:.4f}," if at.best_step else "the last"
        self.screen.message(f"instead of the values of that step {kept} are kept")

    def _take(self, values: Tensor) -> None:
        self.job.flat.values.data.copy_(values)
        self.job.flat.publish()


def load_state(path: Path) -> State:
    """What a checkpoint says beside its tensors. CorruptFileError: another version of Veneer wrote it."""
    stored = read_state(path)
    if "progress" not in stored and "date" in stored and "data" in stored:
        stored = _of_first_layout(stored)
    try:
        return State(Origin(**stored["origin"]), Progress(**stored["progress"]))
    except (KeyError, TypeError) as fault:
        raise CorruptFileError(
            f"the checkpoint {path} is not of this version of Veneer",
            [f"state.json: {fault}"],
            "Continue it with the version that wrote it, or start a new run.",
        ) from fault


def _of_first_layout(stored: dict[str, Any]) -> dict[str, Any]:
    """A state of the first layout, in which the progress stood alone, as one of today's."""
    progress = dict(stored)
    origin = dict.fromkeys(("base", "tokenizer", "template", "settings"))
    origin |= {name: progress.pop(name) for name in ("date", "data")}
    if progress.get("best_step") is not None:
        progress["losses"] = {str(progress["best_step"]): progress.get("best_loss")}
    return {"origin": origin, "progress": progress}
