"""Decisions about the whole project, held: public names, file sizes, and what must never stand in
the source."""

import argparse
import ast
import json
import os
import re
import shutil
import subprocess
import textwrap
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import PretrainedConfig, PreTrainedModel

import veneer
from tests.support.pages import blocks
from veneer.cli.main import command_module

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src").rglob("*.py"))

# Ways to run what a stranger wrote. Models, adapters, templates and run files come from strangers.
BANNED = {
    "pickle": r"(import|from) c?pickle|\bpickle\.|allow_pickle\s*=\s*True",
    "torch.load": r"torch\.load\(",
    "eval": r"(?<![\w.])eval\(",
    "exec": r"(?<![\w.])exec\(",
    "a shell": r"shell\s*=\s*True|os\.system\(",
    "yaml.load": r"yaml\.(unsafe_|full_)?load\(",
    "extractall": r"extractall",
    "code from models": r"trust_remote_code\s*=\s*True",
}


def names(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_public_names_are_sorted_and_unique():
    def place(name: str) -> tuple[bool, bool, str]:
        return not name.isupper(), name[0].islower(), name.lower()

    assert veneer.__all__ == sorted(set(veneer.__all__), key=place)


@pytest.mark.parametrize("name", veneer.__all__)
def test_every_public_name_is_there(name):
    value = getattr(veneer, name)
    assert value.__name__ == name


def test_no_package_or_module_has_the_name_of_a_public_function():
    assert [name for name in veneer.__all__ if find_spec(f"veneer.{name}")] == []


def test_an_unknown_name_is_an_attribute_error_that_lists_the_names():
    with pytest.raises(AttributeError, match="it has DPO, IPO, KTO, ORPO, AdamW, Base, Bottleneck"):
        _ = veneer.Lora


def test_dir_shows_the_public_names():
    assert set(veneer.__all__) < set(dir(veneer))


def test_the_version_is_what_pip_knows():
    from importlib.metadata import version

    assert version("veneer") == veneer.__version__


def test_the_formatter_has_no_exceptions():
    everywhere = [
        path for folder in ("src", "tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")
    ]
    mark = re.compile(r"# fmt" + r": ?(skip|off)")
    assert not [names(path) for path in everywhere if mark.search(path.read_text())]


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a checkout")
def test_the_subject_of_a_commit_is_one_idea_and_fits_a_line():
    asked = ["git", "-C", str(ROOT), "log", "-40", "--no-merges", "--format=%s"]
    subjects = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.splitlines()
    assert not [subject for subject in subjects if len(subject) >= 72 or subject.endswith(".")]


def test_the_architecture_names_every_folder_and_no_other():
    page = (ROOT / "docs" / "architecture.md").read_text()
    listing = page.partition("## Folders")[2].partition("```text\n")[2].partition("```")[0]
    folder, listed = "", set()
    for line in listing.splitlines():
        name = line.split()[0]
        folder = folder if line.startswith(" ") else name
        listed.add(name if name == folder else folder + name)
        listed |= {folder + inner for inner in re.findall(r"; (\w+/):", line)}
    source = ROOT / "src" / "veneer"
    folders = {
        f"{path.relative_to(source).as_posix()}/"
        for path in source.rglob("*")
        if (path.is_dir() and any(path.glob("*.py"))) or path.name == "native"
    }
    assert listed == folders


def test_every_file_that_the_architecture_names_exists():
    page = (ROOT / "docs" / "architecture.md").read_text()
    source = ROOT / "src" / "veneer"
    assert not [
        name for name in re.findall(r"`([\w/]+\.py)`", page) if not (source / name).is_file()
    ]


@pytest.mark.parametrize("what", BANNED)
def test_the_source_never_runs_what_a_stranger_wrote(what):
    found = [
        f"{names(path)}:{number}"
        for path in SOURCES
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(BANNED[what], line.partition("#")[0])
    ]
    assert not found


@pytest.mark.parametrize(
    ("what", "line"),
    [
        ("pickle", "import pickle"),
        ("torch.load", "torch.load(path, weights_only=True)"),
        ("eval", "x = eval(text)"),
        ("exec", "exec(code)"),
        ("a shell", "run(command, shell=True)"),
        ("yaml.load", "yaml.load(text, Loader=L)"),
        ("extractall", "archive.extractall(folder)"),
        ("code from models", "load(trust_remote_code=True)"),
    ],
)
def test_the_search_would_find_each(what, line):
    assert re.search(BANNED[what], line)
    assert not re.search(
        BANNED[what], "model.eval(); re.exec_module; yaml.safe_load(text); retrieval(x)"
    )


# What a weight format means is declared in quant/config.py, what a method is in adapters/config.py:
# others read that. Nobody compares names or classes; a method's own file layout knows its settings,
# and an assert only tells what is known.
ROOMS_OF_FORMATS = ("quant/",)
ROOMS_OF_METHODS = (
    "adapters/",
    "formats/bottleneck.py",
    "formats/peft/config.py",
    "formats/prefix.py",
)


@cache
def tree(source: str) -> ast.Module:
    return ast.parse(source)


def compared(source: str) -> list[tuple[int, object]]:
    """(line, text) of every text that something is compared with: ==, in a list, a case, the
    beginning or end of one.

    A text that is looked for within another is no comparison.
    """
    found: list[ast.expr] = []
    for node in ast.walk(tree(source)):
        if isinstance(node, ast.Compare):
            within = isinstance(node.ops[0], ast.In | ast.NotIn)
            found += [*([] if within else [node.left]), *node.comparators]
        elif isinstance(node, ast.MatchValue):
            found.append(node.value)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            found += node.args if node.func.attr in ("startswith", "endswith") else []
    flat = [
        each
        for operand in found
        for each in (
            operand.elts if isinstance(operand, ast.Tuple | ast.List | ast.Set) else [operand]
        )
    ]
    return [(each.lineno, each.value) for each in flat if isinstance(each, ast.Constant)]


def outside(folders: tuple[str, ...]) -> list[Path]:
    source = ROOT / "src" / "veneer"
    return [path for path in SOURCES if not path.relative_to(source).as_posix().startswith(folders)]


def test_nobody_asks_which_weight_format_it_is():
    from veneer.quant.config import FORMATS

    found = [
        f"{names(path)}:{line} {text!r}"
        for path in outside(ROOMS_OF_FORMATS)
        for line, text in compared(path.read_text())
        if text in FORMATS
    ]
    assert not found, "declare it in quant/config.py"


def classes_asked(source: str) -> list[tuple[int, str]]:
    """(line, name) of every class that something is asked for, outside asserts: isinstance,
    issubclass, type(x) is C."""
    nodes = list(ast.walk(tree(source)))
    asserted = {
        id(each) for node in nodes if isinstance(node, ast.Assert) for each in ast.walk(node)
    }
    found: list[ast.expr] = []
    for node in nodes:
        if id(node) in asserted:
            continue
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in (
            "isinstance",
            "issubclass",
        ):
            found += node.args[1:]
        elif isinstance(node, ast.Compare):
            found += [node.left, *node.comparators]
        elif isinstance(node, ast.MatchClass):
            found.append(node.cls)
    named = [node for operand in found for node in ast.walk(operand)]
    return [
        (n.lineno, getattr(n, "id", getattr(n, "attr", "")))
        for n in named
        if isinstance(n, ast.expr)
    ]


def test_nobody_asks_which_method_it_is():
    from veneer.adapters import config
    from veneer.adapters.config import METHODS, MethodConfig

    settings = {
        name for name, value in vars(config).items() if isinstance(value, type(MethodConfig))
    }
    classes = {name for name in settings if issubclass(getattr(config, name), MethodConfig)}
    assert classes > {"LoRA", "AdapterConfig", "MethodConfig"}
    found = [
        f"{names(path)}:{line} {asked!r}"
        for path in outside(ROOMS_OF_METHODS)
        for asked_in, asked_for in ((compared, set(METHODS)), (classes_asked, classes))
        for line, asked in asked_in(path.read_text())
        if asked in asked_for
    ]
    assert not found, "declare it in adapters/config.py, or in a table by method where it belongs"


@pytest.mark.parametrize(
    "line",
    [
        "isinstance(x, LoRA)",
        "issubclass(x, (DoRA, LoRA))",
        "isinstance(x, DoRA | LoRA)",
        "isinstance(x, config.LoRA)",
        "type(x) is LoRA",
        "x in (LoRA, DoRA)",
        "match x:\n    case LoRA(): pass",
    ],
)
def test_a_question_for_a_class_would_be_found(line):
    assert "LoRA" in [name for _, name in classes_asked(line)]
    assert not classes_asked(
        "assert isinstance(x, LoRA); y = LoRA(); table = {LoRA: 1}; table[LoRA]"
    )


@pytest.mark.parametrize(
    "line",
    [
        'x == "nf4"',
        '"nf4" != x',
        'x in ("fp4", "nf4")',
        'x not in ["nf4"]',
        'x.startswith("nf4")',
        "match x:\n    case 'nf4': pass",
    ],
)
def test_a_comparison_would_be_found(line):
    assert "nf4" in [text for _, text in compared(line)]
    assert not compared('found["nf4"]; "nf4" in text; f(x="nf4"); x = "nf4"')


DOCUMENTED = {"_replace", "_fields_", "_type_", "_length_", "_exit"}
"""Public in spite of the underscore: of named tuples, ctypes and os."""


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in DOCUMENTED


def private_names(tree: ast.AST) -> set[str]:
    """The private names that a file defines: functions, classes, fields, attributes of self."""
    found = set()
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                found.add(name)
            case ast.ClassDef(name=name) | ast.AnnAssign(target=ast.Name(id=name)):
                found.add(name)
            case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()):
                found.add(name)
    return {name for name in found if is_private(name)}


def private_uses(tree: ast.AST, defined: set[str]) -> list[tuple[int, str]]:
    """Line and name of each private part of something that was imported, or that nobody here
    defined."""
    found, imported = [], set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
            imported |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] != "veneer":
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
            imported |= {alias.asname or alias.name for alias in node.names}
        else:
            continue
        found += [(node.lineno, name) for name in modules if any(map(is_private, name.split(".")))]
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=value, attr=name) if is_private(name):
                while isinstance(value, ast.Attribute):
                    value = value.value
                root = value.id if isinstance(value, ast.Name) else ""
                if root in imported or name not in defined:
                    found.append((node.lineno, name))
            case ast.Call(func=ast.Name(id="getattr" | "hasattr" | "setattr"), args=arguments):
                name = arguments[1].value if isinstance(arguments[1], ast.Constant) else ""
                if isinstance(name, str) and is_private(name) and name not in defined:
                    found.append((node.lineno, name))
    return found


def test_private_parts_of_other_libraries_are_used_in_one_room():
    trees = {path: tree(path.read_text()) for path in SOURCES}
    anywhere = set().union(*map(private_names, trees.values()))
    others = {*dir(torch.nn.Module()), *dir(torch.Tensor), *dir(PreTrainedModel)}
    others |= {*dir(PretrainedConfig()), *dir(argparse.ArgumentParser())}
    assert not [
        f"{names(path)}:{line} {name}"
        for path, tree in trees.items()
        if path.parent.name != "private"
        for line, name in private_uses(tree, anywhere - others | private_names(tree))
    ]


@pytest.mark.parametrize(
    "line",
    [
        "import torch._C",
        "from torch._C import x",
        "import os; os._secret()",
        "def f(module): return module._modules",
        "getattr(model, '_supports_sdpa', False)",
    ],
)
def test_a_private_part_would_be_found(line):
    assert private_uses(ast.parse(line), {"_own"})
    assert not private_uses(
        ast.parse("import os; os._exit(0); x._own; getattr(x, '_own')"), {"_own"}
    )


def test_importing_changes_nothing_elsewhere():
    """No module calls anything for its effect, or writes into another's table, when imported."""
    for path in SOURCES:
        for statement in tree(path.read_text()).body:
            targets = statement.targets if isinstance(statement, ast.Assign) else []
            writes = any(isinstance(target, ast.Subscript | ast.Attribute) for target in targets)
            value = statement.value if isinstance(statement, ast.Expr) else None
            assert not writes and not isinstance(value, ast.Call), f"{path}:{statement.lineno}"


def test_every_module_imports():
    """import-linter says that none of them needs another to have been imported before."""
    optional = {"triton": "triton", "liger": "liger_kernel", "bitsandbytes": "bitsandbytes"}
    for path in SOURCES:
        needed = optional.get(path.stem.partition("_")[0]) if path.parent.name == "cuda" else None
        if needed is None or find_spec(needed):
            import_module(
                ".".join(path.relative_to(ROOT / "src").with_suffix("").parts).removesuffix(
                    ".__init__"
                )
            )


@pytest.mark.parametrize(
    "name", ["LICENSE", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile", ".ci/run"]
)
def test_the_files_that_a_newcomer_looks_for_are_there(name):
    assert (ROOT / name).stat().st_size > 100


@pytest.mark.skipif(shutil.which("make") is None, reason="no make is on the path")
def test_make_alone_sets_up_and_says_what_comes_next():
    planned = subprocess.run(
        ["make", "-n", "VENV=/nowhere/venv"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert (
        "pip install --editable ." in planned and "make demo" in planned and "make test" in planned
    )
    assert "veneer demo\n" not in planned and "pytest" not in planned


@pytest.mark.skipif(shutil.which("make") is None, reason="no make is on the path")
def test_processes_of_make_keep_what_python_compiled_for_the_next_one():
    said = subprocess.run(
        ["make", "--no-print-directory", "-f", "Makefile", "-f", "-", "said"],
        input="said:\n\t@echo kept=$$PYTHONDONTWRITEBYTECODE\n",
        cwd=ROOT,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert said == "kept=\n"


def test_the_readme_begins_with_commands_that_work_on_a_checkout():
    first = next(block for block in blocks((ROOT / "README.md").read_text()) if not block.kind)
    assert [line.split()[:2] for line in first.text.splitlines()[1:]] == [
        ["make", "demo"],
        ["make", "test"],
    ]


def test_commands_import_by_the_names_that_help_shows():
    from veneer.cli.main import COMMANDS

    for name in COMMANDS:
        command = command_module(name)
        assert callable(command.add_arguments)
        assert callable(command.run)
        assert command.__doc__


# The README invites: it is read in one sitting. Figures and their caveats stand in
# docs/benchmarks.md.
MOST_PARAGRAPH_LINES, COLUMNS = 4, 110
MOST_CELL_WORDS = 12
TOP = [
    ROOT / name
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "AGENTS.md", "llms.txt")
]
PAGES = [*TOP, *sorted(ROOT.glob("docs/**/*.md"))]
SHORT = [
    page for page in PAGES if page.name not in ("architecture.md", "families.md")
]  # pictures, a list


def prose(text: str) -> list[str]:
    """Paragraphs and items of lists, one string each; without fences, tables, headings and
    pictures."""
    kept = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    kept = re.sub(r"^(#|\||!\[).*$", "", kept, flags=re.MULTILINE)
    paragraphs = re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.) )", kept)
    return [" ".join(text.split()) for text in paragraphs if text.strip()]


def cells(text: str) -> list[str]:
    rows = [line.strip().strip("|") for line in text.splitlines() if line.startswith("|")]
    return [cell for row in rows for cell in row.split("|")]


def anchors(page: Path) -> set[str]:
    """The headings of a page as links name them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def long_paragraphs(text: str) -> list[str]:
    return [p for p in prose(text) if len(textwrap.wrap(p, COLUMNS)) > MOST_PARAGRAPH_LINES]


def long_cells(text: str) -> list[str]:
    return [cell for cell in cells(text) if len(cell.split()) > MOST_CELL_WORDS]


def commit_ids(text: str) -> list[str]:
    found = re.findall(r"\b[0-9a-f]{7,40}\b", text)
    return [
        token for token in found if not token.isdigit() and not token.isalpha()
    ]  # a number, a word


def dead_links(page: Path, text: str) -> list[str]:
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", path):
            continue
        target = page.parent / path if path else page
        if not target.exists() or (
            anchor and target.suffix == ".md" and anchor not in anchors(target)
        ):
            dead.append(link)
    return dead


@pytest.mark.parametrize("rule", [long_paragraphs, long_cells], ids=lambda rule: rule.__name__)
def test_the_readme_is_read_in_one_sitting(rule):
    assert not rule((ROOT / "README.md").read_text())


@pytest.mark.parametrize("page", SHORT, ids=names)
def test_no_page_has_a_long_paragraph(page):
    assert not long_paragraphs(page.read_text())


def missing_files(text: str) -> list[str]:
    """Files of ours that are named in backticks with their folder and are not there."""
    named = re.findall(r"`((?:[\w.-]+/)+[\w-]+\.(?:py|c|md))\b", text)
    return [
        file for file in named if not any((ROOT / at / file).exists() for at in ("", "src/veneer"))
    ]


@pytest.mark.parametrize(
    "page", [page for page in SHORT if page.name not in ("CHANGELOG.md", "log.md")], ids=names
)
def test_every_file_that_a_page_names_is_there(page):
    assert not missing_files(page.read_text())


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_every_link_between_pages_leads_somewhere(page):
    assert not dead_links(page, page.read_text())


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (long_paragraphs, "word " * 100),
        (long_paragraphs, "- short\n- " + "word\n  " * 100),
        (long_cells, "| a | " + "word " * 13 + "|"),
        (commit_ids, "Code: a09453f unless named."),
        (missing_files, "`models/none.py` says so"),
    ],
)
def test_the_rules_of_prose_would_find_each(rule, text):
    assert rule(text)
    assert not rule(
        "# T\n\nShort.\n\n```\n" + "word " * 200 + "\n```\n\n| a | b c |\n\n- one\n- two 1234567\n"
    )


def test_a_dead_link_would_be_found():
    readme = ROOT / "README.md"
    text = "[a](docs/none.md) [b](#no-such) [c](docs/plan.md#nor-this) [d](docs/plan.md) [e](https://example.org)"
    assert dead_links(readme, text) == ["docs/none.md", "#no-such", "docs/plan.md#nor-this"]


RESULTS = sorted(ROOT.glob("docs/results/*.json"))


@pytest.mark.parametrize("file", RESULTS, ids=names)
def test_every_result_says_where_it_comes_from(file):
    for measurement in json.loads(file.read_text())["measurements"]:
        missing = [
            key
            for key in ("what", "machine", "commit", "command", "values")
            if not measurement.get(key)
        ]
        assert not missing, measurement


@pytest.mark.parametrize("file", RESULTS, ids=names)
def test_every_result_is_behind_a_page(file):
    assert any(f"results/{file.name})" in page.read_text() for page in PAGES)


def test_every_section_of_measurements_links_its_raw_values():
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    sections = re.split(r"^###? ", page, flags=re.MULTILINE)[1:]
    with_tables = [section for section in sections if "|---|" in section]
    assert len(with_tables) > 8
    assert [
        section.splitlines()[0]
        for section in with_tables
        if not re.search(r"\(results/\w+\.json\)", section)
    ] == ["At a glance"]


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name not in ("CHANGELOG.md", "log.md")], ids=names
)
def test_no_page_names_a_commit(page):
    assert not commit_ids(page.read_text())
