"""The thread that runs the engine, and the tickets through which the event loop uses it.

    event loop                              the engine's thread
    submit(request) ── commands ──────────> Engine.add       between two steps
    ticket.cancel() ── commands ──────────> Engine.cancel    between two steps
    inbox.next_updates() <── one call a step ── new tokens of the answers

Delivering a token takes processor time from the computation of the next one. So an answer that is
not streamed is delivered twice: its first tokens, and the rest when it ends. The event loop never
touches a tensor, and the thread never a socket. An error in one request ends that request, in a
forward too. An error of a whole step ends the requests in it, and the thread goes on.
"""

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
"""Time between checks for loaded adapters, while every request waits for one."""
GATHERING_SECONDS = 0.01
"""Longest wait of an idle engine for requests that are being read, so that one step has them
all."""
SWITCH_SECONDS = 0.0002
"""Longest time that another thread keeps the interpreter while the engine's thread wants it;
Python's own is 5 ms. The engine gives the interpreter away at every kernel, so while adapters were
loading it waited 5 ms some hundred times a step: a step of 160 tokens of a model of 30 layers took
3.6 to 5.6 s in place of 0.9 s on two busy cores."""


class TokenUpdate(NamedTuple):
    """New tokens of one answer, or its end.

    request: the number of its request in the inbox. choice: the number of the answer. error: why
    the answer ended without a reason.
    """

    request: int
    choice: int
    tokens: list[int]
    logprobs: list[TokenChance]
    reason: FinishReason | None = None
    error: Exception | None = None

    @property
    def ended(self) -> bool:
        return self.reason is not None or self.error is not None


class Inbox:
    """Updates for the answers to some requests, read by one task of the event loop.

    every_step: whether updates come with every step; if not, an answer's first tokens come at once
    and the others when it ends. take_now: called first while the task waits; the task does not see
    an update for which it returns True.
    """

    def __init__(self, *, every_step: bool) -> None:
        self.every_step = every_step
        self.take_now: Callable[[TokenUpdate], bool] | None = None
        self._updates: list[TokenUpdate] = []
        self._first_update: asyncio.Future[None] | None = None  # what the task waits for

    async def next_updates(self) -> list[TokenUpdate]:
        """Waits for the first update, and returns all that have come."""
        if not self._updates:
            self._first_update = asyncio.get_running_loop().create_future()
            try:
                await self._first_update
            finally:
                self._first_update = None
        updates, self._updates = self._updates, []
        return updates

    def put(self, update: TokenUpdate) -> None:
        if self._first_update is not None and not self._first_update.done():
            try:
                if self.take_now is not None and self.take_now(update):
                    return
            except Exception as fault:  # it ends this answer; others come in the same call
                log.exception("a bug: %s", type(fault).__name__)
                update = update._replace(error=fault)
            self._first_update.set_result(None)
        self._updates.append(update)


class Ticket:
    """A submitted request, used on the event loop. Its updates go to `inbox` under `number`."""

    def __init__(self, loop: "EngineLoop", request: Request, inbox: Inbox, number: int) -> None:
        self.request, self.inbox, self.number = request, inbox, number
        self.accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done once the request is queued; raises if it cannot be."""
        self.accepted.add_done_callback(_retrieve)
        self.sequences: tuple[Sequence, ...] = ()
        """The answers, once the request is accepted; the engine's thread changes them."""
        self.sequence_numbers: tuple[int, ...] = ()
        """The numbers of the answers in the engine, for the engine's thread alone."""
        self._loop = loop
        self._open_answers = request.choices

    @property
    def new_tokens(self) -> int:
        return sum(len(sequence.new) for sequence in self.sequences)

    @property
    def cached_tokens(self) -> int:
        """Returns the tokens of the prompt that were in the cache."""
        return self.sequences[0].cached_tokens or 0 if self.sequences else 0

    def cancel(self) -> None:
        """Frees the request's blocks within a step; does nothing once the request has ended."""
        if self._open_answers:
            self._loop.cancel(self)

    def deliver(self, update: TokenUpdate) -> None:
        self._open_answers -= update.ended
        self.inbox.put(update)

    def accept(self, sequences: tuple[Sequence, ...], fault: Exception | None) -> None:
        self.sequences = sequences
        if self.accepted.done():
            return
        if fault is None:
            self.accepted.set_result(None)
        else:
            self._open_answers = 0
            self.accepted.set_exception(fault)


@dataclass
class _OpenSequence:
    """An answer that has not ended. delivered: tokens that its client has. error: why it is being
    cancelled."""

    sequence: Sequence
    ticket: Ticket
    delivered: int = 0
    error: Exception | None = None

    def next_update(self) -> TokenUpdate | None:
        """Returns what to deliver after this step; None if there is nothing."""
        sequence, delivered = self.sequence, self.delivered
        ended = sequence.reason is not None
        waits = len(sequence.new) == delivered or (delivered and not self.ticket.inbox.every_step)
        if waits and not ended:
            return None
        tokens, logprobs = sequence.new[delivered:], sequence.logprobs[delivered:]
        self.delivered += len(tokens)
        error = self.error or sequence.error if ended else None
        reason = sequence.reason if error is None else None
        return TokenUpdate(self.ticket.number, sequence.choice, tokens, logprobs, reason, error)


class EngineLoop:
    """Owns the engine: from now on only this thread may use it.

    clock: seconds, as arrivals and deadlines of requests count them.
    """

    def __init__(self, engine: Engine, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.steps = 0
        self._engine = engine
        self.most_waiting = engine.scheduler.limits.max_waiting
        self._events: asyncio.AbstractEventLoop | None = None
        self._commands: deque[Callable[[], None]] = deque()
        self._expected_requests = 0  # that are being read
        self._unseen_requests = 0  # that the thread has not added yet
        self._wake = threading.Event()
        self._closing = self._stopping = self._aborting = False
        self._open: dict[int, _OpenSequence] = {}
        self._switch_seconds = sys.getswitchinterval()
        self._thread = threading.Thread(target=self._run, name="veneer-engine", daemon=True)

    # Methods for the event loop

    def start(self) -> None:
        """Starts the thread. Call it on the event loop, in the thread that loaded the base; that
        thread must not compute from then on."""
        self._events = asyncio.get_running_loop()
        self._switch_seconds = sys.getswitchinterval()
        sys.setswitchinterval(min(SWITCH_SECONDS, self._switch_seconds))
        end_helpers()
        self._thread.start()

    def submit(self, request: Request, inbox: Inbox, number: int = 0) -> Ticket:
        """Passes a request to the thread. QueueFullError: too many came during one step. Refusal:
        the server is shutting down."""
        if self._closing:
            raise shutting_down()
        if self._unseen_requests >= self.most_waiting:
            raise QueueFullError(self._unseen_requests, self.most_waiting)
        ticket = Ticket(self, request, inbox, number)
        self._unseen_requests += 1
        self._command(lambda: self._add(ticket))
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        def end() -> None:  # the numbers are known once the thread has added the request
            numbers = ticket.sequence_numbers
            self._end([self._open[n] for n in numbers if n in self._open], None)

        self._command(end)

    @contextmanager
    def expecting_request(self) -> Iterator[None]:
        """Announces a request: within the block it is read, and behind it submitted or refused."""
        self._expected_requests += 1
        try:
            yield
        finally:
            self._expected_requests -= 1

    async def run_between_steps(self, function: Callable[[Engine], T]) -> T:
        """Runs a function on the engine's thread. It takes no longer than a step."""
        events = asyncio.get_running_loop()
        result: asyncio.Future[T] = events.create_future()

        def run() -> None:
            try:
                value = function(self._engine)
            except Exception as fault:
                events.call_soon_threadsafe(_settle, result, None, fault)
            else:
                events.call_soon_threadsafe(_settle, result, value, None)

        self._command(run)
        return await result

    def wake(self) -> None:
        """Tells the thread that something has changed, such as a loaded adapter. Thread-safe."""
        self._wake.set()

    def refuse_new(self) -> None:
        """Refuses requests from now on. Thread-safe."""
        self._closing = True

    def abort(self) -> None:
        """Ends open requests within a step and refuses new ones. Thread-safe."""
        self._closing = self._aborting = True
        self.wake()

    async def close(self, seconds: float) -> None:
        """Refuses new requests, gives open ones `seconds` to end, then ends them and the thread."""
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
        return len(self._open)

    @property
    def closing(self) -> bool:
        return self._closing

    def _command(self, command: Callable[[], None]) -> None:
        self._commands.append(command)
        self._wake.set()

    # Methods for the thread

    def _run(self) -> None:
        scheduler = self._engine.scheduler
        while True:
            if not self._commands and scheduler.idle:
                if self._stopping:
                    return
                self._wake.wait()
                self._gather_requests()
            self._wake.clear()
            for _ in range(len(self._commands)):  # those that come meanwhile wait for a step
                self._commands.popleft()()
            if self._aborting:
                self._end(list(self._open.values()), shutting_down())
            if not scheduler.idle:
                self._step()
                if not scheduler.running and not scheduler.idle:
                    self._wake.wait(PATIENCE_SECONDS)

    def _gather_requests(self) -> None:
        """Waits for requests that are being read, so that they start in the same step."""
        until = time.monotonic() + GATHERING_SECONDS
        while (
            self._expected_requests
            and not self._stopping
            and (left := until - time.monotonic()) > 0
        ):
            self._wake.clear()
            self._wake.wait(left)

    def _add(self, ticket: Ticket) -> None:
        fault: Exception | None = None
        sequences: tuple[Sequence, ...] = ()
        try:
            sequences = self._engine.add(ticket.request)
        except Exception as error:  # a wrong request, or a bug: it ends this request alone
            fault = error
        else:
            self._open |= {s.number: _OpenSequence(s, ticket) for s in sequences}
            ticket.sequence_numbers = tuple(sequence.number for sequence in sequences)

        def accept() -> None:
            self._unseen_requests -= 1
            ticket.accept(sequences, fault)

        self._run_on_event_loop(accept)

    def _end(self, sequences: list[_OpenSequence], error: Exception | None) -> None:
        for entry in sequences:
            entry.error = entry.error or error
            self._engine.cancel(entry.sequence)

    def _step(self) -> None:
        try:
            self._engine.step(self.clock())
        except Exception as fault:
            self._end_failed_step(fault)
        self.steps += 1
        updates, ended = [], []
        for number, entry in self._open.items():
            if (update := entry.next_update()) is not None:
                updates.append((entry.ticket, update))
                ended += [number] if update.ended else []
        for number in ended:
            error = self._open.pop(number).sequence.error
            if error is not None and not isinstance(error, VeneerError):
                log.error("a bug: an answer ends", exc_info=error)
        if updates:
            self._run_on_event_loop(lambda: _deliver(updates))

    def _end_failed_step(self, fault: Exception) -> None:
        """Ends the youngest request of the step if memory ran out, else all requests of the
        step."""
        scheduler = self._engine.scheduler
        try:
            scheduler.undo_step()
        except AssertionError:  # it failed before there was a plan
            log.debug("no step was under way")
        running = [self._open[s.number] for s in scheduler.running if s.number in self._open]
        if is_out_of_memory(fault):
            log.error("out of memory: the youngest of %d requests ends", len(running))
            error = Refusal(503, "The server is out of memory.", code="out_of_memory")
            self._end(running[-1:], error)
        else:
            log.error("a step failed: the %d requests in it end", len(running), exc_info=fault)
            self._end(running or list(self._open.values()), fault)

    def _run_on_event_loop(self, function: Callable[[], object]) -> None:
        try:
            self.events.call_soon_threadsafe(function)
        except RuntimeError:
            log.debug("the event loop has ended")


def _deliver(updates: list[tuple[Ticket, TokenUpdate]]) -> None:
    for ticket, update in updates:
        ticket.deliver(update)


def _retrieve(future: asyncio.Future[None]) -> None:
    """Reads the exception, so that asyncio does not log it once the client has gone."""
    if not future.cancelled():
        future.exception()


def _settle(future: asyncio.Future[T], value: T | None, fault: Exception | None) -> None:
    if future.done():  # the client has gone
        return
    if fault is None:
        future.set_result(value)  # type: ignore[arg-type]
    else:
        future.set_exception(fault)
