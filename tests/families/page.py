"""The page of the table of families (tests/families/__main__.py): what its cells say, and when one
of them is a fault."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from tests.families.declared import DECLARED, NOT_COMPARED, NOT_OURS

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
LOSS, GRADIENT, LOGITS = 1e-4, 1e-3, 1e-4
"""Relative to the largest value; float32 in another order. A gradient sums over rows and layers."""
TRAINED = 1e-3
"""After steps of AdamW, whose first one goes by a gradient's sign: of one near zero that is
rounding's."""
LIMITS = {
    "loaded": LOGITS,
    "loss": LOSS,
    "gradient": GRADIENT,
    "several": GRADIENT,
    "run": TRAINED,
    "goes on": LOSS,
    "to PEFT": LOGITS,
    "from PEFT": LOGITS,
    "answers": 0.0,
    "merged": LOGITS,
    ".gguf": LOGITS,
}
"""Column -> largest difference that is a yes."""
LEFT = "Not compared yet since the columns grew (`python -m tests.families --left` does it):"
NOT_WRITTEN = "not written"
_NO_FILE = (NOT_WRITTEN, "refused: ")
"""In the column of .gguf files: no such file is written of this family, or of these settings of
it."""


def words(text: str, most: int = 80) -> str:
    return text.strip().split("\n")[0].replace("|", "/")[:most]


@dataclass
class Result:
    """One family: text where something is told, a number where it was compared."""

    name: str
    built: str | None = None
    path: str = ""
    cells: dict[str, float | str] = field(default_factory=dict)

    @property
    def row(self) -> str:
        """Of the page. The same at every run: a number only where it is too large."""
        if self.built is not None:
            return f"- {self.name}: {NOT_COMPARED.get(self.name, self.built)}"
        shown = [self._shown(cell, self.cells.get(cell, "?")) for cell in LIMITS]
        return f"| {self.name} | {self.path} | {' | '.join(shown)} |"

    def _shown(self, cell: str, value: float | str) -> str:
        if value == NOT_WRITTEN:
            return "–"
        if isinstance(value, str):
            return (
                value if value.startswith("FAULT") else DECLARED.get(self.name, {}).get(cell, value)
            )
        return "yes" if value <= LIMITS[cell] else f"**no: {value:.0e}**"

    @property
    def wrong(self) -> list[str]:
        """Cells that hold neither agreement nor what is declared of them; declared ones that
        agree."""
        if self.built is not None:
            return [] if self.name in NOT_COMPARED else [f"{self.name}: {self.built}"]
        declared = DECLARED.get(self.name, {})
        faults = (
            [f"{self.name} is declared as not compared, and it is"]
            if self.name in NOT_COMPARED
            else []
        )
        for cell, value in self.cells.items():
            if isinstance(value, float) and value <= LIMITS[cell]:
                faults += (
                    [f"{self.name}, {cell}: agrees, and is declared not to"]
                    if cell in declared
                    else []
                )
            elif cell == ".gguf" and isinstance(value, str) and value.startswith(_NO_FILE):
                continue
            elif isinstance(value, float) or value.startswith("FAULT") or cell not in declared:
                faults.append(f"{self.name}, {cell}: {value}")
        return faults


def page(rows: dict[str, str], names: Iterable[str]) -> str:
    """The page of these rows: by name, each as Result.row has it. names: of all families."""
    import peft
    import transformers

    compared = [row for _, row in sorted(rows.items()) if row.startswith("|")]
    packed = sum(row.split(" | ")[1].startswith("packed") for row in compared)
    clean = sum(set(row.removesuffix(" |").split(" | ")[2:-1]) == {"yes"} for row in compared)
    lines = [
        "# Families",
        "",
        (
            "Written by `python -m tests.families`; a sample is held in CI, the whole by `make"
            f" soak`. Every causal LM that transformers {transformers.__version__} names, and"
            " models of texts and images around them, small and random in float32, beside PEFT"
            f" {peft.__version__}."
        ),
        "",
        (
            "- **rows**: how a batch is computed and, where documents are not packed, why. Padded"
            " and one by one are slower, not less exact. A tower for images is left out of what is"
            " trained, by name."
        ),
        "",
        "- Which code computes the layers of each family: [layers](layers.md).",
        "",
        (
            "- **mix tokens by attention**: layers with a state (linear attention, state spaces,"
            " short convolutions) read documents that stand end to end as one; only kernels for"
            " GPUs are told where one ends, and nothing here has tried these. So their rows are"
            " padded."
        ),
        "",
        (
            "- Each model is saved as a folder. `veneer.load` and the command line work on it, and"
            " so do transformers and PEFT; a and b are two adapters of ours with random values."
        ),
        "",
        (
            "- **loaded**: the base has transformers' attributes (but for what"
            " tests/support/models/loaded.py names) and logits"
            f" (within {LOGITS:g} of the largest value, as wherever logits are compared)."
        ),
        "",
        (
            "- **loss**, **gradient**: of a step over rows that share prompts and rows that do"
            f" not, against PEFT and the model's own forward one row at a time; within {LOSS:g} and"
            f" {GRADIENT:g}."
        ),
        "",
        (
            "- **several**: losses and gradients of one step in which a, b and no adapter act on"
            f" rows of their own; within {LOSS:g} and {GRADIENT:g}."
        ),
        "",
        (
            "- **run**: `veneer train --from a` for three steps: losses and the file's logits"
            f" against torch's AdamW on a in PEFT; within {TRAINED:g}."
        ),
        "",
        (
            "- **goes on**: the first loss of a run from the sum run + 0.5 b, against PEFT's own"
            f" merges of the files in transformers' weights; within {LOSS:g}."
        ),
        "",
        (
            "- **to PEFT**: our file in PEFT; **from PEFT**: PEFT's `all-linear` file here; the"
            " same logits."
        ),
        "",
        (
            "- **answers**: four greedy ones at once and one of `veneer generate`, against"
            " transformers' loop in PEFT one at a time; all the same."
        ),
        "",
        (
            "- **merged**: the folder of `veneer merge` in transformers, against the run's file in"
            " PEFT; the same logits."
        ),
        "",
        (
            "- **.gguf**: the file of `veneer export --merged`: its values as `gguf` reads them,"
            " its logits as `veneer.load` does, and llama.cpp's answers where that is installed; –:"
            " no such file is written of this family."
        ),
        "",
        (
            "- Words in place of a yes say what PEFT or transformers does not do"
            " (tests/families/declared.py)."
        ),
        "",
        (
            f"{len(compared)} are compared: {packed} of them packed, {clean} agree in every column;"
            f" .gguf files are written of {sum(row.endswith('| yes |') for row in compared)}."
        ),
        "",
        "| family | rows | " + " | ".join(LIMITS) + " |",
        "|---|---" + "|---" * len(LIMITS) + "|",
        *compared,
        "",
        (
            "Faults of transformers and PEFT beside these columns. Veneer proves on a small copy of"
            " a model which of its ways of answering give the logits of whole texts, and takes no"
            " other:"
        ),
        "",
        *[part for name, said in NOT_OURS.items() for part in (f"- {name}: {said}.", "")],
        "Not compared:",
        "",
        *[part for _, row in sorted(rows.items()) if not row.startswith("|") for part in (row, "")],
    ]
    if left := sorted(set(names) - rows.keys()):
        lines += [LEFT, "", *[part for name in left for part in (f"* {name}", "")]]
    return "\n".join(lines)


def left_of(text: str) -> list[str]:
    """The families that a page lists as not compared yet."""
    _, _, listed = text.partition(LEFT)
    return [line.removeprefix("* ") for line in listed.splitlines() if line.startswith("* ")]


def rows_of(text: str) -> dict[str, str]:
    """What a page holds, by name."""
    lines = text.split("\n")
    compared = {
        line.split(" | ")[0].removeprefix("| "): line
        for line in lines
        if line.count(" | ") == len(LIMITS) + 1
    }
    told = lines[lines.index("Not compared:") :] if "Not compared:" in lines else []
    others = {
        line.split(": ")[0].removeprefix("- "): line for line in told if line.startswith("- ")
    }
    return {name: row for name, row in {**compared, **others}.items() if name != "family"}
