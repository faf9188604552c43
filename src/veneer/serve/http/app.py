"""The routes: each reads a request, calls the service and writes the response."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from veneer.errors import VeneerError
from veneer.serve.engine.metrics import MEDIA_TYPE
from veneer.serve.engine.service import Service
from veneer.serve.engine.vllm_adapters import LoadBody, PinBody, UnloadBody, card_of
from veneer.serve.http.details import angle_between, details
from veneer.serve.http.exchange import ClientGone, Exchange, unless_gone
from veneer.serve.http.guard import error_response
from veneer.serve.http.json_body import parsed, read_body
from veneer.serve.http.keys import Caller
from veneer.serve.http.page import page
from veneer.serve.http.paths import (
    ADMIN_BODIES,
    ANY_QUERY,
    BODIES,
    NOT_SERVED,
    PATHS,
    PROTOCOLS,
    QUERY,
    openapi,
)
from veneer.serve.limits import LARGE_BODY
from veneer.serve.protocols.answers import ApiProtocol
from veneer.serve.protocols.classification import (
    ClassifyBody,
    RerankBody,
    classify_response,
    rerank_response,
)
from veneer.serve.protocols.messages import CountBody
from veneer.serve.protocols.request import GenerationRequest
from veneer.serve.protocols.tokens import DetokenizeBody, TokenizeBody
from veneer.serve.refusals import Refusal, brief, refusal_of, shutting_down
from veneer.wording import shown

log = logging.getLogger("veneer.serve")
CLIENT_GONE = 499
"""Status of a request whose client has gone, for the log and the metrics; nobody reads it."""
Handler = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True)
class TeachTab:
    """The routes that the page's Teach tab calls. close: ends their work when the server ends."""

    routes: Sequence[Route]
    close: Callable[[], Awaitable[None]]


def application(
    service: Service, *, routes: Sequence[Route] = (), teach_tab: TeachTab | None = None
) -> Starlette:
    """Makes the application, without the guard in front of it (guard.py). routes: further ones"""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        service.loop.start()
        fine_tuning = service.fine_tuning
        work = [] if fine_tuning is None else [asyncio.create_task(fine_tuning.start_jobs())]
        if service.chooser is not None:
            work.append(asyncio.create_task(service.chooser.prepare()))
        yield
        for task in work:
            task.cancel()
        if teach_tab is not None:
            await teach_tab.close()
        await service.close()

    return Starlette(
        routes=[
            *routes,
            *(() if teach_tab is None else teach_tab.routes),
            *_routes(service, teaches=teach_tab is not None),
        ],
        lifespan=lifespan,
        exception_handlers={HTTPException: _http_error},
    )


def _routes(service: Service, *, teaches: bool) -> list[Route]:
    def post(
        path: str,
        handler: Callable[[Any, Request], Awaitable[Response]],
        read: Callable[[dict[str, Any]], Any] | None = None,
    ) -> Route:
        """Makes a route for bodies. read: validates a body; by default the model of the path's body
        does."""
        read_fields = read or BODIES[path].read

        async def endpoint(request: Request) -> Response:
            if path in ADMIN_BODIES and caller_of(request).scope != "admin":
                message = "This key may not change which adapters are served."
                raise Refusal(403, message, code="wrong_scope")
            if service.loop.closing:
                raise shutting_down()
            text = await read_body(request, service.limits.body_bytes)
            if len(text) > LARGE_BODY:  # the event loop answers others in the meantime
                body = await asyncio.to_thread(lambda: read_fields(parsed(text)))
            else:
                body = read_fields(parsed(text))
            return await handler(body, request)

        return Route(path, catch_errors(endpoint, QUERY.get(path, ())), methods=["POST"])

    def protocol_route(path: str, protocol: ApiProtocol) -> Route:
        async def answer(generation: GenerationRequest, request: Request) -> Response:
            return Exchange(service, protocol, generation, caller_of(request).digest, path)

        return post(path, answer, protocol.read)

    async def count(body: CountBody, request: Request) -> Response:
        (ids,) = await service.ids([body.prompt()], await service.model(body.model))
        return JSONResponse({"input_tokens": len(ids)})

    async def tokenize(body: TokenizeBody, request: Request) -> Response:
        model = await service.model(body.model or service.names.base_name)
        (ids,) = await service.ids([body.prompt_to_encode()], model)
        strings = await service.prompts.strings(ids) if body.return_token_strs else None
        positions = service.prompts.positions
        return JSONResponse(
            {"count": len(ids), "max_model_len": positions, "tokens": ids, "token_strs": strings}
        )

    async def detokenize(body: DetokenizeBody, request: Request) -> Response:
        await service.model(body.model or service.names.base_name)
        return JSONResponse({"prompt": await service.prompts.text(body.tokens)})

    async def classify(body: ClassifyBody, request: Request) -> Response:
        work = service.score_texts(body.model, body.texts(), "input")
        scores = await unless_gone(request.receive, work)
        return JSONResponse(classify_response(body.model, scores))

    async def rerank(body: RerankBody, request: Request) -> Response:
        work = service.score_texts(body.model, body.texts(), "documents", kind="rerank")
        scores = await unless_gone(request.receive, work)
        return JSONResponse(rerank_response(body.model, body.documents, body.top_n, scores))

    async def load(body: LoadBody, request: Request) -> Response:
        name, reference, in_place = body.lora_name, body.lora_path, body.load_inplace
        await service.read_files(lambda: service.names.check(name, reference, in_place=in_place))
        await service.load(reference)
        return PlainTextResponse(service.names.add(name, reference, in_place=in_place))

    async def unload(body: UnloadBody, request: Request) -> Response:
        return PlainTextResponse(
            await service.read_files(lambda: service.names.remove(body.lora_name))
        )

    def pin(*, pinned: bool) -> Callable[[PinBody, Request], Awaitable[Response]]:
        async def change(body: PinBody, request: Request) -> Response:
            await service.pin(body.name, pinned=pinned)
            return JSONResponse({"pinned": pinned})

        return change

    def get(path: str, handler: Handler) -> Route:
        return Route(path, catch_errors(handler, QUERY.get(path, ())), methods=["GET"])

    async def models(request: Request) -> Response:
        return _list(await service.report(service.names.cards))

    async def adapters(request: Request) -> Response:
        return _list([card_of(adapter) for adapter in service.residents.tiers.shown()])

    async def adapter(request: Request) -> Response:
        name, against = request.path_params["name"], request.query_params.get("against")
        library, names = service.residents.library, service.names

        def describe() -> dict[str, Any]:
            entry = names.entry(name)
            if against is None:
                return details(library, entry)
            return angle_between(library, entry, names.entry(against))

        return JSONResponse(await service.report(describe))

    async def runs(request: Request) -> Response:
        return _list(await service.read_files(service.runs.cards))

    async def run(request: Request) -> Response:
        name, after = request.path_params["name"], position_after(request)
        return JSONResponse(await service.read_files(lambda: service.runs.records(name, after)))

    async def index(request: Request) -> Response:
        return page(teaches=teaches)

    async def model(request: Request) -> Response:
        return JSONResponse(
            await service.read_files(lambda: service.names.card(request.path_params["name"]))
        )

    async def metrics(request: Request) -> Response:
        return PlainTextResponse(await service.metrics_text(), media_type=MEDIA_TYPE)

    async def description(request: Request) -> Response:
        return JSONResponse(await service.report(openapi))

    async def health(request: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def ready(request: Request) -> Response:
        return (
            PlainTextResponse("closing\n", 503)
            if service.loop.closing
            else PlainTextResponse("ready\n")
        )

    return [
        *(protocol_route(path, protocol) for path, protocol in PROTOCOLS.items()),
        post("/v1/messages/count_tokens", count),
        post("/tokenize", tokenize),
        post("/detokenize", detokenize),
        post("/v1/classify", classify),
        post("/v1/rerank", rerank),
        post("/rerank", rerank),
        post("/v1/load_lora_adapter", load),
        post("/v1/unload_lora_adapter", unload),
        post("/v1/adapters/pin", pin(pinned=True)),
        post("/v1/adapters/unpin", pin(pinned=False)),
        get("/", index),
        get("/v1/adapters", adapters),
        get("/v1/adapters/{name:path}", adapter),
        get("/v1/runs", runs),
        get("/v1/runs/{name}", run),
        get("/v1/models", models),
        get("/v1/models/{name:path}", model),
        get("/openapi.json", description),
        get("/metrics", metrics),
        get("/healthz", health),
        get("/readyz", ready),
        *(
            Route(path, catch_errors(_not_served, ANY_QUERY), methods=["GET", "POST"])
            for path in NOT_SERVED
        ),
    ]


def _list(entries: list[dict[str, Any]]) -> Response:
    return JSONResponse({"object": "list", "data": entries})


async def _not_served(request: Request) -> Response:
    raise Refusal(
        404, f"{request.url.path} is not served: {NOT_SERVED[request.url.path]}.", code="not_served"
    )


def catch_errors(handler: Handler, query: Collection[str] = ()) -> Handler:
    """Turns every error into a response. Bugs are logged with their traceback.

    query: the parameters that the handler reads from the address; any other is refused
    """

    async def answer(request: Request) -> Response:
        try:
            for name in request.query_params if query is not ANY_QUERY else ():
                if name not in query:
                    name = brief(name, quoted=False)
                    raise Refusal(400, f"{name}: is not supported in the address here.", name)
            return await handler(request)
        except (Refusal, VeneerError) as fault:
            return error_response(refusal_of(fault), request.url.path)
        except ClientGone:
            return Response(status_code=CLIENT_GONE)
        except asyncio.CancelledError:  # the server ends, and the drain's time is over
            return error_response(shutting_down(), request.url.path)
        except Exception as fault:
            log.exception("a bug: %s", type(fault).__name__)
            return error_response(refusal_of(fault), request.url.path)

    return answer


async def _http_error(request: Request, fault: Exception) -> Response:
    """Answers for a path that does not exist, or not with this method."""
    assert isinstance(fault, HTTPException)
    path, message = request.url.path, f"{fault.detail}."
    if fault.status_code == 404:
        hint = f" Did you mean /v1{path}?" if f"/v1{path}" in PATHS else ""
        message = f"There is no path {shown(path[:80])} here.{hint}"
    elif fault.status_code == 405:
        message = (
            f"{request.method} is not allowed here; allowed:"
            f" {(fault.headers or {}).get('Allow', 'other methods')}."
        )
    return error_response(
        Refusal(fault.status_code, message, headers=fault.headers or {}), request.url.path
    )


def position_after(request: Request) -> int:
    """Returns the position from which records are wanted. Refusal: 400."""
    after = request.query_params.get("after", "0")
    if not (after.isascii() and after.isdigit() and len(after) <= 16):
        raise Refusal(400, "after: is the `next` of the answer before, a whole number.", "after")
    return int(after)


def caller_of(request: Request) -> Caller:
    caller: Caller = request.state.caller
    return caller


def require_train(request: Request) -> None:
    """Raises Refusal 403 if the caller's key may not train."""
    if not caller_of(request).may_train:
        raise Refusal(403, "This key may not train, or read training data.", code="wrong_scope")
