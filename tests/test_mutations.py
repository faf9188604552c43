"""The mutation check itself: every edit it can make is one that parses, and every test it would run
exists."""

import ast
import json
import os
import subprocess
import sys
import warnings

import pytest

from tests.callers import Callers
from tests.mutations import CACHED_CC, ROOT, TESTS, all_mutations, chosen

SOURCE = ROOT / "src" / "veneer"


@pytest.mark.parametrize("file", TESTS)
def test_every_edit_changes_a_line_that_parses(file):
    assert all((ROOT / "tests" / name).exists() for name in TESTS[file])
    own = (SOURCE / file).read_bytes()
    (found,) = all_mutations(SOURCE, f"^{file}$").values()
    assert found
    for mutation in found[:: max(1, len(found) // 20)]:
        assert own[mutation.start : mutation.end].decode() == mutation.before != mutation.after
        if file.endswith(".py"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SyntaxWarning)
                ast.parse(mutation.of(own))


def test_the_draw_is_that_of_its_seed_and_takes_every_file_in_turn():
    found = all_mutations(SOURCE, "evaluation/")
    assert chosen(found, 12, 1) == chosen(found, 12, 1) != chosen(found, 12, 2)
    assert {m.file for m in chosen(found, len(found), 0)} == set(found)


def test_the_shortest_tests_that_call_a_function_come_first_up_to_a_time_near_and_elsewhere():
    times = {"a.py::x": 2.0, "a.py::y": 1.0, "a.py::z": 9.0, "b.py::x": 1.0, "c.py::x": 2.0}
    callers = Callers(
        [json.dumps({"test": t, "seconds": s, "calls": ["f"]}) for t, s in times.items()]
    )
    assert callers.of("f", ["a.py"], 3.0) == (["a.py::y", "a.py::x"], ["b.py::x", "c.py::x"])
    assert callers.of("f", ["a.py"], 2.5) == (["a.py::y"], ["b.py::x"])
    assert callers.of("g", ["a.py"], 3.0) == ([], [])


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
