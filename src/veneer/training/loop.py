"""The training loop: batches in, an adapter's values out, nothing lost on the way.

    before step 1   the optimizer's moments are made and the largest micro-batch of the run goes
                    forward and backward once, its gradient thrown away: what does not fit says so
                    now; the held-out rows are evaluated once, for the comparison afterwards
    a step          micro-batches summed with one normaliser, the norm checked, then clip, AdamW,
                    publish
    an evaluation   loss on the held-out rows, a sample answer, a checkpoint; the best one stays

A loss or gradient that is not finite stops the run before the weights are touched. All order and
randomness come from (seed, epoch, step), so a resumed run continues bit for bit. Knows nothing of
methods: it trains the tensors it is given.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer.adapters.placement.acting import TokenKeys
from veneer.data.batching import EpochPlan, Rows, by_length, plan_epoch, used_length
from veneer.data.examples import Example
from veneer.errors import CorruptFileError, DivergedError, Interrupted, fits_memory
from veneer.formats.manifest import HeldOut
from veneer.kernels.dense.block import added_where_they_lie
from veneer.models.step import batch_loss, batch_of, part_nats, parts_of
from veneer.training.first_evaluation import EvaluationResult, first_evaluation
from veneer.training.held_out import LossCells, losses_by_set, mean_loss
from veneer.training.job import TrainingInputs
from veneer.training.optimizer.buffer import learning_rate_at
from veneer.training.optimizer.offload import offload_for, offloaded
from veneer.training.optimizer.optimizers import make_optimizer
from veneer.training.output.records import (
    NoRecords,
    Records,
    peak_memory_bytes,
    process_memory_bytes,
)
from veneer.training.output.screen import Screen
from veneer.training.processes.dealing import dealt, in_rounds
from veneer.training.processes.reduce import KINDS, GradientSum
from veneer.training.processes.world import ALONE, World
from veneer.training.state.checkpoint import (
    SplitTensor,
    checkpoint_path,
    load_checkpoint,
    load_values,
    numbers,
    pass_by,
    prune,
    save_checkpoint,
)
from veneer.training.state.interrupt import Interrupt
from veneer.training.state.origin import Origin
from veneer.training.state.progress import RunProgress, load_state

FEWER_VALUES = (
    "Train fewer values (an adapter instead of full, a smaller --rank), or --set"
    " optimizer=adamw8bit."
)
FEWER_ROWS = "Take fewer rows at once, --set micro_batch=N, or a smaller --length."


@dataclass(frozen=True)
class StepTotals:
    """Of one step, over all processes. loss: nats per trained token. norm: the gradient's."""

    loss: float
    norm: float
    tokens: int
    trained_tokens: int
    computed_tokens: int


class Loop:
    """resume_from: the checkpoint, told by the leader; its files are read there alone."""

    def __init__(
        self,
        job: TrainingInputs,
        records: Records | NoRecords,
        screen: Screen,
        *,
        origin: Origin,
        resume_from: Path | None,
        world: World = ALONE,
    ) -> None:
        self.job, self.records, self.screen, self.origin, self.world = (
            job,
            records,
            screen,
            origin,
            world,
        )
        self.damaged_best: dict[str, Any] | None = None
        """The best checkpoint, where it was damaged and another had to be taken."""
        with fits_memory("on the optimizer's moments", next_step=FEWER_VALUES):
            self.optimizer = make_optimizer(
                job.config.optimizer, job.flat, weight_decay=job.config.weight_decay
            )
            self.reduce: GradientSum = KINDS[job.config.reduce](
                job.flat.gradient, world, apart=job.flat.apart
            )
            job.flat.deliver_to(self.reduce.receive)
        self.progress = RunProgress()
        self.device = job.flat.values.device
        weights = [*job.model.parameters(), *job.model.buffers(), job.flat.values]
        self.offload = offload_for(self.device, weights) if job.config.offload else None
        self._rows = Rows.of(job.train)
        self._cells = LossCells.over(job.validation, job.held)
        self._epoch_plan: tuple[int, EpochPlan] | None = None
        if resume_from is not None:
            self._resume(resume_from)

    def _resume(self, path: Path) -> None:
        doing = f"on reading {path}"
        with (
            self.world.together(doing),
            fits_memory(doing, next_step="Free memory, then resume again."),
        ):
            if self.world.leads:
                stored, _ = load_checkpoint(path)
                self.progress = load_state(path).progress
        with fits_memory(doing, next_step="Free memory, then resume again."):
            state = self.optimizer.state()
            for name in sorted(state):
                self.job.flat.fill(
                    state[name], stored[name] if self.world.leads else None, self.world
                )
            self.optimizer.load(state)
        self.progress = RunProgress(**self.world.shared(vars(self.progress)))

    def run(self) -> str:
        """Train to the end; 'done' or 'early_stop'. Raises Interrupted after saving, DivergedError,
        DoesNotFitError."""
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
                asked = self.world.any(interrupt.asked)
                if due or at.step % (job.config.save_every or job.steps) == 0 or asked:
                    self._save()
                if asked and at.step < job.steps:
                    raise Interrupted(
                        f"stopped at step {at.step} of {job.steps}; checkpoint saved",
                        next_step=f"Continue with: veneer train --resume {job.out}",
                    )
        self._take_best()
        return "early_stop" if self._out_of_patience() else "done"

    def _out_of_patience(self) -> bool:
        patience = self.job.config.patience
        return patience is not None and self.progress.evaluations_without_better >= patience

    def held_out(self) -> HeldOut | None:
        """Of the values that are kept; None: nothing was held out, or no loss was finite."""
        at = self.progress
        after = at.nats.get(str(at.best_step))
        return None if after is None else self._cells.figures(at.nats.get("0"), after)

    def release(self) -> None:
        """Drop the optimizer and the gradient, which take more than the values; no further step can
        be taken."""
        del self.optimizer, self.reduce
        self.job.flat.release()

    def _plan(self, epoch: int) -> EpochPlan:
        if self._epoch_plan is None or self._epoch_plan[0] != epoch:
            config = self.job.config
            lengths = self._rows.lengths
            self._epoch_plan = None  # two would be held
            plan = plan_epoch(
                lengths,
                batch=config.batch,
                seed=config.seed,
                epoch=epoch,
                order=config.order,
                mixture=self.job.mixture,
            )
            self._epoch_plan = epoch, plan
        return self._epoch_plan[1]

    def _next_rows(self) -> list[int]:
        at = self.progress
        if at.index >= len(self._plan(at.epoch)):
            at.epoch, at.index = at.epoch + 1, 0
        rows = self._plan(at.epoch)[at.index]
        at.index += 1
        return rows

    def _micro_batches(self, rows: list[int]) -> list[list[int]]:
        """Examples of each, the same for every process."""
        job, size = self.job, self.job.config.rows_at_once
        parts = (
            self._rows.examples(rows[start : start + size]) for start in range(0, len(rows), size)
        )
        return list(parts_of(job.model, job.paths, job.train, parts))

    def _own(
        self, parts: Sequence[Sequence[int]], examples: Sequence[Example]
    ) -> list[tuple[int, bool]]:
        """Which of the parts this process computes, and whether it counts: in a round where there
        is none left for it, it computes another's for the layers that all gather."""
        costs = [sum(used_length(examples[i]) for i in part) for part in parts]
        rank, size = self.world.rank, self.world.size
        if self.job.together:
            return [
                (each[min(rank, len(each) - 1)], rank < len(each))
                for each in in_rounds(costs, size)
            ]
        return [(number, True) for number, owner in enumerate(dealt(costs, size)) if owner == rank]

    def _backward(self, rows: Sequence[int], parts: Sequence[Sequence[int]]) -> StepTotals:
        """Gradient of the mean over the trained tokens of these micro-batches, into the flat buffer
        of every process.

        rows: those that the micro-batches consist of
        """
        job = self.job
        total = float(sum(int(job.train[i].trained.sum()) for part in parts for i in part))
        own, counts = dict[int, Tensor](), [0, 0, 0]
        self.reduce.begin()
        with self.world.together(f"at step {self.progress.step + 1}"), self._fits(rows):
            for number, counts_here in self._own(parts, job.train):
                batch = batch_of(
                    job.model,
                    job.paths,
                    job.train,
                    parts[number],
                    share_prompt=job.config.share_prompt,
                )
                keys = TokenKeys(batch.dropout_rows, self.progress.step, job.config.seed)
                with job.routing.drawing(keys):
                    with offloaded(self.offload):
                        of = total if counts_here else math.inf  # then its gradient is 0
                        part = batch_loss(job.model, job.paths, job.routing, batch, total=of)
                    with added_where_they_lie():
                        part.backward()
                job.flat.deliver()
                self.reduce.add()
                if not counts_here:
                    continue
                own[number] = part.detach()
                for place, count in enumerate(
                    (batch.tokens, batch.trained_tokens, batch.computed_tokens)
                ):
                    counts[place] += count
        with fits_memory(
            f"on the gradient of step {self.progress.step + 1}", next_step=self._freed(FEWER_VALUES)
        ):
            self.reduce.finish()
            measured = self.reduce.measured()
        # All at once: nowhere else in a step does the host wait for a GPU.
        *found, own_norm = torch.cat([each.view(1) for each in (*own.values(), measured)]).tolist()
        losses = [0.0] * len(parts)
        for number, value in zip(own, found, strict=True):
            losses[number] = value
        # Every loss is of one process and 0 at the others: these sums are exact.
        *losses, tokens, trained, computed = self.world.summed([*losses, *counts])
        norm = self.reduce.norm(own_norm)
        for part_rows, value in zip(parts, losses, strict=True):
            if not math.isfinite(value):
                raise self._diverged("loss", value, part_rows)
        return StepTotals(sum(losses), norm, round(tokens), round(trained), round(computed))

    def _step(self, *, timed: bool) -> float:
        job, at = self.job, self.progress
        start = time.perf_counter()
        self.world.spent.clear()
        rate = learning_rate_at(
            at.step,
            steps=job.steps,
            peak=job.learning_rate,
            warmup=job.config.warmup,
            schedule=job.config.schedule,
        )
        rows = self._next_rows()
        counted = self._backward(rows, self._micro_batches(rows))
        loss, norm = counted.loss, counted.norm
        if not math.isfinite(norm):
            raise self._diverged("gradient norm", norm, self._rows.examples(rows))
        with fits_memory(
            f"on the optimizer's step {at.step + 1}", next_step=self._freed(FEWER_VALUES)
        ):
            self.optimizer.step(learning_rate=rate, clip=job.config.clip, norm=norm)
        seconds = time.perf_counter() - start
        parts = self._parts(seconds)
        at.step += 1
        at.first_loss = loss if at.first_loss is None else at.first_loss
        at.last_loss = loss
        at.trained_tokens += counted.trained_tokens
        if timed:
            at.timed_seconds += seconds
            at.timed_examples += len(rows)
            at.timed_tokens += counted.tokens
            for part, spent in parts.items():
                at.timed_parts[part] = at.timed_parts.get(part, 0.0) + spent
        record = {
            "kind": "step",
            "step": at.step,
            "loss": loss,
            "gradient_norm": norm,
            "learning_rate": rate,
            "tokens": counted.tokens,
            "trained_tokens": counted.trained_tokens,
            "computed_tokens": counted.computed_tokens,
            "seconds": seconds,
            "memory_bytes": process_memory_bytes(),
            **({"parts": parts} if parts else {}),
        }
        self.records.write(record)
        self.screen.step(record)
        return seconds

    def _parts(self, seconds: float) -> dict[str, float]:
        """What a step's seconds went into, the mean over all processes; nothing for one alone."""
        if self.world.size == 1:
            return {}
        names = ("wait", "reduce", *(["gather"] if self.job.together else []))
        spent = [self.world.spent.get(name, 0.0) for name in names]
        found = self.world.summed([seconds - sum(spent), *spent])
        return {
            name: each / self.world.size
            for name, each in zip(("compute", *names), found, strict=True)
        }

    def _longest_batch(self) -> None:
        """Runs the largest micro-batch of the run once and forgets it: too large shows now, not in
        hour three.

        Every process runs it, as any of them may get it in a step.
        """
        largest = self.job.largest or self.job.find_largest()
        rows = self._rows.of_examples(largest[0])
        # What diverges is told again, with its step, when the batch's turn comes.
        with suppress(DivergedError):
            self._backward(rows, [part for part in largest for _ in range(self.world.size)])
        self.job.flat.gradient.zero_()
        gigabytes = peak_memory_bytes(str(self.device)) / 1e9
        longest = max(used_length(self.job.train[i]) for i in largest[0])
        self.screen.message(
            f"longest batch ok: {len(rows)} rows, up to {longest} tokens, {gigabytes:.2f} GB"
        )

    def _fits(self, rows: Sequence[int]) -> AbstractContextManager[None]:
        tokens = int(self._rows.lengths[rows].sum())
        return fits_memory(
            f"on a batch of {len(rows)} rows, {tokens} tokens",
            [str(self.job.train[i].ref) for i in self._rows.examples(rows)][:8],
            "Try --checkpointing, a smaller --set micro_batch=N, or a smaller --length.",
        )

    def _freed(self, otherwise: str) -> str:
        """What to do: a run that has a checkpoint goes on from there, with its own settings."""
        if not numbers(self.job.out / "checkpoints"):
            return otherwise
        return (
            "Free memory, then continue from the last checkpoint: veneer train --resume"
            f" {self.job.out}"
        )

    def _diverged(self, what: str, value: float, numbers: Sequence[int]) -> DivergedError:
        self.job.flat.gradient.zero_()
        at = self.progress
        rows = [str(self.job.train[i].ref) for i in numbers]
        return DivergedError(
            f"T601 the {what} is {value} at step {at.step + 1}; the weights are those of step"
            f" {at.step}",
            [f"rows of this batch: {', '.join(rows)}"],
            f"Try a lower --learning-rate (now {self.job.learning_rate:g}), or look at these rows; "
            f"checkpoints up to here are in {self.job.out / 'checkpoints'}.",
        )

    def _evaluated(self) -> EvaluationResult:
        """Nats of each held-out example, each process with its own; the leader's sample answer."""
        job, rows, nats = self.job, self.job.validation, [0.0] * len(self.job.validation)
        parts = list(parts_of(job.model, job.paths, rows, by_length(rows, job.config.rows_at_once)))
        with self._evaluating():
            own = self._own(parts, rows)
            found = part_nats(
                job.model, job.paths, job.routing, rows, [parts[number] for number, _ in own]
            )
            for (number, counts), values in zip(own, found, strict=True):
                for example, value in zip(parts[number] if counts else [], values, strict=counts):
                    nats[example] = value
        nats = self.world.summed(nats) if parts else []
        with self._evaluating():
            answers = job.sample is not None and (self.world.leads or job.together)
            return EvaluationResult(
                nats, job.sample.new() if job.sample is not None and answers else None
            )

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        doing = f"on the evaluation at step {self.progress.step}"
        with self.world.together(doing), fits_memory(doing, next_step=self._freed(FEWER_ROWS)):
            yield

    def _evaluate(self) -> None:
        job, at = self.job, self.progress
        start = time.perf_counter()
        if at.step == 0 and self.world.size == 1:
            found = first_evaluation(job, self._evaluated, self.screen.message)
        else:
            found = self._evaluated()
        loss = mean_loss(job.validation, found.nats)
        sets = losses_by_set(job.validation, job.held, found.nats)
        sample = None if job.sample is None or found.new is None else job.sample.told(found.new)
        if sample is not None:
            if at.step == 0:
                at.sample = {"before": sample["answer"]}
            sample = {**sample, "before": at.sample.get("before")}
        # Not (loss < best) would let a NaN be the best for ever: only a finite loss can be better.
        better = (
            loss is not None
            and math.isfinite(loss)
            and (at.best_loss is None or loss < at.best_loss)
        )
        better = better and at.step > 0  # the untrained base is no checkpoint
        if loss is not None and math.isfinite(loss):
            at.nats[str(at.step)] = self._cells.sums(found.nats)
            if at.step > 0:
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
            **({"sets": sets} if sets else {}),
        }
        self.records.write(record)
        self.screen.evaluation(record)

    def _save(self) -> None:
        if self.world.size > 1:
            held = {f"the values of step {self.progress.step}": self.job.flat.digest()}
            self.world.same(held, "Start again from the last checkpoint with --resume.")
        with self.world.together(f"on the checkpoint of step {self.progress.step}"):
            tensors = {
                name: self.job.flat.whole(each) for name, each in self.optimizer.state().items()
            }
            if self.world.leads:
                self._write_checkpoint(tensors)
            else:
                pass_by(tensors)

    def _write_checkpoint(self, tensors: Mapping[str, Tensor | SplitTensor]) -> None:
        at, folder = self.progress, self.job.out / "checkpoints"
        there = {str(step) for step in (*numbers(folder), at.step)}
        at.losses = {step: loss for step, loss in at.losses.items() if step in there}
        at.nats = {step: nats for step, nats in at.nats.items() if step in there | {"0"}}
        # a checkpoint on the disk never knows of steps that the records there do not
        self.records.sync()
        state = {"origin": self.origin.to_dict(), "progress": vars(at)}
        with fits_memory(
            f"on the checkpoint of step {at.step}", next_step=self._freed(FEWER_VALUES)
        ):
            save_checkpoint(folder, at.step, tensors, state)
        prune(folder, keep=self.job.config.keep, best=at.best_step)

    def _take_best(self) -> None:
        """The values with the lowest held-out loss; where their checkpoint is damaged, the next
        best that is whole."""
        at = self.progress
        if at.best_step is None or at.best_step == at.step:
            return
        with self.world.together("on reading the best checkpoint"):
            best = self._read_best() if self.world.leads else None
        if self.world.any(best is not None):
            self.job.flat.fill(self.job.flat.values.data, best, self.world)
            self.job.flat.publish()
        self.progress = RunProgress(**self.world.shared(vars(at)))

    def _read_best(self) -> Tensor | None:
        """None: where every better one is damaged, the last values stay."""
        at = self.progress
        assert at.best_step is not None
        # The values alone: the moments, twice as large, are of no use any more.
        try:
            values = load_values(checkpoint_path(self.job.out / "checkpoints", at.best_step))
        except CorruptFileError as fault:
            return self._next_best(fault)
        self.screen.message(
            f"the values of step {at.best_step} are kept: the lowest held-out loss,"
            f" {at.best_loss:.4f}"
        )
        return values

    def _next_best(self, fault: CorruptFileError) -> Tensor | None:
        at, values = self.progress, None
        self.damaged_best = {"step": at.best_step, "loss": at.best_loss, "faults": fault.faults}
        self.screen.message(f"{fault.headline}, the best one: {'; '.join(fault.faults)}")
        for by_step in (at.losses, at.nats):
            by_step.pop(str(at.best_step), None)
        at.best_step = at.best_loss = None
        for loss, step in sorted((loss, int(step)) for step, loss in at.losses.items()):
            if step != at.step:
                try:
                    values = load_values(checkpoint_path(self.job.out / "checkpoints", step))
                except CorruptFileError:
                    continue
            at.best_step, at.best_loss = step, loss
            break
        kept = (
            f"those of step {at.best_step}, held-out loss {at.best_loss:.4f},"
            if at.best_step
            else "the last"
        )
        self.screen.message(f"instead of the values of that step {kept} are kept")
        return values
