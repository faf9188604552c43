"""The frame of a page: one file without network, script or font, whose texts are escaped."""

from collections.abc import Iterable, Sequence
from html import escape

from veneer.report.style import STYLE


def html_page(title: str, body: str, style: str = "") -> str:
    """Returns a whole page. The policy forbids to load or run anything, even if something slipped
    through the escaping."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; style-src'
        " 'unsafe-inline'\">"
        f"<title>{escape(title)} · Veneer</title><style>{STYLE}{style}</style></head>"
        f"<body><main>{body}</main></body></html>\n"
    )


def section(title: str, content: str, kind: str = "") -> str:
    """Returns a section, or nothing without content. kind: class."""
    opening = f'<section class="{kind}">' if kind else "<section>"
    return f"{opening}<h2>{escape(title)}</h2>{content}</section>" if content else ""


def table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """Returns a table, or nothing without rows. kind: class of a wide one, which scrolls and whose
    cells name their columns."""
    lines = ["".join(_cells(head if kind else (), row)) for row in rows]
    if not lines:
        return ""
    titles = "".join(f"<th>{escape(title)}</th>" for title in head)
    body = "".join(f"<tr>{line}</tr>" for line in ([titles] if titles else []) + lines)
    if not kind:
        return f"<table>{body}</table>"
    return f'<div class=scroll><table class="{kind}">{body}</table></div>'


def _cells(head: Sequence[str], row: Sequence[str]) -> list[str]:
    if not head:
        return [f"<td>{escape(cell)}</td>" for cell in row]
    pairs = zip(head, row, strict=True)
    return [f'<td data-of="{escape(title)}">{escape(cell)}</td>' for title, cell in pairs]
