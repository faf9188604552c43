"""Full fine-tuning in parts: what an optimizer keeps of a value, and its gradient, lie on one
process alone.

A unit is a decoder layer that lies in shards (shards.py), or what every process holds whole:
embeddings, the last norm, the head, tensors too small for a shard. Each process owns an equal run
of every unit: float32 masters, their gradient and moments, one run behind the other in buffers of
its own. A unit's gradient is whole from the beginning of its backward until the next one's begins;
then all processes add it up, each run at its owner. After a step what every process holds whole is
gathered; a layer is when it is computed next.

A checkpoint holds what FlatParameters' does: any number of processes reads it, with shards and
without. After ZeRO's third stage (Rajbhandari et al. 2020, arXiv:1910.02054).
"""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from veneer.errors import RefusedError
from veneer.shards import Sharded, Shards
from veneer.training.optimizer.buffer import Receive, aligned_sizes
from veneer.training.processes.world import World
from veneer.training.state.checkpoint import SplitTensor

ALIGNMENT = 32
"""What lies whole starts at a multiple of this many values: 64 bytes, or 128."""
CHUNK = 1 << 20
"""Values of each process that are gathered at once for a checkpoint."""


class _ParameterGroup:
    """parameters, of one type; starts: where each lies in the unit. place: of this process's run in
    its buffers.

    gradient: [processes * run], float32, while it is computed.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], starts: Sequence[int], run: int) -> None:
        self.parameters, self.starts, self.run = parameters, starts, run
        self.dtype = parameters[0].dtype
        self.place = slice(0, 0)
        self.gradient: Tensor | None = None

    def own(self) -> Tensor:
        """[run], of the parameters' type: this process's."""
        raise NotImplementedError

    def publish(self, values: Tensor) -> None:
        """[run], float32: this process's own have changed."""
        raise NotImplementedError

    def begin(self, processes: int) -> Tensor:
        if self.gradient is None:
            device = self.parameters[0].device
            self.gradient = torch.zeros(self.run * processes, dtype=torch.float32, device=device)
        return self.gradient


class _LayerGroup(_ParameterGroup):
    def __init__(self, held: Sharded) -> None:
        parameters = [each for each in held.tensors if isinstance(each, nn.Parameter)]
        if len(parameters) < len(held.tensors) or len({each.dtype for each in parameters}) > 1:
            raise RefusedError(
                "full fine-tuning holds layers in shards whose tensors are all trained and of one"
                " type, and these hold others too",
                sorted(
                    {f"{type(each).__name__} of {str(each.dtype)[6:]}" for each in held.tensors}
                ),
                "Leave shard out: every process then holds the whole base.",
            )
        size = parameters[0].element_size()
        super().__init__(
            parameters, [start // size for start in held.starts], held.own.numel() // size
        )
        self.held = held

    def own(self) -> Tensor:
        return self.held.own.view(self.dtype)

    def publish(self, values: Tensor) -> None:
        if self.dtype == torch.float32:
            self.held.own = values.view(torch.uint8)  # from the first time on the same memory
        else:
            self.own().copy_(values)


class _ReplicatedGroup(_ParameterGroup):
    """memory: of all processes' runs; the parameters are views of it."""

    def __init__(self, parameters: Sequence[nn.Parameter], world: World) -> None:
        sizes = [math.ceil(each.numel() / ALIGNMENT) * ALIGNMENT for each in parameters]
        starts = list(accumulate(sizes[:-1], initial=0))
        super().__init__(
            parameters, starts, math.ceil(sum(sizes) / (ALIGNMENT * world.size)) * ALIGNMENT
        )
        self.world = world
        self.memory = parameters[0].new_zeros(self.run * world.size, requires_grad=False)
        for each, start in zip(parameters, starts, strict=True):
            view = self.memory[start : start + each.numel()].view(each.shape)
            view.copy_(each.detach())
            each.data = view

    def own(self) -> Tensor:
        return self.memory[self.run * self.world.rank : self.run * (self.world.rank + 1)]

    def publish(self, values: Tensor) -> None:
        self.world.gather(self.memory, values.to(self.dtype))


class FlatShards:
    """In place of FlatParameters. values, gradient: this process's part. size: of all parts, as a
    checkpoint has it.

    Raises RefusedError where a layer holds what is not trained, or several types.
    """

    apart = True

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], shards: Shards, world: World
    ) -> None:
        self.parameters, self.shards, self.world = dict(parameters), shards, world
        sizes = aligned_sizes(self.parameters.values())
        self.size = sum(sizes)
        self._offsets = dict(
            zip(self.parameters.values(), accumulate(sizes, initial=0), strict=False)
        )
        self._layers = {held: _LayerGroup(held) for held in shards.held}
        self._rest = [_ReplicatedGroup(each, world) for each in self._outside()]
        self._units: list[_ParameterGroup] = [*self._layers.values(), *self._rest]
        end = 0
        for unit in self._units:
            unit.place = slice(end, end + unit.run)
            end += unit.run
        device = self._units[0].parameters[0].device
        self.values = nn.Parameter(torch.zeros(end, dtype=torch.float32, device=device))
        self.gradient = torch.zeros_like(self.values.data)
        self.values.grad = self.gradient
        self.groups = [(1.0, slice(0, end))]
        self._hooks: list[RemovableHandle] = []
        for unit in self._units:
            self.values.data[unit.place] = unit.own()
            for each, start in zip(unit.parameters, unit.starts, strict=True):
                each.requires_grad_(True)
                self._hooks.append(
                    each.register_post_accumulate_grad_hook(partial(self._arrived, unit, start))
                )
        self.publish()
        self._open: _ParameterGroup | None = None
        self._receive: Receive | None = None
        shards.begins = self._begins

    def _outside(self) -> list[list[nn.Parameter]]:
        """What lies in no layer's shards, by type."""
        found: dict[torch.dtype, list[nn.Parameter]] = {}
        within = {each for layer in self._layers.values() for each in layer.parameters}
        for each in self.parameters.values():
            if each not in within:
                found.setdefault(each.dtype, []).append(each)
        return list(found.values())

    def deliver_to(self, receive: Receive) -> None:
        self._receive = receive

    def _begins(self, held: Sharded) -> None:
        """All processes together: every one that comes here delivers the layer before."""
        unit = self._layers[held]
        if unit is not self._open:
            self._deliver_open()
            unit.begin(self.world.size)
            self._open = unit

    def _arrived(self, unit: _ParameterGroup, start: int, parameter: Tensor) -> None:
        assert parameter.grad is not None
        place = unit.begin(self.world.size)[start : start + parameter.numel()]
        place.view(parameter.shape).add_(parameter.grad)
        parameter.grad = None

    def deliver(self) -> None:
        self._deliver_open()
        for unit in self._rest:
            self._deliver(unit)

    def _deliver_open(self) -> None:
        unit, self._open = self._open, None
        if unit is not None:
            self._deliver(unit)

    @torch.no_grad()
    def _deliver(self, unit: _ParameterGroup) -> None:
        assert self._receive is not None
        gradient, unit.gradient = unit.begin(self.world.size), None
        self.world.meet()
        for owner, part in enumerate(gradient.split(unit.run)):
            self._receive(unit.place, part, owner)

    def publish(self) -> None:
        self.shards.let_go()
        for unit in self._units:
            unit.publish(self.values.data[unit.place])

    def release(self) -> None:
        """The leader's model is whole then, and stands for itself; the others' holds nothing of its
        layers."""
        for hook in self._hooks:
            hook.remove()
        for parameter in self.parameters.values():
            parameter.requires_grad_(False)
        self.shards.begins = None
        self.values.grad = None
        self.gradient = self.gradient.new_empty(0)
        for unit in self._rest:
            for parameter in unit.parameters:
                parameter.data = parameter.data.clone()
        self.shards.give_back(keep=self.world.leads)
        self.values.data = self.gradient

    def whole(self, own: Tensor) -> Tensor | SplitTensor:
        return (
            SplitTensor(self.size, partial(self._pieces, own))
            if own.shape == self.values.shape
            else own
        )

    def _pieces(self, own: Tensor) -> Iterator[tuple[int, Tensor]]:
        for unit, start, end in self._chunks():
            part = own[unit.place][start:end]
            found = part.new_empty(self.world.size * len(part))
            self.world.gather(found, part)
            for rank, run in enumerate(found.split(len(part))):
                for offset, piece in self._among_all(unit, rank * unit.run + start, len(part)):
                    yield offset, run[piece]

    def fill(self, own: Tensor, stored: Tensor | None, world: World) -> None:
        if own.shape != self.values.shape:
            if stored is not None:
                own.copy_(stored)
            world.follow(own)
            return
        for unit, start, end in self._chunks():
            part = own[unit.place][start:end]
            runs = part.new_zeros(world.size, len(part))
            for rank in range(world.size if stored is not None else 0):
                for offset, piece in self._among_all(unit, rank * unit.run + start, len(part)):
                    assert stored is not None
                    runs[rank, piece] = stored[offset : offset + piece.stop - piece.start].to(
                        runs.device
                    )
            world.follow(runs)
            part.copy_(runs[world.rank])

    def _chunks(self) -> Iterator[tuple[_ParameterGroup, int, int]]:
        for unit in self._units:
            for start in range(0, unit.run, CHUNK):
                yield unit, start, min(start + CHUNK, unit.run)

    def _among_all(
        self, unit: _ParameterGroup, begin: int, size: int
    ) -> Iterator[tuple[int, slice]]:
        """Of `size` values of a unit from `begin` on: where a piece lies among all, and where it
        lies in them."""
        for each, start in zip(unit.parameters, unit.starts, strict=True):
            low, high = max(start, begin), min(start + each.numel(), begin + size)
            if low < high:
                yield self._offsets[each] + low - start, slice(low - begin, high - begin)

    def digest(self) -> str:
        """Of what lies whole; a layer's runs are on one process each."""
        found = hashlib.sha256()
        for unit in self._rest:
            found.update(unit.memory.cpu().view(torch.uint8).numpy().data)
        return found.hexdigest()
