"""Requests that come, go, fail and wait in any order, by a model that is pretended
(tests/support/decoding/toy_engine.py)."""

import math

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from tests.support.decoding.toy_engine import BROKEN, SIZE, Toy, adapter, alone
from veneer.decoding.schedule.sequence import FinishReason, Request, Sequence, SequenceState
from veneer.decoding.schedule.step_plan import SampledToken
from veneer.errors import DoesNotFitError, QueueFullError, VeneerError

A, B, C = (adapter(name) for name in "abc")


class Traffic(RuleBasedStateMachine):
    """Whatever comes when: each sequence ends exactly once, and its tokens are those that it gets
    alone."""

    @initialize(
        blocks=st.integers(3, 20),
        rows=st.integers(1, 5),
        extra=st.integers(0, 6),
        chunk=st.integers(1, 8),
        max_adapters=st.integers(1, 3),
        max_overtaken=st.integers(0, 3),
        guesses=st.booleans(),
    )
    def begin(self, blocks, rows, extra, chunk, max_adapters, max_overtaken, guesses) -> None:
        self.toy = Toy(
            blocks=blocks,
            guesses=guesses,
            rows=rows,
            step_tokens=rows + extra,
            chunk_tokens=chunk,
            max_waiting=12,
            max_adapters=max_adapters,
            max_overtaken=max_overtaken,
        )
        self.all: list[Sequence] = []
        self.front = {A: 0, B: 6, C: 3}

    def draw_request(self, data: st.DataObject) -> Request:
        own = data.draw(st.sampled_from([(), A, B, C, (*A, *C)]))
        deadline = data.draw(st.sampled_from([None, None, None, self.toy.now + 5]))
        return Request(
            prompt=tuple(data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=13))),
            max_new_tokens=data.draw(st.integers(1, 9)),
            adapter=own,
            stops=frozenset(data.draw(st.sampled_from([[], [0], [1, 2]]))),
            choices=data.draw(st.sampled_from([1, 1, 1, 2, 3])),
            seed=data.draw(st.integers(0, 2)),
            arrival=self.toy.now,
            deadline=deadline,
            priority=data.draw(st.sampled_from([0, 0, 0, 1])),
            salt=data.draw(st.sampled_from(["", "", "tenant"])),
        )

    @rule(data=st.data())
    def add(self, data: st.DataObject) -> None:
        request = self.draw_request(data)
        try:
            made = self.toy.scheduler.add(request)
        except QueueFullError as fault:
            assert fault.waiting + request.choices > 12 >= fault.waiting
        except DoesNotFitError:
            needed = math.ceil(request.max_positions / SIZE)
            assert (
                needed > self.toy.blocks.num_blocks
                or len(request.adapter) > self.toy.scheduler.limits.max_adapters
            )
        else:
            assert [s.choice for s in made] == list(range(request.choices))
            self.all += made

    @precondition(lambda self: self.all)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.toy.scheduler.cancel(data.draw(st.sampled_from(self.all)))

    @rule(
        own=st.sampled_from([A, B, C]),
        state=st.sampled_from(["ready", "ready", "on its way", "broken"]),
    )
    def adapters_come_and_go(self, own, state) -> None:
        self.toy.adapters[own] = {"ready": self.front[own], "on its way": None, "broken": BROKEN}[
            state
        ]
        self.toy.adapters[(*A, *C)] = self.toy.adapters.get(A, 0)

    @rule(own=st.sampled_from([A, B, C]))
    def forget(self, own) -> None:
        self.toy.blocks.forget(own[0][0])

    @rule(
        data=st.data(),
        seconds=st.integers(0, 2),
        what=st.sampled_from(["all", "all", "all", "undo", "cancel", "break", "last"]),
    )
    def step(self, data: st.DataObject, seconds: int, what: str) -> None:
        toy = self.toy
        toy.now += seconds
        plan = toy.plan()
        drawing = [s for span in plan.spans for s in span.draws]
        if what == "undo":
            toy.scheduler.undo_step()
            return
        if what == "cancel" and self.all:
            toy.scheduler.cancel(data.draw(st.sampled_from(self.all)))
        instead: dict = {}
        if drawing and what in ("break", "last"):
            s = data.draw(st.sampled_from(drawing))
            instead = {
                s.number: BROKEN
                if what == "break"
                else SampledToken(alone(s.request, s.choice)[len(s.new)], ends=True)
            }
        self.stopped = {*getattr(self, "stopped", ()), *(instead if what == "last" else ())}
        toy.finish(plan, instead)

    @rule()
    def several_steps(self) -> None:
        for _ in range(4):
            self.toy.step()

    def teardown(self) -> None:
        if not hasattr(self, "toy"):
            return
        toy = self.toy
        for own in toy.adapters:
            toy.adapters[own] = self.front.get(own, 0)
        toy.finish_all(3000)
        assert sorted(s.number for s in toy.ended) == [s.number for s in self.all], (
            "each ends exactly once"
        )
        for s in self.all:
            assert s.state is SequenceState.FINISHED and s.table is None
            stopped = s.number in getattr(self, "stopped", ()) and s.reason is FinishReason.STOP
            assert toy.right(s) or (stopped and alone(s.request, s.choice)[: len(s.new)] == s.new)
            assert (s.reason is FinishReason.ERROR) == (s.error is not None)
            assert isinstance(s.error, VeneerError | None)
            assert s.cancelled or s.reason is not FinishReason.CANCELLED
            assert s.cached_tokens is None or s.cached_tokens < len(s.request.prompt)


Traffic.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestTraffic = Traffic.TestCase
