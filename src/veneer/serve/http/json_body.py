"""Reads a request's JSON strictly, with bounds on bytes, time and depth."""

import asyncio
import json
from collections import Counter
from typing import Any

from starlette.requests import ClientDisconnect, Request

from veneer.files.nesting import TOO_DEEP, text_too_deep
from veneer.files.strict_json import finite_float, refuse_constant
from veneer.serve.limits import BODY_SECONDS, MOST_DISCARDED
from veneer.serve.refusals import Refusal


async def read_body(request: Request, most_bytes: int) -> bytes:
    """Reads a body that its header declares as JSON. Refusal: 400, 408, 413 or 415."""
    if media_type(request) != "application/json":
        raise Refusal(415, "The body must be JSON: send the header content-type: application/json.")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise Refusal(415, "The body must not be compressed.")
    return await read_bytes(request, most_bytes)


def media_type(request: Request) -> str:
    """Returns the body's content-type without its parameters."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def read_bytes(request: Request, most_bytes: int) -> bytes:
    """Reads the whole body. Refusal: 400, 408 or 413."""
    text, received = bytearray(), 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                received += len(part)
                if received <= most_bytes:
                    text += part
                elif received > MOST_DISCARDED:
                    break
    except TimeoutError:
        raise Refusal(408, f"The body did not arrive within {BODY_SECONDS:g} seconds.") from None
    except ClientDisconnect:
        raise Refusal(400, "The body was cut short.") from None
    if received > most_bytes:
        raise Refusal(
            413, f"The body is larger than {most_bytes:,} bytes.", headers={"connection": "close"}
        )
    return bytes(text)


def parsed(text: bytes) -> dict[str, Any]:
    """Parses JSON more strictly than json.loads: no duplicate keys, NaN, infinity or deep
    nesting. Refusal: 400."""
    try:
        decoded = text.decode("utf-8")
        if text_too_deep(decoded):
            raise Refusal(400, f"The body {TOO_DEEP}.")
        value = json.loads(
            decoded,
            object_pairs_hook=_unique,
            parse_constant=refuse_constant,
            parse_float=finite_float,
        )
    except ValueError as fault:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise Refusal(400, f"The body is not JSON: {str(fault)[:200]}") from None
    if not isinstance(value, dict):
        raise Refusal(400, "The body is not a JSON object.")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        repeated = next(name for name, count in counts.items() if count > 1)
        raise ValueError(f"the key {repeated[:40]!r} stands there twice")
    return table
