"""The result of a job: held-out rows to judge it, its name in the library, and files to take."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from veneer.data.examples import Row
from veneer.errors import ConfigError
from veneer.jobs.published import may_publish, note_published
from veneer.jobs.record import TrainingJob
from veneer.library.entry import Entry
from veneer.library.library import Library
from veneer.library.names import TRIAL
from veneer.report.card import card_for
from veneer.serve.refusals import MOST_SHOWN, Refusal
from veneer.serve.studio.exports import write_zip
from veneer.serve.studio.judging import label_text

MOST_HELD_OUT = 200
"""Held-out rows that the page may ask about."""


def trial_name(draft_id: str) -> str:
    """Returns the library's name of an adapter that is judged and has no other name yet."""
    return f"{TRIAL}{draft_id}"


def publish(store_folder: Path, library: Library, job: TrainingJob, name: str) -> Entry:
    """Adds a job's adapter to the library."""
    if job.state != "done":
        raise ConfigError(f"the job is {job.state}: only a finished run has an adapter to keep")
    entry = library.add(job.run_folder, name=name)
    note_published(store_folder, entry)
    return entry


def kept_reference(library: Library, name: str, kept: str | None) -> str | None:
    """Returns the reference of the version of a name that holds an object, such as tickets@2; None
    if it was removed."""
    for entry in library.entries(name=name, every_version=True):
        if entry.version.object == kept:
            return entry.reference
    return None


def check_may_keep(store_folder: Path, library: Library, name: str) -> None:
    """Raises Refusal 403 if the library has an adapter of this name that no job published."""
    if not may_publish(store_folder, library, name):
        raise Refusal(
            403,
            f"The library has an adapter {name[:MOST_SHOWN]!r} that was not trained on this page."
            " Choose another name, or use an admin key to add a version to it.",
            "name",
            "wrong_scope",
        )


def check_is_free(library: Library, name: str, kept: str | None) -> None:
    """Raises Refusal 409 if a name is taken, and none of its versions holds this object."""
    if library.has(name) and kept_reference(library, name, kept) is None:
        raise Refusal(
            409,
            f"{library.get(name).reference} is in the library. Keep this adapter as the next"
            f" version of {name}? Who asks for {name} then gets this one.",
            "name",
            "name_taken",
        )


def unpublish(library: Library, name: str) -> None:
    """Removes a name from the library, if it is there."""
    with suppress(ConfigError):  # the name or the library does not exist
        library.remove(name)


def held_out_questions(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Returns the held-out rows that can be asked: messages up to the last turn, and that turn; or
    a text and its label."""
    questions = []
    for row in rows:
        if row.label is not None:
            messages = [{"role": "user", "content": row.text or ""}]
            expected = label_text(row.label)
            questions.append({"line": row.ref.line, "messages": messages, "expected": expected})
        elif row.messages and isinstance(row.messages[-1].get("content"), str) and not row.tools:
            messages = [
                {"role": turn["role"], "content": turn["content"]} for turn in row.messages[:-1]
            ]
            expected = row.messages[-1]["content"]
            questions.append({"line": row.ref.line, "messages": messages, "expected": expected})
    return questions[:MOST_HELD_OUT]


def result_file(job: TrainingJob, kind: str, *, name: str, base: str) -> tuple[bytes, str]:
    """Returns the adapter as a zip archive, the report or the model card, and the file's name.

    base: on which the adapter was trained
    """
    adapter = job.run_folder / "adapter"
    if not adapter.is_dir():
        raise ConfigError("the run has no adapter yet")
    if kind == "report":
        return (job.run_folder / "report.html").read_bytes(), f"{name}.html"
    if kind == "card":
        commands = [f"veneer serve --base {base}"]
        card = card_for(adapter, name=name, commands=commands, base=base) or ""
        return card.encode(), f"{name}.md"
    content = io.BytesIO()
    write_zip(adapter, content)
    return content.getvalue(), f"{name}.zip"
