"""Where keys and values lie: in blocks of as many tokens each, under a byte budget, shared where
equal.

    chain       every full block of a text has a name, a hash over (base, salt, contents and weights
                of adapters, all tokens up to its end): equal names mean equal keys and values
    table       the blocks of one sequence in the order of its tokens, behind its adapter's trained
                prefix
    references  tables hold a block. One that nobody holds stays findable by its name until its room
                is needed, the least recently used first, the end of a text before its beginning.

Only full blocks are found and shared, so nobody writes where another reads. Blocks are numbers
here: tensors, layers and sequences are not known. One thread calls; it does what `fronts` and
`copies` say, computes, and then calls `done`.
"""

from __future__ import annotations

import struct
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

from veneer.bounds import BLOCK, BYTES, check_numbers
from veneer.errors import DoesNotFitError

Identity = tuple[tuple[str, float], ...]
"""The adapters that act on a sequence, in order: (content hash, weight) of each; empty: the base
alone."""


@dataclass(frozen=True)
class BlockCopy:
    """The first `tokens` places of block `source` are wanted in block `target` as well."""

    source: int
    target: int
    tokens: int


@dataclass(frozen=True)
class PrefixWrite:
    """The trained prefix of an adapter, `places` long, is wanted in these blocks, the last filled
    in part."""

    adapter: Identity
    blocks: tuple[int, ...]
    places: int


class BlockNames:
    """The names of the full blocks of one text, made as the text grows."""

    def __init__(self, base: str, adapter: Identity, salt: str, tokens_per_block: int) -> None:
        self.adapter, self.tokens_per_block = adapter, tokens_per_block
        acting = [
            part for own, weight in adapter for part in (own.encode(), struct.pack("<d", weight))
        ]
        self.front = _name(base.encode(), *acting)
        """Of the adapter's trained prefix."""
        self.root = _name(self.front, salt.encode())
        self.names: list[bytes] = []

    def reach(self, places: int, between: Callable[[int, int], Sequence[int]]) -> None:
        """Name the full blocks among the first `places` tokens. between(start, stop): tokens of the
        text."""
        size = self.tokens_per_block
        while (len(self.names) + 1) * size <= places:
            start = len(self.names) * size
            tokens = struct.pack(f"<{size}I", *between(start, start + size))
            self.names.append(_name(self.names[-1] if self.names else self.root, tokens))

    def first(self, blocks: int) -> BlockNames:
        """The names of the first `blocks`, for a text that goes on otherwise behind them."""
        other = object.__new__(BlockNames)
        other.adapter, other.tokens_per_block = self.adapter, self.tokens_per_block
        other.front, other.root, other.names = self.front, self.root, self.names[:blocks]
        return other


def _name(*parts: bytes) -> bytes:
    digest = blake2b(digest_size=32)
    for part in parts:  # lengths go in, so that no two lists of parts read alike
        digest.update(struct.pack("<Q", len(part)) + part)
    return digest.digest()


@dataclass(eq=False)
class BlockTable:
    """blocks[i] holds tokens i * tokens_per_block and on; front: the trained prefix, in front of
    them.

    cached   tokens that were found, whose keys and values need not be computed
    full     blocks that are computed to their end, a part of which has a name
    """

    chain: BlockNames
    blocks: list[int] = field(default_factory=list)
    front: tuple[int, ...] = ()
    front_places: int = 0
    cached: int = 0
    full: int = 0


class BlockManager:
    """base: its fingerprint. budget_bytes: of all blocks. bytes_per_token: keys and values of all
    layers.

    ConfigError: numbers out of bounds. DoesNotFitError: not one block fits into the budget.
    """

    def __init__(
        self, *, base: str, budget_bytes: int, bytes_per_token: int, tokens_per_block: int = 16
    ) -> None:
        check_numbers(
            budget_bytes=(BYTES, budget_bytes),
            bytes_per_token=(BYTES, bytes_per_token),
            tokens_per_block=(BLOCK, tokens_per_block),
        )
        self.base, self.tokens_per_block = base, tokens_per_block
        self.budget_bytes, self.block_bytes = budget_bytes, bytes_per_token * tokens_per_block
        self.num_blocks = budget_bytes // self.block_bytes
        if not self.num_blocks:
            raise DoesNotFitError(
                f"a block of {tokens_per_block} tokens takes {self.block_bytes:,} bytes,"
                f" {budget_bytes:,} are given",
                next_step="Give keys and values more bytes.",
            )
        self._free = list(reversed(range(self.num_blocks)))
        self._idle: OrderedDict[int, None] = (
            OrderedDict()
        )  # named, held by nobody; the least recently used first
        self._references = [0] * self.num_blocks
        self._found: dict[bytes, int] = {}
        self._names: dict[int, tuple[bytes, Identity]] = {}
        self._fronts: dict[bytes, PrefixWrite] = {}
        self._front_of: dict[int, bytes] = {}
        self._tables: dict[int, BlockTable] = {}
        self._unwritten: dict[int, PrefixWrite] = {}  # by their first blocks
        self._copies: dict[int, BlockCopy] = {}  # by their targets

    @property
    def capacity(self) -> int:
        """Tokens that all blocks hold."""
        return self.num_blocks * self.tokens_per_block

    @property
    def available(self) -> int:
        """Blocks that a table could get: the free ones, and those that are only kept to be
        found."""
        return len(self._free) + len(self._idle)

    @property
    def held_bytes(self) -> int:
        """Of blocks that tables hold."""
        return (self.num_blocks - self.available) * self.block_bytes

    @property
    def findable(self) -> int:
        """Full blocks that have a name, held or not."""
        return len(self._found)

    @property
    def fronts(self) -> tuple[PrefixWrite, ...]:
        """Trained prefixes that must be written before anything is computed."""
        return tuple(self._unwritten.values())

    @property
    def copies(self) -> tuple[BlockCopy, ...]:
        """Blocks that must be copied before anything is computed. No source is a target."""
        return tuple(self._copies.values())

    def knows(self, name: bytes) -> bool:
        """Whether a full block of this name can be found."""
        return name in self._found

    def blocks_for(self, places: int) -> int:
        """Blocks that so many tokens take."""
        return -(-places // self.tokens_per_block)

    def chain(self, adapter: Identity, salt: str = "") -> BlockNames:
        """Of a new text. Texts of different salts share nothing but trained prefixes."""
        return BlockNames(self.base, adapter, salt, self.tokens_per_block)

    def open(
        self, chain: BlockNames, places: int, *, front_places: int = 0, spare: int = 0
    ) -> BlockTable | None:
        """A table with room for `places` tokens, the full blocks that are known found and not taken
        anew.

        chain         names of the text so far; at least one of the `places` tokens is left to
                      compute
        front_places  of the adapter's trained prefix
        spare         blocks that must be left for others
        None: there is no room, and nothing has changed.
        """
        found = []
        for name in chain.names[: (places - 1) // self.tokens_per_block]:
            if name not in self._found:
                break
            found.append(self._found[name])
        front = self._fronts.get(chain.front) if front_places else None
        held = [*found, *(front.blocks if front else ())]
        own = self.blocks_for(places) - len(found)
        new_front = self.blocks_for(front_places) if front is None else 0
        left = self.available - sum(block in self._idle for block in held)
        if own + new_front + spare > left:
            return None
        for block in held:
            self._hold(block)
        table = BlockTable(chain, found, cached=len(found) * self.tokens_per_block, full=len(found))
        if front_places:
            table.front = front.blocks if front else self._new_front(chain, front_places)
            table.front_places = front_places
        table.blocks += [self._take() for _ in range(own)]
        self._tables[id(table)] = table
        return table

    def grow(self, table: BlockTable, places: int) -> bool:
        """Room for `places` tokens in all. False: there is none, and nothing has changed."""
        missing = self.blocks_for(places) - len(table.blocks)
        if missing > self.available:
            return False
        table.blocks += [self._take() for _ in range(missing)]
        return True

    def filled(
        self, table: BlockTable, computed: int, between: Callable[[int, int], Sequence[int]]
    ) -> None:
        """The first `computed` tokens have their keys and values: the blocks that they fill can be
        found now.

        between(start, stop): tokens of the text. Where another table was first with the same text,
        its blocks keep the name.
        """
        full = computed // self.tokens_per_block
        if full <= table.full:
            return
        table.chain.reach(full * self.tokens_per_block, between)
        for place in range(table.full, full):
            name, block = table.chain.names[place], table.blocks[place]
            if name not in self._found:
                self._found[name] = block
                self._names[block] = (name, table.chain.adapter)
        table.full = full

    def fork(self, table: BlockTable, computed: int) -> BlockTable | None:
        """Another table that begins with the first `computed` tokens, all computed.

        Full blocks are shared; a block that they fill in part is to be copied (`copies`). None:
        there is no room, and nothing has changed.
        """
        full, rest = divmod(computed, self.tokens_per_block)
        assert full <= table.full, "only what is computed is shared"
        if rest and not self.available:
            return None
        other = BlockTable(
            table.chain.first(full),
            table.blocks[:full],
            table.front,
            table.front_places,
            table.cached,
            full,
        )
        for block in (*other.blocks, *other.front):
            self._hold(block)
        if rest:
            source, target = table.blocks[full], self._take()
            self._hold(source)  # until it is copied, whoever lets go of it
            self._copies[target] = BlockCopy(source, target, rest)
            other.blocks.append(target)
        self._tables[id(other)] = other
        return other

    def close(self, table: BlockTable) -> None:
        """The table's blocks are free, or kept to be found. The table is empty then."""
        del self._tables[id(table)]
        for block in reversed(table.blocks):  # the end of a text goes before its beginning
            if block in self._copies:
                self._release(self._copies.pop(block).source)
            self._release(block)
        for block in table.front:
            self._release(block)
        if table.front and not self._references[table.front[0]]:
            unwritten = self._unwritten.pop(table.front[0], None)
            if unwritten is not None and self._fronts.get(table.chain.front) is unwritten:
                self._drop_front(table.chain.front)
        table.blocks, table.front, table.full, table.cached = [], (), 0, 0

    def pending(self, table: BlockTable) -> tuple[tuple[PrefixWrite, ...], tuple[BlockCopy, ...]]:
        """Of `fronts` and `copies`, those that this table needs."""
        fronts = [self._unwritten[block] for block in table.front[:1] if block in self._unwritten]
        return tuple(fronts), tuple(
            self._copies[block] for block in table.blocks if block in self._copies
        )

    def done(self, fronts: Iterable[PrefixWrite], copies: Iterable[BlockCopy]) -> None:
        """These have been written and copied."""
        for front in fronts:
            self._unwritten.pop(front.blocks[0], None)
        for copy in copies:
            if self._copies.pop(copy.target, None) is not None:
                self._release(copy.source)

    def forget(self, content: str) -> int:
        """Nothing of the adapter of this content hash can be found any more; what nobody holds of
        it is free.

        What running sequences complete afterwards can be found again: call it once more when they
        have ended. Returns the bytes that became free.
        """
        before = len(self._free)
        for block, (name, adapter) in list(self._names.items()):
            if any(content == own for own, _ in adapter):
                del self._found[name], self._names[block]
                self._free_idle(block)
        for name, front in list(self._fronts.items()):
            if any(content == own for own, _ in front.adapter):
                self._drop_front(name)
        return (len(self._free) - before) * self.block_bytes

    def check(self) -> None:
        """AssertionError where the books do not agree. For tests."""
        held = Counter(b for t in self._tables.values() for b in (*t.blocks, *t.front))
        held.update(copy.source for copy in self._copies.values())
        assert self._references == [held[block] for block in range(self.num_blocks)]
        free, idle, taken = set(self._free), set(self._idle), set(held)
        assert (
            len(self._free) == len(free) and len(free) + len(idle) + len(taken) == self.num_blocks
        )
        assert free | idle | taken == set(range(self.num_blocks))
        assert 0 <= self.held_bytes <= self.num_blocks * self.block_bytes <= self.budget_bytes
        assert self._found == {name: block for block, (name, _) in self._names.items()}
        assert self._front_of == {
            b: name for name, front in self._fronts.items() for b in front.blocks
        }
        named = self._names.keys() | self._front_of.keys()
        assert idle <= named and not free & named
        assert not self._names.keys() & self._front_of.keys()
        for table in self._tables.values():
            for place, block in enumerate(table.blocks):
                if place < table.full:
                    known = self._names.get(block, (table.chain.names[place], None))[0]
                    assert known == table.chain.names[place], "a block under another text's name"
                else:
                    sources = sum(copy.source == block for copy in self._copies.values())
                    assert held[block] == 1 + sources and block not in self._names, (
                        "a partial block is shared"
                    )
        assert not self._copies.keys() & {copy.source for copy in self._copies.values()}

    def _hold(self, block: int) -> None:
        self._idle.pop(block, None)
        self._references[block] += 1

    def _release(self, block: int) -> None:
        self._references[block] -= 1
        if not self._references[block]:
            if block in self._names or block in self._front_of:
                self._idle[block] = None
            else:
                self._free.append(block)

    def _take(self) -> int:
        """A block for new tokens. The caller has seen that one is available."""
        if not self._free:
            oldest = next(iter(self._idle))
            if oldest in self._front_of:
                self._drop_front(self._front_of[oldest])
            else:
                del self._found[self._names.pop(oldest)[0]]
                self._free_idle(oldest)
        block = self._free.pop()
        self._references[block] = 1
        return block

    def _free_idle(self, block: int) -> None:
        if block in self._idle:
            del self._idle[block]
            self._free.append(block)

    def _new_front(self, chain: BlockNames, places: int) -> tuple[int, ...]:
        taken = tuple(self._take() for _ in range(self.blocks_for(places)))
        front = PrefixWrite(chain.adapter, taken, places)
        self._fronts[chain.front] = self._unwritten[taken[0]] = front
        self._front_of.update(dict.fromkeys(taken, chain.front))
        return taken

    def _drop_front(self, name: bytes) -> None:
        for block in self._fronts.pop(name).blocks:
            del self._front_of[block]
            self._free_idle(block)
