"""The whole table of families: none in `make test`, where tests/test_families.py holds a sample."""

import pytest

from tests.families import measure, names
from tests.families_page import PAGE, rows_of
from tests.soak.counts import count

pytest.importorskip("peft")


@pytest.mark.parametrize("name", names()[: count("families", ci=0, soak=len(names()))])
def test_every_family_agrees_with_transformers_and_peft_or_says_why_not(name):
    found = measure(name)
    assert not found.wrong
    assert rows_of(PAGE.read_text())[name] == found.row, f"python -m tests.families '{name}' writes it anew"
