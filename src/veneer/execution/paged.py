"""Keys and values in blocks, and a step's way through the layers (kernels/attention/paged.py
attends).

Which tokens a block holds, decoding/schedule/blocks.py says. Knows nothing of models: layers are
numbered in the order in which they call. Shapes: N rows of the step, K key/value heads, D head
size.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from veneer.execution.states import StepStates
from veneer.kernels.attention.groups import Pair
from veneer.kernels.attention.paged import KeyValueBlocks, SpanRows, Spans, paged_attention
from veneer.kernels.attention.paged_rows import BlockTables, paged_rows
from veneer.kernels.dense.mixes import AdapterMix
from veneer.kernels.rules import AttentionRules


class PagedKeys:
    """The blocks of each layer, made when the layer first calls."""

    def __init__(self, num_blocks: int, tokens_per_block: int) -> None:
        self.num_blocks, self.tokens_per_block = num_blocks, tokens_per_block
        self.layers: dict[int, KeyValueBlocks] = {}

    def layer(self, number: int, key_NKD: Tensor, value_NKD: Tensor) -> KeyValueBlocks:
        """Returns the blocks of layer `number`, made for its first keys and values."""
        if number not in self.layers:
            self.layers[number] = KeyValueBlocks.empty(
                self.num_blocks, self.tokens_per_block, key_NKD, value_NKD
            )
        return self.layers[number]

    def like(self, number: int, stored: KeyValueBlocks) -> KeyValueBlocks:
        """Returns the blocks of layer `number`, made with the shapes and type of `stored` if there
        are none yet."""
        if number not in self.layers:
            own = (
                torch.empty(self.num_blocks, *x.shape[1:], dtype=x.dtype, device=x.device)
                for x in (stored.keys, stored.values)
            )
            self.layers[number] = KeyValueBlocks(*own)
        return self.layers[number]

    def write(self, number: int, blocks: Sequence[int], key_NKD: Tensor, value_NKD: Tensor) -> None:
        """Writes the keys and values of a trained prefix into a layer's blocks."""
        size = self.tokens_per_block
        places = [block * size + slot for block in blocks for slot in range(size)][: len(key_NKD)]
        self.layer(number, key_NKD, value_NKD).write(
            torch.tensor(places, device=key_NKD.device), key_NKD, value_NKD
        )

    def copy(self, source: int, target: int) -> None:
        """Copies one block to another in all layers."""
        for stored in self.layers.values():
            stored.copy(source, target)


class PagedStep:
    """The spans of a step as a BatchAttention (execution/attention.py). `calls`: layers done.

    mix: what the adapters add to which rows, where these are listed: such steps are recorded
    (execution/recorded.py). take_states: called with the last hidden states of all rows, (N, D),
    which are valid during the call. states: of the spans, which then have equally many rows; None:
    no layer has any.
    """

    def __init__(
        self,
        keys: PagedKeys,
        spans: Sequence[SpanRows],
        mix: AdapterMix | None = None,
        *,
        spare: int = 0,
        take_states: Callable[[Tensor], None] | None = None,
        states: StepStates | None = None,
    ) -> None:
        self.keys, self.spans, self.calls = keys, Spans(spans, keys.tokens_per_block, spare), 0
        self.mix, self.take_states, self.states = mix, take_states, states
        self._fewer: dict[tuple[int, ...], Spans] = {}

    @property
    def texts(self) -> int:
        """Returns the number of rows that the model's own layers see: one with all tokens, or one
        for each span."""
        return 1 if self.states is None else self.states.texts

    def go_on(self, mix: AdapterMix | None) -> bool:
        """Moves each span to its next token, for steps that are made again (Spans.advance)."""
        self.mix = mix
        return self.spans.advance()

    def attend(
        self,
        query_NHD: Tensor,
        key_NKD: Tensor,
        value_NKD: Tensor,
        prefix: Sequence[tuple[slice, Pair | None]],
        rules: AttentionRules,
    ) -> Tensor:
        """Writes the rows' keys and values, and attends: (N, H, E). A prefix is in its blocks."""
        stored = self.keys.layer(self.calls, key_NKD, value_NKD)
        self.calls += 1
        return paged_attention(
            query_NHD, key_NKD, value_NKD, stored, self._spans_with(prefix), rules
        )

    def _spans_with(self, prefix: Sequence[tuple[slice, Pair | None]]) -> Spans:
        """Returns the spans, without prefixes that have nothing for this layer."""
        if all(pair is not None for _, pair in prefix):
            return self.spans
        starts = accumulate((span.stop - span.start for span in self.spans.spans), initial=0)
        first = [
            next((pair for rows, pair in prefix if start < rows.stop), None) for start in starts
        ]
        bare = tuple(
            n for n, span in enumerate(self.spans.spans) if span.prefix_blocks and first[n] is None
        )
        if bare not in self._fewer:
            fewer = [
                s._replace(prefix_blocks=(), prefix_length=0) if n in bare else s
                for n, s in enumerate(self.spans.spans)
            ]
            self._fewer[bare] = Spans(fewer, self.keys.tokens_per_block)
        return self._fewer[bare]


class RowsStep:
    """Single tokens on their way through the layers, what is seen of them read on the device
    (execution/attention.py: BatchAttention). No trained prefix is in front of them."""

    take_states: None = None
    states: None = None
    texts = 1

    def __init__(self, keys: PagedKeys, tables: BlockTables) -> None:
        self.keys, self.tables, self.calls = keys, tables, 0

    def attend(
        self,
        query_NHD: Tensor,
        key_NKD: Tensor,
        value_NKD: Tensor,
        prefix: Sequence[tuple[slice, Pair | None]],
        rules: AttentionRules,
    ) -> Tensor:
        """Write the rows' keys and values, and attend: (N, H, E)."""
        stored = self.keys.layer(self.calls, key_NKD, value_NKD)
        self.calls += 1
        return paged_rows(query_NHD, key_NKD, value_NKD, stored, self.tables, rules)
