"""Small changes of source text, of which each should fail a test: another comparison, operator or
constant, a negated condition, a statement left out, two arguments exchanged.

Annotations, messages, asserts and constants of a module (sizes that change speed alone) are left
out. C is changed by its text.
"""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass

COMPARISONS = {
    "<": "<=",
    "<=": "<",
    ">": ">=",
    ">=": ">",
    "==": "!=",
    "!=": "==",
    "in": "not in",
    "not in": "in",
    "is": "is not",
    "is not": "is",
}
OPERATORS = {
    "+": "-",
    "-": "+",
    "*": "/",
    "/": "*",
    "//": "*",
    "%": "*",
    "**": "*",
    "&": "|",
    "|": "&",
    "@": "*",
}
SYMMETRIC = {"max", "min", "maximum", "minimum", "equal", "intersect1d"}
"""Functions to which the order of two arguments is nothing."""
LEFT_OUT = (ast.Raise, ast.Assert, ast.JoinedStr, ast.Import, ast.ImportFrom)


@dataclass(frozen=True)
class Mutation:
    """One edit: bytes start to end of the file become `after`."""

    file: str
    line: int
    kind: str
    start: int
    end: int
    before: str
    after: str
    function: str = ""
    """Its qualified name, in Python."""

    def of(self, text: bytes) -> bytes:
        return text[: self.start] + self.after.encode() + text[self.end :]

    def __str__(self) -> str:
        short = " ".join(self.before.split())
        return (
            f"{self.file}:{self.line} {self.kind}: {short[:60]} ->"
            f" {' '.join(self.after.split())[:60] or 'nothing'}"
        )


class _Python(ast.NodeVisitor):
    """Every mutation within the functions of one file."""

    def __init__(self, file: str, text: str) -> None:
        self.file, self.text, self.found = file, text, []  # type: tuple[str, str, list[Mutation]]
        self.data = text.encode()
        self.lines = [0]
        for line in self.data.splitlines(keepends=True):
            self.lines.append(self.lines[-1] + len(line))
        self.names: list[str] = []
        self.in_function = False
        self.visit(ast.parse(text))

    def place(self, node: ast.AST) -> tuple[int, int]:
        """Bytes of a node in the file."""
        start = self.lines[node.lineno - 1] + node.col_offset  # type: ignore[attr-defined]
        last: int = node.end_lineno  # type: ignore[attr-defined]
        end: int = node.end_col_offset  # type: ignore[attr-defined]
        return start, self.lines[last - 1] + end

    def add(self, node: ast.AST, kind: str, start: int, end: int, after: str) -> None:
        if self.in_function:
            before = self.data[start:end].decode()
            line: int = node.lineno  # type: ignore[attr-defined]
            function = ".".join(self.names).removesuffix(".<locals>")
            self.found.append(Mutation(self.file, line, kind, start, end, before, after, function))

    def between(
        self, node: ast.AST, left: ast.AST, right: ast.AST, kind: str, table: dict[str, str]
    ) -> None:
        """The operator that stands between two operands."""
        start, end = self.place(left)[1], self.place(right)[0]
        gap = self.data[start:end].decode()
        for symbol in sorted(table, key=len, reverse=True):
            if (at := gap.find(symbol)) >= 0:
                self.add(node, kind, start + at, start + at + len(symbol), table[symbol])
                return

    def visit(self, node: ast.AST) -> None:
        if isinstance(node, LEFT_OUT):
            return
        if isinstance(node, ast.If | ast.IfExp | ast.While):
            start, end = self.place(node.test)
            self.add(node, "condition", start, end, f"not ({self.data[start:end].decode()})")
        super().visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        before, self.in_function = self.in_function, True
        self.names += [node.name, "<locals>"]
        for child in node.body:
            self.visit(child)
        del self.names[-2:]
        self.in_function = before

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.names.append(node.name)
        self.generic_visit(node)
        self.names.pop()

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_Compare(self, node: ast.Compare) -> None:
        operands = [node.left, *node.comparators]
        for left, right in itertools.pairwise(operands):
            self.between(node, left, right, "comparison", COMPARISONS)
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        self.between(node, node.left, node.right, "operator", OPERATORS)
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        self.between(node, node.values[0], node.values[1], "and, or", {"and": "or", "or": "and"})
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, ast.Not | ast.USub):
            start, end = self.place(node)
            self.add(node, "sign", start, end, self.data[slice(*self.place(node.operand))].decode())
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        start, end = self.place(node)
        if isinstance(node.value, bool):
            self.add(node, "constant", start, end, str(not node.value))
        elif isinstance(node.value, int):
            self.add(node, "constant", start, end, str(node.value + 1))
        elif isinstance(node.value, float):
            self.add(node, "constant", start, end, repr(node.value * 2 if node.value else 1.0))

    def visit_keyword(self, node: ast.keyword) -> None:
        if node.arg != "strict":  # of zip: guards what cannot happen
            self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Constant):
            return  # a docstring
        if isinstance(node.value, ast.Call):
            self.add(node, "left out", *self.place(node), "pass")
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self.add(node, "left out", *self.place(node), "pass")
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        simple = [a for a in node.args if isinstance(a, ast.Name | ast.Attribute)]
        named = (
            node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        )
        if (
            named not in SYMMETRIC
            and len(node.args) >= 2
            and simple[:2] == node.args[:2]
            and ast.dump(simple[0]) != ast.dump(simple[1])
        ):
            (start, middle), (after, end) = self.place(simple[0]), self.place(simple[1])
            one, gap, other = (
                self.data[a:b].decode() for a, b in ((start, middle), (middle, after), (after, end))
            )
            self.add(node, "exchanged", start, end, other + gap + one)
        self.generic_visit(node)


def of_c(file: str, text: str) -> Iterator[Mutation]:
    """Mutations of C, by its text: comparisons, signs with spaces around them, small numbers;
    comments left out."""
    bare = re.sub(
        r"/\*.*?\*/|//[^\n]*|\"[^\"\n]*\"|^#[^\n]*",
        lambda m: " " * len(m.group()),
        text,
        flags=re.S | re.M,
    )
    assert text.isascii()  # places are in bytes
    grain = r"veneer_parallel\(.*,(?P<out>[^,]*)\);"  # items that a thread takes at least
    smaller_or_larger = (
        r"((?!\d)[\w.>-]+(?: - \w+)?)(?P<out> [<>] )(-?[\w.]+) \? (?:\1 : \3|\3 : \1)\b"
    )
    for match in [*re.finditer(grain, bare), *re.finditer(smaller_or_larger, bare)]:
        start, end = match.span("out")
        bare = bare[:start] + " " * (end - start) + bare[end:]

    def line(match: re.Match[str]) -> int:
        return text.count("\n", 0, match.start()) + 1

    swaps = {
        " < ": " <= ",
        " <= ": " < ",
        " > ": " >= ",
        " >= ": " > ",
        " == ": " != ",
        " + ": " - ",
        " - ": " + ",
        " * ": " + ",
        " += ": " -= ",
        " && ": " || ",
        " / ": " * ",
        " >> ": " << ",
    }
    for before, after in swaps.items():
        for match in re.finditer(re.escape(before), bare):
            yield Mutation(file, line(match), "operator", *match.span(), before, after)
    for match in re.finditer(r"(?<![\w.])[1-9]\d?(?![\w.])", bare):
        number = str(int(match.group()) + 1)
        yield Mutation(file, line(match), "constant", *match.span(), match.group(), number)


def edits_of(file: str, text: str) -> list[Mutation]:
    """All mutations of a file of the package."""
    return _Python(file, text).found if file.endswith(".py") else list(of_c(file, text))
