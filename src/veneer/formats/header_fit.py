"""Checks whether an adapter's folder fits a base, by its settings and tensor shapes.

Values are only read if the file holds copies of the base's own. Not known here: fingerprints. An
adapter whose shapes fit may still be refused when it is loaded.
"""

from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from veneer.files.strict_tensors import read_header
from veneer.formats.adapter import WEIGHTS_NAME, read_adapter, read_settings, split_tensors
from veneer.formats.peft.tensors import bare_name
from veneer.formats.peft.token_files import fit_tokens


def header_faults(folder: Path, model: nn.Module, read_past: Collection[str]) -> list[str]:
    """Reports why the adapter does not fit a base, one line each.

    Raises what read_adapter raises about settings and header. model: the base's; its modules must
    not change meanwhile (adapters.wrapping.plain_copy). read_past: weights that the model reads
    directly, not through their modules
    """
    shapes = {
        bare_name(name)[0]: info.shape for name, info in read_header(folder / WEIGHTS_NAME).items()
    }
    try:
        empty = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        return _faults(folder, empty, model, read_past)
    except (NotImplementedError, RuntimeError):  # meta tensors have no values to compare
        return _faults(folder, read_adapter(folder).tensors, model, read_past)


def _faults(
    folder: Path, tensors: Mapping[str, Tensor], model: nn.Module, read_past: Collection[str]
) -> list[str]:
    _, _, file, tokens, _ = read_settings(folder)
    parts = split_tensors(tensors)
    head = model.get_output_embeddings()  # type: ignore[operator]
    method_fit = file.fit(parts.method, model, head, read_past)
    token_fit = fit_tokens(tokens, parts.tokens, model, head)
    return [*method_fit.faults, *([] if token_fit is None else token_fit.faults)]
