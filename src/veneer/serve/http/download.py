"""Sends a file for downloading, never as a type that a browser would show as a page of this site.

The file is open before the answer begins. If it is deleted meanwhile, its content still arrives
whole. Needs Linux or macOS, as jobs do.
"""

import os
from typing import BinaryIO
from urllib.parse import quote

from starlette.responses import FileResponse
from starlette.types import Receive, Scope, Send

BYTES_TYPE = "application/octet-stream"


class Download(FileResponse):
    """Sends an open file, or the range of it that was asked for, and closes it. name: for the
    browser; empty: the browser takes one from the address"""

    def __init__(self, file: BinaryIO, name: str = "") -> None:
        self._file = file
        super().__init__(
            f"/dev/fd/{file.fileno()}",
            stat_result=os.fstat(file.fileno()),
            media_type=BYTES_TYPE,
            headers=download_headers(name),
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._file:
            await super().__call__(scope, receive, send)


def download_headers(name: str) -> dict[str, str]:
    return {
        "content-disposition": "attachment" + (f"; filename*=UTF-8''{quote(name)}" if name else ""),
        "content-security-policy": "sandbox",
        "x-content-type-options": "nosniff",
    }
