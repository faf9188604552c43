"""The engine's thread has the processors to itself."""

import asyncio
import gc
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.serve.server import made_base
from tests.support.tiny import tiny_tokenizer
from veneer.decoding.engine import Engine
from veneer.decoding.schedule.adapters import FixedAdapters
from veneer.decoding.schedule.limits import Limits
from veneer.decoding.schedule.sequence import Request
from veneer.errors import QueueFullError
from veneer.kernels.bindings import library as native
from veneer.serve.engine import loop as loop_module
from veneer.serve.engine.generation import Generation
from veneer.serve.engine.loop import EngineLoop, Inbox
from veneer.serve.engine.token_text import TokenTexts
from veneer.serve.protocols.request import GenerationRequest
from veneer.serve.refusals import Refusal


def test_the_thread_that_loaded_the_base_keeps_no_helpers_once_another_computes():
    if not sys.platform.startswith("linux") or not torch.backends.openmp.is_available():
        pytest.skip("threads are counted as Linux counts them")
    threads, before = Path("/proc/self/task"), torch.get_num_threads()
    base = made_base()
    engine = Engine(base, budget_bytes=2**20, adapters=FixedAdapters({}))

    async def started() -> None:
        loop = EngineLoop(engine)
        helped = len(list(threads.iterdir()))
        loop.start()
        try:
            deadline = time.monotonic() + 10
            while len(list(threads.iterdir())) > helped - 4 + 1 and time.monotonic() < deadline:
                await asyncio.sleep(0.01)
            assert len(list(threads.iterdir())) <= helped - 4 + 1  # the engine's own
        finally:
            await loop.close(1.0)

    try:
        torch.set_num_threads(5)
        torch.ones(2**20).add(1)
        asyncio.run(started())
    finally:
        torch.set_num_threads(before)
        native.end_helpers()


def test_threads_that_load_adapters_hand_the_interpreter_over_soon_while_a_server_runs():
    before = sys.getswitchinterval()

    async def started() -> float:
        loop = EngineLoop(Engine(made_base(), budget_bytes=2**20, adapters=FixedAdapters({})))
        loop.start()
        try:
            return sys.getswitchinterval()
        finally:
            await loop.close(1.0)

    assert asyncio.run(started()) == pytest.approx(
        loop_module.SWITCH_SECONDS,
        abs=1e-5,  # whole microseconds, rounded down each time
    )
    assert sys.getswitchinterval() == before


@pytest.mark.parametrize("every_step", [True, False])
def test_whoever_sends_no_pieces_is_told_the_first_token_and_the_rest_at_the_end(every_step):
    engine = Engine(made_base(), budget_bytes=2**20, adapters=FixedAdapters({}))

    async def asked() -> list[list[int]]:
        loop = EngineLoop(engine)
        loop.start()
        try:
            inbox = Inbox(every_step=every_step)
            ticket = loop.submit(Request(prompt=(5, 6, 7), max_new_tokens=30), inbox)
            told = []
            while not told or not told[-1].ended:
                assert (
                    sum(len(update.tokens) for update in told) <= ticket.new_tokens
                )  # what usage counts is never behind
                told += await inbox.next_updates()
            assert ticket.new_tokens == 30
            return [update.tokens for update in told]
        finally:
            await loop.close(1.0)

    told = asyncio.run(asked())
    assert [len(update) for update in told] == ([1] * 30 if every_step else [1, 29])


@pytest.mark.parametrize("refused", [False, True])
def test_requests_that_come_together_are_read_in_one_step(refused, monkeypatch):
    """What is read and then refused is not waited for longer than a moment."""
    monkeypatch.setattr(loop_module, "GATHERING_SECONDS", 0.1 if refused else 10.0)
    engine = Engine(made_base(), budget_bytes=2**20, adapters=FixedAdapters({}))

    async def asked() -> int:
        loop, inbox = EngineLoop(engine), Inbox(every_step=False)
        loop.start()

        async def one(number: int) -> None:
            with loop.expecting_request():
                await asyncio.sleep(0.002 * number)
            loop.submit(Request(prompt=(5, 6, number), max_new_tokens=1), inbox, number)

        async def never() -> None:
            with loop.expecting_request():
                await asyncio.sleep(10)

        other = asyncio.create_task(never()) if refused else None
        try:
            await asyncio.gather(*map(one, range(4)))
            ended = 0
            while ended < 4:
                ended += sum(each.ended for each in await inbox.next_updates())
            return loop.steps
        finally:
            if other is not None:
                other.cancel()
            await loop.close(1.0)

    began = time.monotonic()
    assert asyncio.run(asked()) == 1
    assert time.monotonic() - began < 5.0


async def begin_generation(
    loop: EngineLoop, requests: list[Request]
) -> tuple[Generation, asyncio.Task[Generation]]:
    """Queues requests, and returns the task of a client that waits until they are accepted."""
    request = GenerationRequest(model="tiny", prompts=())
    generation = Generation(loop, requests, request, TokenTexts(tiny_tokenizer()))
    client = asyncio.create_task(generation.__aenter__())
    await asyncio.sleep(0)
    return generation, client


@pytest.mark.parametrize("accepted", range(4))
def test_a_client_that_leaves_while_its_prompts_are_accepted_leaves_none_running(accepted):
    """Whoever waits for the acceptance of prompts is cancelled at one of them: those behind it must
    not run on."""
    engine = Engine(made_base(), budget_bytes=2**20, adapters=FixedAdapters({}))
    requests = [Request(prompt=(5, 6, number), max_new_tokens=300) for number in range(4)]

    async def left() -> int:
        loop = EngineLoop(engine)
        generation, client = await begin_generation(loop, requests)
        for ticket in generation._tickets[:accepted]:
            ticket.accepted.set_result(None)
        await asyncio.sleep(0)
        client.cancel()
        with pytest.raises(asyncio.CancelledError):
            await client
        loop.start()
        await loop.run_between_steps(lambda engine: None)
        for _ in range(400):
            if not loop.open_answers:
                break
            await asyncio.sleep(0.005)
        new = sum(ticket.new_tokens for ticket in generation._tickets)
        await loop.close(1.0)
        return new

    assert asyncio.run(left()) < 100


def test_a_refused_request_whose_client_has_gone_leaves_no_traceback(caplog):
    engine = Engine(
        made_base(), budget_bytes=2**20, adapters=FixedAdapters({}), limits=Limits(max_waiting=3)
    )
    requests = [Request(prompt=(5, 6, number), max_new_tokens=3, choices=3) for number in range(3)]

    async def refused() -> None:
        loop = EngineLoop(engine)
        generation, client = await begin_generation(loop, requests)
        generation._tickets[0].accepted.set_exception(QueueFullError(3, 3))
        with pytest.raises(Refusal) as caught:
            await client
        assert caught.value.status == 429
        loop.start()  # it refuses the last of the three, of which nobody asks any more
        await loop.run_between_steps(lambda engine: None)
        await loop.close(10.0)
        generation._tickets.clear()
        gc.collect()

    asyncio.run(refused())
    assert [record.getMessage() for record in caplog.records] == []
