"""The routes of OpenAI's fine-tuning: /v1/files and /v1/fine_tuning/jobs.

Every one of them needs a key with the scope `train`: files hold training rows. A server without
`--train` answers 404.
"""

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from veneer.serve.engine.fine_tuning import FineTuning, page_of
from veneer.serve.engine.service import Service
from veneer.serve.http.app import Handler, caller_of, catch_errors, require_train
from veneer.serve.http.download import Download
from veneer.serve.http.json_body import parsed, read_body
from veneer.serve.http.paths import ANY_QUERY
from veneer.serve.http.uploads import Arrivals, read_upload
from veneer.serve.protocols.body import Object
from veneer.serve.protocols.fine_tuning import CreateJobBody, checkpoint_objects, event_objects
from veneer.serve.refusals import Refusal, shutting_down

FILES, JOBS = "/v1/files", "/v1/fine_tuning/jobs"
PAGE, MOST_PAGE = 20, 100
MOST_FILES_PAGE = 10_000
PAGED = ("limit", "after")
"""Parameters of an address that asks for a page of a list."""


def fine_tuning_routes(service: Service) -> list[Route]:
    """Makes the routes; on a server that does not train, they say how to turn it on."""
    fine_tuning = service.fine_tuning
    if fine_tuning is None:
        paths = [path for root in (FILES, JOBS) for path in (root, root + "/{rest:path}")]
        methods = ["GET", "POST", "DELETE"]
        return [
            Route(path, catch_errors(_not_served, ANY_QUERY), methods=methods) for path in paths
        ]
    routes = _Routes(service, fine_tuning)
    return [*routes.of_files(), *routes.of_jobs()]


class _Routes:
    def __init__(self, service: Service, fine_tuning: FineTuning) -> None:
        self._service, self._fine_tuning = service, fine_tuning

    def _route(
        self, method: str, path: str, handler: Handler, query: Collection[str] = ()
    ) -> Route:
        async def answer(request: Request) -> Response:
            require_train(request)
            if method != "GET" and self._service.loop.closing:
                raise shutting_down()
            return await handler(request)

        return Route(path, catch_errors(answer, query), methods=[method])

    def _by_id(
        self,
        read: Callable[[str], Any],
        respond: Callable[[Request, Any], Response] = lambda request, value: JSONResponse(value),
    ) -> Handler:
        """Makes a handler that reads or changes the object whose id is in the path."""

        async def answer(request: Request) -> Response:
            name = request.path_params["id"]
            return respond(request, await self._service.use_jobs(lambda: read(name)))

        return answer

    def of_files(self) -> list[Route]:
        fine_tuning, arrivals = self._fine_tuning, Arrivals()
        use_jobs = self._service.use_jobs

        async def upload(request: Request) -> Response:
            with arrivals.one():
                sent = await read_upload(request, fine_tuning.store.limits.file_bytes)
                with sent.file:
                    if sent.purpose != "fine-tune":
                        raise Refusal(400, "purpose: only fine-tune is supported.", "purpose")
                    owner = caller_of(request).name
                    return JSONResponse(
                        await use_jobs(lambda: fine_tuning.upload(sent.file, sent.name, owner))
                    )

        async def listed(request: Request) -> Response:
            purpose = request.query_params.get("purpose")
            files = await use_jobs(fine_tuning.files)
            kept = [file for file in files if purpose in (None, file["purpose"])]
            order = request.query_params.get("order", "desc")
            if order not in ("asc", "desc"):
                raise Refusal(400, "order: is asc or desc.", "order")
            if order == "asc":
                kept.reverse()
            return _page(request, kept, MOST_FILES_PAGE, MOST_FILES_PAGE)

        return [
            self._route("POST", FILES, upload),
            self._route("GET", FILES, listed, (*PAGED, "purpose", "order")),
            self._route("GET", FILES + "/{id}", self._by_id(fine_tuning.file)),
            self._route(
                "GET",
                FILES + "/{id}/content",
                self._by_id(fine_tuning.content, lambda request, file: Download(file)),
            ),
            self._route("DELETE", FILES + "/{id}", self._by_id(fine_tuning.delete_file)),
        ]

    def of_jobs(self) -> list[Route]:
        fine_tuning, store = self._fine_tuning, self._fine_tuning.store
        use_jobs = self._service.use_jobs

        async def create(request: Request) -> Response:
            text = await read_body(request, self._service.limits.body_bytes)
            body = CreateJobBody.read(parsed(text))
            owner = caller_of(request).name
            return JSONResponse(await use_jobs(lambda: fine_tuning.create(body, owner)))

        async def listed(request: Request) -> Response:
            return _page(request, await use_jobs(fine_tuning.describe_all))

        def retrieve(job_id: str) -> Object:
            return fine_tuning.describe(fine_tuning.job(job_id))

        def events(job_id: str) -> list[Object]:
            return event_objects(fine_tuning.job(job_id), store.events(job_id))

        def checkpoints(job_id: str) -> list[Object]:
            return checkpoint_objects(fine_tuning.job(job_id))

        job = JOBS + "/{id}"
        return [
            self._route("POST", JOBS, create),
            self._route("GET", JOBS, listed, PAGED),
            self._route("GET", job, self._by_id(retrieve)),
            self._route("GET", job + "/events", self._by_id(events, _page), PAGED),
            self._route("GET", job + "/checkpoints", self._by_id(checkpoints, _page), PAGED),
            *(
                self._route(
                    "POST", f"{job}/{name}", self._by_id(partial(fine_tuning.change, change=change))
                )
                for name, change in (
                    ("cancel", store.cancel),
                    ("pause", store.pause),
                    ("resume", store.resume),
                )
            ),
        ]


def _page(
    request: Request, objects: list[Object], default: int = PAGE, most: int = MOST_PAGE
) -> Response:
    """Sends as many objects of a list as are wanted. Refusal: 400."""
    text = request.query_params.get("limit", str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 10 and 1 <= int(text) <= most):
        raise Refusal(400, f"limit: is a whole number from 1 to {most:,}.", "limit")
    return JSONResponse(page_of(objects, request.query_params.get("after"), int(text)))


async def _not_served(request: Request) -> Response:
    raise Refusal(
        404,
        "This server does not train. To upload files and start jobs, start it with --train.",
        code="not_served",
    )
