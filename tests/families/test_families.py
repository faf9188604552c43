"""A sample of the table of families (tests/families/__main__.py).

tests/soak/models/test_families.py has all families."""

import pytest
import transformers

from tests.families import layers
from tests.families.declared import DECLARED, NOT_COMPARED
from tests.families.measure import measure
from tests.families.models import SAMPLE, names
from tests.families.page import LIMITS, PAGE, Result, left_of, rows_of
from veneer.kernels.bindings.library import has_bf16

pytest.importorskip("peft")


@pytest.mark.parametrize("name", SAMPLE)
def test_a_family_agrees_with_transformers_and_peft(name):
    found = measure(name)
    assert found.built is None and not found.wrong
    assert rows_of(PAGE.read_text())[name] == found.row, (
        f"python -m tests.families '{name}' writes it anew"
    )


@pytest.mark.skipif(not has_bf16(), reason="the page is of a processor with bf16 instructions")
@pytest.mark.parametrize("name", ["qwen2", "mamba", "ministral3", "olmo", "llama, dynamic"])
def test_the_layers_of_a_family_are_computed_as_the_page_says(name):
    start = layers.row_start(*layers.layer_paths(name))
    (row,) = (line for line in layers.PAGE.read_text().splitlines() if line.startswith(start))
    assert name in row.removesuffix(" |").rpartition(" | ")[2].split("; "), (
        "python -m tests.families.layers writes it anew"
    )


def test_the_page_says_yes_or_what_is_declared_and_nothing_else():
    rows, left = rows_of(PAGE.read_text()), left_of(PAGE.read_text())
    if f"transformers {transformers.__version__} " in PAGE.read_text():  # another has other ones
        assert sorted([*rows, *left]) == names()
        assert DECLARED.keys() | NOT_COMPARED.keys() <= set(names())
    for name, row in rows.items():
        if name in NOT_COMPARED:
            assert row == f"- {name}: {NOT_COMPARED[name]}"
            continue
        cells = dict(zip(LIMITS, row.removesuffix(" |").split(" | ")[2:], strict=True))
        written = cells.pop(".gguf")
        assert written in ("yes", "–") or written.startswith("refused: "), name
        assert cells == {
            cell: DECLARED.get(name, {}).get(cell, "yes") for cell in LIMITS if cell != ".gguf"
        }, name


def test_a_cell_is_a_fault_unless_it_agrees_or_is_refused_as_declared():
    cells: dict[str, float | str] = {
        **dict.fromkeys(LIMITS, 0.0),
        "to PEFT": "not in PEFT: so",
        ".gguf": "not written",
    }
    assert not Result("laguna", cells=cells).wrong and Result("llama", cells=cells).wrong
    for cell, value in (
        ("to PEFT", 0.0),
        ("to PEFT", 0.5),
        ("to PEFT", "FAULT"),
        ("answers", 0.5),
        ("loss", "refused: so"),
        ("loaded", "FAULT ValueError: 2 attributes differ"),
        (".gguf", 0.5),
    ):
        assert Result("laguna", cells={**cells, cell: value}).wrong, (cell, value)
    assert not Result("laguna", cells={**cells, ".gguf": "refused: so"}).wrong
    assert Result("llama", built="not built").wrong and not Result("xlnet", built="not built").wrong
