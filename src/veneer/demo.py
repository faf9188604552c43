"""`veneer demo`: trains a model of 135 M parameters to answer with function calls, and shows what
it learnt.

    OUT/train.jsonl, held_out.jsonl     300 rows to train on, and the others, which call other
                                        functions
    OUT/run/                            the run, as `veneer train` writes it
    OUT/untuned.json, tuned.json        answers to the held-out rows without and with the adapter
    OUT/demo.json                       hash of all that `run` depends on

Results are stored with a hash of all that they depend on. So a second demo takes seconds, a stopped
one continues, and one with other data, base or settings starts over.
"""

import hashlib
import json
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from veneer import api
from veneer.base import Base
from veneer.bases.compute import DtypeName
from veneer.bases.names.packages import fetch_wheel
from veneer.child import typed_command
from veneer.data import bfcl
from veneer.data.bfcl import BfclEntry, Score
from veneer.data.examples import Row, RowRef
from veneer.data.template.template import ChatTemplate
from veneer.errors import ConfigError
from veneer.evaluation.answers import evaluate_answers
from veneer.files.atomic import write_text
from veneer.files.remembered import own_files_hash
from veneer.files.strict_json import read_json
from veneer.training.config import DataConfig, RunConfig
from veneer.training.output.console import log_console
from veneer.training.output.screen import make_screen
from veneer.training.state.folder import remove_run
from veneer.training.state.place import locked_folder
from veneer.wording import cut, shown, size

BASE = "smollm2-135m"
NOTE = "demo.json"
WRITTEN = ("train.jsonl", "held_out.jsonl", "untuned.json", "tuned.json", "run")
EPOCHS = 4
SHOWN = 5
TRIED = 2  # rows of a step, and held-out rows, if --steps only tests the installation
MAX_NEW_TOKENS = 112  # the longest accepted call of the data set takes 97
CHARACTERS = 240  # most that are shown of an answer: an untuned one can be long


@dataclass(frozen=True)
class _DemoRows:
    """Holds the held-out entries, the same as rows to answer, and the two files."""

    calls: list[BfclEntry]
    rows: list[Row]
    train_file: Path
    held_out_file: Path

    @property
    def digest(self) -> str:
        return _digest(self.train_file.read_text("utf-8"), self.held_out_file.read_text("utf-8"))


def run_demo(
    out: Path,
    *,
    again: bool = False,
    steps: int | None = None,
    base: str = BASE,
    epochs: float = EPOCHS,
) -> dict[str, Any]:
    """Runs the demo; returns {"untuned": {...}, "tuned": {...}, "summary": {...}}.

    out     folder of the demo
    again   train again even if a finished run exists
    steps   train this many steps of TRIED rows instead of `epochs`, and answer TRIED questions
    base    hub id, folder, .gguf file or named default
    Raises SourceError if a download fails, BusyError while another demo runs in the folder.
    """
    with locked_folder(out):
        if steps is None:
            return _demo(out, again=again, base=base, schedule={"epochs": epochs, "batch": 8})
        return _demo(
            out,
            again=again,
            base=base,
            schedule={"steps": steps, "batch": TRIED, "show_answers": False},
        )


def _demo(out: Path, *, again: bool, base: str, schedule: dict[str, Any]) -> dict[str, Any]:
    console = log_console(stderr=False)
    _claim_folder(out)
    _say(console, "Teaching a small language model to answer with function calls, on this machine.")
    held_out = _prepare_rows(out, console, most=TRIED if "steps" in schedule else None)
    loaded = api.load(base)
    _say(console, f"Base: {base}, {loaded.model.num_parameters() / 1e6:.0f} M parameters, frozen.")

    if loaded.compute.line is not None:
        _say(console, f"{loaded.compute.line}.")
    context = _context(loaded, held_out)
    untuned = _answers(loaded, held_out, out / "untuned.json", context, "untuned", console)
    _print_answers(console, held_out.calls, {"untuned": untuned})

    summary = _find_or_train(
        out, base, loaded.compute.name, schedule, context, held_out, console, again=again
    )
    adapter = Path(summary["adapter"])
    loaded.use(loaded.load_adapter(adapter, name="demo"))
    context.append(summary["adapter_sha256"])
    tuned = _answers(loaded, held_out, out / "tuned.json", context, "tuned", console)
    _print_answers(console, held_out.calls, {"untuned": untuned, "tuned": tuned})

    shares = {
        "untuned": _score_shares(held_out.calls, untuned),
        "tuned": _score_shares(held_out.calls, tuned),
    }
    _print_shares(console, shares, len(held_out.calls))
    _print_next(console, out, held_out, summary)
    return {**shares, "summary": summary}


def _claim_folder(out: Path) -> None:
    """Marks the folder as the demo's. Raises ConfigError if another program's files are in it."""
    note = out / NOTE
    if note.is_file():
        return
    if others := [name for name in WRITTEN if (out / name).exists()]:
        raise ConfigError(
            f"{out} was not made by the demo, which writes files of these names",
            others,
            "Take another folder: veneer demo --out DIR",
        )
    write_text(note, json.dumps({"run": None}))


def _context(loaded: Base, held_out: _DemoRows) -> list[str]:
    """Lists what the base's answers depend on, except their length."""
    return [
        loaded.fingerprint().digest,
        loaded.compute.name,
        loaded.tokenizer_hash(),
        ChatTemplate(loaded.tokenizer).fingerprint(),
        *(version(name) for name in ("veneer", "torch", "transformers")),
        own_files_hash(),
        held_out.digest,
    ]


def _prepare_rows(out: Path, console: Console, *, most: int | None) -> _DemoRows:
    calls = bfcl.read_bfcl(fetch_wheel(bfcl.REQUIREMENT))
    trained, held_out = bfcl.split(calls)
    held_out = held_out[:most]
    out.mkdir(parents=True, exist_ok=True)
    train_file, held_out_file = out / "train.jsonl", out / "held_out.jsonl"
    for path, side in ((train_file, trained), (held_out_file, held_out)):
        lines = [
            json.dumps({"messages": bfcl.to_messages(call)}, ensure_ascii=False) for call in side
        ]
        write_text(path, "\n".join(lines) + "\n", replace=True)
    _say(
        console,
        f"Data: {len(calls)} questions of the Berkeley Function Calling Leaderboard"
        f" ({bfcl.REQUIREMENT}), {len(trained)} to train on; the {len(held_out)} held out call"
        " other functions.",
    )
    rows = [
        Row(ref=RowRef(str(held_out_file), number), messages=list(bfcl.to_messages(call)))
        for number, call in enumerate(held_out, 1)
    ]
    return _DemoRows(held_out, rows, train_file, held_out_file)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _answers(
    base: Base, held_out: _DemoRows, path: Path, context: Sequence[str], name: str, console: Console
) -> list[str]:
    """Answers all held-out rows; reads the answers from `path` if nothing changed since."""
    key = _digest(*context, str(MAX_NEW_TOKENS))
    stored = _read_json(path)
    if stored.get("key") == key:
        return list(stored["answers"])
    start, total = time.monotonic(), len(held_out.rows)
    with console.status(f"answering {total} held-out questions, {name}") as status:
        answers = evaluate_answers(
            base,
            held_out.rows,
            max_new_tokens=MAX_NEW_TOKENS,
            progress=lambda done, total: status.update(
                f"answered {done} of {total} questions, {name}"
            ),
        )
    _say(
        console,
        f"Answered {total} held-out questions, {name}, in {time.monotonic() - start:.0f} s.",
    )
    texts = [answer.answer for answer in answers]
    write_text(
        path, json.dumps({"key": key, "answers": texts}, ensure_ascii=False, indent=1), replace=True
    )
    return texts


def _read_json(path: Path) -> dict[str, Any]:
    """Reads a file of the demo; {} if it is missing or damaged."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _find_or_train(
    out: Path,
    base: str,
    dtype: DtypeName,
    schedule: dict[str, Any],
    context: Sequence[str],
    held_out: _DemoRows,
    console: Console,
    *,
    again: bool,
) -> dict[str, Any]:
    """Returns the summary of the run in OUT/run, which is found finished, continued or started."""
    run, note = out / "run", out / NOTE
    config = RunConfig(
        base=base,
        dtype=dtype,
        data=DataConfig(train=str(held_out.train_file), validation=str(held_out.held_out_file)),
        **schedule,
        # No evaluation in between: held-out rows must not choose the step that is kept.
        evaluate_every=10**6,
        out=str(run),
    )
    key = _digest(*context, config.model_dump_json())
    ours = _read_json(note).get("run")
    if run.exists() and ours is None:
        raise ConfigError(
            f"{run} was not made by the demo", [], "Take another folder: veneer demo --out DIR"
        )
    if run.exists() and ours == key and not again:
        if (run / "summary.json").is_file():
            summary = read_json(run / "summary.json")
            _say(
                console,
                f"Trained already, in {summary['total_seconds']:.0f} s ({run}); --again trains"
                " again.",
            )
            return summary
        if any((run / "checkpoints").glob("[0-9]*")):
            return _run(api.resume_config(run), resume=True)
    remove_run(run)
    write_text(note, json.dumps({"run": key}), replace=True)
    return _run(config, resume=False)


def _run(config: RunConfig, *, resume: bool) -> dict[str, Any]:
    screen = make_screen()
    try:
        return api.train_run(config, resume=resume, screen=screen)
    finally:
        screen.close()


def _say(console: Console, text: str) -> None:
    console.print(text, soft_wrap=True)


def shown_rows(total: int) -> range:
    """Returns SHOWN row numbers at even distances, so that they are not all of one subject."""
    return range(0, total, max(1, total // SHOWN))[:SHOWN]


def _print_answers(
    console: Console, calls: Sequence[BfclEntry], answers: dict[str, list[str]]
) -> None:
    """Prints a few held-out questions, always the same ones, with the answers side by side and
    whether they are accepted."""
    table = Table(box=None, padding=(0, 2, 1, 0), show_edge=False, header_style="dim")
    table.add_column("question", ratio=2, overflow="fold")
    for name in answers:
        table.add_column(f"{name} answer", ratio=3, overflow="fold")
    for index in shown_rows(len(calls)):
        call = calls[index]
        question = Text(call.question + "\n").append(
            cut(bfcl.signature(call), CHARACTERS), style="dim"
        )
        cells = [_answer_cell(call, texts[index]) for texts in answers.values()]
        table.add_row(question, *cells)
    console.print()
    console.print(table)


def _answer_cell(call: BfclEntry, answer: str) -> Text:
    score = bfcl.score(call, answer)
    if score.arguments_accepted:
        verdict, style = "✓ accepted", "green"
    elif score.right_function:
        verdict, style = "✗ wrong arguments", "yellow"
    else:
        verdict, style = ("✗ another function" if score.parses else "✗ no call"), "red"
    return Text(cut(shown(answer), CHARACTERS) + "\n").append(verdict, style=style)


def _score_shares(calls: Sequence[BfclEntry], answers: Sequence[str]) -> dict[str, float]:
    scores = [bfcl.score(call, answer) for call, answer in zip(calls, answers, strict=True)]
    return {
        name: sum(getattr(score, name) for score in scores) / len(scores)
        for name in Score.__dataclass_fields__
    }


def _print_shares(console: Console, shares: dict[str, dict[str, float]], total: int) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0), show_edge=False, header_style="dim")
    table.add_column(f"of {total} held-out questions")
    for name in shares:
        table.add_column(name, justify="right")
    for name, wording in (
        ("parses", "answer is one JSON call"),
        ("right_function", "calls the right function"),
        ("arguments_accepted", "all arguments accepted"),
    ):
        table.add_row(wording, *(f"{100 * side[name]:.0f}%" for side in shares.values()))
    console.print(table)


def _print_next(console: Console, out: Path, held_out: _DemoRows, summary: dict[str, Any]) -> None:
    veneer, run = typed_command(), shlex.quote(str(out / "run"))
    question = shlex.quote(bfcl.prompt(held_out.calls[-1]))
    data = shlex.quote(str(held_out.held_out_file))
    _say(console, f"\nAdapter: {summary['adapter']}, {size(summary['adapter_bytes'])}")
    _say(console, "Next:")
    _say(console, f"  {veneer} generate --adapter {run} {question}")
    _say(console, f"  {veneer} chat --adapter {run}")
    _say(console, f"  {veneer} evaluate --adapter {run} --data {data} --metrics field_f1")
