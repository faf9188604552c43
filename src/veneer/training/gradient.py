"""The gradient of one optimizer step: forward and backward of its micro-batches, summed over all
processes.

Raises before any weight changes if a loss is not finite. Knows nothing of optimizers, evaluations
or checkpoints.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.adapters.placement.acting import TokenKeys
from veneer.data.batching import Batch, RowSpans, used_length
from veneer.data.examples import Example
from veneer.errors import DivergedError, fits_memory
from veneer.kernels.dense.block import added_where_they_lie
from veneer.models.step import batch_loss, batch_of
from veneer.training.inputs import TrainingInputs
from veneer.training.optimizer.offload import offload_for, offloaded
from veneer.training.processes.dealing import dealt, in_rounds
from veneer.training.processes.reduce import KINDS, GradientSum
from veneer.training.processes.world import World

FEWER_VALUES = (
    "Train fewer values (an adapter instead of full, a smaller --rank), or --set"
    " optimizer=adamw8bit."
)


@dataclass(frozen=True)
class StepTotals:
    """Totals of one step over all processes. loss: nats per trained token. norm: the gradient's."""

    loss: float
    norm: float
    tokens: int
    trained_tokens: int
    computed_tokens: int


class StepGradient:
    """Computes the gradient of a step into the flat buffer."""

    def __init__(self, inputs: TrainingInputs, world: World) -> None:
        self.inputs, self.world = inputs, world
        flat = inputs.flat
        self._sum: GradientSum = KINDS[inputs.config.reduce](flat.gradient, world, apart=flat.apart)
        flat.deliver_to(self._sum.receive)
        weights = [*inputs.model.parameters(), *inputs.model.buffers(), flat.values]
        self._offload = offload_for(flat.values.device, weights) if inputs.config.offload else None
        self._rows = RowSpans.of(inputs.train)

    def compute(
        self, rows: Sequence[int], micro_batches: Sequence[Sequence[int]], *, step: int
    ) -> StepTotals:
        """Computes the gradient of the mean loss over the trained tokens of these micro-batches.

        rows: the rows that the micro-batches consist of, for errors. step: steps taken before.
        Raises DivergedError if a loss is not finite, and DoesNotFitError.
        """
        inputs = self.inputs
        trained = sum(int(inputs.train[i].trained.sum()) for part in micro_batches for i in part)
        losses: dict[int, Tensor] = {}
        tokens = trained_tokens = computed_tokens = 0
        self._sum.begin()
        with self.world.together(f"at step {step + 1}"), self._fits(rows):
            for number, counts in assigned_here(
                micro_batches, inputs.train, self.world, sharded=inputs.sharded
            ):
                batch = batch_of(
                    inputs.model,
                    inputs.paths,
                    inputs.train,
                    micro_batches[number],
                    share_prompt=inputs.config.share_prompt,
                )
                # Divided by infinity, a micro-batch that another process counts has gradient 0.
                loss = self._backward(batch, step, total=float(trained) if counts else math.inf)
                if counts:
                    losses[number] = loss
                    tokens += batch.tokens
                    trained_tokens += batch.trained_tokens
                    computed_tokens += batch.computed_tokens
        own_losses, norm = self._finish(losses, step)
        # A loss is 0 at all processes but one, so these sums are exact.
        all_losses = [own_losses.get(number, 0.0) for number in range(len(micro_batches))]
        *all_losses, tokens_sum, trained_sum, computed_sum = self.world.summed(
            [*all_losses, tokens, trained_tokens, computed_tokens]
        )
        norm = self._sum.norm(norm)
        for part, loss_value in zip(micro_batches, all_losses, strict=True):
            if not math.isfinite(loss_value):
                raise diverged(inputs, "loss", loss_value, part, step=step)
        return StepTotals(
            sum(all_losses), norm, round(tokens_sum), round(trained_sum), round(computed_sum)
        )

    def _backward(self, batch: Batch, step: int, *, total: float) -> Tensor:
        """Runs forward and backward of one micro-batch; returns its share of the loss."""
        inputs = self.inputs
        with inputs.routing.drawing(TokenKeys(batch.dropout_rows, step, inputs.config.seed)):
            with offloaded(self._offload):
                loss = batch_loss(inputs.model, inputs.paths, inputs.routing, batch, total=total)
            with added_where_they_lie():
                loss.backward()
        inputs.flat.deliver()
        self._sum.add()
        return loss.detach()

    def _finish(self, losses: dict[int, Tensor], step: int) -> tuple[dict[int, float], float]:
        """Adds up the gradients of all processes; returns this process's losses and norm.

        Reads all numbers at once: nowhere else in a step does the host wait for a GPU.
        """
        with fits_memory(
            f"on the gradient of step {step + 1}", next_step=self.inputs.memory_advice(FEWER_VALUES)
        ):
            self._sum.finish()
            measured = self._sum.measured()
        *values, norm = torch.cat([n.view(1) for n in (*losses.values(), measured)]).tolist()
        return dict(zip(losses, values, strict=True)), norm

    def _fits(self, rows: Sequence[int]) -> AbstractContextManager[None]:
        tokens = int(self._rows.lengths[rows].sum())
        return fits_memory(
            f"on a batch of {len(rows)} rows, {tokens} tokens",
            [str(self.inputs.train[i].ref) for i in self._rows.examples(rows)][:8],
            "Try --checkpointing, a smaller --set micro_batch=N, or a smaller --length.",
        )


def assigned_here(
    micro_batches: Sequence[Sequence[int]],
    examples: Sequence[Example],
    world: World,
    *,
    sharded: bool,
) -> list[tuple[int, bool]]:
    """Lists the micro-batches that this process computes, and whether their result counts.

    Sharded layers are gathered by all processes, so in a round without a micro-batch left for it a
    process computes another's, which does not count.
    """
    costs = [sum(used_length(examples[i]) for i in part) for part in micro_batches]
    if not sharded:
        owners = dealt(costs, world.size)
        return [(number, True) for number, owner in enumerate(owners) if owner == world.rank]
    return [
        (numbers[min(world.rank, len(numbers) - 1)], world.rank < len(numbers))
        for numbers in in_rounds(costs, world.size)
    ]


def diverged(
    inputs: TrainingInputs, figure: str, value: float, numbers: Sequence[int], *, step: int
) -> DivergedError:
    """Drops the gradient and returns the error for a loss or norm that is not finite."""
    inputs.flat.gradient.zero_()
    rows = [str(inputs.train[i].ref) for i in numbers]
    return DivergedError(
        f"T601 the {figure} is {value} at step {step + 1}; the weights are those of step {step}",
        [f"rows of this batch: {', '.join(rows)}"],
        f"Try a lower --learning-rate (now {inputs.learning_rate:g}), or look at these rows; "
        f"checkpoints up to here are in {inputs.out / 'checkpoints'}.",
    )
