"""Full fine-tuning of a sharded base: each process holds masters, gradient and moments of its rows.

FSDP2 shards every weight by rows (training/processes/sharding.py). The float32 masters of this
process's rows are its shard, from which FSDP2 gathers weights of the base's type; it adds up
gradients in float32 after the backward of each layer, and a hook moves them into the flat buffer.

A checkpoint has the same content as with FlatParameters, so any number of processes can read it,
sharded or not. Stages 1 to 3 of Rajbhandari et al. 2020, arXiv:1910.02054.
"""

from collections.abc import Iterator
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from veneer.models.left_out import reached_weights
from veneer.private.torch import convert_tensors
from veneer.sharded import Sharding, gather_rows
from veneer.training.optimizer.buffer import FlatValues, aligned_sizes, gradient_hook
from veneer.training.processes.world import World
from veneer.training.state.checkpoint import SplitTensor


class ShardedValues(FlatValues):
    """Replaces FlatParameters. values, gradient: of this process's rows.

    size: of the values of all processes, as a checkpoint has it.
    """

    apart = True

    def __init__(self, sharding: Sharding, left_out: tuple[str, ...], world: World) -> None:
        self.sharding, self.world = sharding, world
        model = sharding.root
        sharding.reshard()
        self.parameters = reached_weights(model, left_out)
        sizes = aligned_sizes(self.parameters.values())
        self.size = sum(sizes)
        self._offsets = list(accumulate(sizes[:-1], initial=0))
        shards = [local(parameter) for parameter in self.parameters.values()]
        own_sizes = aligned_sizes(shards)
        device = shards[0].device
        self.values = nn.Parameter(torch.zeros(sum(own_sizes), dtype=torch.float32, device=device))
        self.gradient = torch.zeros_like(self.values.data)
        self.values.grad = self.gradient
        self.groups = [(1.0, slice(0, sum(own_sizes)))]
        starts = accumulate(own_sizes[:-1], initial=0)
        self._places = [
            (slice(start, start + shard.numel()), shard.shape)
            for start, shard in zip(starts, shards, strict=True)
        ]
        del shards
        self._take_masters(model)
        self._hooks = []
        for parameter, gradient in zip(
            self.parameters.values(), self._views(self.gradient), strict=True
        ):
            parameter.requires_grad_(True)
            self._hooks.append(
                parameter.register_post_accumulate_grad_hook(gradient_hook(gradient))
            )
        sharding.learn_types()

    def _take_masters(self, model: nn.Module) -> None:
        """Makes float32 views of the values this process's shards."""
        from torch.distributed.tensor import DTensor

        masters = dict(zip(self.parameters.values(), self._views(self.values.data), strict=True))
        names = list(self.parameters)

        def master_of(tensor: Any) -> Tensor:
            if (master := masters.get(tensor)) is None:
                return tensor
            master.copy_(local(tensor))
            return DTensor.from_local(
                master,
                tensor.device_mesh,
                tensor.placements,
                run_check=False,
                shape=tensor.shape,
                stride=tensor.stride(),
            )

        convert_tensors(model, master_of)
        parameters = dict(model.named_parameters())
        self.parameters = {name: parameters[name] for name in names}

    def _views(self, own: Tensor) -> list[Tensor]:
        """Returns this process's rows of each parameter, of a tensor like `values`."""
        return [own[place].view(shape) for place, shape in self._places]

    def _copy_to_model(self) -> None:
        """Lets the next gathering read the values; rows that FSDP2 had to pad are copied."""
        self.sharding.reshard()
        for parameter, master in zip(
            self.parameters.values(), self._views(self.values.data), strict=True
        ):
            shard = local(parameter)
            if shard.data_ptr() != master.data_ptr():
                shard.copy_(master)

    def whole(self, own: Tensor) -> Tensor | SplitTensor:
        if own.shape != self.values.shape:
            return own
        return SplitTensor(self.size, partial(self._pieces, own))

    def _pieces(self, own: Tensor) -> Iterator[tuple[int, Tensor]]:
        parameters: Any = self.parameters.values()
        for offset, parameter, rows in zip(
            self._offsets, parameters, self._views(own), strict=True
        ):
            yield offset, gather_rows(rows, parameter.shape, parameter.device_mesh).view(-1)

    def fill(self, own: Tensor, stored: Tensor | None, world: World) -> None:
        if own.shape != self.values.shape:
            super().fill(own, stored, world)
            return
        for offset, parameter, rows in zip(
            self._offsets, self.parameters.values(), self._views(own), strict=True
        ):
            values = own.new_zeros(parameter.shape)
            if stored is not None:
                values.view(-1).copy_(stored[offset : offset + values.numel()])
            world.broadcast(values)
            start = world.rank * -(-len(values) // world.size)
            rows.copy_(values[start : start + len(rows)])

    def digest(self) -> str:
        """Says what all processes have in common: how many values there are."""
        return f"{self.size:,} values"


@torch.no_grad()
def local(parameter: Any) -> Tensor:
    """Returns the rows of a sharded parameter that this process holds."""
    rows: Tensor = parameter.to_local()
    return rows
