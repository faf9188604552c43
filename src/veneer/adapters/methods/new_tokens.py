"""New tokens of an adapter: trained rows for the embedding and for the output head.

    embedding   table[ids], with the adapter's row for each of its ids
    head        the base's logits, with h row^T (+ the base's bias, if any) in the columns of its
                ids

The base's tables do not change. An id may be one of their rows (a padded vocabulary) or a number
past their end: the logits are then wider, with -inf in the new columns of rows on which no such
adapter acts. At most one adapter with new tokens acts on a row, with weight 1 (combinations.py).
Shapes: n new tokens, D hidden, V rows of the base's table, M rows of a forward.
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
from veneer.private.torch import parameters_of


class _VocabularyModule(AdaptedModule):
    outside = True

    def token_rows_of(self, adapters: Applied) -> TokenRows | None:
        return next((rows for rows, _ in self.layers_of(adapters)), None)


class ExtendedEmbedding(_VocabularyModule):
    def forward(self, input: Tensor) -> Tensor:  # the name that nn.Embedding gives it
        acting = self.routing.acting
        parts = {part.adapters: self.token_rows_of(part.adapters) for part in acting.parts}
        if not any(parts.values()):
            return self.base(input)
        plain: Tensor = self.base(
            input.clamp(max=unwrapped(self).get_parameter("weight").shape[0] - 1)
        )
        scale = getattr(unwrapped(self), "embed_scale", 1.0)
        if acting.whole is not None:
            rows = parts[acting.whole]
            assert rows is not None
            return rows.looked_up(input, plain, scale)
        flat_ids, flat_plain = input.flatten(), plain.flatten(0, -2)
        pieces = []
        for segment in acting.segments(rows_of(acting, (input,), {})):
            rows, piece = parts[segment.adapters], flat_plain[segment.rows]
            if rows is not None:
                piece = rows.looked_up(flat_ids[segment.rows], piece, scale)
            pieces.append(piece)
        return torch.cat(pieces).view(plain.shape)


class ExtendedHead(_VocabularyModule):
    def forward(self, input: Tensor) -> Tensor:
        acting = self.routing.acting
        parts = {part.adapters: self.token_rows_of(part.adapters) for part in acting.parts}
        plain: Tensor = self.base(input)
        if not any(parts.values()):
            return plain
        bias = parameters_of(unwrapped(self)).get("bias")
        if acting.whole is not None:
            rows = parts[acting.whole]
            assert rows is not None
            return rows.put_logits(plain, input, bias)
        width = max(plain.shape[-1], *(rows.end for rows in parts.values() if rows is not None))
        flat_h, flat_plain = input.flatten(0, -2), plain.flatten(0, -2)
        pieces = []
        for segment in acting.segments(rows_of(acting, (input,), {})):
            rows, piece = parts[segment.adapters], flat_plain[segment.rows]
            if rows is not None:
                piece = rows.put_logits(piece, flat_h[segment.rows], bias)
            pieces.append(F.pad(piece, (0, width - piece.shape[-1]), value=float("-inf")))
        return torch.cat(pieces).view(*plain.shape[:-1], width)


def put_tokens(site: Site, tokens: AddedTokens, embedding: nn.Module | None) -> None:
    """Attaches rows for new tokens to the embedding and the head. Raises ConfigError if the model
    cannot take new tokens."""
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
            "this model takes no new tokens: it reads a table without calling its module, where new"
            " rows would not act",
            past,
            "Leave new_tokens out.",
        )
    tied = getattr(site.head, "weight", None) is table.get_parameter("weight")
    places = {at_table: _rows(tokens, site, at_table)}
    if tokens.head and not tied:
        places[at_head] = _rows(tokens, site, at_head)
    site.attachment.tokens = NewTokens(tokens.texts, tokens.ids, places)
    layers = site.attachment.wrapper_layers
    layers[site.wrap(at_table, ExtendedEmbedding).key] = places[at_table]
    if tied or tokens.head:  # a tied head is the same tensor
        layers[site.wrap(at_head, ExtendedHead).key] = places.get(at_head, places[at_table])


def _rows(tokens: AddedTokens, site: Site, path: str) -> TokenRows:
    module = site.modules[path]
    weight = parameters_of(module).get("weight")
    if weight is None or weight.dim() != 2 or not weight.is_floating_point():
        linear = frozen_linear(module)
        assert linear is not None
        weight = nn.Parameter(linear.dense_weight(torch.float32), requires_grad=False)
    if tokens.pieces:
        start = torch.stack([weight[list(pieces)].float().mean(0) for pieces in tokens.pieces])
    else:
        start = torch.zeros(len(tokens.ids), weight.shape[1], device=weight.device)
    return TokenRows(tokens.ids, nn.Parameter(start.detach().clone()))


def width_of(adapters: Applied, base_ids: int) -> int:
    """Returns the number of ids on rows where these adapters act; base_ids: number of the base."""
    return max(
        [base_ids, *(adapter.tokens.end for adapter, _ in adapters if adapter.tokens is not None)]
    )


def texts_of(adapters: Sequence[Any]) -> tuple[str, ...]:
    """Returns the texts of the adapters' new tokens."""
    return next((adapter.tokens.texts for adapter in adapters if adapter.tokens is not None), ())
