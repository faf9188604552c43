"""Does an adapter's folder fit a base, by its settings and the shapes of its tensors?

Values are read only where the file has copies of the base's own. Not known here: fingerprints.
What fits by its shapes may still be refused when it is loaded.
"""

from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from veneer.files.strict_tensors import read_header
from veneer.formats.adapter import WEIGHTS_NAME, read_adapter, read_settings
from veneer.formats.peft.tensors import bare_name
from veneer.formats.peft.token_files import apart, fit_tokens


def header_faults(folder: Path, model: nn.Module, read_past: Collection[str]) -> list[str]:
    """Why the adapter does not fit a base, one line each. Raises what read_adapter raises of its
    settings and header.

    model: the base's; its tree of modules must not change meanwhile (adapters.wrapping.plain_copy).
    read_past: the weights that the model takes past their modules.
    """
    shapes = {
        bare_name(name)[0]: info.shape for name, info in read_header(folder / WEIGHTS_NAME).items()
    }
    try:
        empty = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        return _faults(folder, empty, model, read_past)
    except (
        NotImplementedError,
        RuntimeError,
    ):  # a copy of the base's values is compared with them, which meta has not
        return _faults(folder, read_adapter(folder).tensors, model, read_past)


def _faults(
    folder: Path, tensors: Mapping[str, Tensor], model: nn.Module, read_past: Collection[str]
) -> list[str]:
    _, _, file, tokens, _ = read_settings(folder)
    own, rows = apart(tensors)
    head = model.get_output_embeddings()  # type: ignore[operator]
    found = file.fit(own, model, head, read_past)
    of_tokens = fit_tokens(tokens, rows, model, head)
    return [*found.faults, *([] if of_tokens is None else of_tokens.faults)]
