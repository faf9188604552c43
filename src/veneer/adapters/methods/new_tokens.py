"""Tokens that an adapter brings: rows of its own beside a base's embedding, and beside its head.

    embedding   table[ids], and where an id is one of the adapter's: its row
    head        the base's logits, and in the columns of these ids h row^T (+ the base's bias, where
                it has one there)

The base's tables stay as they are. An id may lie among their rows (a padded vocabulary) or behind
them: the logits are then so much wider. On rows that no such adapter acts on, those columns are
-inf. A row is a token's own: one adapter that brings tokens acts on a row of the forward, and with
weight 1 (combinations.py). Shapes: n tokens brought, D hidden, V rows of the base's table, M rows
of a forward.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from veneer.adapters.placement.acting import Applied
from veneer.adapters.placement.rows import rows_of
from veneer.adapters.placement.site import Site
from veneer.adapters.placement.token_rows import AddedTokens, NewTokens, TokenRows
from veneer.adapters.placement.wrapping import AdaptedModule, unwrapped
from veneer.errors import ConfigError
from veneer.linear import frozen_linear, is_plain_embedding


class _VocabularyModule(AdaptedModule):
    outside = True

    def rows_beside(self, adapters: Applied) -> TokenRows | None:
        return next((rows for rows, _ in self.beside(adapters)), None)


class ExtendedEmbedding(_VocabularyModule):
    def forward(self, input: Tensor) -> Tensor:  # the name that nn.Embedding gives it
        acting = self.routing.acting
        parts = {part.adapters: self.rows_beside(part.adapters) for part in acting.parts}
        if not any(parts.values()):
            known: Tensor = self.base(input)
            return known
        own: Tensor = self.base(
            input.clamp(max=unwrapped(self).get_parameter("weight").shape[0] - 1)
        )
        scale = getattr(unwrapped(self), "embed_scale", 1.0)
        if acting.whole is not None:
            rows = parts[acting.whole]
            assert rows is not None
            return rows.looked_up(input, own, scale)
        flat_ids, flat = input.flatten(), own.flatten(0, -2)
        pieces = []
        for segment in acting.segments(rows_of(acting, (input,), {})):
            rows, some = parts[segment.adapters], flat[segment.rows]
            pieces.append(
                some if rows is None else rows.looked_up(flat_ids[segment.rows], some, scale)
            )
        return torch.cat(pieces).view(own.shape)


class ExtendedHead(_VocabularyModule):
    def forward(self, input: Tensor) -> Tensor:
        acting = self.routing.acting
        parts = {part.adapters: self.rows_beside(part.adapters) for part in acting.parts}
        own: Tensor = self.base(input)
        if not any(parts.values()):
            return own
        bias: Any = unwrapped(self)._parameters.get("bias")
        if acting.whole is not None:
            rows = parts[acting.whole]
            assert rows is not None
            return rows.beside(own, input, bias)
        width = max(own.shape[-1], *(rows.end for rows in parts.values() if rows is not None))
        flat_h, flat = input.flatten(0, -2), own.flatten(0, -2)
        pieces = []
        for segment in acting.segments(rows_of(acting, (input,), {})):
            rows, some = parts[segment.adapters], flat[segment.rows]
            if rows is not None:
                some = rows.beside(some, flat_h[segment.rows], bias)
            pieces.append(F.pad(some, (0, width - some.shape[-1]), value=float("-inf")))
        return torch.cat(pieces).view(*own.shape[:-1], width)


def put_tokens(site: Site, brought: AddedTokens, embedding: nn.Module | None) -> None:
    """Rows for these tokens beside the embedding and the head. ConfigError: the model has no place
    for them."""
    paths = {id(module): path for path, module in site.modules.items()}
    table = None if embedding is None else unwrapped(embedding)
    if (
        table is None
        or not is_plain_embedding(table)
        or site.head is None
        or frozen_linear(site.head) is None
    ):
        raise ConfigError(
            "this model takes no new tokens",
            ["its embedding is no plain table, or its head no plain linear layer"],
            "Leave new_tokens out.",
        )
    at_table, at_head = paths[id(table)], paths[id(site.head)]
    if past := [path for path in (at_table, at_head) if f"{path}.weight" in (site.read_past or ())]:
        raise ConfigError(
            "this model takes no new tokens: it reads a table past its module, where new rows would"
            " not act",
            past,
            "Leave new_tokens out.",
        )
    tied = getattr(site.head, "weight", None) is table.get_parameter("weight")
    places = {at_table: _rows(brought, site, at_table)}
    if brought.head and not tied:
        places[at_head] = _rows(brought, site, at_head)
    site.attachment.tokens = NewTokens(brought.texts, brought.ids, places)
    beside = site.attachment.beside
    beside[site.wrap(at_table, ExtendedEmbedding).key] = places[at_table]
    if tied or brought.head:  # a tied head is the same tensor, and follows
        beside[site.wrap(at_head, ExtendedHead).key] = places.get(at_head, places[at_table])


def _rows(brought: AddedTokens, site: Site, path: str) -> TokenRows:
    module = site.modules[path]
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() != 2 or not weight.is_floating_point():
        linear = frozen_linear(module)
        assert linear is not None
        weight = nn.Parameter(linear.dense_weight(torch.float32), requires_grad=False)
    if brought.pieces:
        start = torch.stack([weight[list(pieces)].float().mean(0) for pieces in brought.pieces])
    else:
        start = torch.zeros(len(brought.ids), weight.shape[1], device=weight.device)
    return TokenRows(brought.ids, nn.Parameter(start.detach().clone()))


def width_of(adapters: Applied, own: int) -> int:
    """Ids that rows on which these act know; own: those of the base."""
    return max(
        [own, *(adapter.tokens.end for adapter, _ in adapters if adapter.tokens is not None)]
    )


def texts_of(adapters: Sequence[Any]) -> tuple[str, ...]:
    """Of the tokens that these adapters bring."""
    return next((adapter.tokens.texts for adapter in adapters if adapter.tokens is not None), ())
