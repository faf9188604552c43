"""A base held in 4 bits as a folder in bitsandbytes' layout: transformers with bitsandbytes loads
it, and so does Veneer.

The packed bytes are written as they are held: what is read back is the same to the bit. Fused
experts are written packed as well; transformers keeps those in 16 bits and cannot read them so,
Veneer can.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from veneer.bases.packed.bnb_files import file_tensors
from veneer.bases.quiet_transformers import quiet
from veneer.errors import ConfigError
from veneer.files.atomic import atomic_folder
from veneer.linear import PackedModule
from veneer.models.frozen_base import FrozenBase
from veneer.quant.config import FOUR_BITS, weight_format
from veneer.quant.layers import HeldExperts, HeldLinear
from veneer.quant.nf4 import Packed
from veneer.quant.weight import PackedWeight


@dataclass(frozen=True)
class WrittenBase:
    """path: the folder; bytes: of its weights; others_read: whether transformers with bitsandbytes
    loads it."""

    path: Path
    bytes: int
    others_read: bool


def write_packed(base: FrozenBase, folder: str | Path) -> WrittenBase:
    """Raises ConfigError: the base is not held as nf4 or fp4, or the folder exists;
    DoesNotFitError: the disk is full."""
    if not weight_format(base.quantize).writes_folder:
        raise ConfigError(
            f"{base.source} is not held in 4 bits: there is nothing to write in this layout",
            next_step=f"Load it with quantize {FOUR_BITS}.",
        )
    tensors = _tensors(base.model)
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    with atomic_folder(folder, needed_bytes=size) as partial:
        save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
        with quiet():
            base.config.save_pretrained(partial)
            if base.model.generation_config is not None:
                base.model.generation_config.save_pretrained(partial)
            base.tokenizer.save_pretrained(partial)
        path = partial / "config.json"
        config = json.loads(path.read_text(encoding="utf-8")) | {
            "quantization_config": _settings(base)
        }
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    experts = any(isinstance(module, HeldExperts) for module in base.model.modules())
    return WrittenBase(Path(folder), size, not experts)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every weight under its own name, packed ones with their parts; tied ones once."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    parts: set[str] = set()
    tensors: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if isinstance(module, HeldLinear | HeldExperts):
            for name in module.packed_shapes():
                tensors |= file_tensors(f"{path}.{name}", _code_book(module.packed(name)))
            parts |= {
                f"{path}.{name}"
                for name, _ in module.named_buffers(recurse=False, remove_duplicate=False)
            }
        assert isinstance(module, HeldLinear | HeldExperts) or not isinstance(module, PackedModule)
    for name, tensor in model.state_dict().items():
        if name not in tied and name not in parts and name not in tensors:
            tensors[name] = tensor
    # Small ones are copied: a table that every weight shares is written with each.
    return {
        n: (t.detach().clone() if t.numel() <= 256 else t.detach()).cpu().contiguous()
        for n, t in tensors.items()
    }


def _code_book(weight: PackedWeight) -> Packed:
    assert isinstance(weight, Packed)  # of the formats, only these are written
    return weight


def _settings(base: FrozenBase) -> dict[str, object]:
    """What transformers wants to find; it leaves dense what llm_int8_skip_modules names."""
    dense = [path for path, module in base.model.named_modules() if isinstance(module, nn.Linear)]
    double = [
        _code_book(m.packed()).nested is not None
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
