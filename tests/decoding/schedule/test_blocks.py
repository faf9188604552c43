"""Blocks of keys and values, whose contents are pretended."""

import subprocess
import sys
from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.support.decoding.pretended_memory import PretendedMemory, contents
from veneer.decoding.schedule.block_names import Identity
from veneer.decoding.schedule.blocks import BlockCopy, BlockManager, BlockTable
from veneer.errors import ConfigError, DoesNotFitError

SIZE = 4
ONE: Identity = (("1" * 64, 1.0),)
TWO: Identity = (("2" * 64, 1.0),)


def manager(blocks: int = 8, base: str = "base") -> BlockManager:
    return BlockManager(
        base=base, budget_bytes=blocks * SIZE * 10, bytes_per_token=10, tokens_per_block=SIZE
    )


@dataclass(eq=False)
class Text:
    """A sequence as a caller of the manager keeps it."""

    tokens: list[int]
    adapter: Identity = ()
    salt: str = ""
    table: BlockTable | None = None
    computed: int = 0
    front: int = 0

    def between(self, start: int, stop: int) -> list[int]:
        return self.tokens[start:stop]

    def contents(self, place: int) -> tuple:
        return contents(self.salt, self.adapter, self.tokens[: place + 1])


class Memory:
    """What each place of each block holds, and the manager that says where."""

    def __init__(self, blocks: BlockManager) -> None:
        self.blocks, self.places = blocks, PretendedMemory(SIZE)

    def open(self, text: Text, *, spare: int = 0) -> bool:
        chain = self.blocks.chain(text.adapter, text.salt)
        chain.extend_to(len(text.tokens), text.between)
        text.table = self.blocks.open(
            chain, len(text.tokens), prefix_length=text.front, spare=spare
        )
        if text.table is not None:
            text.computed = text.table.cached
        return text.table is not None

    def compute(self, text: Text, tokens: int | None = None) -> None:
        self.places.prepare(self.blocks.prefix_writes, self.blocks.copies)
        self.blocks.done(self.blocks.prefix_writes, self.blocks.copies)
        stop = len(text.tokens) if tokens is None else min(text.computed + tokens, len(text.tokens))
        for place in range(text.computed, stop):
            self.places.write(text.table, place, text.contents(place))
        text.computed = stop
        self.blocks.filled(text.table, stop, text.between)

    def holds(self, text: Text) -> None:
        """Every place of its table holds what it should."""
        copied = {copy.target: copy.source for copy in self.blocks.copies}
        for place in range(text.computed):
            assert self.places.read(text.table, place, copied) == text.contents(place)
        assert self.places.front_holds(text.table, self.blocks.prefix_writes)

    def run(
        self, tokens: list[int], adapter: Identity = (), *, salt: str = "", front: int = 0
    ) -> Text:
        text = Text(list(tokens), adapter, salt, front=front)
        assert self.open(text)
        self.compute(text)
        self.blocks.check()
        return text

    def cached(self, tokens: list[int], adapter: Identity = (), salt: str = "") -> int:
        """Tokens that such a text would find."""
        text = Text(list(tokens), adapter, salt)
        assert self.open(text)
        found = text.table.cached
        self.blocks.close(text.table)
        return found


TOKENS = list(range(10, 20))  # two full blocks of 4, and two tokens


def test_a_prompt_is_found_in_full_blocks_by_the_next_that_begins_with_it():
    memory = Memory(manager())
    memory.run(TOKENS)
    assert memory.cached([*TOKENS, 1, 2, 3]) == 8
    assert memory.cached([*TOKENS[:5], 99, 99, 99, 99]) == 4
    assert memory.cached([99, *TOKENS[1:]]) == 0


def test_one_token_at_least_is_left_to_compute():
    memory = Memory(manager())
    memory.run(TOKENS[:8])
    assert memory.cached(TOKENS[:8]) == 4
    assert memory.cached(TOKENS[:9]) == 8


def test_what_is_not_computed_yet_is_not_found():
    memory = Memory(manager())
    text = Text(list(TOKENS))
    memory.open(text)
    assert memory.cached(TOKENS) == 0
    memory.compute(text, 5)
    assert memory.cached(TOKENS) == 4


def test_two_adapters_never_share_whatever_they_are_called():
    memory = Memory(manager(20))
    memory.run(TOKENS, ONE)
    assert memory.cached(TOKENS, ONE) == 8
    for other in ((), TWO, ((ONE[0][0], 0.5),), (*ONE, *TWO), (*TWO, *ONE)):
        assert memory.cached(TOKENS, other) == 0


def test_another_base_another_salt_and_another_size_of_blocks_have_other_names():
    chains = [
        manager().chain(ONE),
        manager(base="other").chain(ONE),
        manager().chain(ONE, salt="tenant"),
        BlockManager(base="base", budget_bytes=10**4, bytes_per_token=1, tokens_per_block=2).chain(
            ONE
        ),
        manager().chain(()),
        manager(base="b").chain((("ase", 1.0),)),
    ]
    for chain in chains:
        chain.extend_to(4, lambda start, stop: [1, 2, 3, 4][start:stop])
    assert len({name for chain in chains for name in chain.names[:1]}) == len(chains)


def test_a_block_without_references_stays_until_its_room_is_needed_last_of_a_text_first():
    memory = Memory(manager(4))
    memory.blocks.close(memory.run(TOKENS).table)  # 2 full blocks stay, the partial one is free
    assert memory.blocks.available == 4
    assert memory.blocks.held_bytes == 0
    other = memory.run(
        [1, 2, 3, 4, 5, 6, 7, 8, 9]
    )  # takes the 2 free ones, then the end of the old text
    assert memory.blocks.findable == 3
    memory.blocks.close(other.table)
    assert memory.cached(TOKENS) == 4


def test_the_least_recently_used_goes_first():
    memory = Memory(manager(4))
    for start in (100, 200):
        memory.blocks.close(memory.run(list(range(start, start + 5))).table)
    memory.blocks.close(memory.run(list(range(100, 105))).table)
    memory.blocks.close(memory.run(list(range(300, 312))).table)
    assert memory.cached(list(range(100, 105))) == 4
    assert memory.cached(list(range(200, 205))) == 0


def test_without_room_nothing_changes():
    memory = Memory(manager(3))
    first = memory.run(TOKENS[:8])
    assert not memory.open(Text([1] * 5))
    assert memory.blocks.available == 1
    assert not memory.open(Text([1]), spare=1)
    assert memory.blocks.grow(first.table, 12)
    assert not memory.blocks.grow(first.table, 13)
    memory.blocks.check()


def test_a_fork_shares_full_blocks_and_says_what_is_to_be_copied():
    memory = Memory(manager())
    text = memory.run(TOKENS)
    fork = memory.blocks.fork(text.table, 10)
    assert fork.blocks[:2] == text.table.blocks[:2]
    assert memory.blocks.copies == (BlockCopy(text.table.blocks[2], fork.blocks[2], 2),)
    memory.blocks.check()
    memory.blocks.close(text.table)
    assert memory.blocks.available == 8 - 4  # the source waits until it is copied
    memory.blocks.check()
    memory.blocks.done((), memory.blocks.copies)
    assert memory.blocks.available == 8 - 3


def test_forks_that_go_on_otherwise_are_each_found_by_what_they_hold():
    memory = Memory(manager(20))
    text = memory.run(TOKENS)
    fork = Text(list(TOKENS), table=memory.blocks.fork(text.table, 10), computed=10)
    for each, own in ((text, [1, 2, 3]), (fork, [4, 5, 6])):
        each.tokens += own
        memory.blocks.grow(each.table, 13)
        memory.compute(each)
        memory.holds(each)
    assert memory.cached([*TOKENS, 1, 2, 9]) == memory.cached([*TOKENS, 4, 5, 9]) == 12
    assert memory.cached([*TOKENS, 1, 5, 9]) == 8


def test_a_fork_before_the_end_of_a_text_is_found_by_what_it_holds_itself():
    memory = Memory(manager(20))
    text = Text(TOKENS[:8])
    memory.open(text)
    memory.compute(text, 6)
    fork = Text([*TOKENS[:6], 1, 2], table=memory.blocks.fork(text.table, 6), computed=6)
    memory.compute(fork)
    again = Text([*TOKENS[:8], 3])
    memory.open(again)
    memory.holds(again)
    assert memory.cached([*TOKENS[:6], 1, 2, 9]) == 8
    memory.blocks.check()


def test_a_fork_that_is_closed_before_its_copy_is_made_leaves_nothing_to_copy():
    memory = Memory(manager())
    text = memory.run(TOKENS)
    memory.blocks.close(memory.blocks.fork(text.table, 10))
    assert memory.blocks.copies == ()
    memory.blocks.close(text.table)
    assert memory.blocks.available == 8


def test_each_table_waits_for_its_own_prefix_and_copies_alone():
    memory = Memory(manager(12))
    one, plain = Text([1, 2], ONE, front=6), memory.run([5, 6, 7])
    memory.open(one)
    fork = memory.blocks.fork(plain.table, 2)
    assert fork is not None
    assert memory.blocks.pending(one.table) == (memory.blocks.prefix_writes, ())
    assert memory.blocks.pending(fork) == ((), memory.blocks.copies)
    assert memory.blocks.pending(plain.table) == ((), ())
    assert len(memory.blocks.prefix_writes) == len(memory.blocks.copies) == 1


def test_a_fork_at_the_end_of_a_block_copies_nothing():
    memory = Memory(manager(2))
    text = memory.run(TOKENS[:8])
    assert memory.blocks.fork(text.table, 8) is not None
    assert memory.blocks.copies == ()


def test_a_trained_prefix_is_held_once_for_all_requests_of_its_adapter():
    memory = Memory(manager(9))
    one = memory.run([1, 2], ONE, front=6)
    assert len(one.table.prefix_blocks) == 2
    again = Text([3, 4], ONE, front=6)
    memory.open(again)
    assert again.table.prefix_blocks == one.table.prefix_blocks
    assert memory.blocks.prefix_writes == ()
    other = Text([1, 2], TWO, front=6)
    memory.open(other)
    assert not set(other.table.prefix_blocks) & set(one.table.prefix_blocks)
    assert [front.adapter for front in memory.blocks.prefix_writes] == [TWO]
    memory.blocks.close(other.table)  # before it was written
    assert memory.blocks.prefix_writes == ()
    memory.blocks.check()
    for text in (one, again):
        memory.blocks.close(text.table)
    memory.open(again)
    assert memory.blocks.prefix_writes == (), "it was still there"


def test_a_prefix_whose_room_was_needed_is_written_again():
    memory = Memory(manager(3))
    memory.blocks.close(memory.run([1], ONE, front=6).table)
    memory.blocks.close(memory.run([5] * 9).table)
    assert memory.open(Text([1], ONE, front=6))
    assert [front.places for front in memory.blocks.prefix_writes] == [6]
    memory.blocks.check()


def test_an_adapter_that_is_forgotten_gives_its_blocks_back():
    memory = Memory(manager(20))
    base = memory.run(TOKENS)
    gone = memory.run(TOKENS, ONE, front=3)
    both = memory.run(TOKENS, (*TWO, *ONE))
    memory.blocks.close(gone.table)
    assert memory.blocks.forget(ONE[0][0]) == 3 * SIZE * 10  # two of the text, one of the prefix
    memory.blocks.check()
    assert memory.cached(TOKENS, ONE) == memory.cached(TOKENS, both.adapter) == 0
    assert memory.cached(TOKENS) == 8
    memory.holds(both)
    memory.blocks.close(both.table)
    memory.blocks.close(base.table)
    assert memory.blocks.available == 20


def test_a_budget_without_room_for_a_block_says_both_numbers():
    with pytest.raises(DoesNotFitError, match=r"16 tokens takes 1,600 bytes, 1,599 are given"):
        BlockManager(base="base", budget_bytes=1599, bytes_per_token=100)
    with pytest.raises(ConfigError, match="tokens_per_block is 0"):
        BlockManager(base="base", budget_bytes=1599, bytes_per_token=100, tokens_per_block=0)


def test_neither_torch_nor_transformers_is_loaded():
    code = (
        "import sys, veneer.decoding.schedule.scheduler; sys.exit(bool({'torch', 'transformers'} &"
        " set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


FRONT = {(): 0, ONE: 0, TWO: 6, (*ONE, *TWO): 3}


class Books(RuleBasedStateMachine):
    """Any calls in any order: the books agree, and every table reads what its sequence has
    written."""

    @initialize(blocks=st.integers(1, 14))
    def begin(self, blocks: int) -> None:
        self.memory = Memory(manager(blocks))
        self.texts: list[Text] = []

    def some(self, data: st.DataObject) -> Text:
        return data.draw(st.sampled_from(self.texts))

    @rule(
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=14),
        adapter=st.sampled_from(list(FRONT)),
        salt=st.sampled_from(["", "", "tenant"]),
        spare=st.integers(0, 2),
    )
    def open(self, tokens: list[int], adapter: Identity, salt: str, spare: int) -> None:
        text = Text(tokens, adapter, salt, front=FRONT[adapter])
        if self.memory.open(text, spare=spare):
            self.texts.append(text)
            assert text.computed < len(tokens)
            assert self.memory.blocks.available >= spare

    @precondition(lambda self: self.texts)
    @rule(data=st.data(), tokens=st.integers(1, 9))
    def compute(self, data: st.DataObject, tokens: int) -> None:
        self.memory.compute(self.some(data), tokens)

    @precondition(lambda self: self.texts)
    @rule(data=st.data(), token=st.integers(0, 1))
    def say(self, data: st.DataObject, token: int) -> None:
        text = self.some(data)
        if self.memory.blocks.grow(text.table, len(text.tokens) + 1):
            text.tokens.append(token)

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        text = self.some(data)
        if text.table.blocks[text.computed // SIZE : text.computed // SIZE + 1] and any(
            copy.target == text.table.blocks[text.computed // SIZE]
            for copy in self.memory.blocks.copies
        ):
            return  # what waits for its own copy is not forked: it has computed nothing yet
        table = self.memory.blocks.fork(text.table, text.computed)
        if table is not None:
            fork = Text(
                text.tokens[: text.computed],
                text.adapter,
                text.salt,
                table,
                text.computed,
                text.front,
            )
            self.texts.append(fork)

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        text = self.some(data)
        self.texts.remove(text)
        self.memory.blocks.close(text.table)

    @rule(adapter=st.sampled_from([ONE, TWO]))
    def forget(self, adapter: Identity) -> None:
        self.memory.blocks.forget(adapter[0][0])

    @invariant()
    def the_books_agree_and_every_table_reads_its_own_text(self) -> None:
        if hasattr(self, "memory"):
            self.memory.blocks.check()
            for text in self.texts:
                self.memory.holds(text)

    def teardown(self) -> None:
        if hasattr(self, "memory"):
            for text in self.texts:
                self.memory.blocks.close(text.table)
            self.memory.blocks.check()
            assert self.memory.blocks.available == self.memory.blocks.num_blocks
            assert self.memory.blocks.prefix_writes == self.memory.blocks.copies == ()


Books.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestBooks = Books.TestCase
