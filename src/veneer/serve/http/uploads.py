"""Reads an uploaded file, in bounded memory.

A file of a multipart body goes to an unnamed temporary file while it arrives, so an upload that is
cut off leaves nothing behind. A file that is the whole body is held in memory.
"""

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from veneer.serve.http.connection import allow_more_time
from veneer.serve.http.json_body import media_type
from veneer.serve.limits import BODY_SECONDS, MOST_DISCARDED, MOST_UPLOADS, UPLOAD_SECONDS
from veneer.serve.refusals import Refusal, brief

MOST_FORM_BYTES = 64 * 2**10
"""Bytes of a multipart body beside the file: boundaries, headers and other fields."""
MOST_FIELDS = 8
MOST_FIELD_BYTES = 4096


@dataclass(frozen=True)
class Upload:
    """An uploaded file at its beginning. The reader closes it."""

    file: BinaryIO
    name: str
    purpose: str


class Arrivals:
    """Counts the files that arrive now. Refusal: 429, there are too many."""

    def __init__(self, most: int = MOST_UPLOADS) -> None:
        self._most, self._count = most, 0

    @contextmanager
    def one(self) -> Iterator[None]:
        """Counts a file until the end of the block."""
        if self._count >= self._most:
            raise Refusal(429, f"{self._count} files arrive now: send this one again later.")
        self._count += 1
        try:
            yield
        finally:
            self._count -= 1


async def read_upload(request: Request, most_bytes: int) -> Upload:
    """Reads fields `purpose` and `file`. Refusal: 400, 408, 413 or 415."""
    if media_type(request) != "multipart/form-data":
        raise Refusal(415, "The body must be multipart/form-data, with a file and a purpose.")
    stream = _bounded(request, most_bytes, beside=MOST_FORM_BYTES)
    parser = MultiPartParser(
        request.headers, stream, max_files=1, max_fields=MOST_FIELDS, max_part_size=MOST_FIELD_BYTES
    )
    try:
        with _refusing_late():
            async with asyncio.timeout(UPLOAD_SECONDS):
                form = await parser.parse()
    except MultiPartException as fault:
        raise Refusal(400, f"The body is not a form: {fault.message[:200]}") from None
    file, purpose = form.get("file"), form.get("purpose")
    try:
        if not isinstance(file, UploadFile):
            raise Refusal(400, "file: is missing.", "file")
        if not isinstance(purpose, str):
            raise Refusal(400, "purpose: is missing.", "purpose")
        if unknown := sorted(set(form) - {"file", "purpose"}):
            raise Refusal(400, f"{brief(unknown[0], quoted=False)}: is not supported.", unknown[0])
    except Refusal:
        await form.close()
        raise
    return Upload(file.file, file.filename or "", purpose)


async def read_file(request: Request, most_bytes: int) -> bytes:
    """Reads a file that is the whole body. Refusal: 400, 408 or 413."""
    content = bytearray()
    with _refusing_late():
        async with asyncio.timeout(UPLOAD_SECONDS):
            async for part in _bounded(request, most_bytes):
                content += part
    return bytes(content)


@contextmanager
def _refusing_late() -> Iterator[None]:
    """Turns a file that arrives too late, or in part, into a Refusal: 408 or 400."""
    try:
        yield
    except TimeoutError:
        raise Refusal(408, f"The file did not arrive within {UPLOAD_SECONDS:g} seconds.") from None
    except ClientDisconnect:
        raise Refusal(400, "The body was cut short.") from None


async def _bounded(
    request: Request, most_bytes: int, *, beside: int = 0
) -> AsyncGenerator[bytes, None]:
    """Yields the body. Refusal: it is too large, or the client sends nothing for too long.

    most_bytes: of the file. beside: bytes of the body beside it

    The rest of a too large body is read for a while: a client that still sends would not see the
    answer.
    """
    parts, received = request.stream().__aiter__(), 0
    while True:
        try:
            async with asyncio.timeout(BODY_SECONDS):
                part = await anext(parts, None)
        except TimeoutError:
            raise Refusal(408, f"No data arrived for {BODY_SECONDS:g} seconds.") from None
        if part is None:
            break
        allow_more_time(request.scope)
        received += len(part)
        if received <= most_bytes + beside:
            yield part
        elif received > most_bytes + beside + MOST_DISCARDED:
            break
    if received > most_bytes + beside:
        raise Refusal(
            413,
            f"The file is larger than {most_bytes:,} bytes.",
            "file",
            headers={"connection": "close"},
        )
