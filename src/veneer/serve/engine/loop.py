"""One thread that computes, and what the event loop sees of it: tickets.

    event loop                              the engine's thread
    submit(request) ── commands ──────────> Engine.add       between two steps
    ticket.cancel() ── commands ──────────> Engine.cancel    between two steps
    inbox.taken() <──── one call a step ─── what answers got: all of them, or of each its first
        tokens and its end

Telling a token takes the processors from what computes the next one: whoever sends no pieces is
told the rest at the end. The event loop never touches a tensor, the thread never a socket. What
goes wrong with one request ends that request, in a forward too; what goes wrong with the books of a
step ends those that were in it, and the thread goes on.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from veneer.decoding.engine import Engine
from veneer.decoding.sampling.sampling import TokenChance
from veneer.decoding.schedule.sequence import FinishReason, Request, Sequence
from veneer.errors import QueueFullError, VeneerError, is_out_of_memory
from veneer.kernels.bindings.library import end_helpers
from veneer.serve.refusals import Refusal, shutting_down

log = logging.getLogger("veneer.serve")
T = TypeVar("T")
PATIENCE_SECONDS = 0.005
"""While all that wait wait for their adapters: how often is looked whether one has come."""
GATHERING_SECONDS = 0.01
"""At most: for requests that are being read while nothing is computed, so that one step reads them
all."""


SWITCH_SECONDS = 0.0002
"""Longest time that another thread keeps the interpreter while the engine's thread wants it;
Python's own is 5 ms. The engine gives the interpreter away at every kernel, so while adapters were
loading it waited 5 ms some hundred times a step: a step of 160 tokens of a model of 30 layers took
3.6 to 5.6 s in place of 0.9 s on two busy cores."""


class TokenUpdate(NamedTuple):
    """What one answer got since it was told last. request: its number in the inbox; choice: which
    of its answers.

    error: why it has ended without a reason.
    """

    request: int
    choice: int
    tokens: list[int]
    chances: list[TokenChance]
    reason: FinishReason | None = None
    error: Exception | None = None

    @property
    def ended(self) -> bool:
        return self.reason is not None or self.error is not None


class Inbox:
    """What the answers to some requests get, for the one task that reads it. Of the event loop.

    every_step: a token is told with the step that drew it; else of each answer its first ones, and
    the others when it has ended. taking: asked first while that task waits: whether it takes an
    update, of which the task hears nothing.
    """

    def __init__(self, *, every_step: bool) -> None:
        self.every_step = every_step
        self.taking: Callable[[TokenUpdate], bool] | None = None
        self._told: list[TokenUpdate] = []
        self._waiting: asyncio.Future[None] | None = None  # the task, for the first

    async def taken(self) -> list[TokenUpdate]:
        """All that has come since the last time, once there is anything."""
        if not self._told:
            self._waiting = asyncio.get_running_loop().create_future()
            try:
                await self._waiting
            finally:
                self._waiting = None
        told, self._told = self._told, []
        return told

    def put(self, update: TokenUpdate) -> None:
        if self._waiting is not None and not self._waiting.done():  # it is behind nothing
            try:
                if self.taking is not None and self.taking(update):
                    return
            except Exception as fault:  # of this one: others are told in the same turn
                log.exception("a bug: %s", type(fault).__name__)
                update = update._replace(error=fault)
            self._waiting.set_result(None)
        self._told.append(update)


class Ticket:
    """A request on its way, told of in `inbox` under `number`. Of the event loop."""

    def __init__(self, loop: EngineLoop, request: Request, inbox: Inbox, number: int) -> None:
        self.request, self.inbox, self.number = request, inbox, number
        self.accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when it waits to be answered; raises why it does not."""
        self.accepted.add_done_callback(_retrieve)
        self.answers: tuple[Sequence, ...] = ()
        """Once it is accepted; the engine's thread changes them."""
        self.numbers: tuple[int, ...] = ()
        """The numbers of its answers in the engine. Only the engine's thread reads and writes
        them."""
        self._loop = loop
        self._left = request.choices

    @property
    def new(self) -> int:
        """Tokens that its answers have."""
        return sum(len(answer.new) for answer in self.answers)

    @property
    def cached(self) -> int:
        """Tokens of its prompt that were found and not computed."""
        return self.answers[0].cached_tokens or 0 if self.answers else 0

    def cancel(self) -> None:
        """Whoever asked has gone: its places are free within a step. Nothing, if it has ended."""
        if self._left:
            self._loop._cancel(self)

    def tell(self, update: TokenUpdate) -> None:
        self._left -= update.ended
        self.inbox.put(update)

    def accept(self, answers: tuple[Sequence, ...], fault: Exception | None) -> None:
        self.answers = answers
        if self.accepted.done():
            return
        if fault is None:
            self.accepted.set_result(None)
        else:
            self._left = 0
            self.accepted.set_exception(fault)


@dataclass
class _OpenSequence:
    """An answer that has not ended. told: how many of its tokens are. error: why it is being
    cancelled."""

    answer: Sequence
    ticket: Ticket
    told: int = 0
    error: Exception | None = None

    def news(self) -> TokenUpdate | None:
        """What its ticket is to be told now."""
        answer, told = self.answer, self.told
        ended = answer.reason is not None
        if not ended and (len(answer.new) == told or (told and not self.ticket.inbox.every_step)):
            return None
        new, chances = answer.new[told:], answer.logprobs[told:]
        self.told += len(new)
        error = self.error or answer.error if ended else None
        reason = answer.reason if error is None else None
        return TokenUpdate(self.ticket.number, answer.choice, new, chances, reason, error)


class EngineLoop:
    """engine: for this thread alone from now on. clock: seconds; that of arrivals and deadlines."""

    def __init__(self, engine: Engine, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.steps = 0
        self._engine = engine
        self._most_waiting = engine.scheduler.limits.max_waiting
        self._events: asyncio.AbstractEventLoop | None = None
        self._commands: deque[Callable[[], None]] = deque()
        self._coming = 0  # requests that are being read
        self._adding = 0  # and those that the thread has not seen yet
        self._wake = threading.Event()
        self._closing = self._stopping = self._aborting = False
        self._open: dict[int, _OpenSequence] = {}
        self._switch_seconds = sys.getswitchinterval()
        self._thread = threading.Thread(target=self._run, name="veneer-engine", daemon=True)

    # of the event loop

    def start(self) -> None:
        """Call it on the event loop that tickets are for, in the thread that loaded the base: it
        computes no more."""
        self._events = asyncio.get_running_loop()
        self._switch_seconds = sys.getswitchinterval()
        sys.setswitchinterval(min(SWITCH_SECONDS, self._switch_seconds))
        end_helpers()
        self._thread.start()

    def submit(self, request: Request, inbox: Inbox, number: int = 0) -> Ticket:
        """number: of the request in its inbox. QueueFullError: so many have come during one step.
        Refusal: it is shutting down."""
        if self._closing:
            raise shutting_down()
        if self._adding >= self._most_waiting:
            raise QueueFullError(self._adding, self._most_waiting)
        ticket = Ticket(self, request, inbox, number)
        self._adding += 1
        self._command(lambda: self._add(ticket))
        return ticket

    @contextmanager
    def coming(self) -> Iterator[None]:
        """Within, a request is being read that is submitted behind the block, unless it is
        refused."""
        self._coming += 1
        try:
            yield
        finally:
            self._coming -= 1

    async def ask(self, function: Callable[[Engine], T]) -> T:
        """What a function finds between two steps. It must be short."""
        events = asyncio.get_running_loop()
        found: asyncio.Future[T] = events.create_future()

        def between() -> None:
            try:
                value = function(self._engine)
            except Exception as fault:
                events.call_soon_threadsafe(_settle, found, None, fault)
            else:
                events.call_soon_threadsafe(_settle, found, value, None)

        self._command(between)
        return await found

    def wake(self) -> None:
        """From any thread: something has changed, an adapter has come."""
        self._wake.set()

    def refuse_new(self) -> None:
        """From now on, from any thread."""
        self._closing = True

    def abort(self) -> None:
        """What is open ends within a step, and nothing new comes. From any thread."""
        self._closing = self._aborting = True
        self.wake()

    async def close(self, seconds: float) -> None:
        """No new requests; those that are open have so long to end, and end then. The thread is
        gone afterwards."""
        self._closing = self._stopping = True
        self.wake()
        await asyncio.to_thread(self._thread.join, seconds)
        self.abort()
        await asyncio.to_thread(self._thread.join)
        sys.setswitchinterval(self._switch_seconds)

    @property
    def events(self) -> asyncio.AbstractEventLoop:
        assert self._events is not None, "it has not been started"
        return self._events

    @property
    def open_answers(self) -> int:
        """Those that have not ended."""
        return len(self._open)

    @property
    def closing(self) -> bool:
        return self._closing

    def _command(self, command: Callable[[], None]) -> None:
        self._commands.append(command)
        self._wake.set()

    def _cancel(self, ticket: Ticket) -> None:
        self._command(
            lambda: self._end([self._open[n] for n in ticket.numbers if n in self._open], None)
        )

    # of the thread

    def _run(self) -> None:
        while True:
            if not self._commands and self._engine.scheduler.idle:
                if self._stopping:
                    return
                self._wake.wait()
                self._gather()
            self._wake.clear()
            while self._commands:
                self._commands.popleft()()
            if self._aborting:
                self._end(list(self._open.values()), shutting_down())
            if not self._engine.scheduler.idle:
                self._step()
                if not self._engine.scheduler.running and not self._engine.scheduler.idle:
                    self._wake.wait(PATIENCE_SECONDS)

    def _gather(self) -> None:
        """Waits for those that came together with the one that woke it."""
        until = time.monotonic() + GATHERING_SECONDS
        while self._coming and not self._stopping and (left := until - time.monotonic()) > 0:
            self._wake.clear()
            self._wake.wait(left)

    def _add(self, ticket: Ticket) -> None:
        fault: Exception | None = None
        answers: tuple[Sequence, ...] = ()
        try:
            answers = self._engine.add(ticket.request)
        except Exception as error:  # a mistake of the request, or a bug: it alone ends
            fault = error
        else:
            self._open |= {answer.number: _OpenSequence(answer, ticket) for answer in answers}
            ticket.numbers = tuple(answer.number for answer in answers)

        def accept() -> None:
            self._adding -= 1
            ticket.accept(answers, fault)

        self._later(accept)

    def _end(self, some: list[_OpenSequence], error: Exception | None) -> None:
        for each in some:
            each.error = each.error or error
            self._engine.cancel(each.answer)

    def _step(self) -> None:
        try:
            self._engine.step(self.clock())
        except Exception as fault:
            self._failed(fault)
        self.steps += 1
        told, ended = [], []
        for number, each in self._open.items():
            if (update := each.news()) is not None:
                told.append((each.ticket, update))
                ended += [number] if update.ended else []
        for number in ended:
            error = self._open.pop(number).answer.error
            if error is not None and not isinstance(error, VeneerError):
                log.error("a bug: an answer ends", exc_info=error)
        if told:
            self._later(lambda: _tell(told))

    def _failed(self, fault: Exception) -> None:
        """A step was not computed. Out of memory, the youngest that was in it ends; else all that
        were."""
        scheduler = self._engine.scheduler
        try:
            scheduler.undo_step()
        except AssertionError:  # it failed before there was a plan
            log.debug("no step was under way")
        running = [
            self._open[answer.number] for answer in scheduler.running if answer.number in self._open
        ]
        if is_out_of_memory(fault):
            log.error("out of memory: the youngest of %d requests ends", len(running))
            self._end(
                running[-1:], Refusal(503, "The server is out of memory.", code="out_of_memory")
            )
        else:
            log.error("a step failed: the %d requests in it end", len(running), exc_info=fault)
            self._end(running or list(self._open.values()), fault)

    def _later(self, function: Callable[[], object]) -> None:
        """On the event loop, unless that is gone."""
        try:
            self.events.call_soon_threadsafe(function)
        except RuntimeError:
            log.debug("the event loop has ended")


def _tell(told: list[tuple[Ticket, TokenUpdate]]) -> None:
    for ticket, update in told:
        ticket.tell(update)


def _retrieve(future: asyncio.Future[None]) -> None:
    """Looks at the future's exception, so that asyncio does not log it where its client has
    gone."""
    if not future.cancelled():
        future.exception()


def _settle(future: asyncio.Future[T], value: T | None, fault: Exception | None) -> None:
    if future.done():  # whoever asked has gone
        return
    if fault is None:
        future.set_result(value)  # type: ignore[arg-type]
    else:
        future.set_exception(fault)
