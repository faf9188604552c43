"""Reads and writes the rows of an adapter's new tokens as PEFT's trainable tokens, for every
method.

adapter_config.json          trainable_token_indices: {<module>: [ids]}, or PEFT's short [ids]:
                             of the embedding
adapter_model.safetensors    base_model.model.<module>.token_adapter.trainable_tokens_delta
                             (n, D) float32

The tensor holds whole rows in the order of the ids, despite its name. A tied head has no tensor of
its own. Not known here: the tokens' texts (manifest.py). Facts: PEFT 0.21.2,
peft/tuners/trainable_tokens/layer.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from veneer.adapters.methods.targets import ends_with
from veneer.adapters.placement.attachment import Attachment
from veneer.adapters.placement.token_rows import PART
from veneer.adapters.placement.wrapping import plain_modules, unwrapped
from veneer.bounds import TOKEN
from veneer.errors import CorruptFileError, RefusedError
from veneer.formats.peft.tensors import PREFIX

KEY = "trainable_token_indices"
ENDING = ".token_adapter.trainable_tokens_delta"
MOST = 100_000
"""Most tokens of one file."""


@dataclass(frozen=True)
class TokenFile:
    """New tokens in a file. ids: of the rows; modules: with such rows, by name or ending; (): the
    embedding"""

    ids: tuple[int, ...]
    modules: tuple[str, ...]


@dataclass(frozen=True)
class TokenFit:
    """Where token rows go on a model.

    values: by their names among Attachment.parameters(); head: whether the output head uses them
    too
    """

    values: dict[str, Tensor] = field(default_factory=dict)
    head: bool = True
    faults: list[str] = field(default_factory=list)


def token_settings(attachment: Attachment) -> dict[str, Any]:
    """Returns the tokens' entry of adapter_config.json."""
    if (tokens := attachment.tokens) is None:
        return {}
    return {KEY: {path: list(tokens.ids) for path in tokens.places}}


def token_tensors(attachment: Attachment) -> dict[str, Tensor]:
    """Returns the tokens' rows by their full names."""
    if (tokens := attachment.tokens) is None:
        return {}
    return {
        f"{PREFIX}{path}{ENDING}": rows.rows.detach().contiguous().cpu()
        for path, rows in tokens.places.items()
    }


def read_tokens(path: Path, stored: Mapping[str, Any]) -> TokenFile | None:
    """Reads the tokens' entry. stored: content of adapter_config.json at `path`

    Returns None if there are no tokens. Raises CorruptFileError, RefusedError.
    """
    entry = stored.get(KEY)
    if not entry:
        return None
    lists = list(entry.values()) if isinstance(entry, dict) else [entry]
    if not all(
        isinstance(ids, list) and all(TOKEN.holds(i) and type(i) is int for i in ids)
        for ids in lists
    ):
        raise CorruptFileError(
            f"{path}: {KEY} does not hold lists of token ids", [], "Restore the file."
        )
    if any(ids != lists[0] for ids in lists):
        raise RefusedError(
            f"{path}: {KEY} names different tokens for different modules",
            [f"{name}: {len(ids)} tokens" for name, ids in entry.items()],
            "Train it again with the same tokens for all of them.",
        )
    ids = tuple(lists[0])
    if len(set(ids)) != len(ids) or not 0 < len(ids) <= MOST:
        raise CorruptFileError(
            f"{path}: {KEY} holds {len(ids):,} ids, {len(set(ids)):,} of them different"
        )
    return TokenFile(ids, tuple(entry) if isinstance(entry, dict) else ())


def split_token_rows(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Splits tensors by bare names into the method's own and the rows of tokens."""
    rows = {name: tensor for name, tensor in tensors.items() if name.endswith(ENDING)}
    return {name: tensor for name, tensor in tensors.items() if name not in rows}, rows


def fit_tokens(
    file: TokenFile | None, rows: Mapping[str, Tensor], model: nn.Module, head: nn.Module | None
) -> TokenFit | None:
    """Finds where token rows go on a model; rows: by bare names. Returns None if there are none."""
    if file is None:
        return (
            TokenFit(faults=[f"{name}: {KEY} does not name it" for name in sorted(rows)])
            if rows
            else None
        )
    paths = {id(module): path for path, module in plain_modules(model).items()}
    table: Any = unwrapped(model.get_input_embeddings())  # type: ignore[operator]
    plain_head: Any = None if head is None else unwrapped(head)
    embedding, head_path = paths[id(table)], paths.get(id(plain_head))
    tied = plain_head is not None and getattr(plain_head, "weight", None) is table.weight
    faults, module_paths = [], [] if file.modules else [embedding]
    for module in file.modules:
        matches = [
            path for path in (embedding, head_path) if path is not None and ends_with(path, module)
        ]
        if not matches:
            faults.append(
                f"{KEY} names {module}, which is neither the embedding ({embedding}) nor the head"
                f" ({head_path})"
            )
        module_paths += matches
    if embedding not in module_paths and not faults:
        faults.append(f"{KEY} names only the head: the model could not read these tokens")
    expected = {f"{path}{ENDING}" for path in module_paths if not (tied and path == head_path)}
    shape = (len(file.ids), table.weight.shape[1])
    for name in sorted(expected | rows.keys()):
        if name not in rows:
            faults.append(f"{name}   missing   {shape}")
        elif name not in expected:
            faults.append(f"{name}   no such tensor")
        elif tuple(rows[name].shape) != shape:
            faults.append(f"{name}   adapter {tuple(rows[name].shape)}   model {shape}")
    if faults:
        return TokenFit(faults=faults)
    values = {
        f"{name.removesuffix(ENDING)}.{PART}": rows[name].float() for name in sorted(expected)
    }
    return TokenFit(values, tied or head_path in module_paths)
