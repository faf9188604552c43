"""Does an adapter's folder fit a base, by its settings and the shapes of its tensors?

Values are read only where the file has copies of the base's own. Not known here: fingerprints.
What fits by its shapes may still be refused when it is loaded.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from veneer.files.strict_tensors import read_header
from veneer.formats.adapter import WEIGHTS_NAME, read_adapter, read_settings
from veneer.formats.peft_tensors import bare_name
from veneer.formats.token_files import apart, fit_tokens
from veneer.models.frozen_base import FrozenBase


def header_faults(folder: Path, base: FrozenBase) -> list[str]:
    """Why the adapter does not fit, one line each. Raises what read_adapter raises of its settings and header."""
    shapes = {bare_name(name)[0]: info.shape for name, info in read_header(folder / WEIGHTS_NAME).items()}
    try:
        return _faults(folder, {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}, base)
    except (NotImplementedError, RuntimeError):  # a copy of the base's values is compared with them, which meta has not
        return _faults(folder, read_adapter(folder).tensors, base)


def _faults(folder: Path, tensors: Mapping[str, Tensor], base: FrozenBase) -> list[str]:
    _, _, file, tokens, _ = read_settings(folder)
    own, rows = apart(tensors)
    head = base.model.get_output_embeddings()
    found = file.fit(own, base.model, head, base.read_past)
    of_tokens = fit_tokens(tokens, rows, base.model, head)
    return [*found.faults, *([] if of_tokens is None else of_tokens.faults)]
