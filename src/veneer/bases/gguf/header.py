"""Reads hyperparameters in the header of a .gguf file by key and type, and names unread keys.

Not known here: which keys an architecture has (config.py).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

NO_EFFECT = ("rope.scaling.finetuned", "tensor_data_layout")
"""Keys that llama.cpp prints or ignores: they affect no computation."""

Shapes = Mapping[str, tuple[int, ...]]
"""Name of a tensor in the file -> its shape, rows first."""


class Hyperparameters:
    """The keys of one architecture. Reading a key marks it as used; faults are collected."""

    def __init__(self, architecture: str, fields: Mapping[str, Any], tensors: Shapes) -> None:
        prefix = f"{architecture}."
        self.architecture, self.tensors = architecture, tensors
        self.faults: list[str] = []
        self._values = {
            key.removeprefix(prefix): value
            for key, value in fields.items()
            if key.startswith(prefix)
        }
        self._read: set[str] = set(NO_EFFECT)

    def size(self, key: str, default: int | None = None) -> int:
        """Reads a whole number of at least 1. A missing or other value is a fault, and 1 is
        returned."""
        value = self._common_value(key, default)
        if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
            return value
        self.refuse(key, value, "a whole number of at least 1 is expected")
        return 1

    def real(self, key: str, default: float | None = None) -> float:
        """Reads a number, as it was before it was rounded to single precision."""
        value = self._common_value(key, default)
        if isinstance(value, int | float) and not isinstance(value, bool) and np.isfinite(value):
            return undo_single_precision(float(value))
        self.refuse(key, value, "a number is expected")
        return 1.0

    def choice(self, key: str, default: str, known: tuple[str, ...]) -> str:
        """Reads one of the known values; any other is a fault."""
        value = self._common_value(key, default)
        if value in known:
            return str(value)
        self.refuse(key, value, f"known are {', '.join(known)}")
        return default

    def window(self) -> int:
        """Reads the size of the sliding window; 0 if the header names none or 0."""
        value = self._common_value("attention.sliding_window", 0)
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            return value
        self.refuse("attention.sliding_window", value, "a whole number is expected")
        return 0

    def layer_types(self, layers: int, period: int) -> list[str]:
        """Reads which layers have a window: all but every `period`-th, unless the header has its
        own pattern."""
        key = "attention.sliding_window_pattern"
        self._read.add(key)
        value = self._values.get(key, period)
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            sliding = [value == 0 or layer % value < value - 1 for layer in range(layers)]
        elif isinstance(value, list) and len(value) >= layers and set(value) <= {0, 1}:
            sliding = [bool(flag) for flag in value[:layers]]
        else:
            self.refuse(key, value, "a period, or true and false for each layer, is expected")
            sliding = [False] * layers
        return ["sliding_attention" if has_window else "full_attention" for has_window in sliding]

    def expect(self, key: str, value: float | bool) -> None:
        """Refuses any other value: llama.cpp or transformers' model has this one built in."""
        stored = self._common_value(key, value)
        same = stored is value if isinstance(value, bool) else stored == value
        if not same and (not isinstance(stored, float) or undo_single_precision(stored) != value):
            self.refuse(key, stored, f"{value} is expected")

    def refuse_unread(self) -> None:
        """Names every key that no function read."""
        for key in sorted(self._values.keys() - self._read):
            self.refuse(key, self._values[key], f"unknown for {self.architecture}")

    def refuse(self, key: str, value: Any, reason: str) -> None:
        """Adds a fault that names the key."""
        stored = "is missing" if value is None else str(value)[:60]
        self.faults.append(f"{self.architecture}.{key}  {stored}: {reason}")

    def _common_value(self, key: str, default: Any) -> Any:
        """Returns the value; for an array of one value per layer, the common value.

        Returns None if the key is missing, and the array if layers differ.
        """
        self._read.add(key)
        value = self._values.get(key, default)
        if not isinstance(value, list):
            return value
        return (
            value[0] if value and all(layer_value == value[0] for layer_value in value) else value
        )


def undo_single_precision(value: float) -> float:
    """Returns the shortest number that single precision rounds to `value`: 9.99999974e-06 becomes
    1e-5.

    Numbers that are not single precision stay.
    """
    rounded = np.float32(value)
    return float(str(rounded)) if value == float(rounded) else value
