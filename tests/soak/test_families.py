"""The whole table of families: none in `make test`, where tests/test_families.py holds a sample."""

import pytest

from tests.families import measure, names
from tests.soak.counts import count

pytest.importorskip("peft")


@pytest.mark.parametrize("name", names()[: count("families", ci=0, soak=len(names()))])
def test_every_family_agrees_with_transformers_and_peft_or_says_why_not(name):
    assert not measure(name).wrong
