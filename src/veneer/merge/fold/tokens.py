"""Extends a base's tables by the rows of an adapter's new tokens: replaced if they exist, else
appended.

Shapes: V rows of the base, V' with the tokens, D hidden.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from veneer.adapters.placement.token_rows import NewTokens, TokenRows
from veneer.errors import RefusedError
from veneer.merge.fold.fold import Applied, SourceTensor

WeightChanges = dict[str, Callable[[Tensor], Tensor]]


def tokens_of(applied: Applied) -> NewTokens | None:
    """Returns the new tokens of one of these adapters; several with new tokens cannot act
    together.
    """
    return next((adapter.tokens for adapter, _ in applied if adapter.tokens is not None), None)


def refuse_tokens(applied: Applied, why: str, next_step: str) -> None:
    """Raises RefusedError if an adapter has new tokens."""
    if (tokens := tokens_of(applied)) is not None:
        raise RefusedError(
            f"an adapter brings {len(tokens.ids):,} tokens: {why}", next_step=next_step
        )


def with_rows(
    stored: Mapping[str, SourceTensor],
    changes: WeightChanges,
    tokens: NewTokens,
    tied: Mapping[str, str],
) -> tuple[dict[str, SourceTensor], WeightChanges]:
    """Returns tables with the tokens' rows, and the changes of weights adapted to them."""
    tables, longer_changes = dict(stored), dict(changes)
    for path, rows in tokens.places.items():
        names = {f"{path}.weight"}
        names |= {name for pair in tied.items() for name in pair if names & set(pair)}
        for name in names:
            tables[name] = _longer(stored[name], rows)
            if name in changes:
                longer_changes[name] = _changed(changes[name], rows, stored[name].shape[0])
        for bias in (f"{name.removesuffix('.weight')}.bias" for name in names):
            if bias in stored and stored[bias].shape[0] < rows.end:
                tables[bias] = _padded(stored[bias], rows.end)
    return tables, longer_changes


def _longer(tensor: SourceTensor, rows: TokenRows) -> SourceTensor:
    shape = torch.Size((max(tensor.shape[0], rows.end), *tensor.shape[1:]))
    return replace(tensor, shape=shape, read=lambda: _placed(tensor.read(), rows))


def _placed(table: Tensor, rows: TokenRows) -> Tensor:
    """Places rows in a table: (V, D) -> (V', D), in its type."""
    missing = max(0, rows.end - table.shape[0])
    extended = torch.cat([table, table.new_zeros(missing, *table.shape[1:])])
    extended[rows.at.to(extended.device)] = rows.rows.detach().to(extended)
    return extended


def _changed(
    change: Callable[[Tensor], Tensor], rows: TokenRows, base_rows: int
) -> Callable[[Tensor], Tensor]:
    return lambda table: _placed(change(table[:base_rows]), rows)


def _padded(tensor: SourceTensor, size: int) -> SourceTensor:
    def read() -> Tensor:
        values = tensor.read()
        return torch.cat([values, values.new_zeros(size - len(values))])

    return replace(tensor, shape=torch.Size((size,)), read=read)
