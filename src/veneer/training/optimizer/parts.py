"""Full fine-tuning with masters, gradient and moments split over processes: each value is on one
process alone.

A parameter group is a sharded decoder layer (shards.py), or what every process holds whole:
embeddings, the last norm, the head, tensors too small for a shard. Each process owns a run, an
equal part, of every group, and keeps float32 masters, gradient and moments of its runs, one after
another, in buffers of its own. A group's gradient is whole from the start of its backward until the
next group's begins; then all processes add it up, each run at its owner. After a step what every
process holds whole is gathered; a layer is gathered when it is computed next.

A checkpoint has the same content as with FlatParameters, so any number of processes can read it,
sharded or not. After ZeRO's third stage (Rajbhandari et al. 2020, arXiv:1910.02054).
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
"""Values to which parameters that are held whole are aligned: 64 bytes, or 128."""
CHUNK = 1 << 20
"""Values per process that are gathered at once for a checkpoint."""


class _ParameterGroup:
    """Holds parameters of one type. starts: offset of each in the group.

    place: slice of this process's run in its buffers. gradient: [processes * run], float32, while
    it is computed.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], starts: Sequence[int], run: int) -> None:
        self.parameters, self.starts, self.run = parameters, starts, run
        self.dtype = parameters[0].dtype
        self.place = slice(0, 0)
        self.gradient: Tensor | None = None

    def own_run(self) -> Tensor:
        """Returns this process's run, [run], of the parameters' type."""
        raise NotImplementedError

    def publish(self, values: Tensor) -> None:
        """Takes over this process's changed values, [run], float32."""
        raise NotImplementedError

    def begin_gradient(self, processes: int) -> Tensor:
        if self.gradient is None:
            device = self.parameters[0].device
            self.gradient = torch.zeros(self.run * processes, dtype=torch.float32, device=device)
        return self.gradient


class _LayerGroup(_ParameterGroup):
    def __init__(self, layer: Sharded) -> None:
        parameters = [tensor for tensor in layer.tensors if isinstance(tensor, nn.Parameter)]
        if len(parameters) < len(layer.tensors) or len({tensor.dtype for tensor in parameters}) > 1:
            raise RefusedError(
                "full fine-tuning holds layers in shards whose tensors are all trained and of one"
                " type, and these hold others too",
                sorted(
                    {
                        f"{type(tensor).__name__} of {str(tensor.dtype)[6:]}"
                        for tensor in layer.tensors
                    }
                ),
                "Leave shard out: every process then holds the whole base.",
            )
        size = parameters[0].element_size()
        super().__init__(
            parameters, [start // size for start in layer.starts], layer.own.numel() // size
        )
        self.layer = layer

    def own_run(self) -> Tensor:
        return self.layer.own.view(self.dtype)

    def publish(self, values: Tensor) -> None:
        if self.dtype == torch.float32:
            self.layer.own = values.view(torch.uint8)  # the same memory from the first time on
        else:
            self.own_run().copy_(values)


class _ReplicatedGroup(_ParameterGroup):
    """Holds what every process has whole. memory: of all runs; the parameters are views of it."""

    def __init__(self, parameters: Sequence[nn.Parameter], world: World) -> None:
        sizes = [math.ceil(parameter.numel() / ALIGNMENT) * ALIGNMENT for parameter in parameters]
        starts = list(accumulate(sizes[:-1], initial=0))
        super().__init__(
            parameters, starts, math.ceil(sum(sizes) / (ALIGNMENT * world.size)) * ALIGNMENT
        )
        self.world = world
        self.memory = parameters[0].new_zeros(self.run * world.size, requires_grad=False)
        for parameter, start in zip(parameters, starts, strict=True):
            view = self.memory[start : start + parameter.numel()].view(parameter.shape)
            view.copy_(parameter.detach())
            parameter.data = view

    def own_run(self) -> Tensor:
        return self.memory[self.run * self.world.rank : self.run * (self.world.rank + 1)]

    def publish(self, values: Tensor) -> None:
        self.world.gather(self.memory, values.to(self.dtype))


class FlatShards:
    """Replaces FlatParameters where values are split. values, gradient: this process's part.

    size: of all parts together, as a checkpoint has it. Raises RefusedError if a layer holds
    tensors that are not trained, or of several types.
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
        self._layers = {layer: _LayerGroup(layer) for layer in shards.held}
        self._replicated = [_ReplicatedGroup(parameter, world) for parameter in self._outside()]
        self._groups: list[_ParameterGroup] = [*self._layers.values(), *self._replicated]
        end = 0
        for group in self._groups:
            group.place = slice(end, end + group.run)
            end += group.run
        device = self._groups[0].parameters[0].device
        self.values = nn.Parameter(torch.zeros(end, dtype=torch.float32, device=device))
        self.gradient = torch.zeros_like(self.values.data)
        self.values.grad = self.gradient
        self.groups = [(1.0, slice(0, end))]
        self._hooks: list[RemovableHandle] = []
        for group in self._groups:
            self.values.data[group.place] = group.own_run()
            for parameter, start in zip(group.parameters, group.starts, strict=True):
                parameter.requires_grad_(True)
                self._hooks.append(
                    parameter.register_post_accumulate_grad_hook(
                        partial(self._arrived, group, start)
                    )
                )
        self.publish()
        self._open: _ParameterGroup | None = None
        self._receive: Receive | None = None
        shards.begins = self._begins

    def _outside(self) -> list[list[nn.Parameter]]:
        """Returns parameters outside sharded layers, by type."""
        by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
        in_layers = {parameter for layer in self._layers.values() for parameter in layer.parameters}
        for parameter in self.parameters.values():
            if parameter not in in_layers:
                by_dtype.setdefault(parameter.dtype, []).append(parameter)
        return list(by_dtype.values())

    def deliver_to(self, receive: Receive) -> None:
        self._receive = receive

    def _begins(self, layer: Sharded) -> None:
        """Delivers the previous layer's gradient; all processes come here together."""
        group = self._layers[layer]
        if group is not self._open:
            self._deliver_open()
            group.begin_gradient(self.world.size)
            self._open = group

    def _arrived(self, group: _ParameterGroup, start: int, parameter: Tensor) -> None:
        assert parameter.grad is not None
        target = group.begin_gradient(self.world.size)[start : start + parameter.numel()]
        target.view(parameter.shape).add_(parameter.grad)
        parameter.grad = None

    def deliver(self) -> None:
        self._deliver_open()
        for group in self._replicated:
            self._deliver(group)

    def _deliver_open(self) -> None:
        group, self._open = self._open, None
        if group is not None:
            self._deliver(group)

    @torch.no_grad()
    def _deliver(self, group: _ParameterGroup) -> None:
        assert self._receive is not None
        gradient, group.gradient = group.begin_gradient(self.world.size), None
        self.world.meet()
        for owner, part in enumerate(gradient.split(group.run)):
            self._receive(group.place, part, owner)

    def publish(self) -> None:
        self.shards.release()
        for group in self._groups:
            group.publish(self.values.data[group.place])

    def release(self) -> None:
        """Gives the leader a whole model of its own; the other processes hold no layers
        afterwards.
        """
        for hook in self._hooks:
            hook.remove()
        for parameter in self.parameters.values():
            parameter.requires_grad_(False)
        self.shards.begins = None
        self.values.grad = None
        self.gradient = self.gradient.new_empty(0)
        for group in self._replicated:
            for parameter in group.parameters:
                parameter.data = parameter.data.clone()
        self.shards.unshard(keep=self.world.leads)
        self.values.data = self.gradient

    def whole(self, own: Tensor) -> Tensor | SplitTensor:
        return (
            SplitTensor(self.size, partial(self._pieces, own))
            if own.shape == self.values.shape
            else own
        )

    def _pieces(self, own: Tensor) -> Iterator[tuple[int, Tensor]]:
        for group, start, end in self._chunks():
            part = own[group.place][start:end]
            gathered = part.new_empty(self.world.size * len(part))
            self.world.gather(gathered, part)
            for rank, run in enumerate(gathered.split(len(part))):
                for offset, piece in self._among_all(group, rank * group.run + start, len(part)):
                    yield offset, run[piece]

    def fill(self, own: Tensor, stored: Tensor | None, world: World) -> None:
        if own.shape != self.values.shape:
            if stored is not None:
                own.copy_(stored)
            world.follow(own)
            return
        for group, start, end in self._chunks():
            part = own[group.place][start:end]
            runs = part.new_zeros(world.size, len(part))
            for rank in range(world.size if stored is not None else 0):
                for offset, piece in self._among_all(group, rank * group.run + start, len(part)):
                    assert stored is not None
                    runs[rank, piece] = stored[offset : offset + piece.stop - piece.start].to(
                        runs.device
                    )
            world.follow(runs)
            part.copy_(runs[world.rank])

    def _chunks(self) -> Iterator[tuple[_ParameterGroup, int, int]]:
        for group in self._groups:
            for start in range(0, group.run, CHUNK):
                yield group, start, min(start + CHUNK, group.run)

    def _among_all(
        self, group: _ParameterGroup, begin: int, size: int
    ) -> Iterator[tuple[int, slice]]:
        """Locates `size` values of a group, starting at `begin`, among all values.

        Yields (offset among all values, slice of the `size` values) of each piece.
        """
        for parameter, start in zip(group.parameters, group.starts, strict=True):
            low, high = max(start, begin), min(start + parameter.numel(), begin + size)
            if low < high:
                yield self._offsets[parameter] + low - start, slice(low - begin, high - begin)

    def digest(self) -> str:
        """Hashes what every process holds whole; a layer's runs are on one process each."""
        digest = hashlib.sha256()
        for group in self._replicated:
            digest.update(group.memory.cpu().view(torch.uint8).numpy().data)
        return digest.hexdigest()
