"""Reads JSON strictly in row files and in texts inside rows.

Duplicate keys, NaN and infinity are refused, and nesting is bounded.
"""

import json
import math
import re
from collections import Counter
from typing import Any

from veneer.data.examples import RowFault
from veneer.files.nesting import MAX_JSON_DEPTH, TOO_DEEP, too_deep

_SPACE = re.compile(r"[ \t\r\n]*")
_NAMED_KEYS = 5


class JSONText:
    """Reads JSON values from a text.

    Faults that json.loads accepts (duplicate keys, NaN) are collected in `faults`, and the end of
    the value is still found.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.faults: list[RowFault] = []
        self._decoder = json.JSONDecoder(
            object_pairs_hook=self._pairs, parse_constant=self._constant, parse_float=self._float
        )

    def value(self, at: int) -> tuple[Any, int]:
        """Reads the value at `at`. Returns it and its end. Raises RowFault if there is no value."""
        try:
            value, end = self._decoder.raw_decode(self.text, at)
        except json.JSONDecodeError as error:
            reason = error.msg.removesuffix(" at").rstrip(
                ": "
            )  # some of Python's messages end like this
            message = f"is not JSON: {reason} at column {error.colno}"
            raise RowFault(
                "D103", message + (f" of line {error.lineno}" if error.lineno > 1 else "")
            ) from None
        except RecursionError:
            raise RowFault("D103", TOO_DEEP) from None
        except ValueError as error:  # a number of thousands of digits
            raise RowFault("D103", f"is not JSON that can be read: {error}") from None
        opened = self.text.count("[", at, end) + self.text.count("{", at, end)
        if opened > MAX_JSON_DEPTH and too_deep(value):
            raise RowFault("D103", TOO_DEEP)
        return value, end

    def skip(self, at: int) -> int:
        """Returns the position after white space."""
        match = _SPACE.match(self.text, at)
        assert match is not None
        return match.end()

    def after(self, at: int) -> str:
        """Returns the character at `at`; empty at the end."""
        return self.text[at : at + 1]

    def _pairs(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            counts = Counter(name for name, _ in pairs)
            duplicates = sorted(name for name, times in counts.items() if times > 1)[:_NAMED_KEYS]
            keys = ", ".join(repr(name[:40]) for name in duplicates)
            self.faults.append(RowFault("D104", f"duplicate key {keys} in one object"))
        return values

    def _constant(self, name: str) -> float:
        self.faults.append(RowFault("D103", f"{name} is not JSON"))
        return 0.0

    def _float(self, text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            self.faults.append(RowFault("D103", f"{text[:40]} is too large for a number"))
        return value


def whole_value(text: str) -> Any:
    """Reads a text that is one JSON value. Raises RowFault."""
    json_text = JSONText(text)
    value, end = json_text.value(json_text.skip(0))
    end = json_text.skip(end)
    if end < len(text):
        raise RowFault("D103", f"is not JSON: something follows the value at column {end + 1}")
    if json_text.faults:
        raise json_text.faults[0]
    return value
