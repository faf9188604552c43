"""Rows of tokens that an adapter brings, beside what its method stores: PEFT's trainable tokens,
whatever the method.

    adapter_config.json          trainable_token_indices: {<module>: [ids]}, or PEFT's short [ids]:
                                 of the embedding
    adapter_model.safetensors    base_model.model.<module>.token_adapter.trainable_tokens_delta
                                 (n, D) float32

The tensor holds rows, in the order of the ids, whatever its name says. A tied head has no tensor of
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
"""Tokens of one file."""


@dataclass(frozen=True)
class TokenFile:
    """ids: of the rows; modules: that have such rows, by names or endings; (): the embedding."""

    ids: tuple[int, ...]
    modules: tuple[str, ...]


@dataclass(frozen=True)
class TokenFit:
    """values: by their names among Attachment.parameters(). head: whether they are rows of the head
    too."""

    values: dict[str, Tensor] = field(default_factory=dict)
    head: bool = True
    faults: list[str] = field(default_factory=list)


def token_settings(attachment: Attachment) -> dict[str, Any]:
    """What adapter_config.json says of them."""
    if (tokens := attachment.tokens) is None:
        return {}
    return {KEY: {path: list(tokens.ids) for path in tokens.places}}


def token_tensors(attachment: Attachment) -> dict[str, Tensor]:
    if (tokens := attachment.tokens) is None:
        return {}
    return {
        f"{PREFIX}{path}{ENDING}": each.rows.detach().contiguous().cpu()
        for path, each in tokens.places.items()
    }


def read_tokens(path: Path, stored: Mapping[str, Any]) -> TokenFile | None:
    """stored: the content of adapter_config.json at `path`. None: no tokens. Raises
    CorruptFileError, RefusedError."""
    named = stored.get(KEY)
    if not named:
        return None
    lists = list(named.values()) if isinstance(named, dict) else [named]
    if not all(
        isinstance(ids, list) and all(TOKEN.holds(i) and type(i) is int for i in ids)
        for ids in lists
    ):
        raise CorruptFileError(
            f"{path}: {KEY} holds no lists of token ids", [], "Restore the file."
        )
    if any(ids != lists[0] for ids in lists):
        raise RefusedError(
            f"{path}: {KEY} names other tokens for one module than for another",
            [f"{name}: {len(ids)} tokens" for name, ids in named.items()],
            "Train it again with the same tokens for all of them.",
        )
    ids = tuple(lists[0])
    if len(set(ids)) != len(ids) or not 0 < len(ids) <= MOST:
        raise CorruptFileError(
            f"{path}: {KEY} holds {len(ids):,} ids, {len(set(ids)):,} of them different"
        )
    return TokenFile(ids, tuple(named) if isinstance(named, dict) else ())


def apart(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """By bare names: what the method stored, and the rows of tokens."""
    rows = {name: tensor for name, tensor in tensors.items() if name.endswith(ENDING)}
    return {name: tensor for name, tensor in tensors.items() if name not in rows}, rows


def fit_tokens(
    file: TokenFile | None, rows: Mapping[str, Tensor], model: nn.Module, head: nn.Module | None
) -> TokenFit | None:
    """Where they go on a model; rows: by bare names. None: there are none."""
    if file is None:
        return (
            TokenFit(faults=[f"{name}: {KEY} does not name it" for name in sorted(rows)])
            if rows
            else None
        )
    paths = {id(module): path for path, module in plain_modules(model).items()}
    table: Any = unwrapped(model.get_input_embeddings())  # type: ignore[operator]
    own: Any = None if head is None else unwrapped(head)
    embedding, last = paths[id(table)], paths.get(id(own))
    tied = own is not None and getattr(own, "weight", None) is table.weight
    faults, named = [], [] if file.modules else [embedding]
    for module in file.modules:
        found = [path for path in (embedding, last) if path is not None and ends_with(path, module)]
        if not found:
            faults.append(
                f"{KEY} names {module}, which is neither the embedding ({embedding}) nor the head"
                f" ({last})"
            )
        named += found
    if embedding not in named and not faults:
        faults.append(f"{KEY} names the head alone: its tokens could not be read")
    expected = {f"{path}{ENDING}" for path in named if not (tied and path == last)}
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
    return TokenFit(values, tied or last in named)
