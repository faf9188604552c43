"""Makes adapters in files, and changes such files."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.support.tiny import tiny_base
from veneer.adapters.attach import attach
from veneer.adapters.config import LoRA
from veneer.adapters.placement.attachment import Attachment
from veneer.formats import adapter as store
from veneer.formats.adapter import manifest_for, write_adapter
from veneer.formats.manifest import MANIFEST_NAME
from veneer.formats.peft.config import CONFIG_NAME
from veneer.models.frozen_base import FrozenBase

WEIGHTS = store.WEIGHTS_NAME


IDS = torch.tensor([[5, 200, 17, 99, 3]])
SETTINGS = {"rank": 4, "alpha": 7, "rank_pattern": {"v_proj": 2}, "train_modules": ["model.norm"]}


def adapted(
    family: str = "llama_untied", *, name: str = "x", **fields
) -> tuple[FrozenBase, Attachment]:
    base = tiny_base(family)
    base.fingerprint()
    settings = LoRA(**{**SETTINGS, **fields})
    head = base.model.get_output_embeddings()
    attachment = attach(base.model, settings, name=name, routing=base.routing, head=head)
    generator = torch.Generator().manual_seed(1)
    for parameter in attachment.parameters().values():
        parameter.data.add_(
            0.2 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        )
    return base, attachment


def write(folder: Path, base: FrozenBase, attachment: Attachment, **fields):
    manifest = manifest_for(base, method="lora", **fields)
    return write_adapter(folder, attachment, manifest, model=base.model)


def edit_config(folder: Path, **fields) -> None:
    config = json.loads((folder / CONFIG_NAME).read_text())
    (folder / CONFIG_NAME).write_text(json.dumps(config | fields))


def edit_tensors(folder: Path, edit) -> None:
    """Change the tensors as PEFT would have written them: no veneer.json vouches for them."""
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS)
    (folder / MANIFEST_NAME).unlink(missing_ok=True)
