"""The table of loops names every loop in the tests, and what a soak wrote down is where the next
one goes on."""

import re
from pathlib import Path

from tests.soak import __main__ as soak
from tests.soak.loops import LOOPS

TESTS = Path(__file__).parents[1]
USE = re.compile(r'(?:rounds\(|chosen\([^"\n]*, )"(\w+)", ci=')


def test_the_table_of_loops_names_every_loop_and_every_test_exists():
    used = {name for path in TESTS.rglob("test_*.py") for name in USE.findall(path.read_text())}
    assert used == set(LOOPS)
    for loop in LOOPS.values():
        for test in loop.test.split():
            file, _, name = test.partition("::")
            assert f"def {name}" in (TESTS / file).read_text()


def test_a_soak_goes_on_where_the_last_one_stopped(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(soak, "RECORD", tmp_path / "build" / "soak.json")
    monkeypatch.setitem(LOOPS, "calls", soak.Loop(LOOPS["calls"].test, 10, 15))
    assert soak.main(["--loops", "calls", "--hours", "0"]) == 0  # no time: nothing runs
    assert soak.read(soak.RECORD) == []
    assert soak.main(["--loops", "calls"]) == 0
    assert [(done.first, done.rounds, done.passed) for done in soak.read(soak.RECORD)] == [
        (0, 10, True),
        (10, 5, True),
    ]
    capsys.readouterr()
    assert soak.main(["--table", "--loops", "calls"]) == 0
    assert re.search(r"\| calls \| 15 \| 15 \| \d+ \| none \|", capsys.readouterr().out)
