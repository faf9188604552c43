"""The mutation check itself: every edit it can make is one that parses, and every test it would run exists."""

import ast
import warnings

import pytest

from tests.mutations import ROOT, TESTS, all_mutations, chosen

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
    found = all_mutations(SOURCE, "evaluate/")
    assert chosen(found, 12, 1) == chosen(found, 12, 1) != chosen(found, 12, 2)
    assert {m.file for m in chosen(found, len(found), 0)} == set(found)
