"""Writes a 4-bit base as a folder in bitsandbytes' layout, for transformers and Veneer.

The packed bytes are written unchanged, so reading returns the same bits. Fused experts are written
packed too. transformers keeps experts in 16 bits and cannot read them; Veneer can.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from veneer.bases.folder.score_head import FILE as SCORE_FILE
from veneer.bases.folder.score_head import settings_text, with_head
from veneer.bases.packed.bnb_files import file_tensors
from veneer.bases.quiet_transformers import quiet
from veneer.errors import ConfigError
from veneer.files.atomic import atomic_folder
from veneer.linear import PackedModule
from veneer.models.frozen_base import FrozenBase
from veneer.models.own_head import own_head
from veneer.quant.config import FOUR_BITS, weight_format
from veneer.quant.layers import HeldExperts, HeldLinear
from veneer.quant.nf4 import Packed
from veneer.quant.weight import PackedWeight


@dataclass(frozen=True)
class WrittenBase:
    """The written folder.

    bytes: of its weights; others_read: whether transformers with bitsandbytes can load it
    """

    path: Path
    bytes: int
    others_read: bool


def write_packed(base: FrozenBase, folder: str | Path) -> WrittenBase:
    """Writes the base's folder.

    Raises ConfigError if the base is not held as nf4 or fp4, or the folder exists; DoesNotFitError
    if the disk is full.
    """
    if not weight_format(base.quantize).writes_folder:
        raise ConfigError(
            f"{base.source} is not held in 4 bits, which this layout requires",
            next_step=f"Load it with quantize {FOUR_BITS}.",
        )
    tensors, head = _tensors(base.model), own_head(base)
    if head is not None:
        tensors = with_head(tensors, head)
    size = sum(t.nbytes for t in tensors.values())
    with atomic_folder(folder, needed_bytes=size) as partial:
        save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
        with quiet():
            base.config.save_pretrained(partial)
            if base.model.generation_config is not None:
                base.model.generation_config.save_pretrained(partial)
            base.tokenizer.save_pretrained(partial)
        path = partial / "config.json"
        config = json.loads(path.read_text(encoding="utf-8")) | {
            "quantization_config": _settings(base, [] if head is None else ["score"])
        }
        if head is None:  # the folder's own head may be detached
            config["architectures"] = [type(base.model).__name__]
        else:
            (partial / SCORE_FILE).write_text(settings_text(head.settings), encoding="utf-8")
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    experts = any(isinstance(module, HeldExperts) for module in base.model.modules())
    return WrittenBase(Path(folder), size, not experts)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Returns every weight by its name, packed ones with their parts; tied ones once."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    parts: set[str] = set()
    tensors: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if isinstance(module, HeldLinear | HeldExperts):
            for name in module.packed_shapes():
                tensors |= file_tensors(f"{path}.{name}", _as_code_book_weight(module.packed(name)))
            parts |= {
                f"{path}.{name}"
                for name, _ in module.named_buffers(recurse=False, remove_duplicate=False)
            }
        assert isinstance(module, HeldLinear | HeldExperts) or not isinstance(module, PackedModule)
    for name, tensor in model.state_dict().items():
        if name not in tied and name not in parts and name not in tensors:
            tensors[name] = tensor
    # Small tensors are copied: a table that all weights share is written with each weight.
    return {
        n: (t.detach().clone() if t.numel() <= 256 else t.detach()).cpu().contiguous()
        for n, t in tensors.items()
    }


def _as_code_book_weight(weight: PackedWeight) -> Packed:
    assert isinstance(weight, Packed)  # write_packed refused other formats
    return weight


def _settings(base: FrozenBase, heads: Sequence[str]) -> dict[str, object]:
    """Returns transformers' quantization_config; llm_int8_skip_modules lists the dense modules.

    heads: dense modules besides those of the model
    """
    dense = [path for path, module in base.model.named_modules() if isinstance(module, nn.Linear)]
    dense += heads
    double = [
        _as_code_book_weight(m.packed()).nested is not None
        for m in base.model.modules()
        if isinstance(m, HeldLinear)
    ]
    return {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": str(base.dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": base.quantize,
        "bnb_4bit_use_double_quant": all(double),
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": dense,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }
