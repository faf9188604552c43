"""Serves the page at /: one HTML file, joined from the files in web/.

Its content security policy allows that one script, by its hash, requests to this server only, and
no HTML made from text.
"""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib.resources import files

from starlette.responses import HTMLResponse

SCRIPTS = (
    "base",
    "stream",
    "words",
    "columns",
    "ask",
    "code",
    "rows",
    "table",
    "library",
    "runs",
    "start",
)
"""In this order: the files share one scope, and each may use those before it."""


def page() -> HTMLResponse:
    """Returns the page, which is the same for everyone and reveals nothing about the models."""
    html, headers = _page()
    return HTMLResponse(html, headers=headers)


@cache
def _page() -> tuple[str, dict[str, str]]:
    web = files("veneer.serve") / "web"
    style = (web / "style.css").read_text(encoding="utf-8")
    script = "\n".join((web / f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS)
    html = (web / "index.html").read_text(encoding="utf-8")
    html = html.replace("<style>STYLE<", f"<style>{style}<").replace(">SCRIPT<", f">{script}<")
    policy = {
        "default-src": "'none'",
        "script-src": _hash(script),
        "style-src": _hash(style),
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
    }
    return html, {
        "content-security-policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "cache-control": "no-cache",
        "cross-origin-opener-policy": "same-origin",
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
    }


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
