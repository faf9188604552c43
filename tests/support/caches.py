"""Where the source keeps results, found by reading it: what docs/caches.md has to name."""

import ast
from collections.abc import Iterator
from pathlib import Path

import veneer

SOURCE = Path(veneer.__file__).parent
PAGE = Path(__file__).parents[2] / "docs" / "caches.md"
DECORATORS = ("cache", "lru_cache")
CONTAINERS = ("dict", "list", "set", "OrderedDict", "defaultdict", "Counter", "local")
REMEMBERS = ("remember", "structure_proof", "remember_by_values")


def caches() -> set[str]:
    """module.name of each function and module-level container that keeps results, found/KIND and
    folders on disk."""
    found: set[str] = set()
    for path in sorted(SOURCE.rglob("*.py")):
        module = path.relative_to(SOURCE).with_suffix("").as_posix().replace("/", ".")
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found |= {f"{module}.{name}" for name in (*_decorated(tree), *_containers(tree))}
        found |= set(_on_disk(tree))
    return found


def properties() -> set[str]:
    """module.Class of each class that has a cached_property."""
    found = set()
    for path in sorted(SOURCE.rglob("*.py")):
        module = path.relative_to(SOURCE).with_suffix("").as_posix().replace("/", ".")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and any(
                _name(mark) == "cached_property"
                for function in node.body
                if isinstance(function, ast.FunctionDef)
                for mark in function.decorator_list
            ):
                found.add(f"{module}.{node.name}")
    return found


def _name(node: ast.expr) -> str:
    if isinstance(node, ast.Call | ast.Subscript):
        return _name(node.func if isinstance(node, ast.Call) else node.value)
    return (
        node.attr
        if isinstance(node, ast.Attribute)
        else node.id
        if isinstance(node, ast.Name)
        else ""
    )


def _decorated(tree: ast.Module) -> Iterator[str]:
    marks = {
        id(mark)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        for mark in node.decorator_list
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and any(
            _name(mark) in DECORATORS for mark in node.decorator_list
        ):
            yield node.name
        if isinstance(node, ast.Assign) and _is_wrapped(node.value) and id(node.value) not in marks:
            yield _name(node.targets[0])


def _is_wrapped(value: ast.expr) -> bool:
    """True for lru_cache(size)(function)."""
    return (
        isinstance(value, ast.Call)
        and isinstance(value.func, ast.Call)
        and _name(value.func) in DECORATORS
    )


def _containers(tree: ast.Module) -> Iterator[str]:
    """Those that begin empty: somebody fills them."""
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            value, target = (
                node.value,
                node.targets[0] if isinstance(node, ast.Assign) else node.target,
            )
            empty = isinstance(value, ast.Dict | ast.List) and not ast.unparse(value).strip("{}[]")
            called = isinstance(value, ast.Call) and not value.args and not value.keywords
            if empty or (called and (_name(value) in CONTAINERS or "Weak" in _name(value))):
                yield _name(target)


def _on_disk(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and _name(node.func) in REMEMBERS and node.args:
            kinds = [node.args[0].value] if isinstance(node.args[0], ast.Constant) else []
            yield from (f"found/{kind}" for kind in kinds)
        if (
            isinstance(node, ast.BinOp)
            and isinstance(node.left, ast.Call)
            and _name(node.left) == "cache_folder"
        ):
            yield from [str(node.right.value)] if isinstance(node.right, ast.Constant) else []
