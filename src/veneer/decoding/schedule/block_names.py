"""Names the full blocks of texts: equal names mean equal keys and values.

A name is a hash of (base, salt, adapters' contents and weights, all tokens up to the block's end).
Before an adapter's activation the base alone computes, so these blocks have the base's names, and
all adapters with an activation share them. The first block behind it adds the adapters and the
place of the activation, since another text may go on to a later one.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from copy import copy
from hashlib import blake2b

Identity = tuple[tuple[str, float], ...]
"""(content hash, weight) of the adapters that act on a sequence, in order. Empty: the base."""


class BlockNames:
    """The names of the full blocks of one text, extended as the text grows.

    activation: the first token on which the adapter acts
    """

    def __init__(
        self, base: str, adapter: Identity, salt: str, tokens_per_block: int, activation: int = 0
    ) -> None:
        self.adapter, self.tokens_per_block = adapter, tokens_per_block
        self.activation = activation
        acting = [
            part
            for content, weight in adapter
            for part in (content.encode(), struct.pack("<d", weight))
        ]
        self.prefix_name = _name(base.encode(), *acting)
        """Name of the adapter's trained prefix."""
        self._switch = _name(self.prefix_name, struct.pack("<Q", activation))
        """Names the adapters and their activation in the first block on which they act."""
        before = _name(base.encode()) if activation else self.prefix_name
        self.root = _name(before, salt.encode())
        self.names: list[bytes] = []

    def adapter_of(self, block: int) -> Identity:
        """Returns the adapters that act on some token of a block."""
        return self.adapter if (block + 1) * self.tokens_per_block > self.activation else ()

    def extend_to(self, places: int, between: Callable[[int, int], Sequence[int]]) -> None:
        """Names the full blocks of the first `places` tokens. between(start, stop) returns tokens
        of the text."""
        size = self.tokens_per_block
        while (len(self.names) + 1) * size <= places:
            start = len(self.names) * size
            tokens = struct.pack(f"<{size}I", *between(start, start + size))
            before = self.names[-1] if self.names else self.root
            switches = 0 <= self.activation - start < size and self.activation > 0
            self.names.append(_name(before, *([self._switch] if switches else []), tokens))

    def copy_beginning(self, blocks: int) -> BlockNames:
        """Returns a chain of the first `blocks` names, for a text that continues differently."""
        chain = copy(self)
        chain.names = self.names[:blocks]
        return chain


def _name(*parts: bytes) -> bytes:
    digest = blake2b(digest_size=32)
    for part in parts:  # with lengths, so that no two lists of parts hash alike
        digest.update(struct.pack("<Q", len(part)) + part)
    return digest.digest()
