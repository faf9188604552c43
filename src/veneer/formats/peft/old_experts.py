"""Converts adapters of mixture-of-experts models made before experts were fused into one parameter.

<block>.experts.3.w1.lora_A.weight (R, I)   ->   one update of <block>.experts.gate_up_proj,
<block>.experts.down_proj

The gate and up projections share the fused matrix. Their A's are stacked, their B's form a block
diagonal, so the rank is the sum of theirs and the update is the same. Differences in scaling are
folded into B. Not known here: files, families without these two fused parameters.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.formats.peft.config import PeftLoRA
from veneer.formats.peft.matching import strengths
from veneer.formats.peft.tensors import Modules, Slot, flat_factors, slot_of, tensor_names

_OLD_NAME = re.compile(
    r"(?P<module>(?P<block>.+)\.experts\.(?P<expert>\d+)"
    r"\.(?P<part>w[123]|gate_proj|up_proj|down_proj))"
    r"\.lora_(?P<factor>[AB])\.weight"
)
_PARTS = {
    "w1": ("gate_up_proj", 0),
    "gate_proj": ("gate_up_proj", 0),
    "w3": ("gate_up_proj", 1),
    "up_proj": ("gate_up_proj", 1),
    "w2": ("down_proj", 0),
    "down_proj": ("down_proj", 0),
}
"""Old module -> the fused parameter, and which half of its rows."""


@dataclass(frozen=True)
class _ExpertUpdate:
    """The update of one old expert: half of the fused rows, A (R, I), B (half O or O, R), its
    scaling."""

    half: int
    A: Tensor
    B: Tensor
    scaling: float


def fuse_old_experts(
    config: PeftLoRA, tensors: Mapping[str, Tensor], modules: Modules
) -> tuple[PeftLoRA, Mapping[str, Tensor]]:
    """Converts the adapter to fused experts; unchanged if the file or the model has none.

    If an expert lacks tensors, the old names stay and are reported as unexpected.
    """
    names = {name: match for name in tensors if (match := _OLD_NAME.fullmatch(name)) is not None}
    updates: dict[str, dict[int, list[_ExpertUpdate]]] = {}
    for name, match in names.items():
        module, part = match["module"], match["part"]
        owner = f"{_new_block(match['block'], modules)}.experts"
        twin = f"{module}.lora_B.weight"
        if (
            match["factor"] == "B"
            or twin not in tensors
            or owner not in modules
            or module in modules
        ):
            continue
        fused, half = _PARTS[part]
        A, B = tensors[name].float(), tensors[twin].float()
        piece = _ExpertUpdate(half, A, B, _scaling(config, module, A.shape[0]))
        updates.setdefault(f"{owner}.{fused}", {}).setdefault(int(match["expert"]), []).append(
            piece
        )
    slots = {path: slot for path in updates if (slot := slot_of(path, modules)) is not None}
    if not slots or not all(_is_complete(updates[path], slot) for path, slot in slots.items()):
        return config, tensors
    converted = {
        _renamed(name, modules): tensor for name, tensor in tensors.items() if name not in names
    }
    ranks, alphas = dict(config.rank_pattern or {}), dict(config.alpha_pattern or {})
    for path, (name_A, name_B) in tensor_names(list(slots.values()), modules).items():
        A, B, scaling = _fuse(updates[path], slots[path])
        converted[name_A], converted[name_B] = flat_factors(A, B)
        rank = A.shape[1]
        pattern = f"^{re.escape(path)}"
        ranks = {pattern: rank} | ranks
        alphas = {pattern: scaling * (math.sqrt(rank) if config.use_rslora else rank)} | alphas
    target_list = config.target_modules if isinstance(config.target_modules, list) else None
    remaining = (
        None
        if target_list is None
        else [entry for entry in target_list if entry.rsplit(".", 1)[-1] not in _PARTS]
    )
    update = {
        "target_modules": remaining,  # None: the tensors name the targets
        "target_parameters": [*(config.target_parameters or []), *slots],
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
    }
    return config.model_copy(update=update), converted


def _is_complete(experts: Mapping[int, list[_ExpertUpdate]], slot: Slot) -> bool:
    """Whether every expert has the same halves of equal ranks, with the model's shapes."""
    shapes = {
        tuple(
            sorted(
                (update.half, tuple(update.A.shape), tuple(update.B.shape)) for update in updates
            )
        )
        for updates in experts.values()
    }
    if sorted(experts) != list(range(slot.experts)) or len(shapes) != 1:
        return False
    parts = shapes.pop()
    rows = slot.out_features // (2 if slot.path.endswith("gate_up_proj") else 1)
    halves = [half for half, _, _ in parts]
    return len(set(halves)) == len(halves) and all(
        len(A) == 2 and A[0] > 0 and A[1] == slot.in_features and (rows, A[0]) == B
        for _, A, B in parts
    )


def _fuse(experts: Mapping[int, list[_ExpertUpdate]], slot: Slot) -> tuple[Tensor, Tensor, float]:
    """Returns A (E, R, I), B (E, O, R) with R the sum of the ranks, and the common scaling."""
    scaling = experts[0][0].scaling
    stack_A, stack_B = [], []
    for expert in range(slot.experts):
        parts = sorted(experts[expert], key=lambda update: update.half)
        A = torch.cat([update.A for update in parts])
        B = torch.zeros(slot.out_features, A.shape[0])
        column = 0
        for update in parts:
            rows, rank = update.B.shape
            B[update.half * rows : (update.half + 1) * rows, column : column + rank] = update.B * (
                update.scaling / scaling
            )
            column += rank
        stack_A.append(A)
        stack_B.append(B)
    return torch.stack(stack_A), torch.stack(stack_B), scaling


def _scaling(config: PeftLoRA, module: str, rank: int) -> float:
    slot = Slot(module, "linear", module, None, 0, 0)
    alpha = strengths(config, [slot])[module].alpha
    return alpha / math.sqrt(rank) if config.use_rslora else alpha / rank


def _new_block(block: str, modules: Modules) -> str:
    """Returns the block's current name; Mixtral's was called block_sparse_moe."""
    renamed = (
        block.removesuffix("block_sparse_moe") + "mlp"
        if block.endswith("block_sparse_moe")
        else block
    )
    return block if f"{block}.experts" in modules else renamed


def _renamed(name: str, modules: Modules) -> str:
    head, old, tail = name.partition(".block_sparse_moe.")
    return f"{head}.mlp.{tail}" if old and f"{head}.block_sparse_moe" not in modules else name
