"""Server-sent events of a job, an evaluation or an export, so that the page need not poll it."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from veneer.errors import VeneerError
from veneer.serve.refusals import Refusal, refusal_of
from veneer.serve.studio.wording import messages_in_page_words

EVERY_SECONDS = 0.7
"""Seconds between two looks."""
SILENT_LOOKS = 20
"""Looks without news after which an event is sent anyway: proxies close silent connections."""


@dataclass(frozen=True)
class Update:
    """The result of a look.

    content    the event, as JSON
    is_open    whether a later look may show something else
    is_news    whether the event is worth sending
    has_more   whether the next look already has news
    """

    content: dict[str, Any]
    is_open: bool
    is_news: bool = True
    has_more: bool = False


Look = Callable[[], Awaitable[Update]]


async def follow(look: Look, closing: Callable[[], bool]) -> AsyncIterator[bytes]:
    """Yields events until nothing can change any more, or the server ends.

    An event with `fault` says that what was followed is gone.
    """
    silent_looks = 0
    while not closing():
        try:
            update = await look()
        except (Refusal, VeneerError) as fault:  # the draft or its job was deleted
            yield _event({"fault": refusal_of(fault).message})
            return
        silent_looks += 1
        if update.is_news or silent_looks > SILENT_LOOKS:
            silent_looks = 0
            yield _event(update.content)
        if update.has_more:
            continue
        if not update.is_open:
            return
        await asyncio.sleep(EVERY_SECONDS)


def _event(content: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(messages_in_page_words(content))}\n\n".encode()
