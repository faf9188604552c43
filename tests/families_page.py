"""The page of the table of families (tests/families.py): what its cells say, and when one of them is a fault."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from tests.families_declared import DECLARED, NOT_COMPARED

PAGE = Path(__file__).parent.parent / "docs" / "families.md"
LOSS, GRADIENT, LOGITS = 1e-4, 1e-3, 1e-4
"""Relative to the largest value; float32 in another order. A gradient sums over rows and layers."""
LIMITS = {"loss": LOSS, "gradient": GRADIENT, "to PEFT": LOGITS, "from PEFT": LOGITS, "answers": 0.0}


def words(text: str) -> str:
    return text.strip().split("\n")[0].replace("|", "/")[:80]


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
        if isinstance(value, str):
            return value if value.startswith("FAULT") else DECLARED.get(self.name, {}).get(cell, value)
        return "yes" if value <= LIMITS[cell] else f"**no: {value:.0e}**"

    @property
    def wrong(self) -> list[str]:
        """Cells that hold neither agreement nor what is declared of them; declared ones that agree."""
        if self.built is not None:
            return [] if self.name in NOT_COMPARED else [f"{self.name}: {self.built}"]
        declared = DECLARED.get(self.name, {})
        faults = [f"{self.name} is declared as not compared, and it is"] if self.name in NOT_COMPARED else []
        for cell, value in self.cells.items():
            if isinstance(value, float) and value <= LIMITS[cell]:
                faults += [f"{self.name}, {cell}: agrees, and is declared not to"] if cell in declared else []
            elif isinstance(value, float) or value.startswith("FAULT") or cell not in declared:
                faults.append(f"{self.name}, {cell}: {value}")
        return faults


def page(rows: dict[str, str]) -> str:
    """The page of these rows: by name, each as Result.row has it."""
    import peft
    import transformers

    compared = [row for _, row in sorted(rows.items()) if row.startswith("|")]
    packed = sum(row.split(" | ")[1].startswith("packed") for row in compared)
    clean = sum(row.count("| yes ") == len(LIMITS) for row in compared)
    lines = [
        "# Families",
        "",
        "Written by `python -m tests.families`; a sample is held in CI, the whole by `make soak`. Every causal LM that "
        f"transformers {transformers.__version__} names, and models of texts and images around them, small and random "
        f"in float32, beside PEFT {peft.__version__}.",
        "",
        "- **rows**: how a batch is computed and, where documents are not packed, why. Padded and one by one "
        "are slower, "
        "not less exact. A tower for images is left out of what is trained, by name.",
        "",
        "- **mix tokens by attention**: layers with a state (linear attention, state spaces, short convolutions) read "
        "documents that stand end to end as one; only kernels for GPUs are told where one ends, and nothing here "
        "has tried these. So their rows are padded.",
        "",
        f"- **loss**, **gradient**: of a batch with a shared prompt, against PEFT and the model's own forward "
        f"one row at "
        f"a time; yes: within {LOSS:g} and {GRADIENT:g} of the largest value.",
        "",
        "- **to PEFT**: our adapter's file in PEFT; **from PEFT**: PEFT's `all-linear` file here; yes: the same "
        "logits.",
        "",
        "- **answers**: four greedy ones at once against transformers' loop in PEFT one at a time, all the same.",
        "",
        "- Words in place of a yes say what PEFT or transformers does not do (tests/families_declared.py).",
        "",
        f"{len(compared)} are compared: {packed} of them packed, {clean} agree in every column.",
        "",
        "| family | rows | " + " | ".join(LIMITS) + " |",
        "|---|---|---|---|---|---|---|",
        *compared,
        "",
        "Not compared:",
        "",
        *[part for _, row in sorted(rows.items()) if not row.startswith("|") for part in (row, "")],
    ]
    return "\n".join(lines)


def rows_of(text: str) -> dict[str, str]:
    """What a page holds, by name."""
    lines = text.split("\n")
    compared = {line.split(" | ")[0].removeprefix("| "): line for line in lines if line.count(" | ") == 6}
    told = lines[lines.index("Not compared:") :] if "Not compared:" in lines else []
    others = {line.split(": ")[0].removeprefix("- "): line for line in told if line.startswith("- ")}
    return {name: row for name, row in {**compared, **others}.items() if name != "family"}
