"""Adapters of mixture-of-experts models from before their experts were fused into one parameter.

    <block>.experts.3.w1.lora_A.weight (R, I)   ->   one update of <block>.experts.gate_up_proj,
    <block>.experts.down_proj

The gate and up projections share the fused matrix: their A's stand one above the other, their B's
on a block diagonal, so the rank is the sum of theirs and the update is the same. What differs in
scaling is folded into B. Not known here: files, other families than those with the two fused
parameters.
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
    r"(?P<module>(?P<block>.+)\.experts\.(?P<expert>\d+)\.(?P<part>w[123]|gate_proj|up_proj|down_proj))"
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
class _Piece:
    """One old expert's update: half of the fused rows, A (R, I), B (half O or O, R), its
    scaling."""

    half: int
    A: Tensor
    B: Tensor
    scaling: float


def fuse_old_experts(
    config: PeftLoRA, tensors: Mapping[str, Tensor], modules: Modules
) -> tuple[PeftLoRA, Mapping[str, Tensor]]:
    """The same adapter in terms of fused experts; unchanged where the file or the model has none.

    An expert without its tensors leaves the old names as they are: they are then told as
    unexpected.
    """
    names = {name: match for name in tensors if (match := _OLD_NAME.fullmatch(name)) is not None}
    pieces: dict[str, dict[int, list[_Piece]]] = {}
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
        piece = _Piece(half, A, B, _scaling(config, module, A.shape[0]))
        pieces.setdefault(f"{owner}.{fused}", {}).setdefault(int(match["expert"]), []).append(piece)
    slots = {path: slot for path in pieces if (slot := slot_of(path, modules)) is not None}
    if not slots or not all(_fits(pieces[path], slot) for path, slot in slots.items()):
        return config, tensors
    kept = {
        _renamed(name, modules): tensor for name, tensor in tensors.items() if name not in names
    }
    ranks, alphas = dict(config.rank_pattern or {}), dict(config.alpha_pattern or {})
    for path, (name_A, name_B) in tensor_names(list(slots.values()), modules).items():
        A, B, scaling = _fused(pieces[path], slots[path])
        kept[name_A], kept[name_B] = flat_factors(A, B)
        rank = A.shape[1]
        pattern = f"^{re.escape(path)}"
        ranks = {pattern: rank} | ranks
        alphas = {pattern: scaling * (math.sqrt(rank) if config.use_rslora else rank)} | alphas
    listed = config.target_modules if isinstance(config.target_modules, list) else None
    remaining = (
        None
        if listed is None
        else [entry for entry in listed if entry.rsplit(".", 1)[-1] not in _PARTS]
    )
    update = {
        "target_modules": remaining,  # None: the tensors tell
        "target_parameters": [*(config.target_parameters or []), *slots],
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
    }
    return config.model_copy(update=update), kept


def _fits(experts: Mapping[int, list[_Piece]], slot: Slot) -> bool:
    """Every expert is there, with the same halves of the same ranks, and the shapes are those of
    the model."""
    shapes = {
        tuple(sorted((piece.half, tuple(piece.A.shape), tuple(piece.B.shape)) for piece in pieces))
        for pieces in experts.values()
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


def _fused(experts: Mapping[int, list[_Piece]], slot: Slot) -> tuple[Tensor, Tensor, float]:
    """A (E, R, I), B (E, O, R) with R the sum of the pieces' ranks, and the scaling that all
    share."""
    scaling = experts[0][0].scaling
    stack_A, stack_B = [], []
    for expert in range(slot.experts):
        parts = sorted(experts[expert], key=lambda piece: piece.half)
        A = torch.cat([piece.A for piece in parts])
        B = torch.zeros(slot.out_features, A.shape[0])
        column = 0
        for piece in parts:
            rows, rank = piece.B.shape
            B[piece.half * rows : (piece.half + 1) * rows, column : column + rank] = piece.B * (
                piece.scaling / scaling
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
    """Mixtral's block was called block_sparse_moe."""
    renamed = (
        block.removesuffix("block_sparse_moe") + "mlp"
        if block.endswith("block_sparse_moe")
        else block
    )
    return block if f"{block}.experts" in modules else renamed


def _renamed(name: str, modules: Modules) -> str:
    head, old, tail = name.partition(".block_sparse_moe.")
    return f"{head}.mlp.{tail}" if old and f"{head}.block_sparse_moe" not in modules else name
