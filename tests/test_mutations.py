"""The mutation check itself: every edit it can make is one that parses, and a module's area is made
of the tests that import it and of those beside it."""

import ast
import itertools
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests import mutations
from tests.areas import CALLS, OF_C, Areas
from tests.callers import Callers
from tests.mutations import CACHED_CC, ROOT, SECONDS_OF_AREA, Copy, all_mutations, chosen


@pytest.fixture(scope="module")
def areas():
    return Areas(ROOT)


def test_every_edit_changes_a_line_that_parses(areas):
    drawn = chosen(all_mutations(areas, "^(kernels|serve|decoding|training)/"), 200, 0)
    assert len(drawn) == 200 and {Path(m.file).suffix for m in drawn} == {".py", ".c", ".h"}
    for mutation in drawn:
        own = (areas.source / mutation.file).read_bytes()
        assert own[mutation.start : mutation.end].decode() == mutation.before != mutation.after
        if mutation.file.endswith(".py"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SyntaxWarning)
                ast.parse(mutation.of(own))


def test_the_draw_is_that_of_its_seed_and_takes_every_file_in_turn(areas):
    mutations = all_mutations(areas, "evaluation/")
    assert chosen(mutations, 12, 1) == chosen(mutations, 12, 1) != chosen(mutations, 12, 2)
    files = {file for file, edits in mutations.items() if edits}
    assert {m.file for m in chosen(mutations, len(files), 0)} == files


def test_every_module_has_an_area_of_tests_that_exist(areas):
    areas_by_module = {file: areas.of(file) for file in areas.modules()}
    alone = {file for file, tests in areas_by_module.items() if not tests}
    assert alone == {"__main__.py"}
    named = {test for tests in areas_by_module.values() for test in tests}
    assert all((areas.tests / test).exists() for test in named)
    unused = [place for place in OF_C if not any(_starts(file, place) for file in areas_by_module)]
    assert not unused


def _starts(file, place):
    return re.match(f"kernels/native/{place}", file)


def test_an_area_is_the_importers_and_the_folders_beside_the_nearest_first(tmp_path):
    texts = {
        "src/veneer/a/one.py": "",
        "src/veneer/a/b/two.py": "from veneer.a import (\n    one,\n)\n",
        "src/veneer/a/three.py": "",
        "src/veneer/c.py": "import veneer.a.b.two\n",
        "tests/help.py": "from veneer.a.three import f\n",
        "tests/a/test_one.py": "def test():\n    from veneer.a import one\n",
        "tests/a/b/test_beside.py": "",
        "tests/d/test_far.py": "import os, sys\nfrom veneer.a import one as other\n",
        "tests/d/test_c.py": "import veneer.c\n",
        "tests/d/test_helped.py": "from tests.help import f\n",
        "tests/soak/test_one.py": "from veneer.a import one\n",
    }
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    areas = Areas(tmp_path)
    assert areas.of("a/one.py") == ["a/test_one.py", "d/test_far.py"]
    assert areas.of("a/b/two.py") == ["d/test_c.py", "a/b/test_beside.py", "a/test_one.py"]
    assert areas.of("a/three.py") == ["d/test_helped.py", "a/test_one.py"]
    assert areas.of("c.py") == ["d/test_c.py"]
    assert areas.of("kernels/native/nf4/nf4.h") == ["quant/test_nf4.py", CALLS]
    assert areas.of("kernels/native/gguf/gguf_tiles.c") == []


def test_the_shortest_tests_that_call_a_function_come_first_up_to_a_time_near_and_elsewhere():
    times = {"a.py::x": 2.0, "a.py::y": 1.0, "a.py::z": 9.0, "b.py::x": 1.0, "c.py::x": 2.0}
    callers = Callers(
        [json.dumps({"test": t, "seconds": s, "calls": ["f"]}) for t, s in times.items()]
    )
    assert callers.of("f", ["a.py"], 3.0) == (["a.py::y", "a.py::x"], ["b.py::x", "c.py::x"])
    assert callers.of("f", ["a.py"], 2.5) == (["a.py::y"], ["b.py::x"])
    assert callers.of("g", ["a.py"], 3.0) == ([], [])


@pytest.mark.parametrize(("calls", "watched"), [("f", 3), ("g", 9)])
def test_an_area_is_watched_until_enough_of_its_tests_call_a_function_or_for_its_time(
    calls, watched, tmp_path, monkeypatch
):
    """Each file has a test of eight seconds, and takes twenty to be watched."""
    copy, now = Copy.__new__(Copy), itertools.count(step=20)
    copy.root, copy.areas = tmp_path, SimpleNamespace(files={})

    def tested(tests, plugin, *, seconds):
        line = {"test": f"{tests[0]}::test", "seconds": 8.0, "calls": [calls]}
        with plugin.out.open("a") as file:
            file.write(json.dumps(line) + "\n")

    monkeypatch.setattr(mutations, "computed", lambda: next(now))
    copy.tested = tested
    copy.with_callers(tmp_path / "callers", [])
    files = [f"test_{number:02}.py" for number in range(30)]
    copy.watch_area("f", files)
    assert SECONDS_OF_AREA == 180 and copy.watched == set(files[:watched])


def test_what_a_test_and_its_fixtures_call_is_noted_by_qualified_name(tmp_path):
    (tmp_path / "inside.py").write_text(
        "class A:\n    def f(self):\n        return [self.g() for _ in 'x']\n    def g(self):\n    "
        "    pass\n"
    )
    (tmp_path / "test_it.py").write_text(
        "import pytest, inside\n"
        "@pytest.fixture(scope='module')\ndef a():\n    inside.A().g()\n    return inside.A()\n"
        "def test_one(a):\n    pass\n"
        "def test_two(a):\n    a.f()\n"
    )
    code = (
        "import sys, pathlib, pytest; from tests.callers import Calls; here ="
        " pathlib.Path(sys.argv[1]); pytest.main(['-q', '-p', 'no:cacheprovider', 'test_it.py'],"
        " plugins=[Calls(here / 'out', here)])"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=tmp_path,
        env=env,
        check=True,
        capture_output=True,
    )
    callers = Callers((tmp_path / "out").read_text().splitlines())
    assert callers.tests["inside.py:A.g"] == ["test_it.py::test_one", "test_it.py::test_two"]
    assert callers.tests["inside.py:A.f"] == ["test_it.py::test_two"]


def test_a_file_is_compiled_again_only_if_it_or_its_headers_changed(tmp_path):
    (tmp_path / "number.h").write_text("#define NUMBER 1\n")
    (tmp_path / "file.c").write_text('#include "number.h"\nint number(void) { return NUMBER; }\n')
    environment = os.environ | {"OBJECT_CACHE": str(tmp_path / "objects")}

    def compiled():
        words = [str(CACHED_CC), "-O1", "-c", "file.c", "-o", "file.o"]
        subprocess.run(words, cwd=tmp_path, env=environment, check=True)
        return (tmp_path / "file.o").read_bytes(), len(list((tmp_path / "objects").iterdir()))

    first, objects = compiled()
    assert compiled() == (first, objects) and objects == 1
    (tmp_path / "number.h").write_text("// A comment.\n#define NUMBER 1\n")
    assert compiled() == (first, 1)
    (tmp_path / "number.h").write_text("#define NUMBER 2\n")
    other, objects = compiled()
    assert other != first and objects == 2
    (tmp_path / "file.c").write_text("int number(void) {\n")
    with pytest.raises(subprocess.CalledProcessError):
        compiled()
    assert len(list((tmp_path / "objects").iterdir())) == 2
