"""A scheduler with a pretended model: the next token is a function of the adapter and all tokens so
far.

Keys and values lie where the block manager says (pretended_memory.py), and every draw looks at all
of them.
"""

from collections import Counter
from collections.abc import Callable
from hashlib import blake2b

from tests.support.decoding.pretended_memory import PretendedMemory, contents
from veneer.decoding.schedule.block_names import Identity
from veneer.decoding.schedule.blocks import BlockManager
from veneer.decoding.schedule.limits import Limits
from veneer.decoding.schedule.lookup import Lookup
from veneer.decoding.schedule.scheduler import Scheduler
from veneer.decoding.schedule.sequence import FinishReason, Request, Sequence, SequenceState
from veneer.decoding.schedule.step_plan import SampleResult, Span, StepPlan, StepResult
from veneer.errors import SourceError

SIZE = 4
WORDS = 7


def adapter(name: str, weight: float = 1.0) -> Identity:
    return ((name * 8, weight),)


def next_token(request: Request, choice: int, new: list[int]) -> int:
    text = repr((request.adapter, request.prompt, new, request.seed, choice)).encode()
    return blake2b(text, digest_size=1).digest()[0] % WORDS


def alone(request: Request, choice: int = 0) -> list[int]:
    """The new tokens of a choice with nobody beside it, the stop token included."""
    new: list[int] = []
    while len(new) < request.max_new_tokens:
        new.append(next_token(request, choice, new))
        if new[-1] in request.stops and len(new) > request.min_new_tokens:
            break
    return new


class PretendedLookup(Lookup):
    """Guesses up to 5 tokens, of which the first 0 to 5 are right."""

    def __init__(self) -> None:
        super().__init__(lambda identity: True)

    def guesses(self, answers: list[Sequence], most_rows: int) -> dict[Sequence, list[int]]:
        guesses, left = {}, most_rows - len(answers)
        for s in answers:
            seed = blake2b(repr((s.request.prompt, s.new)).encode(), digest_size=2).digest()
            most = s.request.max_new_tokens - len(s.new) - 1
            count = min(left, most, seed[0] % 6)
            text = [*s.new]
            for place in range(count):
                right = next_token(s.request, s.choice, text)
                text.append(right if place < seed[1] % 6 else (right + 1) % WORDS)
            if count > 0:
                guesses[s], left = text[len(s.new) :], left - count
        return guesses


class Toy:
    """adapters: prefix places of each that is ready, None for one that is on its way, an error for
    a broken one; those that are not named are ready and have no prefix. guesses: whether tokens are
    guessed."""

    def __init__(
        self,
        *,
        blocks: int = 64,
        tokens_per_block: int = SIZE,
        guesses: bool = False,
        **limits: int,
    ) -> None:
        self.blocks = BlockManager(
            base="base",
            budget_bytes=blocks * tokens_per_block * 10,
            bytes_per_token=10,
            tokens_per_block=tokens_per_block,
        )
        self.adapters: dict[Identity, int | Exception | None] = {}
        self.scheduler = Scheduler(
            self.blocks,
            Limits(**{"rows": 8, "step_tokens": 32, **limits}),
            self,
            lookup=PretendedLookup() if guesses else None,
        )
        self.memory = PretendedMemory(tokens_per_block)
        self.ended: list[Sequence] = []
        self.asked: Counter[Identity] = Counter()
        self.held: Counter[Identity] = Counter()
        self.offered: set[Identity] = set()
        self.gone: list[str] = []
        self.computed = 0
        self.now = 0.0

    def expect(self, adapter: Identity) -> None: ...

    def ready(self, adapter: Identity) -> int | None:
        self.asked[adapter] += 1
        state = self.adapters.get(adapter, 0)
        if isinstance(state, Exception):
            raise state
        if state is not None:
            self.offered.add(adapter)
        return state

    def take_removed(self) -> list[str]:
        self.offered.clear()
        gone, self.gone = self.gone, []
        return gone

    def hold(self, adapter: Identity) -> None:
        assert self.held[adapter] or adapter in self.offered, "it might have gone"
        self.held[adapter] += 1

    def release(self, adapter: Identity) -> None:
        self.held[adapter] -= 1
        assert self.held[adapter] >= 0

    def applied(self, adapter: Identity) -> tuple:
        raise AssertionError("the scheduler does not ask what an adapter is on the base")

    def add(
        self, prompt: list[int] | range, new: int = 4, own: Identity = (), **asked: object
    ) -> Sequence:
        request = Request(prompt=tuple(prompt), max_new_tokens=new, adapter=own, **asked)
        return self.scheduler.add(request)[0]

    def step(
        self,
        *,
        meanwhile: Callable[[], object] = lambda: None,
        instead: dict[int, SampleResult] | None = None,
    ) -> StepPlan:
        """A whole step. meanwhile: called during it. instead: of what the model says, by number."""
        plan = self.plan()
        meanwhile()
        self.finish(plan, instead or {})
        return plan

    def plan(self, most_tokens: int | None = None) -> StepPlan:
        plan = self.scheduler.step(self.now, most_tokens=most_tokens)
        self.ended += plan.ended
        self.check(plan, most_tokens)
        return plan

    def finish(self, plan: StepPlan, instead: dict[int, SampleResult]) -> None:
        self.memory.prepare(plan.prefix_writes, plan.copies)
        for (
            span
        ) in plan.spans:  # as in a layer of a model: all keys and values are written, then read
            for place in range(span.start, span.start + span.rows):
                self.memory.write(span.sequence.table, place, self.expected(span, place))
        results: dict[int, StepResult] = {}
        for span in plan.spans:
            assert self.memory.front_holds(span.sequence.table)
            for place in range(span.start + span.rows):
                at = self.memory.read(span.sequence.table, place)
                assert at == self.expected(span, place)
            self.computed += span.rows
            for s in span.draws:
                results[s.number] = self.draw(s, span, instead)
        self.ended += self.scheduler.finish_step(results)
        self.blocks.check()

    def draw(self, s: Sequence, span: Span, instead: dict[int, SampleResult]) -> StepResult:
        if s.number in instead or not span.guesses:
            return instead.get(s.number, next_token(s.request, s.choice, s.new))
        drawn = [next_token(s.request, s.choice, s.new)]
        for guess in span.guesses:
            if drawn[-1] != guess:
                break
            drawn.append(next_token(s.request, s.choice, [*s.new, *drawn]))
        return drawn

    def expected(self, span: Span, place: int) -> tuple:
        s = span.sequence
        text = [*s.between(0, span.stop), *span.guesses][: place + 1]
        return contents(s.request.salt, s.request.adapter, text)

    def check(self, plan: StepPlan, most_tokens: int | None = None) -> None:
        """What holds for every plan."""
        limits, running = self.scheduler.limits, self.scheduler.running
        self.blocks.check()
        assert sum(rows for _, rows in plan.parts) <= min(
            limits.step_tokens, most_tokens or limits.step_tokens
        )
        assert (
            len({span.sequence for span in plan.spans})
            == len(plan.spans)
            <= len(running)
            <= limits.rows
        )
        assert len({own for s in running for own, _ in s.request.adapter}) <= limits.max_adapters
        assert +self.held == Counter(s.request.adapter for s in running if s.request.adapter)
        in_order = [span.sequence.request.adapter for span in plan.spans]
        runs = [own for i, own in enumerate(in_order) if i == 0 or in_order[i - 1] != own]
        assert len(runs) == len(set(runs)), "not adapter by adapter"
        assert () not in runs[1:], "the base is not first"
        for span in plan.spans:
            s = span.sequence
            assert s.state is SequenceState.RUNNING and not s.cancelled
            assert (
                span.start
                == s.computed
                < span.stop
                <= s.length
                <= s.length + len(span.guesses)
                <= min(len(s.table.blocks) * self.memory.size, s.request.max_positions)
            )
            assert not span.guesses or span.draws == (s,)
            assert (s in span.draws) == (span.stop == s.length)
            assert span.stop - span.start <= max(limits.chunk_tokens, 1)
            text = s.between(0, s.length)[span.start : span.stop]
            assert span.tokens == [*text, *span.guesses]

    def finish_all(self, steps: int = 1000) -> None:
        for _ in range(steps):
            if self.scheduler.idle:
                break
            self.step()
        assert self.scheduler.idle
        assert self.blocks.available == self.blocks.num_blocks
        assert not +self.held
        assert self.blocks.prefix_writes == self.blocks.copies == ()

    def right(self, s: Sequence) -> bool:
        """Whether its tokens are those that it gets alone, all of them or, if it was ended, the
        first."""
        whole = alone(s.request, s.choice)
        complete = s.reason in (FinishReason.STOP, FinishReason.LENGTH)
        return s.new == (whole if complete else whole[: len(s.new)])


def steps_until(toy: Toy, sequence: Sequence, state: SequenceState, most: int = 100) -> int:
    for step in range(1, most + 1):
        toy.step()
        if sequence.state is state:
            return step
    raise AssertionError(f"{sequence} after {most} steps")


BROKEN = SourceError("adapter x cannot be read", ["it is torn"])
