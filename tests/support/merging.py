"""Makes adapters with values, and loads merged folders."""

import torch
from transformers import AutoModelForCausalLM

from tests.support.helpers import fill
from tests.support.tiny import tiny_base
from veneer.adapters.attach import attach
from veneer.adapters.config import LoRA
from veneer.formats.adapter import manifest_for, write_adapter
from veneer.models.load import load_base

NAME = "lora.weight"


def plain_load(folder, dtype="auto"):
    """As anyone would, without Veneer."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()


def adapted(family="llama", dtype=torch.float32, *, scale=0.2, settings=None, **overrides):
    base = tiny_base(family, dtype, **overrides)
    made = LoRA(**{"rank": 4, "alpha": 7, **(settings or {})})
    attachment = attach(
        base.model, made, name=NAME, routing=base.routing, head=base.model.get_output_embeddings()
    )
    fill(attachment.parameters().values(), scale=scale)
    return base


def written_adapter(folder, base, place):
    """The tiny adapter as files, and its base as a folder beside it."""
    write_adapter(
        place,
        base.attachments[NAME],
        manifest_for(load_base(str(folder)), method="lora"),
        model=base.model,
    )
    return place
