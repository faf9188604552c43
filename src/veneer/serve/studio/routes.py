"""Routes of the Teach tab, under /studio/api.

Everything there changes the machine's files or computes for long, so that it needs an
administrator's key where keys are used. A body that is not JSON comes as
application/octet-stream, which no form of another site can send.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from veneer.serve.http.app import caller_of, catch_errors
from veneer.serve.limits import BODY_BYTES
from veneer.serve.protocols.body import Body
from veneer.serve.protocols.json_body import parsed, read_body, read_bytes
from veneer.serve.refusals import Refusal
from veneer.serve.studio.bodies import NoBody, PlanBody, RowChoices
from veneer.serve.studio.settings import describe_settings
from veneer.serve.studio.studio import Studio

PREFIX = "/studio/api"
UPLOAD_BYTES = 256 * 2**20
Answer = Callable[[Request, Any], Awaitable[Any]]


def studio_routes(studio: Studio) -> list[Route]:
    """Returns the routes of the studio."""

    async def drafts(request: Request, body: None) -> Any:
        return {"data": await studio.run(studio.cards), "base": studio.base_source}

    async def settings(request: Request, body: None) -> Any:
        return {"settings": describe_settings()}

    async def upload(request: Request) -> Response:
        _require_admin(request)
        kind = request.headers.get("content-type", "")
        if kind != "application/octet-stream":
            raise Refusal(415, "Send the file with content-type: application/octet-stream.")
        name = request.query_params.get("name", "")
        content = await read_bytes(request, UPLOAD_BYTES)
        return JSONResponse(await studio.run(lambda: studio.add(name, content)))

    async def show(request: Request, body: None) -> Any:
        return await studio.run(lambda: studio.show(_id(request)))

    async def preview(request: Request, body: RowChoices) -> Any:
        return await studio.run(lambda: studio.preview(_id(request), body))

    async def check(request: Request, body: None) -> Any:
        return await studio.run(lambda: studio.check(_id(request)))

    async def plan(request: Request, body: PlanBody) -> Any:
        return await studio.plan(_id(request), body)

    async def remove(request: Request, body: NoBody) -> Any:
        await studio.run(lambda: studio.drafts.remove(_id(request)))
        return {}

    return [
        _get("/settings", settings),
        _get("/drafts", drafts),
        Route(f"{PREFIX}/drafts", catch_errors(upload), methods=["POST"]),
        _get("/drafts/{id}", show),
        _post("/drafts/{id}/rows", RowChoices, preview),
        _get("/drafts/{id}/check", check),
        _post("/drafts/{id}/plan", PlanBody, plan),
        _post("/drafts/{id}/remove", NoBody, remove),
    ]


def _get(path: str, answer: Answer) -> Route:
    async def endpoint(request: Request) -> Response:
        _require_admin(request)
        return JSONResponse(await answer(request, None))

    return Route(PREFIX + path, catch_errors(endpoint), methods=["GET"])


def _post(path: str, body: type[Body], answer: Answer) -> Route:
    async def endpoint(request: Request) -> Response:
        _require_admin(request)
        text = await read_body(request, BODY_BYTES)
        fields = await asyncio.to_thread(lambda: body.read(parsed(text)))
        return JSONResponse(await answer(request, fields))

    return Route(PREFIX + path, catch_errors(endpoint), methods=["POST"])


def _require_admin(request: Request) -> None:
    if caller_of(request).scope != "admin":
        raise Refusal(403, "This key may not train.", code="wrong_scope")


def _id(request: Request) -> str:
    return str(request.path_params["id"])
