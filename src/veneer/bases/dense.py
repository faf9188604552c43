"""Dense weights, read by transformers: every one of them from the files, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from veneer.bases.faults import check_loaded


def build_dense(folder: Path, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model on the CPU, every weight from the files. Raises CorruptFileError otherwise."""
    loader: Any = AutoModelForCausalLM  # annotated as if it always returned the model alone
    model, info = loader.from_pretrained(
        folder,
        config=config,
        dtype=dtype,
        attn_implementation=None,  # sdpa where the class supports it, else eager; never what a file says
        experts_implementation=None,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        ignore_mismatched_sizes=True,  # they are refused below, all at once and with both shapes
        output_loading_info=True,
    )
    check_loaded(folder, model, info)
    loaded: PreTrainedModel = model
    return loaded
