"""Computes packed attention in transformers models, through their public interfaces.

`AttentionInterface` passes q, k, v of every layer to a function registered by name; an extra
keyword of the model's forward (`veneer_layout`) reaches it. transformers passes a 4-D attention
mask through unchanged, so no mask is built. The mask also identifies the layout, for layers that
pass no keywords on (Nemotron, StableLM). A trained prefix (adapters/methods/prefix.py) comes only
as a keyword. Layers that pass a state from token to token read text by text
(execution/text_rows.py). If a model does neither, mixes tokens elsewhere, or gives other results
when packed, execution/proofs/structure.py and execution/proofs/model.py say why, and batches are
padded for transformers' own attention.
"""

import inspect
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from veneer.adapters.methods.prefix_layer import KeyRecorder, PrefixKeys
from veneer.data.batching import Batch
from veneer.execution.switches import forget_lengths
from veneer.execution.text_rows import read_by_text
from veneer.kernels.attention.groups import Pair, grouped_attention
from veneer.kernels.layout import BatchLayout
from veneer.kernels.rules import AttentionRules
from veneer.model_record import record_of
from veneer.private.transformers import attention_of, offers_attention

NAME = "veneer"


class BatchAttention(Protocol):
    """Computes the attention of a model's layers for one batch layout."""

    def attend(
        self,
        query_NHD: Tensor,
        key_NKD: Tensor,
        value_NKD: Tensor,
        prefix: Sequence[tuple[slice, Pair | None]],
        rules: AttentionRules,
    ) -> Tensor:
        """Computes attention of the next layer (N, H, E). prefix: keys and values that a slice of
        rows sees first."""


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    veneer_layout: BatchAttention | None = None,
    veneer_prefix: PrefixKeys | None = None,
    veneer_keys: KeyRecorder | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """query (B, H, N, D), key and value (B, K, N, D) -> (B, N, H, D). The signature is
    transformers'."""
    rules = AttentionRules(
        query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window, softcap, s_aux
    )
    if veneer_keys is not None:
        veneer_keys.take(_layer_number(module), key, value)
    prefix = [] if veneer_prefix is None else veneer_prefix.along(_layer_number(module))
    veneer_layout = layout_of(attention_mask, veneer_layout)
    if veneer_layout is not None:
        q, k, v = (_row_by_row(rows) for rows in (query, key, value))
        return veneer_layout.attend(q, k, v, prefix, rules).unflatten(0, (len(query), -1)), None

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        if softcap is None and s_aux is None:
            return sdpa_attention_forward(
                module, query, key, value, mask, scaling=rules.scale, dropout=0.0, **others
            )[0]
        return _masked_attention(query, key, value, mask, rules)

    if veneer_prefix is None or all(pair is None for _, pair in prefix):
        return attend(query, key, value, attention_mask), None
    outputs = []
    for rows, pair in batch_rows(prefix, *query.shape[::2]):
        q, k, v = query[rows], key[rows], value[rows]
        mask = (
            attention_mask
            if attention_mask is None or len(attention_mask) == 1
            else attention_mask[rows]
        )
        if pair is not None:
            positions = veneer_prefix.positions
            positions = positions if len(positions) == 1 else positions[rows]
            mask = _prefix_mask(mask, q, k, pair[0], positions, sliding_window)
            k, v = (
                torch.cat([first.transpose(0, 1).expand(len(rest), -1, -1, -1), rest], dim=2)
                for first, rest in zip(pair, (k, v), strict=True)
            )
        outputs.append(attend(q, k, v, mask))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs), None


def batch_rows(
    prefix: Sequence[tuple[slice, Pair | None]], rows: int, length: int
) -> list[tuple[slice, Pair | None]]:
    """Turns slices of a padded batch's tokens (rows * length) into slices of its rows."""
    if len(prefix) == 1:
        return [(slice(None), prefix[0][1])]
    return [(slice(part.start // length, part.stop // length), pair) for part, pair in prefix]


def _layer_number(module: nn.Module) -> int:
    return int(getattr(module, "layer_idx", -1))


def _prefix_mask(
    mask: Tensor | None,
    query: Tensor,
    key: Tensor,
    prefix: Tensor,
    positions: Tensor,
    window: int | None,
) -> Tensor | None:
    """Returns the mask with the prefix's M columns in front: seen by all rows, or, with a window,
    by those near enough.

    query (B, H, T, D), key (B, K, S, D), prefix (M, K, D); positions (B, T) count the prefix, never
    padding, so a row sees the same in any batch.
    """
    M, T, S = prefix.shape[0], query.shape[2], key.shape[2]
    if mask is None:
        mask = torch.ones(T, S, dtype=torch.bool, device=query.device).tril(S - T)[None, None]
    seen = torch.ones(*positions.shape, M, dtype=torch.bool, device=query.device)
    if window is not None:
        seen = positions[..., None] - torch.arange(M, device=query.device) < window
    B = max(mask.shape[0], seen.shape[0])
    columns = seen[:, None].expand(B, mask.shape[1], T, M)
    if mask.dtype != torch.bool:
        columns = torch.zeros(columns.shape, dtype=mask.dtype, device=mask.device).masked_fill(
            ~columns, torch.finfo(mask.dtype).min
        )
    return torch.cat([columns, mask.expand(B, -1, T, S)], dim=-1)


def _masked_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, rules: AttentionRules
) -> Tensor:
    """Computes attention over a cache for models with soft caps or sinks. mask: bool, True is seen;
    None: causal."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = rules.capped(query @ key.transpose(2, 3) * rules.scale)
    if mask is None:
        rows, columns = scores.shape[-2:]
        mask = torch.ones(rows, columns, dtype=torch.bool, device=query.device).tril(columns - rows)
    if mask.dtype == torch.bool:
        # Not -inf: a row of padding may see nothing at all, and its NaN would reach real rows as 0
        # * NaN.
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    else:
        scores = scores + mask
    if rules.sinks is not None:
        column = rules.sinks.view(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
        scores = torch.cat([scores, column], dim=-1)
    probabilities = torch.softmax(scores.float(), dim=-1).to(value.dtype)
    return (probabilities[..., : key.shape[2]] @ value).transpose(1, 2)


@dataclass
class LayoutAttention:
    """A layout as a BatchAttention. `calls` counts the attention layers that it reached."""

    layout: BatchLayout
    calls: int = 0

    @property
    def positions(self) -> int:
        """Returns the positions of the longest document, its prompt included."""
        return max(group.prompt + max(group.lengths) for group in self.layout.groups)

    def attend(
        self,
        query_NHD: Tensor,
        key_NKD: Tensor,
        value_NKD: Tensor,
        prefix: Sequence[tuple[slice, Pair | None]],
        rules: AttentionRules,
    ) -> Tensor:
        self.calls += 1
        first = [
            next((pair for rows, pair in prefix if s.start < rows.stop), None)
            for s in self.layout.spans
        ]
        return grouped_attention(query_NHD, key_NKD, value_NKD, self.layout, first, rules)


_LAYOUTS: MutableMapping[Tensor, BatchAttention] = WeakTensorKeyDictionary()
"""Layouts by the unused masks that stand for them. The mask keeps the layout, and a checkpointed
layer keeps the mask until it is computed again."""


def packed_arguments(positions: Tensor, layout: BatchAttention) -> dict[str, Any]:
    """Returns the arguments of a model's forward besides ids (1, N). positions: (1, N)."""
    return {
        "position_ids": positions,
        "attention_mask": mask_of(layout, positions.device),
        "use_cache": False,
        "veneer_layout": layout,
    }


def mask_of(layout: BatchAttention, device: torch.device) -> Tensor:
    """Returns an unused mask that leads attention to this layout."""
    mask = unused_mask(device)
    _LAYOUTS[mask] = layout
    return mask


def unused_mask(device: torch.device) -> Tensor:
    """Returns a 4-D mask, which transformers passes through and packed attention does not read."""
    return torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=device)


def layout_of(mask: Tensor | None, layout: BatchAttention | None) -> BatchAttention | None:
    """Returns the layout of a layer's arguments: its own, or else that of its mask."""
    return _LAYOUTS.get(mask) if layout is None and mask is not None else layout


def _row_by_row(x: Tensor) -> Tensor:
    """Returns x (B, H, T, D) as (B * T, H, D)."""
    return x[0].transpose(0, 1) if len(x) == 1 else x.transpose(1, 2).flatten(0, 1)


@dataclass(frozen=True)
class DecoderPath:
    """The decoder's path in a model. It is stored because every forward needs it, and a search
    walks all modules. The module at the path may be exchanged."""

    path: str | None


def takes_layouts(module: nn.Module) -> bool:
    """Whether attention of a model, or of a block, computes by layouts: it has our name."""
    return attention_of(getattr(module, "config", None)) == NAME


def take_packed(model: PreTrainedModel) -> None:
    """Switches the model to packed attention, which transformers then knows by its name. A model
    whose code looks no attention up stays as it is."""
    if not offers_attention(model):
        return
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
    if (inner := decoder(model)) is not None:
        read_by_text(inner)


def decoder(model: PreTrainedModel) -> nn.Module | None:
    """Returns the model without its head: ids in, hidden states out. None if it has no such
    part."""
    path = record_of(model).part(DecoderPath, lambda: _decoder_path(model)).path
    return None if path is None else model.get_submodule(path)


def _decoder_path(model: PreTrainedModel) -> DecoderPath:
    part = _find_decoder(model)
    paths = (path for path, module in model.named_modules() if module is part)
    return DecoderPath(next(paths, None))


def _find_decoder(model: PreTrainedModel) -> nn.Module | None:
    table, head = model.get_input_embeddings(), model.get_output_embeddings()

    def holds(part: nn.Module, searched: nn.Module | None) -> bool:
        return any(module is searched for module in part.modules())

    declared = [model.get_decoder()] if hasattr(model, "get_decoder") else []
    for part in (*declared, model.base_model, *model.children()):
        if part is not None and part is not table and holds(part, table) and not holds(part, head):
            return part
    return None


def packed_states(
    model: PreTrainedModel, ids: Tensor, positions: Tensor, layout: BatchLayout
) -> tuple[Tensor, int]:
    """Returns the last hidden states (N, D) of ids and positions (1, N), and the number of layers
    that the layout reached."""
    inner, attention = decoder(model), LayoutAttention(layout)
    assert inner is not None
    out = inner(input_ids=ids, **packed_arguments(positions, attention))
    return out.last_hidden_state[0], attention.calls


def padded_states(model: PreTrainedModel, ids: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
    """Returns the last hidden states (B, L, D) of right-padded ids by transformers' attention."""
    inner = decoder(model)
    assert inner is not None
    takes_positions = "position_ids" in inspect.signature(inner.forward).parameters
    keywords: dict[str, Any] = {"position_ids": positions} if takes_positions else {}
    return inner(input_ids=ids, attention_mask=mask, use_cache=False, **keywords).last_hidden_state


def hidden_states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Returns the last hidden states (rows of the batch, D)."""
    forget_lengths(model)
    if batch.layout is not None:
        return packed_states(model, batch.ids, batch.positions, batch.layout)[0]
    assert batch.mask is not None
    return padded_states(model, batch.ids, batch.positions, batch.mask).flatten(0, 1)
