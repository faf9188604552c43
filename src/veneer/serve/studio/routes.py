"""Routes of the Teach tab, under /studio/api.

Everything there changes the machine's files or computes for long, so a server with keys requires
one that may train. A body that is not JSON comes as application/octet-stream, which no form of
another site can send.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from veneer.errors import VeneerError
from veneer.files.strict_json import legible
from veneer.serve.http.app import caller_of, catch_errors, position_after, require_train
from veneer.serve.http.download import BYTES_TYPE, Download, download_headers
from veneer.serve.http.json_body import media_type, parsed, read_body
from veneer.serve.http.uploads import Arrivals, read_file
from veneer.serve.limits import BODY_BYTES
from veneer.serve.protocols.body import Body
from veneer.serve.refusals import Refusal, refusal_of
from veneer.serve.studio.bodies import (
    ExportBody,
    JudgeBody,
    KeepBody,
    MethodChoices,
    NoBody,
    PlanBody,
    RowChoices,
    WorkBody,
)
from veneer.serve.studio.events import Look, follow
from veneer.serve.studio.settings import describe_settings
from veneer.serve.studio.studio import Studio
from veneer.serve.studio.training import job_look
from veneer.serve.studio.wording import in_page_words, messages_in_page_words
from veneer.serve.studio.work import work_look

PREFIX = "/studio/api"
UPLOAD_BYTES = 256 * 2**20
DOCUMENT_BYTES = 2**20
MOST_IN_MEMORY = 2
"""Files of the page that arrive at once: they are held in memory."""
QUERY = ("name", "after", "other")
"""Parameters of the page's addresses."""
Answer = Callable[[Request, Any], Awaitable[Any]]


def studio_routes(studio: Studio, closing: Callable[[], bool]) -> list[Route]:
    """Returns the routes of the studio. closing: whether the server ends; streams end then too."""

    arrivals = Arrivals(MOST_IN_MEMORY)

    async def drafts(request: Request, body: None) -> Any:
        return {"data": await studio.run(studio.cards)}

    async def settings(request: Request, body: None) -> Any:
        return {"settings": describe_settings()}

    async def bases(request: Request, body: None) -> Any:
        return {"data": await studio.run(studio.bases.listed)}

    async def upload(request: Request) -> Response:
        _check_upload(request)
        name, owner = request.query_params.get("name", ""), caller_of(request).name
        with arrivals.one():
            content = await read_file(request, UPLOAD_BYTES)
            return _json(await studio.run(lambda: studio.add(name, content, owner)))

    async def set_document(request: Request) -> Response:
        _check_upload(request)
        name, draft_id = request.query_params.get("name", ""), _id(request)
        content = await read_file(request, DOCUMENT_BYTES)
        card = await studio.run(lambda: studio.set_document(draft_id, name, content))
        return _json(card)

    async def remove_document(request: Request, body: NoBody) -> Any:
        return await studio.run(lambda: studio.remove_document(_id(request)))

    async def show(request: Request, body: None) -> Any:
        return await studio.run(lambda: studio.show(_id(request)))

    async def preview(request: Request, body: RowChoices) -> Any:
        return await studio.run(lambda: studio.preview(_id(request), body))

    async def check(request: Request, body: None) -> Any:
        return await studio.check(_id(request))

    async def method(request: Request, body: MethodChoices) -> Any:
        return await studio.run(lambda: studio.choose_method(_id(request), body))

    async def plan(request: Request, body: PlanBody) -> Any:
        return await studio.plan(_id(request), body)

    async def train(request: Request, body: MethodChoices) -> Any:
        owner = caller_of(request).name
        studio.plans.stop(studio.drafts.place(_id(request)))  # it would compete with the trainer
        await studio.results.work.stop(_id(request))  # of the run before
        return await studio.run(lambda: studio.start(_id(request), body, owner))

    async def stop(request: Request, body: NoBody) -> Any:
        return await studio.run(lambda: studio.stop(_id(request)))

    async def resume(request: Request, body: NoBody) -> Any:
        return await studio.run(lambda: studio.resume(_id(request)))

    async def events(request: Request) -> Response:
        require_train(request)
        draft_id, after = _id(request), position_after(request)

        async def progress(after: int) -> dict[str, Any]:
            return await studio.run(lambda: studio.progress(draft_id, after))

        await progress(after)  # a draft without a job is refused before the stream begins
        return _event_stream(job_look(progress, after), closing)

    async def held_out(request: Request, body: None) -> Any:
        return await studio.run_check(lambda: studio.results.held_out(_id(request)))

    async def try_out(request: Request, body: NoBody) -> Any:
        return await studio.run(lambda: studio.results.try_out(_id(request)))

    async def evaluate(request: Request, body: JudgeBody) -> Any:
        return await studio.results.evaluate(_id(request), body.other)

    async def evaluation(request: Request, body: None) -> Any:
        return await studio.results.evaluation(_id(request), _other(request))

    async def evaluation_events(request: Request) -> Response:
        require_train(request)
        draft_id, other_adapter = _id(request), _other(request)
        return await _work_events(lambda: studio.results.evaluation(draft_id, other_adapter))

    async def stop_work(request: Request, body: WorkBody) -> Any:
        await studio.results.work.stop(_id(request), body.kind)
        return {}

    async def export(request: Request, body: ExportBody) -> Any:
        return await studio.results.export(_id(request), body)

    async def exported(request: Request, body: None) -> Any:
        return await studio.results.exported(_id(request))

    async def export_events(request: Request) -> Response:
        require_train(request)
        draft_id = _id(request)
        return await _work_events(lambda: studio.results.exported(draft_id))

    async def _work_events(state: Callable[[], Awaitable[dict[str, Any]]]) -> Response:
        await state()  # an unknown draft is refused before the stream begins
        return _event_stream(work_look(state), closing)

    async def exported_file(request: Request) -> Response:
        require_train(request)
        file, name = await studio.run(lambda: studio.results.exported_file(_id(request)))
        return Download(file, name)

    async def keep(request: Request, body: KeepBody) -> Any:
        may_replace = caller_of(request).scope == "admin"
        return await studio.run(lambda: studio.keep(_id(request), body, may_replace=may_replace))

    async def take(request: Request) -> Response:
        require_train(request)
        kind = str(request.path_params["kind"])
        content, name = await studio.run(lambda: studio.results.take(_id(request), kind))
        return Response(content, media_type=BYTES_TYPE, headers=download_headers(name))

    async def remove(request: Request, body: NoBody) -> Any:
        await studio.results.work.stop(_id(request))
        await studio.run(lambda: studio.remove(_id(request)))
        return {}

    return [
        _get("/settings", settings),
        _get("/bases", bases),
        _get("/drafts", drafts),
        Route(f"{PREFIX}/drafts", _answering(upload), methods=["POST"]),
        _get("/drafts/{id}", show),
        _post("/drafts/{id}/rows", RowChoices, preview),
        Route(f"{PREFIX}/drafts/{{id}}/document", _answering(set_document), methods=["POST"]),
        _post("/drafts/{id}/document/remove", NoBody, remove_document),
        _get("/drafts/{id}/check", check),
        _post("/drafts/{id}/method", MethodChoices, method),
        _post("/drafts/{id}/plan", PlanBody, plan),
        _post("/drafts/{id}/train", MethodChoices, train),
        _post("/drafts/{id}/stop", NoBody, stop),
        _post("/drafts/{id}/resume", NoBody, resume),
        _stream("/drafts/{id}/events", events),
        _get("/drafts/{id}/held_out", held_out),
        _post("/drafts/{id}/try", NoBody, try_out),
        _get("/drafts/{id}/evaluation", evaluation),
        _post("/drafts/{id}/evaluation", JudgeBody, evaluate),
        _stream("/drafts/{id}/evaluation/events", evaluation_events),
        _post("/drafts/{id}/stop_work", WorkBody, stop_work),
        _get("/drafts/{id}/export", exported),
        _post("/drafts/{id}/export", ExportBody, export),
        _stream("/drafts/{id}/export/events", export_events),
        _stream("/drafts/{id}/export/file", exported_file),
        _post("/drafts/{id}/keep", KeepBody, keep),
        _stream("/drafts/{id}/files/{kind}", take),
        _post("/drafts/{id}/remove", NoBody, remove),
    ]


def _check_upload(request: Request) -> None:
    """Raises Refusal 403 without the scope to train, 415 for a type that a form can send."""
    require_train(request)
    if media_type(request) != BYTES_TYPE:
        raise Refusal(415, f"Send the file with content-type: {BYTES_TYPE}.")


def _get(path: str, answer: Answer) -> Route:
    async def endpoint(request: Request) -> Response:
        require_train(request)
        return _json(await answer(request, None))

    return Route(PREFIX + path, _answering(endpoint), methods=["GET"])


def _post(path: str, body: type[Body], answer: Answer) -> Route:
    async def endpoint(request: Request) -> Response:
        require_train(request)
        text = await read_body(request, BODY_BYTES)
        fields = await asyncio.to_thread(lambda: body.read(parsed(text)))
        return _json(await answer(request, fields))

    return Route(PREFIX + path, _answering(endpoint), methods=["POST"])


def _json(value: Any) -> Response:
    """Returns an answer, whose texts may come from a file: those may hold half a surrogate pair,
    which no UTF-8 has."""
    return JSONResponse(legible(messages_in_page_words(value)))


def _answering(endpoint: Callable[[Request], Awaitable[Response]]) -> Any:
    """Turns errors into responses, in the words of the page."""

    async def answer(request: Request) -> Response:
        try:
            return await endpoint(request)
        except (Refusal, VeneerError) as fault:
            refusal = refusal_of(fault)
            raise replace(refusal, message=in_page_words(refusal.message)) from None

    return catch_errors(answer, QUERY)


def _stream(path: str, endpoint: Callable[[Request], Awaitable[Response]]) -> Route:
    """Returns a route whose response is no JSON."""
    return Route(PREFIX + path, _answering(endpoint), methods=["GET"])


def _event_stream(look: Look, closing: Callable[[], bool]) -> Response:
    headers = {"cache-control": "no-store"}
    stream = follow(look, closing)
    return StreamingResponse(stream, media_type="text/event-stream", headers=headers)


def _id(request: Request) -> str:
    return str(request.path_params["id"])


def _other(request: Request) -> str:
    """Returns the other adapter that an evaluation compares, if there is one."""
    return request.query_params.get("other", "")
