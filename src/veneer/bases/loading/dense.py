"""Reads dense weights through transformers, and refuses incomplete files."""

from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from veneer.bases.config.model_class import auto_class
from veneer.bases.folder.faults import check_loaded


def build_dense(folder: Path, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Builds the model on the CPU with every weight from the files. Raises CorruptFileError
    otherwise."""
    model, info = auto_class(config).from_pretrained(
        folder,
        config=config,
        dtype=dtype,
        # sdpa if the class supports it, else eager; never the file's choice
        attn_implementation=None,
        experts_implementation=None,
        use_kernels=False,  # kernels from the hub are code of strangers
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        ignore_mismatched_sizes=True,  # check_loaded refuses them all at once, with both shapes
        output_loading_info=True,
    )
    check_loaded(folder, model, info)
    return model
