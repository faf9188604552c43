"""The paths that the server answers, the body of each, and /openapi.json, which describes them."""

from importlib.metadata import version
from typing import Any

from pydantic.json_schema import models_json_schema

from veneer.serve.engine.vllm_adapters import LoadBody, PinBody, UnloadBody
from veneer.serve.protocols import chat, completions, messages, responses
from veneer.serve.protocols.answers import ApiProtocol
from veneer.serve.protocols.body import Body
from veneer.serve.protocols.classification import ClassifyBody, RerankBody
from veneer.serve.protocols.fine_tuning import CreateJobBody
from veneer.serve.protocols.tokens import DetokenizeBody, TokenizeBody

PROTOCOLS: dict[str, ApiProtocol] = {
    "/v1/chat/completions": chat.PROTOCOL,
    "/v1/completions": completions.PROTOCOL,
    "/v1/responses": responses.PROTOCOL,
    "/v1/messages": messages.PROTOCOL,
}
ADMIN_BODIES: dict[str, type[Body]] = {
    "/v1/load_lora_adapter": LoadBody,
    "/v1/unload_lora_adapter": UnloadBody,
    "/v1/adapters/pin": PinBody,
    "/v1/adapters/unpin": PinBody,
}
"""Paths that change which adapters are served, for an administrator's key."""
BODIES: dict[str, type[Body]] = {
    **{path: protocol.body for path, protocol in PROTOCOLS.items()},
    "/v1/messages/count_tokens": messages.CountBody,
    "/v1/classify": ClassifyBody,
    "/v1/rerank": RerankBody,
    "/rerank": RerankBody,
    "/v1/fine_tuning/jobs": CreateJobBody,
    "/tokenize": TokenizeBody,
    "/detokenize": DetokenizeBody,
    **ADMIN_BODIES,
}
ANY_QUERY = ("*",)
"""Parameters of an address that is answered whatever stands behind it."""
QUERY: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("/", "/metrics", "/healthz", "/readyz"), ANY_QUERY),
    **dict.fromkeys(("/v1/messages", "/v1/messages/count_tokens"), ("beta",)),
    "/v1/adapters/{name:path}": ("against",),
    "/v1/runs/{name}": ("after",),
}
"""Parameters of a path's address; none of other paths. Anthropic's client marks calls of its beta
interface with one, which changes nothing."""
NOT_SERVED = {
    "/v1/embeddings": "a causal language model makes no embeddings",
    "/v1/audio/transcriptions": "text alone is read",
    "/v1/images/generations": "answers are text",
    "/v1/moderations": "ask a model of your own for it",
    "/v1/score": "no model here scores pairs",
}
PATHS = (
    "/",
    *BODIES,
    *NOT_SERVED,
    "/v1/models",
    "/v1/adapters",
    "/v1/runs",
    "/v1/files",
    "/openapi.json",
    "/metrics",
    "/healthz",
    "/readyz",
)
"""Paths that the metrics count one by one."""


def openapi() -> dict[str, Any]:
    """Describes the bodies for OpenAPI's tools."""
    references, definitions = models_json_schema(
        [(body, "validation") for body in dict.fromkeys(BODIES.values())],
        ref_template="#/components/schemas/{model}",
    )
    return {
        "openapi": "3.1.0",
        "info": {"title": "Veneer", "version": version("veneer")},
        "paths": {
            path: {
                "post": {
                    "requestBody": {
                        "required": True,
                        "content": {"application/json": {"schema": references[body, "validation"]}},
                    },
                    "responses": {"200": {"description": "the answer"}},
                }
            }
            for path, body in BODIES.items()
        },
        "components": {"schemas": definitions["$defs"]},
    }
