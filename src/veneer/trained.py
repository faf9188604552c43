"""`veneer.train` and the finished run that it returns: its figures, adapter and report."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from veneer import api
from veneer.adapters.config import LoRA, Method
from veneer.base import Base
from veneer.data.files.writing import Record, is_rows
from veneer.errors import ConfigError
from veneer.evaluation.metrics.user_function import UserFunction
from veneer.files.home import expanded
from veneer.report.notebook import screen_here
from veneer.report.page import NAME as REPORT
from veneer.training.config import RunConfig
from veneer.training.output.screen import end_lines
from veneer.wording import clock, html_table, shown


def train(
    base: str | Path,
    data: str | Path | Mapping[str, Any] | Iterable[Record],
    *,
    out: str | Path,
    method: Method | None = None,
    quiet: bool = False,
    **settings: Any,
) -> "TrainedRun":
    """Trains, and shows its progress unless quiet is set.

    data      as `data` in a run file, or the rows themselves, each a dict; data["train"] and
              data["validation"] may be rows too. Rows are written into the run's folder.
    settings  the other fields of a run file
    """
    if not isinstance(out, str | Path):
        raise ConfigError(
            f"out is {out!r}, not a folder's name", next_step="For instance out='runs/tickets'."
        )
    folder = expanded(out)
    data_files, rows = _name_row_files(data, folder)
    fields = {
        "base": str(base) if isinstance(base, Path) else base,
        "data": data_files,
        "out": str(folder),
    }
    config = RunConfig.of({**fields, "method": method or LoRA(), **settings})
    screen = screen_here(quiet=quiet or os.environ.get("RANK", "0") != "0")
    screen.message(f"loading {config.base}")
    try:
        summary = api.train_run(config, resume=False, screen=screen, rows=rows)
    finally:
        screen.close()
    return TrainedRun(folder, summary)


def _name_row_files(data: Any, out: Path) -> tuple[Any, dict[str, Iterable[Record]]]:
    """Returns `data` with names of files in place of rows, and the rows by file name."""
    if is_rows(data):
        data = {"train": data}
    if not isinstance(data, Mapping):
        return data, {}
    sets = {"train": "rows.jsonl", "validation": "validation_rows.jsonl"}
    rows = {
        file: data[name] for name, file in sets.items() if is_rows(data.get(name), beside_sets=True)
    }
    paths = {name: str(out / file) for name, file in sets.items() if file in rows}
    return {**data, **paths}, rows


class TrainedRun(Mapping[str, Any]):
    """A finished run: a mapping with the content of summary.json, and the paths of its results.

    folder   folder of the run, which `--adapter` accepts
    adapter  folder of the adapter; None if every weight was trained
    model    folder of the model; None unless every weight was trained
    report   path of report.html
    """

    def __init__(self, folder: Path, summary: Mapping[str, Any]) -> None:
        self.folder, self._summary = folder, dict(summary)
        self.adapter = Path(summary["adapter"]) if "adapter" in summary else None
        self.model = Path(summary["model"]) if "model" in summary else None
        self.report = folder / REPORT

    def __getitem__(self, name: str) -> Any:
        return self._summary[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._summary)

    def __len__(self) -> int:
        return len(self._summary)

    @cached_property
    def base(self) -> Base:
        """Loads the base of the run with the adapter in use, once."""
        config = api.resume_config(self.folder)
        if self.model is not None:
            return api.load(str(self.model), dtype=config.dtype, device=config.device)
        base = api.load(
            config.base,
            dtype=config.dtype,
            device=config.device,
            quantize=config.quantize,
            keep_dense=config.keep_dense,
        )
        assert self.adapter is not None
        base.use(base.load_adapter(self.adapter, name=self.folder.resolve().name))
        return base

    def evaluate(
        self,
        data: str | Path | Iterable[Record],
        *,
        metrics: Sequence[str | UserFunction] = (),
        labels: str | Sequence[str] = (),
        max_new_tokens: int = 256,
    ) -> dict[str, Any]:
        """Evaluates `base` as veneer.evaluate does."""
        return api.evaluate(
            self.base, data, metrics=metrics, labels=labels, max_new_tokens=max_new_tokens
        )

    def _facts(self) -> list[tuple[str, str]]:
        figures, result = end_lines(self)[:2]
        return [
            ("figures", figures.strip()),
            ("model" if self.adapter is None else "adapter", result.strip().removeprefix("✓ ")),
            ("report", shown(self.report)),
        ]

    @property
    def _title(self) -> str:
        duration = clock(self["total_seconds"])
        return (
            f"{shown(self.folder)} · {shown(self['base'])} · {shown(self['method'])} ·"
            f" {self['steps']:,} steps · {duration}"
        )

    def __str__(self) -> str:
        return "\n".join([self._title, *(f"  {name:<8} {text}" for name, text in self._facts())])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_table(self._title, self._facts())
