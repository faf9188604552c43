"""The routes of OpenAI's fine-tuning: /v1/files and /v1/fine_tuning/jobs.

Every one of them needs a key with the scope `train`: files hold training rows. A server without
`--train` answers 404.
"""

from collections.abc import Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from veneer.jobs.record import TrainingJob
from veneer.serve.engine.fine_tuning import FineTuning, page_of
from veneer.serve.engine.service import Service
from veneer.serve.http.app import Handler, caller_of, catch_errors, require_train
from veneer.serve.http.json_body import parsed, read_body
from veneer.serve.http.uploads import Arrivals, read_upload
from veneer.serve.protocols.fine_tuning import CreateJobBody, checkpoint_objects, event_objects
from veneer.serve.refusals import Refusal, shutting_down

FILES, JOBS = "/v1/files", "/v1/fine_tuning/jobs"
PAGE, MOST_PAGE = 20, 100
MOST_FILES_PAGE = 10_000


def fine_tuning_routes(service: Service) -> list[Route]:
    """Makes the routes; on a server that does not train, they say how to turn it on."""
    fine_tuning = service.fine_tuning
    if fine_tuning is None:
        paths = [path for root in (FILES, JOBS) for path in (root, root + "/{rest:path}")]
        methods = ["GET", "POST", "DELETE"]
        return [Route(path, catch_errors(_not_served), methods=methods) for path in paths]
    routes = _Routes(service, fine_tuning)
    return [*routes.of_files(), *routes.of_jobs()]


class _Routes:
    def __init__(self, service: Service, fine_tuning: FineTuning) -> None:
        self._service, self._fine_tuning = service, fine_tuning

    def _route(self, method: str, path: str, handler: Handler) -> Route:
        async def answer(request: Request) -> Response:
            require_train(request)
            if method != "GET" and self._service.loop.closing:
                raise shutting_down()
            return await handler(request)

        return Route(path, catch_errors(answer), methods=[method])

    # files

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
            if request.query_params.get("order") == "asc":
                kept.reverse()
            limit = _limit(request, MOST_FILES_PAGE, MOST_FILES_PAGE)
            return JSONResponse(page_of(kept, request.query_params.get("after"), limit))

        async def retrieve(request: Request) -> Response:
            file_id = request.path_params["id"]
            return JSONResponse(await use_jobs(lambda: fine_tuning.file(file_id)))

        async def content(request: Request) -> Response:
            file_id = request.path_params["id"]
            path = await use_jobs(lambda: fine_tuning.content(file_id))
            # Never a type that a browser would show as a page of this server.
            headers = {"x-content-type-options": "nosniff", "content-disposition": "attachment"}
            return FileResponse(path, media_type="application/octet-stream", headers=headers)

        async def delete(request: Request) -> Response:
            file_id = request.path_params["id"]
            await use_jobs(lambda: fine_tuning.delete_file(file_id))
            return JSONResponse({"id": file_id, "object": "file", "deleted": True})

        return [
            self._route("POST", FILES, upload),
            self._route("GET", FILES, listed),
            self._route("GET", FILES + "/{id}", retrieve),
            self._route("GET", FILES + "/{id}/content", content),
            self._route("DELETE", FILES + "/{id}", delete),
        ]

    # jobs

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

        async def retrieve(request: Request) -> Response:
            job_id = request.path_params["id"]
            job = await use_jobs(lambda: fine_tuning.describe(fine_tuning.job(job_id)))
            return JSONResponse(job)

        async def events(request: Request) -> Response:
            job_id = request.path_params["id"]

            def read() -> list[dict[str, Any]]:
                job = fine_tuning.job(job_id)
                return event_objects(job, store.events(job_id))

            return _page(request, await use_jobs(read))

        async def checkpoints(request: Request) -> Response:
            job_id = request.path_params["id"]
            return _page(
                request, await use_jobs(lambda: checkpoint_objects(fine_tuning.job(job_id)))
            )

        def change(action: Callable[[str], TrainingJob]) -> Handler:
            async def answer(request: Request) -> Response:
                job_id = request.path_params["id"]
                return JSONResponse(await use_jobs(lambda: fine_tuning.change(job_id, action)))

            return answer

        job = JOBS + "/{id}"
        return [
            self._route("POST", JOBS, create),
            self._route("GET", JOBS, listed),
            self._route("GET", job, retrieve),
            self._route("GET", job + "/events", events),
            self._route("GET", job + "/checkpoints", checkpoints),
            self._route("POST", job + "/cancel", change(store.cancel)),
            self._route("POST", job + "/pause", change(store.pause)),
            self._route("POST", job + "/resume", change(store.resume)),
        ]


def _page(request: Request, objects: list[dict[str, Any]]) -> Response:
    limit = _limit(request, PAGE, MOST_PAGE)
    return JSONResponse(page_of(objects, request.query_params.get("after"), limit))


def _limit(request: Request, default: int, most: int) -> int:
    """Returns how many objects of a list are wanted. Refusal: 400."""
    text = request.query_params.get("limit", str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 10 and 1 <= int(text) <= most):
        raise Refusal(400, f"limit: is a whole number from 1 to {most:,}.", "limit")
    return int(text)


async def _not_served(request: Request) -> Response:
    raise Refusal(
        404,
        "This server does not train. To upload files and start jobs, start it with --train.",
        code="not_served",
    )
