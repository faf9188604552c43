"""Allocates keys and values in blocks of equal size, under a byte budget, and shares equal blocks.

    chain       every full block of a text has a name (block_names.py): equal names mean equal keys
                and values
    table       the blocks of one sequence in the order of its tokens, after its adapter's trained
                prefix
    references  number of tables that use a block. An unused named block stays in the cache until
                its memory is needed: the least recently used goes first, the end of a text before
                its beginning.

Only full blocks are shared, so no sequence writes where another one reads. Blocks are numbers here;
this module knows nothing of tensors, layers and sequences. One thread calls it: it carries out
`prefix_writes` and `copies`, computes, and then calls `done`.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from veneer.bounds import BLOCK, BYTES, check_numbers
from veneer.decoding.schedule.block_names import BlockNames, Identity
from veneer.errors import DoesNotFitError


@dataclass(frozen=True)
class BlockCopy:
    """Copies the first `tokens` places of block `source` to block `target`."""

    source: int
    target: int
    tokens: int


@dataclass(frozen=True)
class PrefixWrite:
    """Writes an adapter's trained prefix of `places` tokens to blocks, the last one in part."""

    adapter: Identity
    blocks: tuple[int, ...]
    places: int


@dataclass(eq=False)
class BlockTable:
    """The blocks of one sequence. blocks[i] has the tokens from i * tokens_per_block on.

    prefix_blocks  blocks of the trained prefix, in front of the others
    cached         number of tokens whose keys and values were cached
    full           number of blocks that are computed to their end
    """

    chain: BlockNames
    blocks: list[int] = field(default_factory=list)
    prefix_blocks: tuple[int, ...] = ()
    prefix_length: int = 0
    cached: int = 0
    full: int = 0


class BlockManager:
    """All blocks of a base's keys and values.

    base             fingerprint of the base
    budget_bytes     memory of all blocks
    bytes_per_token  keys and values of all layers
    shares           whether a text begins in the blocks of an equal one

    Raises ConfigError if a number is out of bounds, and DoesNotFitError if no block fits.
    """

    def __init__(
        self,
        *,
        base: str,
        budget_bytes: int,
        bytes_per_token: int,
        tokens_per_block: int = 16,
        shares: bool = True,
    ) -> None:
        check_numbers(
            budget_bytes=(BYTES, budget_bytes),
            bytes_per_token=(BYTES, bytes_per_token),
            tokens_per_block=(BLOCK, tokens_per_block),
        )
        self.base, self.tokens_per_block, self.shares = base, tokens_per_block, shares
        self.budget_bytes, self.block_bytes = budget_bytes, bytes_per_token * tokens_per_block
        self.num_blocks = budget_bytes // self.block_bytes
        if not self.num_blocks:
            raise DoesNotFitError(
                f"a block of {tokens_per_block} tokens takes {self.block_bytes:,} bytes,"
                f" {budget_bytes:,} are given",
                next_step="Give keys and values more bytes.",
            )
        self._free = list(reversed(range(self.num_blocks)))
        self._idle: OrderedDict[int, None] = OrderedDict()
        """Named blocks that no table uses, the least recently used first."""
        self._references = [0] * self.num_blocks
        self._blocks_by_name: dict[bytes, int] = {}
        self._names: dict[int, tuple[bytes, Identity]] = {}
        self._prefixes: dict[bytes, PrefixWrite] = {}
        self._prefix_of: dict[int, bytes] = {}
        self._tables: dict[int, BlockTable] = {}
        self._unwritten: dict[int, PrefixWrite] = {}  # by first block
        self._copies: dict[int, BlockCopy] = {}  # by target

    @property
    def capacity(self) -> int:
        """Number of tokens in all blocks."""
        return self.num_blocks * self.tokens_per_block

    @property
    def available(self) -> int:
        """Number of blocks that a table could get: free ones and unused cached ones."""
        return len(self._free) + len(self._idle)

    @property
    def held_bytes(self) -> int:
        """Bytes of blocks in use."""
        return (self.num_blocks - self.available) * self.block_bytes

    @property
    def findable(self) -> int:
        """Number of full blocks in the cache, in use or not."""
        return len(self._blocks_by_name)

    @property
    def prefix_writes(self) -> tuple[PrefixWrite, ...]:
        """Trained prefixes that must be written before anything is computed."""
        return tuple(self._unwritten.values())

    @property
    def copies(self) -> tuple[BlockCopy, ...]:
        """Blocks that must be copied before anything is computed. No source is a target."""
        return tuple(self._copies.values())

    @property
    def has_writes(self) -> bool:
        return bool(self._unwritten or self._copies)

    def knows(self, name: bytes) -> bool:
        """Whether a full block of this name is cached."""
        return name in self._blocks_by_name

    def blocks_for(self, places: int) -> int:
        """Returns the number of blocks that so many tokens take."""
        return -(-places // self.tokens_per_block)

    def chain(self, adapter: Identity, salt: str = "", activation: int = 0) -> BlockNames:
        """Returns the block names of a new text. Texts with different salts share only trained
        prefixes. activation: the first token on which the adapter acts"""
        return BlockNames(self.base, adapter, salt, self.tokens_per_block, activation)

    def open(
        self, chain: BlockNames, places: int, *, prefix_length: int = 0, spare: int = 0
    ) -> BlockTable | None:
        """Opens a table with room for `places` tokens, using cached blocks of the same text.

        chain          names of the text so far; at least one of the tokens is left to compute
        prefix_length  tokens of the adapter's trained prefix
        spare          number of blocks that must stay available
        Returns None, with nothing changed, if there is no room.
        """
        cached = []
        for name in chain.names[: (places - 1) // self.tokens_per_block]:
            if name not in self._blocks_by_name:
                break
            cached.append(self._blocks_by_name[name])
        prefix = self._prefixes.get(chain.prefix_name) if prefix_length else None
        shared = [*cached, *(prefix.blocks if prefix else ())]
        new_blocks = self.blocks_for(places) - len(cached)
        new_prefix_blocks = self.blocks_for(prefix_length) if prefix is None else 0
        left = self.available - sum(block in self._idle for block in shared)
        if new_blocks + new_prefix_blocks + spare > left:
            return None
        for block in shared:
            self._hold(block)
        cached_tokens = len(cached) * self.tokens_per_block
        table = BlockTable(chain, cached, cached=cached_tokens, full=len(cached))
        if prefix_length:
            table.prefix_blocks = (
                prefix.blocks if prefix else self._new_prefix(chain, prefix_length)
            )
            table.prefix_length = prefix_length
        table.blocks += [self._take() for _ in range(new_blocks)]
        self._tables[id(table)] = table
        return table

    def grow(self, table: BlockTable, places: int) -> bool:
        """Grows a table to `places` tokens. Returns False, with nothing changed, without room."""
        missing = self.blocks_for(places) - len(table.blocks)
        if missing > self.available:
            return False
        table.blocks += [self._take() for _ in range(missing)]
        return True

    def filled(
        self, table: BlockTable, computed: int, between: Callable[[int, int], Sequence[int]]
    ) -> None:
        """Caches the full blocks of the first `computed` tokens, whose keys and values are there.

        between(start, stop) returns tokens of the text. If another table computed the same text
        first, the name stays with its blocks.
        """
        full = computed // self.tokens_per_block
        if full <= table.full:
            return
        table.chain.extend_to(full * self.tokens_per_block, between)
        for place in range(table.full, full):
            name, block = table.chain.names[place], table.blocks[place]
            if self.shares and name not in self._blocks_by_name:
                self._blocks_by_name[name] = block
                self._names[block] = (name, table.chain.adapter_of(place))
        table.full = full

    def fork(self, table: BlockTable, computed: int) -> BlockTable | None:
        """Opens another table that shares the first `computed` tokens.

        Full blocks are shared; a partial block is to be copied (`copies`). Returns None, with
        nothing changed, if there is no room.
        """
        full, rest = divmod(computed, self.tokens_per_block)
        assert full <= table.full, "only what is computed is shared"
        if rest and not self.available:
            return None
        fork = BlockTable(
            table.chain.copy_beginning(full),
            table.blocks[:full],
            table.prefix_blocks,
            table.prefix_length,
            table.cached,
            full,
        )
        for block in (*fork.blocks, *fork.prefix_blocks):
            self._hold(block)
        if rest:
            source, target = table.blocks[full], self._take()
            self._hold(source)  # until it is copied
            self._copies[target] = BlockCopy(source, target, rest)
            fork.blocks.append(target)
        self._tables[id(fork)] = fork
        return fork

    def close(self, table: BlockTable) -> None:
        """Empties a table. Its blocks become free, or stay in the cache."""
        del self._tables[id(table)]
        for block in reversed(table.blocks):  # the end of a text goes before its beginning
            if block in self._copies:
                self._release(self._copies.pop(block).source)
            self._release(block)
        for block in table.prefix_blocks:
            self._release(block)
        if table.prefix_blocks and not self._references[table.prefix_blocks[0]]:
            unwritten = self._unwritten.pop(table.prefix_blocks[0], None)
            if unwritten is not None and self._prefixes.get(table.chain.prefix_name) is unwritten:
                self._drop_prefix(table.chain.prefix_name)
        table.blocks, table.prefix_blocks, table.full, table.cached = [], (), 0, 0

    def pending(self, table: BlockTable) -> tuple[tuple[PrefixWrite, ...], tuple[BlockCopy, ...]]:
        """Returns the `prefix_writes` and `copies` that this table needs."""
        prefix_writes = [
            self._unwritten[block] for block in table.prefix_blocks[:1] if block in self._unwritten
        ]
        return tuple(prefix_writes), tuple(
            self._copies[block] for block in table.blocks if block in self._copies
        )

    def done(self, prefix_writes: Iterable[PrefixWrite], copies: Iterable[BlockCopy]) -> None:
        """Marks these as written and copied."""
        for prefix_write in prefix_writes:
            self._unwritten.pop(prefix_write.blocks[0], None)
        for copy in copies:
            if self._copies.pop(copy.target, None) is not None:
                self._release(copy.source)

    def forget(self, content: str) -> int:
        """Removes all blocks of an adapter, by content hash, from the cache. Unused ones are freed.

        Blocks that running sequences complete later are cached again: call it once more after they
        have ended. Returns the bytes that were freed.
        """
        before = len(self._free)
        for block, (name, adapter) in list(self._names.items()):
            if any(content == used for used, _ in adapter):
                del self._blocks_by_name[name], self._names[block]
                self._free_idle(block)
        for name, prefix in list(self._prefixes.items()):
            if any(content == used for used, _ in prefix.adapter):
                self._drop_prefix(name)
        return (len(self._free) - before) * self.block_bytes

    def check(self) -> None:
        """Raises AssertionError if the tables and counts disagree. For tests."""
        uses = Counter(b for t in self._tables.values() for b in (*t.blocks, *t.prefix_blocks))
        uses.update(copy.source for copy in self._copies.values())
        assert self._references == [uses[block] for block in range(self.num_blocks)]
        free, idle, used = set(self._free), set(self._idle), set(uses)
        assert len(self._free) == len(free) and len(free) + len(idle) + len(used) == self.num_blocks
        assert free | idle | used == set(range(self.num_blocks))
        assert 0 <= self.held_bytes <= self.num_blocks * self.block_bytes <= self.budget_bytes
        assert self._blocks_by_name == {name: block for block, (name, _) in self._names.items()}
        assert self._prefix_of == {
            b: name for name, prefix in self._prefixes.items() for b in prefix.blocks
        }
        named = self._names.keys() | self._prefix_of.keys()
        assert idle <= named and not free & named
        assert not self._names.keys() & self._prefix_of.keys()
        for table in self._tables.values():
            for place, block in enumerate(table.blocks):
                if place < table.full:
                    known = self._names.get(block, (table.chain.names[place], None))[0]
                    assert known == table.chain.names[place], "a block under another text's name"
                else:
                    sources = sum(copy.source == block for copy in self._copies.values())
                    assert uses[block] == 1 + sources and block not in self._names, (
                        "a partial block is shared"
                    )
        assert not self._copies.keys() & {copy.source for copy in self._copies.values()}

    def _hold(self, block: int) -> None:
        self._idle.pop(block, None)
        self._references[block] += 1

    def _release(self, block: int) -> None:
        self._references[block] -= 1
        if not self._references[block]:
            if block in self._names or block in self._prefix_of:
                self._idle[block] = None
            else:
                self._free.append(block)

    def _take(self) -> int:
        """Takes a block for new tokens. The caller has checked that one is available."""
        if not self._free:
            oldest = next(iter(self._idle))
            if oldest in self._prefix_of:
                self._drop_prefix(self._prefix_of[oldest])
            else:
                del self._blocks_by_name[self._names.pop(oldest)[0]]
                self._free_idle(oldest)
        block = self._free.pop()
        self._references[block] = 1
        return block

    def _free_idle(self, block: int) -> None:
        if block in self._idle:
            del self._idle[block]
            self._free.append(block)

    def _new_prefix(self, chain: BlockNames, places: int) -> tuple[int, ...]:
        blocks = tuple(self._take() for _ in range(self.blocks_for(places)))
        prefix = PrefixWrite(chain.adapter, blocks, places)
        self._prefixes[chain.prefix_name] = self._unwritten[blocks[0]] = prefix
        self._prefix_of.update(dict.fromkeys(blocks, chain.prefix_name))
        return blocks

    def _drop_prefix(self, name: bytes) -> None:
        for block in self._prefixes.pop(name).blocks:
            del self._prefix_of[block]
            self._free_idle(block)
