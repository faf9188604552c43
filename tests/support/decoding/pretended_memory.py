"""Pretended keys and values: a place holds what they depend on, (salt, adapter, all tokens up to
it)."""

from collections.abc import Iterable, Sequence

from veneer.decoding.schedule.block_names import Identity
from veneer.decoding.schedule.blocks import BlockCopy, BlockTable, PrefixWrite


def contents(salt: str, adapter: Identity, tokens: Sequence[int]) -> tuple:
    """Of the last of these tokens."""
    return (salt, adapter, tuple(tokens))


class PretendedMemory:
    """What each place of each block holds; what was never written is not there."""

    def __init__(self, tokens_per_block: int) -> None:
        self.size = tokens_per_block
        self.places: dict[tuple[int, int], tuple] = {}

    def prepare(self, fronts: Iterable[PrefixWrite], copies: Iterable[BlockCopy]) -> None:
        for front in fronts:
            for place in range(front.places):
                at = front.blocks[place // self.size], place % self.size
                self.places[at] = ("front", front.adapter, place)
        for copy in copies:
            for place in range(copy.tokens):
                self.places[copy.target, place] = self.places[copy.source, place]

    def write(self, table: BlockTable, place: int, what: tuple) -> None:
        self.places[table.blocks[place // self.size], place % self.size] = what

    def read(self, table: BlockTable, place: int, copied: dict[int, int] | None = None) -> tuple:
        """copied: target -> source of copies that are still to be made."""
        block = table.blocks[place // self.size]
        return self.places[(copied or {}).get(block, block), place % self.size]

    def front_holds(self, table: BlockTable, unwritten: Iterable[PrefixWrite] = ()) -> bool:
        """Whether the trained prefix stands in front, or is still to be written there."""
        waiting = {block for front in unwritten for block in front.blocks}
        at = (
            (table.prefix_blocks[place // self.size], place) for place in range(table.prefix_length)
        )
        return all(
            block in waiting
            or self.places[block, place % self.size] == ("front", table.chain.adapter, place)
            for block, place in at
        )
