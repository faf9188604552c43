"""Finds the tests of a module's area: the files whose tests should notice a change in it.

These are the test files that import the module. Where none does, those that import what imports it,
and so on. The test files of the folders that mirror the module's follow. C is not imported: its
files have a table.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

CALLS = "kernels/bindings/test_native_calls.py"
OF_C = {
    r"attention/paged": ("kernels/attention/test_paged_attention.py", CALLS),
    r"attention/attention_tiles": (
        "kernels/attention/test_attention_native.py",
        "kernels/test_tiles.py",
        CALLS,
    ),
    r"attention/attention(?!_tiles)": ("kernels/attention/test_attention_native.py", CALLS),
    r"common/tape\.c": ("kernels/tape/test_recorded.py", "kernels/tape/test_layer_tape.py", CALLS),
    r"common/parallel\.c": (
        "kernels/bindings/test_native.py",
        "kernels/tape/test_recorded.py",
        "kernels/dense/test_few_rows.py",
    ),
    r"common/(across|bf16|bits|unroll)\.h": (
        "kernels/dense/test_few_rows.py",
        "quant/test_nf4.py",
        "kernels/packed/test_gguf.py",
    ),
    r"common/(float_vectors|totals)\.h": (
        "kernels/dense/test_fused.py",
        "kernels/attention/test_attention_native.py",
    ),
    r"dense/(few_rows|float_products)(?!_tiles)": (
        "kernels/dense/test_few_rows.py",
        "kernels/dense/test_float_products.py",
        CALLS,
    ),
    r"dense/products": ("kernels/dense/test_products.py", CALLS),
    r"dense/(factors|updates)(?!_tiles)": ("kernels/dense/test_mixes.py", CALLS),
    r"gguf/(?!gguf_tiles)": (
        "kernels/packed/test_gguf.py",
        "kernels/tape/test_recorded.py",
        CALLS,
        "quant/test_nf4.py",
    ),
    r"nf4/": ("quant/test_nf4.py", CALLS),
    r"layers/draw": ("decoding/sampling/test_sampling.py", CALLS),
    r"layers/decoder_step": ("decoding/test_direct.py", CALLS),
    r"layers/dropout": ("kernels/bindings/test_native.py", "kernels/test_references.py", CALLS),
    r"layers/rank": ("kernels/dense/test_rank.py", "kernels/layers/test_block.py", CALLS),
    r"layers/block": ("kernels/layers/test_block.py", CALLS),
    r"layers/(fused|activations)": (
        "kernels/dense/test_fused.py",
        "kernels/test_references.py",
        "kernels/layers/test_block.py",
        CALLS,
    ),
}
"""Files under kernels/native, and their tests. Without a row: what no processor here runs (AMX
tiles), and what asks the processor."""
NOT_RUN = "kernels/cuda/"
"""Needs a device."""
FROM = re.compile(r"^\s*from ((?:veneer|tests)[\w.]*) import (\([^)]*\)|.*)", re.M)
PLAIN = re.compile(r"^\s*import ((?:veneer|tests)[\w.]*)", re.M)


class Areas:
    """Who imports whom in the package and its tests, by dotted names."""

    def __init__(self, root: Path) -> None:
        self.source, self.tests = root / "src" / "veneer", root / "tests"
        files = {
            _dotted(path.relative_to(folder)): path
            for folder, own in ((root / "src", self.source), (root, self.tests))
            for path in sorted(own.rglob("*.py"))
        }
        self.files = {
            name: str(path.relative_to(self.tests))
            for name, path in files.items()
            if path.name.startswith("test_")
            and path.is_relative_to(self.tests)
            and not path.is_relative_to(self.tests / "soak")
        }
        self.importers: dict[str, set[str]] = {name: set() for name in files}
        for name, path in files.items():
            for imported in _imported(path) & files.keys():
                self.importers[imported].add(name)

    def modules(self) -> list[str]:
        """Files of the package that have an area."""
        python = [str(path.relative_to(self.source)) for path in self.source.rglob("*.py")]
        native = self.source / "kernels" / "native"
        c = [
            str(path.relative_to(self.source))
            for path in native.rglob("*.[ch]")
            if of_c(str(path.relative_to(native)))
        ]
        return sorted([name for name in python if not name.startswith(NOT_RUN)] + c)

    def of(self, file: str) -> list[str]:
        """Test files of the area of a file of the package, the nearest first."""
        if not file.endswith(".py"):
            return list(of_c(file.removeprefix("kernels/native/")))
        stem, importers = Path(file).stem, self._importers(_dotted(Path("veneer", file)))
        beside = {
            str(path.relative_to(self.tests))
            for folder in Path(file).parents[:-1]
            for path in (self.tests / folder).glob("test_*.py")
        }

        def distance(name: str) -> tuple[bool, bool, bool, int]:
            size = (self.tests / name).stat().st_size
            return (
                Path(name).stem != f"test_{stem}",
                name not in importers,
                name not in beside,
                size,
            )

        return sorted(importers | beside, key=distance)

    def _importers(self, module: str) -> set[str]:
        """The test files from which the fewest imports lead to the module."""
        seen = level = {module}
        while level:
            level = {name for one in level for name in self.importers[one]} - seen
            if tests := {self.files[name] for name in level & self.files.keys()}:
                return tests
            seen = seen | level
        return set()


def of_c(file: str) -> Iterable[str]:
    """Test files of a file under kernels/native; none if nothing here runs it."""
    return next((tests for place, tests in OF_C.items() if re.match(place, file)), ())


def _dotted(file: Path) -> str:
    return ".".join(file.with_suffix("").parts).removesuffix(".__init__")


def _imported(path: Path) -> set[str]:
    """Dotted names that a file imports, from the package or its tests, wherever in it."""
    text, names = path.read_text(encoding="utf-8"), set()
    for module, words in FROM.findall(text):
        names |= {module, *(f"{module}.{word}" for word in re.findall(r"\w+", words))}
    return names | set(PLAIN.findall(text))
