"""Shards a base over the processes of a run by FSDP2 (torch's fully_shard).

A decoder layer is gathered before its forward and again before its backward, also if it is computed
as one node of the graph. While it computes, the next layer is gathered. Packed weights are sharded
as bytes, with their scales and code books. Adapters are attached later, so FSDP2 never sees their
values. If the base itself trains, the weights outside of its layers are sharded too, and FSDP2 adds
up gradients in float32 (training/optimizer/sharded_values.py).

Source: Zhao et al. 2023, arXiv:2304.11277; torch/distributed/fsdp/_fully_shard/.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from transformers import PreTrainedModel

from veneer.errors import RefusedError
from veneer.execution.attention import decoder
from veneer.private.torch import begin_sharded
from veneer.quant.layers import Holder
from veneer.sharded import is_sharded, keep_gather, whole
from veneer.training.processes.world import World

FIRST_TORCH = (2, 12)
"""The first version of torch that shards packed weights."""
WHOLE_BASE = "Leave shard out: every process then holds the whole base."


class FullyShard:
    """Shards the decoder layers of a base; if the base trains, everything else of it too.

    units: the sharded layers. root: the model, after `complete`.
    """

    def __init__(self, world: World, *, trains: bool) -> None:
        if tuple(int(part) for part in torch.__version__.split(".")[:2]) < FIRST_TORCH:
            raise RefusedError(
                f"shard needs torch 2.12 or newer, and here is {torch.__version__}",
                next_step=f"Install a newer torch. {WHOLE_BASE}",
            )
        # Imported here alone: it takes a second.
        from torch.distributed.device_mesh import init_device_mesh

        self.world, self.trains = world, trains
        self.units: list[Any] = []
        self.root: Any = None
        self._mesh = init_device_mesh(world.wire.type, (world.size,))
        keep_gather(self._mesh, world.gather)
        self._gather, self._reduce = _Gather(world), _ReduceScatter(world)

    @property
    def bytes(self) -> tuple[int, int]:
        """Returns the bytes of the layers on this process, and on all of them together."""
        weights = [weight for unit in self.units for weight in unit.parameters()]
        own = sum(weight.to_local().nbytes for weight in weights if is_sharded(weight))
        return own, sum(weight.nbytes for weight in weights)

    def take(self, layer: nn.Module, dtype: torch.dtype) -> None:
        for module in layer.modules():
            if isinstance(module, Holder):
                module.parts_to_parameters()
        weights = set(layer.parameters())
        self.units.append(layer)
        self._shard(layer, dtype, weights)

    def complete(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        types = {weight.dtype for weight in model.parameters()}
        single = any(weight.dim() == 0 for weight in model.parameters())
        if self.trains and (types != {dtype} or single):
            raise RefusedError(
                "full fine-tuning shards weights of one type that have axes, and these have several"
                " types or no axis",
                [*sorted(str(kind)[6:] for kind in types), *(["a single value"] if single else [])],
                WHOLE_BASE,
            )
        outside = {weight for weight in model.parameters() if not is_sharded(weight)}
        self._shard(model, dtype, outside if self.trains else set())
        self.root = model
        begin_sharded(model)
        for layer, following in pairwise(self.units):
            layer.set_modules_to_forward_prefetch([following])
            following.set_modules_to_backward_prefetch([layer])
        if self.units:
            self.units[0].set_modules_to_backward_prefetch([model])
        if self.trains:
            # The loss calls the decoder and reads the head, so FSDP2 does not see a whole forward.
            for part in {model, decoder(model) or model}:
                part.register_forward_pre_hook(lambda *_: self.root.unshard(), prepend=True)

    def reshard(self) -> None:
        for module in (*self.units, self.root):
            module.reshard()

    def learn_types(self) -> None:
        for module in (*self.units, self.root):
            module.unshard()
            module.reshard()

    def whole_state(self, dtype: torch.dtype) -> dict[str, Tensor]:
        self.reshard()
        tied: dict[int, Tensor] = {}
        state: dict[str, Tensor] = {}
        for name, tensor in self.root.state_dict(keep_vars=True).items():
            if id(tensor) not in tied:
                weight = whole(tensor)
                tied[id(tensor)] = weight.to(dtype) if is_sharded(tensor) else weight
            if self.world.leads:
                state[name] = tied[id(tensor)]
            else:
                tied[id(tensor)] = tensor
        self.root.unshard()  # its type is read from its first weight
        return state

    def _shard(self, module: Any, dtype: torch.dtype, weights: set[nn.Parameter]) -> None:
        """Shards these weights of a module. dtype: in which weights that train are gathered."""
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        if any(hasattr(weight, "veneer_sharded") for weight in weights):
            raise RefusedError(
                "layers that share weights with other parts cannot be sharded", next_step=WHOLE_BASE
            )
        # A weight without axes cannot be divided.
        undivided = {weight for weight in weights if weight.dim() == 0}
        policy = MixedPrecisionPolicy()
        if self.trains:
            policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
        for weight in weights:
            weight.veneer_sharded = True  # type: ignore[attr-defined]
            weight.data = weight.data.contiguous()
        name = type(module).__name__
        fully_shard(
            module,
            mesh=self._mesh,
            reshard_after_forward=module in self.units,
            mp_policy=policy,
            ignored_params=set(module.parameters()) - (weights - undivided),
        )
        type(module).__name__ = name  # files and messages name the class
        module.set_custom_all_gather(self._gather)
        module.set_custom_reduce_scatter(self._reduce)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
        module.set_reduce_scatter_unused_params(True, recurse=False)


class _Communication:
    """Lets FSDP2 communicate through World, so that an error of one process ends all processes.

    Implements torch.distributed.fsdp._fully_shard._fsdp_api.Comm.
    """

    def __init__(self, world: World) -> None:
        self.world = world

    def allocate(
        self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device=device)


class _Gather(_Communication):
    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False
    ) -> dist.Work | None:
        if async_op:
            return self.world.begin_gather(output_tensor, input_tensor)
        self.world.gather(output_tensor, input_tensor)
        return None


class _ReduceScatter(_Communication):
    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: Any,
        op: Any,
        async_op: bool = False,
    ) -> None:
        self.world.sum_parts(output_tensor, input_tensor)
