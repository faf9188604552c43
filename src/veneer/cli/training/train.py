"""Train an adapter, or every weight, from a run file or from flags.

For instance:

  veneer train RUN.yaml
  veneer train --base smollm2-135m --data tickets.jsonl --out runs/tickets
  veneer train RUN.yaml --rank 8 --set data.long_rows=drop
  veneer train --resume runs/tickets
  veneer train JOBS.yaml          several jobs together, if it lists `jobs:`
  veneer train RUN.yaml --sweep learning_rate=3e-4,1e-3 rank=8,32

These are the settings that people use most. `veneer explain settings` lists all of them,
`veneer explain rank` explains one, and --set path=value sets any of them (the value is YAML).
Flags override the run file, and --set overrides both.
"""

from __future__ import annotations

import os
import shlex
import sys
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.bounds import COUNT, PROCESSES
from veneer.cli.bases import locate_base_and_adapter
from veneer.cli.common import add_json, add_map, parse_columns, pause_collection, print_json
from veneer.cli.config_file import (
    FLAGS,
    find_first_parent,
    read_run_config,
    read_settings,
    resolve_run,
    summarize_setting,
)
from veneer.cli.early import check_place, check_run
from veneer.cli.flags import add_repeated, add_switch, add_value
from veneer.cli.job_settings import read_jobs
from veneer.cli.training.file_jobs import (
    FileJob,
    begun_jobs,
    find_library,
    new_jobs,
    stopped_at_once,
)
from veneer.cli.training.plan import parse_size
from veneer.errors import ConfigError, RunInterrupted
from veneer.library.names import name_of_run
from veneer.private.argparse import Group
from veneer.training.config import RunConfig

if TYPE_CHECKING:
    from veneer.library.library import Library


def add_arguments(parser: ArgumentParser) -> None:
    parser.usage = (
        "veneer train [RUN.yaml] [--base B --data D --out DIR] [--set path=value]"
        " [--sweep name=value,value] | --resume DIR"
    )
    add_value(parser, "run", "RUN.yaml", "run file: settings in YAML", nargs="?")
    for title, names in GROUPS.items():
        group = parser.add_argument_group(title)
        for name, placeholder in names.items():
            _add_setting(group, name, placeholder)
        if "data" in names:
            add_map(group)
    group = parser.add_argument_group("the run")
    add_repeated(
        group,
        "--set",
        "PATH=VALUE",
        "set any setting, for instance data.long_rows=drop",
        dest="sets",
    )
    add_value(
        group,
        "--sweep",
        "NAME=VALUES",
        (
            "train every combination together, for instance rank=8,32; with"
            " --draws also ranges, learning_rate=log:1e-4..3e-3 or warmup=even:0..0.1"
        ),
        nargs="+",
    )
    add_value(
        group, "--draws", "N", "train N random points of the sweep, drawn by --seed", type=COUNT
    )
    add_switch(group, "--halving", "stop the worse half at each rung, by held-out loss")
    add_value(
        group,
        "--resume",
        "DIR",
        (
            "continue the run in DIR bit for bit, with its own settings; several train together."
            " Without DIR: the unfinished runs of RUN.yaml"
        ),
        nargs="*",
    )
    add_value(
        group,
        "--library",
        "DIR",
        "add each finished adapter to this library; without DIR: to your own",
        nargs="?",
        const="",
    )
    add_value(
        group,
        "--fit",
        "MEMORY",
        "adjust settings until the run fits, for instance 24GiB; prints each change",
    )
    add_value(
        group,
        "--processes",
        "N",
        "train in N processes on this machine; for several machines use torchrun",
        type=PROCESSES,
    )
    add_switch(group, "--quiet", "show no progress")
    add_json(group)


GROUPS: dict[str, dict[str, str | None]] = {
    "base, data and output": {
        "base": "B",
        "data": "D",
        "validation": "D",
        "from": "A",
        "out": "DIR",
    },
    "method": {
        "objective": "O",
        "method": "M",
        "rank": "R",
        "alpha": "ALPHA",
        "quantize": "FORMAT",
    },
    "training": {
        "steps": "N",
        "epochs": "N",
        "batch": "N",
        "micro_batch": "N",
        "length": "N",
        "learning_rate": "RATE",
        "seed": "N",
    },
    "machine": {"dtype": "TYPE", "checkpointing": None, "shard": None},
}
"""Settings that have a flag of their own, with the placeholder of its value; None: yes or no."""


def _add_setting(group: Group, name: str, placeholder: str | None) -> None:
    flag = "--" + name.replace("_", "-")
    help_text = summarize_setting(FLAGS[name]).replace("%", "%%")
    if placeholder is None:
        group.add_argument(flag, action=BooleanOptionalAction, default=None, help=help_text)
    else:
        add_value(group, flag, placeholder, help_text)


def run(args: Namespace) -> int:
    leads = os.environ.get("RANK", "0") == "0"
    # Rank 0 sends its settings to the other processes.
    jobs, are_several = _read_jobs(args) if leads else ([], False)
    library = find_library(args, [job.config for job in jobs])
    if are_several:
        from veneer.cli.training.train_jobs import train_jobs

        return train_jobs(jobs, args, library)
    if args.processes is not None:
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise ConfigError(
                "--processes starts processes, but this is already one of several",
                [],
                "Leave it out.",
            )
        return _launch_processes(args.processes)
    return _train_run(next(iter(jobs), None), args, library)


def _train_run(job: FileJob | None, args: Namespace, library: Library | None) -> int:
    """Trains one run. job: None on processes other than the first."""
    leads, config = job is not None, None if job is None else job.config
    resume = job is not None and job.resume
    if config is not None:
        check_place(config, resume=resume)
        check_run(config)
    # Imported after the settings are checked: loading torch takes seconds, a typo should not.
    from veneer.training.output.screen import make_screen

    screen = make_screen(json=args.json, quiet=args.quiet or not leads)
    if config is not None:
        screen.message(f"loading {config.base}")
    with pause_collection():
        from veneer import api

    try:
        if args.fit and config is not None:
            config, changes = api.fit_run(config, parse_size(args.fit))
            for line in changes:
                screen.message(line)
        summary = api.train_run(config, resume=resume, screen=screen)
    except RunInterrupted:
        if leads:
            raise
        return RunInterrupted.exit_code  # process 0 reports it
    except KeyboardInterrupt:
        if config is None or not (Path(config.out) / "run.yaml").is_file():
            raise
        raise stopped_at_once(f"veneer train --resume {shlex.quote(config.out)}") from None
    finally:
        screen.close()
    if config is not None and library is not None:
        entry = library.add(config.out, name=name_of_run(config.out))
        screen.message(f"in the library as {entry.reference}")
    if args.json and leads:
        print_json(summary)
    elif config is not None and not args.quiet:
        screen.message(_suggest_next(config, is_kept=library is not None))
    return 0


def _launch_processes(processes: int) -> int:
    """Runs this command in each process, without --processes."""
    from veneer.training.processes.launch import launch

    arguments, words = [], iter(sys.argv[1:])
    for argument in words:
        if argument == "--processes":
            next(words)
        elif not argument.startswith("--processes="):
            arguments.append(argument)
    return launch(arguments, processes, os.environ)


def _read_jobs(args: Namespace) -> tuple[list[FileJob], bool]:
    """Returns one run or several, and whether several were asked for."""
    flags: dict[str, Any] = {name: getattr(args, name) for name in FLAGS}
    if args.resume:
        _refuse_settings(args, flags)
        folders = _unfinished(args.resume)
        jobs = [FileJob(_resumed_config(folder), resume=True) for folder in folders]
        return jobs, len(folders) > 1
    if flags["from"] is not None and flags["base"] is None and args.run is None:
        parent = find_first_parent(flags["from"])
        flags["base"] = None if parent is None else locate_base_and_adapter(None, parent)[0]
    columns = parse_columns(args)
    settings = read_settings(args.run)  # once: the file may be a pipe
    _refuse_without_sweep(args)
    configs = read_jobs(settings, flags, args.sets, columns, args.sweep, args.draws)
    are_several = configs is not None
    if configs is None:
        configs = [resolve_run(settings, flags, args.sets, columns)]
    return (new_jobs if args.resume is None else begun_jobs)(configs), are_several


def _refuse_without_sweep(args: Namespace) -> None:
    """Raises ConfigError for flags that change a sweep, if there is none."""
    flags = [f"--{name}" for name in ("draws", "halving") if getattr(args, name)]
    if flags and args.sweep is None:
        raise ConfigError(
            f"{', '.join(flags)}: only with --sweep",
            next_step="Name what is tried, for instance --sweep learning_rate=3e-4,1e-3 rank=8,32.",
        )
    if args.halving and args.resume is not None:
        raise ConfigError(
            "--halving compares jobs from their start, and --resume goes on with those left",
            next_step="Leave --halving out.",
        )


def _refuse_settings(args: Namespace, flags: Mapping[str, Any]) -> None:
    """Raises ConfigError if settings are given beside --resume."""
    conflicting = [
        "--" + name.replace("_", "-") for name, value in flags.items() if value is not None
    ]
    conflicting += [f"--map {text}" for text in args.columns]
    conflicting += [f"--set {text}" for text in args.sets] + ([args.run] if args.run else [])
    conflicting += ["--fit"] if args.fit else []
    conflicting += [f"--{n}" for n in ("sweep", "draws", "halving") if getattr(args, n)]
    if conflicting:
        raise ConfigError(
            f"--resume {' '.join(args.resume)} takes its settings from that folder's run.yaml;"
            f" also given: {', '.join(conflicting)}",
            [],
            "Leave them out, or start a new run with another --out.",
        )


def _unfinished(folders: Sequence[str]) -> list[str]:
    """Leaves out finished runs of several, unless all are finished."""
    open_folders = [folder for folder in folders if not (Path(folder) / "summary.json").is_file()]
    return open_folders or list(folders[:1])


def _resumed_config(folder: str) -> RunConfig:
    file = Path(folder) / "run.yaml"
    if not file.is_file():
        raise ConfigError(
            f"{folder} holds no run: {file} was not found",
            [],
            f"For a run file: veneer train {folder} --resume"
            if Path(folder).is_file()
            else "Give the folder that --out named.",
        )
    return read_run_config(file, {"out": folder})


def _suggest_next(config: RunConfig, *, is_kept: bool) -> str:
    """Suggests the commands that come after a run."""
    trains_base, validation = config.method.trains_base, config.data.validation
    name, folder = ("--base", f"{config.out}/model") if trains_base else ("--adapter", config.out)
    flag = f"{name} {shlex.quote(folder)}"
    rows = shlex.quote(validation) if isinstance(validation, str) else "HELD_OUT.jsonl"
    keep = "" if is_kept or trains_base else f"\n        veneer adapters add {shlex.quote(folder)}"
    chat = f"veneer chat {flag}\n        " if config.objective.answers else ""
    return f"next: {chat}veneer evaluate {flag} --data {rows}{keep}"
