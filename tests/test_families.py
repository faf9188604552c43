"""A sample of the table of families (tests/families.py); tests/soak/test_families.py holds them all."""

import pytest

from tests.families import PAGE, SAMPLE, measure, rows_of

pytest.importorskip("peft")


@pytest.mark.parametrize("name", SAMPLE)
def test_a_family_agrees_with_transformers_and_peft(name):
    found = measure(name)
    assert found.built is None and not found.wrong
    assert rows_of(PAGE.read_text())[name] == found.row, f"python -m tests.families '{name}' writes it anew"
