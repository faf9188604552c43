"""Converts between LoRA layers and PEFT's named tensors, and computes the file's exact size.

base_model.model.<module>[.base_layer].lora_A.weight            (R, I)      linear
base_model.model.<module>[.base_layer].lora_B.weight            (O, R)
base_model.model.<module>[.base_layer].lora_B.bias              (O)         linear: lora_bias
base_model.model.<module>.lora_magnitude_vector
    (O), (D)    linear, embedding: DoRA
base_model.model.<module>.lora_embedding_A / _B                 (R, V) / (D, R)
base_model.model.<experts>[.base_layer].lora_A.weight
    (E*R, I)    expert e owns rows e*R ...
base_model.model.<experts>[.base_layer].lora_B.weight
    (O, R*E)    and columns e, e+E, e+2E ...
base_model.model.<module>[.base_layer].bias, <module>.<name>
    values trained in place of the base's own

Parameters (fused experts) are wrapped one after the other in the order in which the module
registers them. The first is innermost: its name has most `.base_layer`. The parameter's own name
appears nowhere. Not known here: files, settings, what an adapter computes. Shapes: I/O in/out
features, R rank, V vocabulary, D hidden, E experts. Facts: PEFT 0.21.2, peft/tuners/.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from veneer.adapters.methods.expert_stack import expert_parameters
from veneer.adapters.methods.lora import Kind, LowRankLayer
from veneer.adapters.placement.attachment import Attachment
from veneer.adapters.placement.wrapping import plain_modules
from veneer.files.strict_tensors import file_start
from veneer.linear import frozen_linear, is_plain_embedding, matrix_shape

PREFIX = "base_model.model."
_OLD_EXPERT_NAMES = {"gate", "w1", "w2", "w3", "gate_proj", "up_proj", "down_proj"}
"""On families with fused experts PEFT mistakes list targets with these names for experts of older
model versions and rewrites them. It does not rewrite the weight as a parameter, which is the same
update."""

Modules = Mapping[str, nn.Module]


@dataclass(frozen=True)
class Slot:
    """The place of one low-rank update in PEFT's naming, and the size of its base matrix.

    path       as in Attachment.layers: the module, for experts the 3-D parameter
    owner      the module that PEFT wraps
    parameter  the parameter that PEFT's settings name; None if they name the module
    """

    path: str
    kind: Kind
    owner: str
    parameter: str | None
    in_features: int
    out_features: int
    experts: int = 1

    @property
    def key(self) -> str:
        """Returns the string that PEFT matches names and patterns against."""
        return self.owner if self.parameter is None else f"{self.owner}.{self.parameter}"


def slot_of(path: str, modules: Modules, *, as_parameter: bool = False) -> Slot | None:
    """Returns the slot at a module's or 3-D parameter's path; None if Veneer adapts nothing there.

    as_parameter: PEFT's settings name the weight of a linear module or router as a parameter
    """
    if (module := modules.get(path)) is not None:
        if (linear := frozen_linear(module)) is not None:
            parameter = "weight" if as_parameter else None
            return Slot(path, "linear", path, parameter, linear.in_features, linear.out_features)
        if is_plain_embedding(module):
            assert isinstance(module, nn.Embedding)
            return Slot(path, "embedding", path, None, module.num_embeddings, module.embedding_dim)
        if (shape := matrix_shape(module)) is not None:
            return Slot(
                path, "linear", path, "weight" if as_parameter else None, shape[1], shape[0]
            )
        return None
    owner, _, name = path.rpartition(".")
    if owner in modules and name in (stacks := expert_parameters(modules[owner])):
        experts, out_features, in_features = stacks[name]
        return Slot(path, "experts", owner, name, in_features, out_features, experts)
    return None


def written_slots(attachment: Attachment, modules: Modules) -> list[Slot]:
    """Returns the slots of an attachment's layers, named such that PEFT does not rewrite them.

    PEFT has no DoRA and no lora_bias of parameters: then a module always keeps its name.
    """
    fused = attachment.config.two_factors and any(
        expert_parameters(module) for module in modules.values()
    )
    slots = []
    for path in attachment.layers:
        rewritten = fused and path.rsplit(".", 1)[-1] in _OLD_EXPERT_NAMES
        router = path in modules and matrix_shape(modules[path]) is not None
        slot = slot_of(path, modules, as_parameter=rewritten or router)
        assert slot is not None, f"{path} is adapted but not a slot of this model"
        slots.append(slot)
    return slots


# names


def wrappers(slots: Sequence[Slot], modules: Modules) -> dict[str, list[Slot]]:
    """Maps each owner to its slots in the order in which PEFT wraps them, innermost first."""
    slots_by_owner: dict[str, list[Slot]] = {}
    for slot in slots:
        slots_by_owner.setdefault(slot.owner, []).append(slot)
    for owner, group in slots_by_owner.items():
        order = [name for name, _ in modules[owner].named_parameters(recurse=False)]
        group.sort(key=lambda slot: -1 if slot.parameter is None else order.index(slot.parameter))
    return slots_by_owner


def tensor_names(slots: Sequence[Slot], modules: Modules) -> dict[str, tuple[str, str]]:
    """Maps the path of each slot to the file's names of A and B, without the prefix."""
    names = {}
    for owner, group in wrappers(slots, modules).items():
        for position, slot in enumerate(group):
            inner = owner + ".base_layer" * (len(group) - 1 - position)
            if slot.kind == "embedding":
                names[slot.path] = (f"{inner}.lora_embedding_A", f"{inner}.lora_embedding_B")
            else:
                names[slot.path] = (f"{inner}.lora_A.weight", f"{inner}.lora_B.weight")
    return names


def magnitude_name(slot: Slot) -> str:
    """Returns the file's name of DoRA's row lengths, without the prefix."""
    return f"{slot.owner}.lora_magnitude_vector"


def offset_name(factors: tuple[str, str]) -> str:
    """Returns the file's name of lora_bias. factors: names of A and B"""
    return factors[1].removesuffix("weight") + "bias"


def value_name(path: str, trained: Sequence[str], depth: Mapping[str, int]) -> str:
    """Returns the file's name of a fully trained parameter, without the prefix.

    trained: fully trained modules, whose parameters keep their names; depth: owner -> number of its
    wrappers
    """
    module, _, name = path.rpartition(".")
    if any(module == entry or module.startswith(entry + ".") for entry in trained):
        return path
    return module + ".base_layer" * depth.get(module, 0) + f".{name}"


def frozen_tables(slots: Sequence[Slot], head: str | None) -> dict[str, str]:
    """Maps names of frozen tables that PEFT adds by itself to the path of the base's weight.

    These belong to adapted embeddings and heads. Veneer does not write them; in a file they must
    equal the base's.
    """
    owners = [slot.owner for slot in slots if slot.kind == "embedding" or slot.owner == head]
    return {f"{owner}.base_layer.weight": f"{owner}.weight" for owner in owners}


def bare_name(name: str) -> tuple[str, bool]:
    """Removes the prefix and a leftover adapter name. Returns the name, and whether it was
    repaired."""
    parts = name.removeprefix(PREFIX).split(".")
    markers = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
    if (
        len(parts) > 2
        and parts[-3] in markers[:2]
        and parts[-1] in ("weight", "bias")
        and parts[-2] not in markers
    ):
        return ".".join([*parts[:-2], parts[-1]]), True
    if len(parts) > 2 and parts[-2] in markers[2:] and parts[-1] not in markers:
        return ".".join(parts[:-1]), True
    return ".".join(parts), False


def adapted_modules(names: Iterable[str]) -> list[str]:
    """Returns the modules that a file's bare names adapt, sorted."""
    ends = (".lora_A.weight", ".lora_embedding_A")
    return sorted({name.removesuffix(end) for name in names for end in ends if name.endswith(end)})


# tensors


def factor_shapes(slot: Slot, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Returns the shapes of A and B in the file."""
    rows = rank * slot.experts
    return (rows, slot.in_features), (slot.out_features, rows)


def to_file(layer: LowRankLayer) -> tuple[Tensor, Tensor]:
    """Returns A and B as in the file: detached, contiguous, on the CPU."""
    stored = layer.stored()
    A, B = stored["A"], stored["B"]
    if layer.kind == "experts":
        A, B = flat_factors(A, B)
    return A.contiguous().cpu(), B.contiguous().cpu()


def flat_factors(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Flattens A (E, R, I), B (E, O, R) to (E*R, I) expert by expert, (O, R*E) rank by rank."""
    experts, rank, _ = A.shape
    return A.reshape(experts * rank, -1), B.permute(1, 2, 0).reshape(-1, rank * experts)


def from_file(A: Tensor, B: Tensor, slot: Slot) -> tuple[Tensor, Tensor]:
    """Returns A and B as a layer holds them, float32."""
    if slot.kind == "experts":
        E = slot.experts
        A = A.reshape(E, -1, slot.in_features)
        B = B.reshape(slot.out_features, -1, E).permute(2, 0, 1)
    return A.float().contiguous(), B.float().contiguous()


def file_tensors(attachment: Attachment, model: nn.Module) -> dict[str, Tensor]:
    """Returns every tensor of the file by its full name. model: the adapter's"""
    modules = plain_modules(model)
    slots = written_slots(attachment, modules)
    tensors = {}
    names = tensor_names(slots, modules)
    for slot in slots:
        layer = cast(LowRankLayer, attachment.layers[slot.path])
        for name, factor in zip(names[slot.path], to_file(layer), strict=True):
            tensors[PREFIX + name] = factor
        if (offset := layer.stored().get("offset")) is not None:
            tensors[PREFIX + offset_name(names[slot.path])] = offset.contiguous().cpu()
        if (magnitude := layer.stored().get("magnitude")) is not None:
            tensors[PREFIX + magnitude_name(slot)] = magnitude.contiguous().cpu()
    depth = {owner: len(group) for owner, group in wrappers(slots, modules).items()}
    for path, value in attachment.values.items():
        name = value_name(path, attachment.trained, depth)
        tensors[PREFIX + name] = value.detach().contiguous().cpu()
    return tensors


def tensor_file_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Computes the exact size of the safetensors file."""
    start, _, values_bytes = file_start(tensors)
    return len(start) + values_bytes
