"""Arrays for gguf's writer that are written through Python's file instead of C's.

numpy's tofile reports "8704 requested and 2816 written" on a full disk, without the system's
reason, and nothing at all if the last bytes are lost when C's buffer is flushed.
"""

from typing import Any

import numpy as np


class WritableArray(np.ndarray[Any, Any]):
    """Makes tofile fail as a write does."""

    def tofile(self, fid: Any, sep: str = "", format: str = "%s") -> None:
        fid.write(np.ascontiguousarray(self).view(np.ndarray).reshape(-1).view(np.uint8).data)


def as_writable(array: np.ndarray[Any, Any]) -> WritableArray:
    return array.view(WritableArray)
