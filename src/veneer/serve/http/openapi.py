"""/openapi.json: the paths that take a body, with the schemas of their bodies."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from pydantic.json_schema import models_json_schema

from veneer.serve.engine.adapters import LoadBody, PinBody, UnloadBody
from veneer.serve.protocols.body import Body
from veneer.serve.protocols.chat import ChatBody
from veneer.serve.protocols.completions import CompletionBody
from veneer.serve.protocols.messages import CountBody, MessageBody
from veneer.serve.protocols.responses import ResponseBody
from veneer.serve.protocols.tokens import DetokenizeBody, TokenizeBody

BODIES: dict[str, type[Body]] = {
    "/v1/chat/completions": ChatBody,
    "/v1/completions": CompletionBody,
    "/v1/responses": ResponseBody,
    "/v1/messages": MessageBody,
    "/v1/messages/count_tokens": CountBody,
    "/tokenize": TokenizeBody,
    "/detokenize": DetokenizeBody,
    "/v1/load_lora_adapter": LoadBody,
    "/v1/unload_lora_adapter": UnloadBody,
    "/v1/adapters/pin": PinBody,
    "/v1/adapters/unpin": PinBody,
}


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
