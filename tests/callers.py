"""Which tests call which functions of Veneer: noted while they run, one JSON object a test.

    {"test": "tests/kernels/dense/test_rank.py::test_...", "seconds": 0.1, "calls":
        ["kernels/dense/rank.py:down", ...]}

A function is named as its code object is: file and qualified name. What a process of its own calls
is not seen.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import CodeType, FrameType

import pytest


class Calls:
    """A plugin of pytest. Fixtures may serve the tests behind the one that made them: what they
    call counts for those too."""

    def __init__(self, out: Path, source: Path) -> None:
        self.out, self.source = out, str(source) + "/"
        self.seen: dict[int, CodeType] = {}
        self.by_fixtures: set[str] = set()
        self.file = ""

    def _trace(self, frame: FrameType, event: str, arg: object) -> None:
        self.seen[id(frame.f_code)] = frame.f_code

    def _taken(self) -> set[str]:
        codes, self.seen = list(self.seen.values()), {}
        inside = [code for code in codes if code.co_filename.startswith(self.source)]
        return {
            f"{code.co_filename.removeprefix(self.source)}:{code.co_qualname}" for code in inside
        }

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Iterator[None]:
        threading.settrace(self._trace)
        sys.settrace(self._trace)
        try:
            return (yield)
        finally:
            if self.file != (file := item.nodeid.partition("::")[0]):
                self.file, self.by_fixtures = file, set()
            self.by_fixtures |= self._taken()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        began = sum(os.times()[:4])  # computed, not waited, by this process and those that ended
        sys.settrace(self._trace)
        try:
            return (yield)
        finally:
            sys.settrace(None)
            calls = sorted(self._taken() | self.by_fixtures)
            line = {"test": item.nodeid, "seconds": sum(os.times()[:4]) - began, "calls": calls}
            with self.out.open("a") as file:
                file.write(json.dumps(line) + "\n")


class Callers:
    """What such lines say, read back."""

    def __init__(self, lines: Sequence[str]) -> None:
        self.seconds: dict[str, float] = {}
        self.tests: dict[str, list[str]] = {}
        for line in map(json.loads, lines):
            self.seconds[line["test"]] = line["seconds"]
            for function in line["calls"]:
                self.tests.setdefault(function, []).append(line["test"])

    def of(
        self, function: str, files: Sequence[str], seconds: float
    ) -> tuple[list[str], list[str]]:
        """The tests that call it, in the files and elsewhere: the shortest first, as many as take
        that long."""
        near: list[str] = []
        far: list[str] = []
        left = [seconds, seconds]
        for test in sorted(self.tests.get(function, ()), key=lambda test: self.seconds[test]):
            elsewhere = test.partition("::")[0] not in files
            left[elsewhere] -= self.seconds[test]
            if left[elsewhere] >= 0:
                (far if elsewhere else near).append(test)
        return near, far
