"""List, follow, stop and resume the training jobs of `veneer serve --train` and `veneer studio`.

Each job is a run in a process beside the server, and goes on if the server ends.

For instance:

  veneer runs --jobs jobs        list the jobs of a folder; default: your own
  veneer runs show 4f1c          settings, losses and events of a job
  veneer runs follow 4f1c        show its steps as they come
  veneer runs stop 4f1c          save a checkpoint and stop
  veneer runs resume 4f1c        continue from there
  veneer runs rm 4f1c            delete a job and its checkpoints

ID is a job's id, or a part of it that no other id has.
"""

from __future__ import annotations

import sys
import time
from argparse import SUPPRESS, ArgumentParser, Namespace
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from shutil import get_terminal_size
from typing import TYPE_CHECKING, Any

from veneer.cli.common import add_action, add_json, print_json
from veneer.cli.flags import add_value
from veneer.cli.library.adapters_ls import age, table
from veneer.errors import RefusedError
from veneer.wording import number, shown, wrapped

if TYPE_CHECKING:
    from veneer.jobs.record import TrainingJob
    from veneer.jobs.store import JobStore
    from veneer.training.output.records import Record
    from veneer.training.output.screen import Screen

HEAD = ("JOB", "STATE", "STEP", "LOSS", "BASE", "NAME", "AGE")
POLL_SECONDS = 0.5
PART_BYTES = 2**20
EVENTS_SHOWN = 8
LABEL_WIDTH = 10

Action = Callable[[Namespace, "JobStore"], int]


def add_arguments(parser: ArgumentParser) -> None:
    parser.set_defaults(act=_list)
    _add_common(parser)
    actions = parser.add_subparsers(dest="action", metavar="ACTION", title="actions")

    def action(name: str, act: Action, help: str) -> ArgumentParser:
        action_parser = add_action(actions, name, help)
        action_parser.set_defaults(act=act)
        _add_common(action_parser, default=SUPPRESS)  # keeps flags before the action
        return action_parser

    action("list", _list, "list the jobs, the newest first; the default")
    for name, act, help in (
        ("show", _show, "show settings, losses and events of a job"),
        ("follow", _follow, "print the steps of a job as they come, until it ends"),
        ("stop", _stop, "save a checkpoint and stop; resume continues"),
        ("resume", _resume, "queue a stopped or failed job again"),
        ("rm", _rm, "delete a job that does not run; an adapter in the library stays"),
    ):
        add_value(action(name, act, help), "job", "ID", "id of a job, or a part")


def _add_common(parser: ArgumentParser, *, default: Any = None) -> None:
    add_value(parser, "--jobs", "DIR", "folder of jobs; default: your own", default=default)
    add_json(parser, default=default)


def run(args: Namespace) -> int:
    from veneer.jobs.store import JobStore

    act: Action = args.act
    return act(args, JobStore(args.jobs))


def describe(job: TrainingJob) -> dict[str, Any]:
    """Returns what `--json` prints of a job."""
    record = job.record
    return {
        "id": job.id,
        "state": job.state,
        "error": job.error,
        "base": record.base,
        **job.facts(),
        "created": record.created,
        "started": record.started,
        "ended": record.ended,
        "name": record.publish_as,
        "adapter": record.adapter,
        "threads": record.threads,
        "run": str(job.run_folder),
    }


def _list(args: Namespace, store: JobStore) -> int:
    jobs = store.jobs()
    if args.json:
        print_json([describe(job) for job in jobs])
    elif not jobs:
        print(f"no jobs in {shown(store.folder)}")
        print("To start one, open the page of veneer studio, or use veneer serve --train.")
    else:
        width = get_terminal_size().columns if sys.stdout.isatty() else None
        print("\n".join(table(HEAD, [_row(job) for job in jobs], width)))
    return 0


def _row(job: TrainingJob) -> tuple[str, ...]:
    facts, record = job.facts(), job.record
    cells = (
        job.id,
        job.state,
        f"{facts.get('step', 0)}/{facts['steps']}" if facts.get("steps") else "",
        _loss(facts),
        facts.get("base") or record.base,
        record.adapter or record.publish_as or "",
        age(datetime.fromtimestamp(record.created, UTC).isoformat()),
    )
    return tuple(map(shown, cells))


def _loss(facts: Mapping[str, Any]) -> str:
    """Returns the newest loss as text; empty if there is none."""
    loss = facts.get("loss")
    return number(loss) if isinstance(loss, int | float) else ""


def _show(args: Namespace, store: JobStore) -> int:
    job = store.find(args.job)
    events = store.events(job.id)
    if args.json:
        print_json({**describe(job), "events": events})
        return 0
    from veneer.jobs.record import together_words

    facts = job.facts()
    steps = f"step {facts.get('step', 0)} of {facts['steps']}" if facts.get("steps") else ""
    state = " · ".join(filter(None, (job.state, steps)))
    lines = {
        "job": job.id,
        "state": state + together_words(store.num_together(job)),
        "loss": _loss(facts),
        "base": facts.get("base") or job.record.base,
        "method": facts.get("method"),
        "adapter": job.record.adapter or job.record.publish_as,
        "threads": f"{job.record.threads}, niceness {job.record.niceness}",
        "run": job.run_folder,
        "settings": job.run_file,
    }
    for label, value in lines.items():
        if value:
            print(f"{label:<{LABEL_WIDTH}}{shown(value)}")
    for event in events[-EVENTS_SHOWN:]:
        _print_event(event)
    return 0


def _print_event(event: dict[str, Any]) -> None:
    """Prints an event's time and message, wrapped to the terminal and indented."""
    when = datetime.fromtimestamp(float(event["time"])).strftime("%m-%d %H:%M:%S")
    width = max(get_terminal_size().columns - len(when) - 2, 40)
    message = str(event["message"]).splitlines() or [""]
    lines = [part for line in message for part in wrapped(shown(line), width).splitlines()]
    for number_of_line, line in enumerate(lines):
        print(f"{when if number_of_line == 0 else '':<{len(when)}}  {line}")


def _follow(args: Namespace, store: JobStore) -> int:
    """Prints steps until the job ends. Raises RefusedError if it failed."""
    from veneer.training.output.screen import make_screen

    screen = make_screen(json=args.json)
    job = store.find(args.job)
    try:
        job = _follow_records(store, job, screen)
    except KeyboardInterrupt:
        screen.close()
        screen.message("the job goes on")
        return 0
    finally:
        screen.close()
    if args.json:
        print_json(describe(job))
    if job.state == "failed":
        raise RefusedError(f"job {job.id} failed", (job.error or "").splitlines())
    screen.message(f"{job.id} is {job.state}")
    return 0


def _follow_records(store: JobStore, job: TrainingJob, screen: Screen) -> TrainingJob:
    """Shows the records of a job as they come; returns the job when it has stopped."""
    from veneer.jobs.record import OPEN
    from veneer.training.output.records import follow_records

    position, is_started, shown_state = 0, False, ""
    while True:
        job = store.get(job.id)  # read before its records, so that none is missed at the end
        if not is_started and job.state != shown_state:
            shown_state = job.state
            screen.message(f"{job.id} is {shown_state}")
        records: list[Record] = []
        if job.records_file.is_file():
            part = follow_records(
                job.records_file, position, most_bytes=PART_BYTES, shown=f"the run of {job.id}"
            )
            records, position = part.records, part.next
        for record in records:
            if record["kind"] == "start":
                screen.close()
                screen.start({**record, "paths": []})
                is_started = True
            elif is_started and record["kind"] == "step":
                screen.step(record)
            elif is_started and record["kind"] == "evaluation":
                screen.evaluation(record)
        if job.state not in OPEN and not records:
            return job
        if not records:
            time.sleep(POLL_SECONDS)


def _stop(args: Namespace, store: JobStore) -> int:
    return _print_state(args, store.pause(store.find(args.job).id))


def _resume(args: Namespace, store: JobStore) -> int:
    job = store.find(args.job)
    if job.record.disk_bytes is not None:  # the server's limit, which this command does not know
        store.limits = replace(store.limits, disk_bytes=job.record.disk_bytes)
    return _print_state(args, store.resume(job.id))


def _rm(args: Namespace, store: JobStore) -> int:
    job = store.find(args.job)
    store.delete(job.id)
    if args.json:
        print_json({"id": job.id, "deleted": True})
    else:
        print(f"deleted {job.id}")
    return 0


def _print_state(args: Namespace, job: TrainingJob) -> int:
    if args.json:
        print_json(describe(job))
    else:
        print(f"{job.id} is {job.state}")
    return 0
