"""Serves the page at /: one HTML file, joined from the files in web/.

Its content security policy allows that one script, by its hash, requests to this server only, and
no HTML made from text.
"""

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
TEACHING = (
    "steps",
    "upload",
    "row_step",
    "findings",
    "settings",
    "document",
    "plan",
    "bases",
    "method_step",
    "follow",
    "train_step",
    "measures",
    "judge_step",
    "exports",
    "keep_step",
)
"""Scripts of the tab Teach, in web/teach/. They come before the last of SCRIPTS."""


def page(*, teaches: bool = False) -> HTMLResponse:
    """Returns the page, which is the same for everyone and reveals nothing about the models.

    teaches: whether it has the tab Teach
    """
    html, headers = _page(teaches)
    return HTMLResponse(html, headers=headers)


@cache
def _page(teaches: bool) -> tuple[str, dict[str, str]]:
    web = files("veneer.serve") / "web"

    def text(*names: str) -> str:
        return "\n".join((web / name).read_text(encoding="utf-8") for name in names)

    scripts = [f"{name}.js" for name in SCRIPTS]
    if teaches:
        scripts[-1:-1] = [f"teach/{name}.js" for name in TEACHING]
    script = text(*scripts)
    style = text("style.css", *["teach/teach.css"] * teaches)
    html = text("index.html")
    for mark, file in (("<!--TAB-->", "teach/tab.html"), ("<!--TEACH-->", "teach/teach.html")):
        html = html.replace(mark, text(file) if teaches else "")
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
