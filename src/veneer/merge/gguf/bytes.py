"""Arrays as gguf's writer takes them, which write themselves through Python's file and not through
C's.

numpy's own tofile says "8704 requested and 2816 written" of a full disk, without the system's
reason, and says nothing at all where the last bytes are lost as C's buffer is emptied.
"""

from typing import Any

import numpy as np


class WritableArray(np.ndarray[Any, Any]):
    """An array whose tofile fails as a write does."""

    def tofile(self, fid: Any, sep: str = "", format: str = "%s") -> None:
        fid.write(np.ascontiguousarray(self).view(np.ndarray).reshape(-1).view(np.uint8).data)


def written(array: np.ndarray[Any, Any]) -> WritableArray:
    return array.view(WritableArray)
