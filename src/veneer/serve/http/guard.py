"""Checks every request before anything else reads it, gives it an id and logs it.

    Host     must be an address, localhost, or a name that the server was started with. Otherwise a
             foreign page could reach the server under a name of its own (DNS rebinding)
    Origin   a browser says which site a request comes from; other sites are refused
    key      `authorization: Bearer KEY`, or Anthropic's `x-api-key`

The log has no prompts, no keys and no query strings.
"""

import ipaddress
import logging
import re
import secrets
import time
import unicodedata
from collections.abc import Callable, Collection
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from veneer.errors import ConfigError
from veneer.serve.http.keys import ApiKeys
from veneer.serve.refusals import Refusal
from veneer.wording import shown

log = logging.getLogger("veneer.serve")
OPEN = ("/healthz", "/readyz", "/")
"""Paths that need no key, because they reveal nothing."""
_ID = re.compile(r"[\w.:-]{1,128}")
KEY_NEEDED = "An API key is required: send the header authorization: Bearer KEY."
UNKNOWN_KEY = (
    "This API key is not one of the server's keys. Check it, or ask the server's operator for one."
)
_PATH_CHARACTERS = 80
_HOST = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*\.?")
_DEFAULT_PORTS = {"http": 80, "https": 443}
"""Browsers leave these out of an origin."""


class Guard:
    """An ASGI application that checks requests before another one answers them.

    counted: called with (path, status) of each response.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: ApiKeys,
        hosts: Collection[str] = (),
        origins: Collection[str] = (),
        counted: Callable[[str, int], None] | None = None,
    ) -> None:
        self.app, self.keys, self.counted = app, keys, counted
        self.hosts = {"localhost", *(host.lower() for host in hosts)}
        self.origins = frozenset(map(as_browsers_send, origins))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        sent_id = headers.get("x-request-id", "")
        request_id = sent_id if _ID.fullmatch(sent_id) else secrets.token_hex(8)
        began, status = time.monotonic(), 0

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        scope["state"] = {**scope.get("state", {}), "request_id": request_id}
        try:
            refusal = self._check(scope, headers)
            if refusal is not None:
                await error_response(refusal, scope["path"])(scope, receive, sending)
            else:
                await self.app(scope, receive, sending)
        finally:
            if scope["path"] not in OPEN:  # probes ask for these every few seconds
                path = shown(scope["path"][:_PATH_CHARACTERS])
                log.info(
                    "%s %s %s %.0f ms %s",
                    scope["method"],
                    path,
                    status or "gone",
                    1000 * (time.monotonic() - began),
                    request_id,
                )
            if self.counted is not None:
                self.counted(scope["path"], status)

    def _check(self, scope: Scope, headers: Headers) -> Refusal | None:
        host = headers.get("host", "")
        if not self._known_host(host):
            return Refusal(
                403,
                "This Host is not allowed. To allow it, start the server with --allow-host.",
                code="unknown_host",
            )
        origin = headers.get("origin")
        if origin is not None and not self._known_origin(origin, host):
            return Refusal(
                403,
                "Requests from other sites are not allowed. To allow this one, start the server"
                " with --allow-origin.",
                code="unknown_origin",
            )
        if scope["path"] in OPEN:
            return None
        key = _given_key(headers)
        caller = self.keys.caller(key)
        if caller is None:
            return Refusal(
                401,
                KEY_NEEDED if key is None else UNKNOWN_KEY,
                headers={"www-authenticate": "Bearer"},
            )
        scope["state"]["caller"] = caller
        return None

    def _known_host(self, host: str) -> bool:
        """Accepts all addresses: nobody's DNS can point an address elsewhere."""
        try:
            name = (urlsplit(f"//{host}").hostname or "").lower().rstrip(".")
        except ValueError:
            return False
        return name in self.hosts or _is_address(name)

    def _known_origin(self, origin: str, host: str) -> bool:
        # Behind a proxy the scheme may differ.
        same_site = {f"http://{host}".lower(), f"https://{host}".lower()}
        return origin.lower() in same_site or origin.lower() in self.origins


def check_origins(origins: Collection[str]) -> None:
    """Checks values of --allow-origin. ConfigError: browsers do not send one of them as an
    origin."""
    faults = [fault for origin in origins if (fault := _origin_fault(origin)) is not None]
    if faults:
        raise ConfigError(
            "--allow-origin must name a site",
            faults,
            "For instance: --allow-origin https://page.example",
        )


def _origin_fault(text: str) -> str | None:
    """Says why no browser sends this as the origin of a page; None if one may."""
    fault = f"{shown(text[:80])} is not SCHEME://HOST or SCHEME://HOST:PORT"
    try:
        parts = urlsplit(text)
        host, _ = parts.hostname or "", parts.port
    except ValueError:
        return fault
    if text.lower() != f"{parts.scheme}://{parts.netloc}".lower() or "@" in text:
        return fault
    if "*" in host:
        return f"{shown(text[:80])} has a *: list every site"
    if _HOST.fullmatch(_punycode(host)) is None and not _is_address(host):
        return fault
    return (
        None
        if text.isascii()
        else f"{shown(text[:80])} has letters beyond ASCII: browsers send {_punycode(host)}"
    )


def _punycode(host: str) -> str:
    """Writes a host's name as DNS and browsers do."""
    labels = unicodedata.normalize("NFC", host).split(".")
    return ".".join(
        label if label.isascii() else f"xn--{label.encode('punycode').decode()}" for label in labels
    )


def as_browsers_send(origin: str) -> str:
    """Writes a valid origin in lower case and without the scheme's default port."""
    parts = urlsplit(origin)
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    port = "" if parts.port in (None, _DEFAULT_PORTS.get(parts.scheme)) else f":{parts.port}"
    return f"{parts.scheme}://{host}{port}"


def for_browsers(app: ASGIApp, origins: Collection[str]) -> ASGIApp:
    """Lets pages of these origins read the answers of a guarded application (CORS).

    Before a page's request, a browser asks without the key whether it may be sent (a preflight).
    This is answered before any other check. Errors have the headers too, or a page could not show
    them.
    """
    if not origins:
        return app
    return CORSMiddleware(
        app,
        allow_origins=[as_browsers_send(origin) for origin in origins],
        allow_methods=("GET", "POST", "DELETE"),
        allow_headers=("*",),  # clients of OpenAI and Anthropic send headers of their own
        allow_private_network=True,  # a page of the web asks a server at home
        expose_headers=("x-request-id", "retry-after", "x-should-retry"),
    )


def error_response(refusal: Refusal, path: str) -> JSONResponse:
    """Writes an error as the path's clients expect it: Anthropic's also read a type."""
    body: dict[str, Any] = refusal.body
    if path.startswith("/v1/messages"):
        body = {"type": "error", **body}
    return JSONResponse(body, refusal.status, headers=refusal.all_headers)


def _given_key(headers: Headers) -> str | None:
    kind, _, key = headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer" and key.strip():
        return key.strip()
    return headers.get("x-api-key")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
