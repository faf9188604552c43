"""A trainee: one adapter, or one whole base, with everything that its training needs.

Its rows and their order, trained values in a flat buffer, optimizer, schedule, progress, best
value, records and checkpoints are its own. loop.py trains one trainee, or several in the same
forwards; a trainee knows nothing of the others.

    before step 1   the optimizer's moments are allocated; the held-out rows are evaluated, for the
                    comparison afterwards
    a step          begin_step chooses rows; gradient.py computes their gradient; end_step checks
                    the norm, and the optimizer updates
    an evaluation   held_out/evaluations.py: loss on the held-out rows, a sample answer; then a
                    checkpoint
    the end         held_out/best.py: the values with the lowest held-out loss

A loss or gradient that is not finite raises before the weights change. All order and randomness
come from (seed, epoch, step), so a resumed run continues bit for bit. Knows nothing of methods: it
trains the tensors it receives.
"""

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch import Tensor

from veneer.adapters.placement.acting import Acting
from veneer.data.batching import EpochPlan, plan_epoch, used_length
from veneer.data.examples import Example
from veneer.errors import fits_memory
from veneer.execution.proofs.model import acting_prefix_length
from veneer.formats.manifest import HeldOut
from veneer.models.step import parts_of
from veneer.training.gradient import FEWER_VALUES, StepGradient, StepTotals, diverged
from veneer.training.held_out.best import read_best
from veneer.training.held_out.evaluations import compute_evaluation, evaluation_record
from veneer.training.held_out.first_evaluation import EvaluationResult, first_evaluation
from veneer.training.held_out.losses import LossCells
from veneer.training.held_out.reference import compute_reference, reference_from, reference_tensor
from veneer.training.inputs import TrainingInputs
from veneer.training.optimizer.buffer import learning_rate_at
from veneer.training.optimizer.optimizers import make_optimizer
from veneer.training.output.records import (
    NoRecords,
    Records,
    peak_memory_bytes,
    process_memory_bytes,
)
from veneer.training.output.screen import Screen
from veneer.training.processes.world import ALONE, World
from veneer.training.state.checkpoint import (
    SplitTensor,
    load_checkpoint,
    numbers,
    prune,
    save_checkpoint,
    send_pieces,
)
from veneer.training.state.origin import Origin
from veneer.training.state.progress import RunProgress, load_state

KEPT = 2
"""Checkpoints that a run keeps while it trains, so that it can continue if one is damaged."""


class Trainee:
    """Trains one adapter. resume_from: a checkpoint, of which only the leader reads the files."""

    def __init__(
        self,
        inputs: TrainingInputs,
        records: Records | NoRecords,
        screen: Screen,
        *,
        origin: Origin,
        resume_from: Path | None,
        world: World = ALONE,
    ) -> None:
        self.inputs, self.records, self.screen = inputs, records, screen
        self.origin, self.world = origin, world
        self.damaged_best: dict[str, Any] | None = None
        """The best checkpoint, if it was damaged and another had to be taken."""
        with fits_memory("on the optimizer's moments", next_step=FEWER_VALUES):
            self.optimizer = make_optimizer(
                inputs.config.optimizer, inputs.flat, weight_decay=inputs.config.weight_decay
            )
            self.gradient = StepGradient(inputs, world)
        self.progress = RunProgress()
        counts = inputs.objective.counts(inputs.validation).tolist()
        self._cells = LossCells.over(inputs.validation, inputs.validation_sets, counts)
        self._epoch_plan: tuple[int, EpochPlan] | None = None
        self._timed = False  # the first step is not timed: it allocates
        self.saved_step: int | None = None
        """Step of the newest checkpoint of this process."""
        self.rungs: Sequence[int] = ()
        """Steps after which it is evaluated and saved besides the usual ones (supervisor.py)."""
        self._stop_reason: str | None = None
        if resume_from is not None:
            self._resume(resume_from)

    @property
    def ended(self) -> bool:
        """True after the last step, after too many evaluations without an improvement, and if a
        supervisor stopped it."""
        at_end = self.progress.step >= self.inputs.steps
        return at_end or self._out_of_patience() or self._stop_reason is not None

    @property
    def reason(self) -> str:
        return self._stop_reason or ("early_stop" if self._out_of_patience() else "done")

    def stop(self, reason: str, message: str) -> None:
        """Ends the training after this step. message: says why on the screen."""
        self._stop_reason = reason
        self.screen.message(message)

    def acting(self) -> AbstractContextManager[None]:
        """Within the block only its own adapter acts, on all rows."""
        return self.inputs.routing.held(Acting.everywhere(self.inputs.adapters))

    def held_out(self) -> HeldOut | None:
        """Returns the held-out figures of the values that are kept, None if there are none."""
        num_cells = len(self._cells.counts)  # an earlier version may have made others
        nats = {step: sums for step, sums in self.progress.nats.items() if len(sums) == num_cells}
        after = nats.get(str(self.progress.best_step))
        return None if after is None else self._cells.figures(nats.get("0"), after)

    def release(self) -> None:
        """Frees the optimizer and the gradient, which are larger than the values; ends training."""
        del self.optimizer, self.gradient
        self.inputs.flat.release()

    # one step

    def begin_step(self) -> None:
        """Chooses the rows of the next step; the loop computes their gradient."""
        start = time.perf_counter()
        self.world.spent.clear()
        rows = self._next_rows()
        overrides = self._draw_own_answers(rows)
        parts = self._micro_batches(rows, overrides)
        self.gradient.begin(rows, parts, step=self.progress.step, replays=True, overrides=overrides)
        self.gradient.seconds = time.perf_counter() - start

    def end_step(self) -> None:
        """Updates the values by the gradient that was computed, and records the step."""
        inputs, progress = self.inputs, self.progress
        start = time.perf_counter()
        rate = learning_rate_at(
            progress.step,
            steps=inputs.steps,
            peak=inputs.learning_rate,
            warmup=inputs.config.warmup,
            schedule=inputs.config.schedule,
        )
        totals, rows = self.gradient.finish(), self.gradient.rows
        if not math.isfinite(totals.norm):
            examples = [inputs.train[i] for i in inputs.rows.examples(rows)]
            raise diverged(inputs, "gradient norm", totals.norm, examples, step=progress.step)
        with fits_memory(
            f"on the optimizer's step {progress.step + 1}",
            next_step=inputs.memory_advice(FEWER_VALUES),
        ):
            self.optimizer.step(learning_rate=rate, clip=inputs.config.clip, norm=totals.norm)
        seconds = self.gradient.seconds + time.perf_counter() - start
        parts = self._seconds_by_part(seconds)
        progress.count_step(loss=totals.loss, trained_tokens=totals.trained_tokens)
        if self._timed:
            progress.count_time(seconds, parts, examples=len(rows), tokens=totals.tokens)
        self._timed = True
        progress.total_seconds += seconds
        self._record_step(totals, rate, seconds, parts)

    def _record_step(
        self, totals: StepTotals, rate: float, seconds: float, parts: Mapping[str, float]
    ) -> None:
        record = {
            "kind": "step",
            "step": self.progress.step,
            "loss": totals.loss,
            "gradient_norm": totals.norm,
            "learning_rate": rate,
            "tokens": totals.tokens,
            "trained_tokens": totals.trained_tokens,
            "computed_tokens": totals.computed_tokens,
            "seconds": seconds,
            "memory_bytes": process_memory_bytes(),
            **({"parts": parts} if parts else {}),
            **({self.inputs.objective.figures_name: totals.figures} if totals.figures else {}),
            **({} if totals.replay is None else {"replay": totals.replay}),
        }
        self.records.write(record)
        self.screen.step(record)

    def _seconds_by_part(self, seconds: float) -> dict[str, float]:
        """Divides a step's seconds by part, the mean over all processes; empty for one process."""
        if self.world.size == 1:
            return {}
        names = ("wait", "reduce", *(["gather"] if self.inputs.sharded else []))
        spent = [self.world.spent.get(name, 0.0) for name in names]
        sums = self.world.summed([seconds - sum(spent), *spent])
        return {
            name: total / self.world.size
            for name, total in zip(("compute", *names), sums, strict=True)
        }

    # rows of a step

    def _plan(self, epoch: int) -> EpochPlan:
        if self._epoch_plan is None or self._epoch_plan[0] != epoch:
            config = self.inputs.config
            self._epoch_plan = None  # so that only one plan is in memory
            plan = plan_epoch(
                self.inputs.rows.lengths,
                batch=config.batch,
                seed=config.seed,
                epoch=epoch,
                order=config.order,
                mixture=self.inputs.mixture,
            )
            self._epoch_plan = epoch, plan
        return self._epoch_plan[1]

    def _next_rows(self) -> list[int]:
        progress = self.progress
        if progress.index >= len(self._plan(progress.epoch)):
            progress.epoch, progress.index = progress.epoch + 1, 0
        rows = self._plan(progress.epoch)[progress.index]
        progress.index += 1
        return rows

    def _draw_own_answers(self, rows: Sequence[int]) -> Mapping[int, Example]:
        """Lets the student answer some rows of a step; returns their examples by number."""
        own_answers, progress = self.inputs.own_answers, self.progress
        if own_answers is None:
            return {}
        with (
            self.acting(),
            fits_memory(
                f"on the student's own answers of step {progress.step + 1}",
                next_step=self.inputs.memory_advice("Take a smaller objective.answer_tokens."),
            ),
        ):
            return own_answers.draw(
                rows, epoch=progress.epoch, index=progress.index, world=self.world
            )

    def _micro_batches(self, rows: list[int], overrides: Mapping[int, Example]) -> list[list[int]]:
        """Divides rows into micro-batches of examples, the same for every process."""
        inputs, size = self.inputs, self.inputs.config.rows_at_once
        parts = (
            inputs.rows.examples(rows[start : start + size]) for start in range(0, len(rows), size)
        )
        with self.acting():
            examples = {i: inputs.train[i] for i in inputs.rows.examples(rows)}
            return list(parts_of(inputs, {**examples, **overrides}, parts))

    def next_lengths(self) -> list[int]:
        """Counts the tokens of each example of the next micro-batch, with those of a prefix."""
        with self.acting():
            prefix = acting_prefix_length(self.inputs.model)
        return [prefix + length for length in self.gradient.next_lengths()]

    def begin_trial(self) -> None:
        """Begins a step of the largest micro-batch of the run. Every process computes it, because
        any of them may have to in a later step."""
        largest = (self.inputs.largest or self.inputs.find_largest())[0]
        rows = self.inputs.rows.of_examples(largest)
        examples = self.inputs.longest_train
        self.gradient.begin(
            rows,
            [largest] * self.world.size,
            step=self.progress.step,
            overrides={number: examples[number] for number in largest},
        )

    def end_trial(self) -> None:
        """Drops the gradient of a trial and says that the largest batch fits.

        If the trial diverged, the step with these rows reports it later.
        """
        inputs, gradient = self.inputs, self.gradient
        inputs.flat.gradient.zero_()
        gigabytes = peak_memory_bytes(str(inputs.flat.values.device)) / 1e9
        longest = max(used_length(inputs.longest_train[i]) for i in gradient.micro_batches[0])
        self.screen.message(
            f"largest batch fits: {len(gradient.rows)} rows, up to {longest} tokens,"
            f" {gigabytes:.2f} GB"
        )

    # evaluations and checkpoints

    def after_step(self) -> None:
        """Evaluates and saves if an evaluation or a checkpoint is due at this step."""
        inputs, step = self.inputs, self.progress.step
        evaluates = step == inputs.steps or step % inputs.evaluate_every == 0 or step in self.rungs
        if evaluates:
            self.evaluate()
        if evaluates or step % (inputs.config.save_every or inputs.steps) == 0:
            self.save()

    def _out_of_patience(self) -> bool:
        patience = self.inputs.config.patience
        return patience is not None and self.progress.evaluations_without_better >= patience

    def start(self) -> None:
        """Computes what the run is compared with: the reference, and the first evaluation."""
        inputs = self.inputs
        if inputs.objective.compares:
            inputs.reference = compute_reference(inputs, self.world, self.screen.message)
        self.evaluate()

    def evaluate(self) -> None:
        inputs, progress = self.inputs, self.progress
        start = time.perf_counter()

        def compute() -> EvaluationResult:
            return compute_evaluation(inputs, self.world, step=progress.step)

        with self.acting():
            if progress.step == 0 and self.world.size == 1:
                result = first_evaluation(inputs, compute, self.screen.message)
            else:
                result = compute()
            record = evaluation_record(inputs, progress, self._cells, result, start=start)
        if record is not None:
            self.records.write(record)
            self.screen.evaluation(record)

    def save(self) -> None:
        step, flat = self.progress.step, self.inputs.flat
        if self.world.size > 1:
            self.world.require_same(
                {f"the values of step {step}": flat.digest()},
                "Start again from the last checkpoint with --resume.",
            )
        with self.world.fail_together(f"on the checkpoint of step {step}"):
            tensors = {name: flat.whole(tensor) for name, tensor in self.optimizer.state().items()}
            if self.world.leads:
                self._write_checkpoint(tensors)
            else:
                send_pieces(tensors)
        self.saved_step = step

    def _write_checkpoint(self, tensors: Mapping[str, Tensor | SplitTensor]) -> None:
        progress, folder = self.progress, self.inputs.out / "checkpoints"
        progress.forget_losses_except({*numbers(folder), progress.step})
        # Records are written first, so that no checkpoint is newer than they are.
        self.records.sync()
        state = {"origin": self.origin.to_dict(), "progress": vars(progress)}
        if (reference := self.inputs.reference) is not None:
            tensors = {**tensors, "reference": reference_tensor(reference)}
        with fits_memory(
            f"on the checkpoint of step {progress.step}",
            next_step=self.inputs.memory_advice(FEWER_VALUES),
        ):
            save_checkpoint(folder, progress.step, tensors, state)
        prune(folder, keep=self.inputs.config.keep or KEPT, best=progress.best_step)

    def _resume(self, path: Path) -> None:
        """Restores progress, values and moments from a checkpoint."""
        flat, doing = self.inputs.flat, f"on reading {path}"
        advice = "Free memory, then resume again."
        stored: dict[str, Tensor] = {}
        with self.world.fail_together(doing), fits_memory(doing, next_step=advice):
            if self.world.leads:
                stored, _ = load_checkpoint(path)
                self.progress = load_state(path).progress
        with fits_memory(doing, next_step=advice):
            state = self.optimizer.state()
            for name in sorted(state):
                flat.fill(state[name], stored[name] if self.world.leads else None, self.world)
            self.optimizer.load(state)
        if self.inputs.objective.compares:
            values = stored["reference"].tolist() if self.world.leads else []
            values = self.world.broadcast_value(values)
            self.inputs.reference = reference_from(values, len(self.inputs.train))
        self.progress = RunProgress(**self.world.broadcast_value(vars(self.progress)))
        self.saved_step = self.progress.step

    def take_best(self) -> None:
        """Puts the values with the lowest held-out loss into the model."""
        progress, flat = self.progress, self.inputs.flat
        if progress.best_step is None or progress.best_step == progress.step:
            return
        values = None
        with self.world.fail_together("on reading the best checkpoint"):
            if self.world.leads:
                values, self.damaged_best = read_best(
                    self.inputs.out / "checkpoints", progress, self.screen.message
                )
        if self.world.any(values is not None):
            flat.fill(flat.values.data, values, self.world)
            flat.publish()
        self.progress = RunProgress(**self.world.broadcast_value(vars(progress)))
