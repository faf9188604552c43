"""Does an adapter's folder fit a base, by its settings and the shapes of its tensors alone? No value is read.

Not known here: fingerprints. What fits by its shapes may still be refused when it is loaded.
"""

from pathlib import Path

import torch

from veneer.files.strict_tensors import read_header
from veneer.formats.adapter import WEIGHTS_NAME, read_settings
from veneer.formats.peft_tensors import bare_name
from veneer.formats.token_files import apart, fit_tokens
from veneer.models.frozen_base import FrozenBase


def header_faults(folder: Path, base: FrozenBase) -> list[str]:
    """Why the adapter does not fit, one line each. Raises what read_adapter raises of its settings and header."""
    _, _, file, tokens, _ = read_settings(folder)
    shapes = {bare_name(name)[0]: info.shape for name, info in read_header(folder / WEIGHTS_NAME).items()}
    tensors, rows = apart({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    head = base.model.get_output_embeddings()
    found = file.fit(tensors, base.model, head, base.read_past)
    of_tokens = fit_tokens(tokens, rows, base.model, head)
    return [*found.faults, *([] if of_tokens is None else of_tokens.faults)]
