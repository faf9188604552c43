"""Compare methods on your rows: quality with intervals, memory, time, file size, forgetting.

For instance:

  veneer compare --base smollm2-135m --data tickets.jsonl \\
      --methods full,lora,prefix --out compare/tickets
  veneer compare a.yaml b.yaml --test held_out.jsonl --metrics field_f1 \\
      --seeds 3 --out compare/ab
  veneer compare --base smollm2-135m --data pairs.jsonl --objective dpo \\
      --methods lora,dora --out c

Every candidate gets the same rows and budget, a search for its learning rate, and --seeds runs.
The rates of a search train together, and halving stops the worse half; full fine-tuning and
clusters train them one by one. Every other run has a process of its own. After Ctrl-C the same
command continues and reuses finished runs. Run files keep their settings, except for rows, budget,
learning rate, seed and folder. --on ray uses a cluster: docs/guides/ray.md.
"""

from __future__ import annotations

import signal
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.bounds import COUNT, EXTENSIONS, NEW_TOKENS, RATIO, SECONDS, SEEDS
from veneer.cli.common import (
    add_json,
    add_map,
    make_console,
    parse_columns,
    pause_collection,
    print_json,
    working,
)
from veneer.cli.config_file import read_run_config
from veneer.cli.early import check_files, check_new, check_rows, check_run, check_writable
from veneer.cli.flags import add_repeated, add_value
from veneer.errors import ConfigError
from veneer.training.config import RunConfig
from veneer.training.state.interrupt import ASKING
from veneer.wording import shown

if TYPE_CHECKING:
    from rich.table import Table

    from veneer.comparison.jobs import JobExecutor


def add_arguments(parser: ArgumentParser) -> None:
    parser.usage = (
        "veneer compare (--base B --data D --methods M,M | RUN.yaml RUN.yaml ...) --out DIR"
    )
    add_value(parser, "runs", "RUN.yaml", "run files to compare", nargs="*")
    add_value(parser, "--base", "B", "hub id, folder, .gguf file or named default")
    add_value(parser, "--data", "D", "rows: .jsonl, .json, .csv or .parquet")
    add_value(
        parser,
        "--methods",
        "M,M",
        "methods, for instance full,lora,qlora,dora,prefix,bottleneck",
        default="",
    )
    add_value(
        parser, "--objective", "O", "answers, or dpo, ipo or orpo over pairs; default: answers"
    )
    add_value(
        parser,
        "--validation",
        "V",
        "rows to choose the learning rate with; default: split off --data",
    )
    add_value(parser, "--test", "T", "rows to measure quality on; default: split off --data")
    add_map(parser)
    add_value(parser, "--steps", "N", "optimizer steps of each run; default: 100", type=COUNT)
    add_value(
        parser, "--seconds", "S", "training time of each run, instead of --steps", type=SECONDS
    )
    add_value(parser, "--seeds", "N", "runs of each candidate; default: 3", type=SEEDS, default=3)
    add_value(
        parser,
        "--rates",
        "F,F",
        "learning rates to try, times the method's default; default: 1/3,1,3",
        default="1/3,1,3",
    )
    add_value(
        parser,
        "--extend",
        "N",
        "extra rates to try if the best one is the lowest or highest; default: 1",
        type=EXTENSIONS,
        default=1,
    )
    add_value(
        parser,
        "--metrics",
        "M,M",
        "metrics of veneer evaluate; the first one ranks; default: loss",
        default="",
    )
    add_value(
        parser, "--labels", "L", "labels for accuracy: A,B,C or a file with one label per line"
    )
    add_value(
        parser,
        "--max-new-tokens",
        "N",
        "longest answer in tokens; default: 128",
        type=NEW_TOKENS,
        default=128,
    )
    add_value(
        parser, "--general", "FILE", "text to measure forgetting on; default: a built-in text"
    )
    add_repeated(parser, "--set", "PATH=VALUE", "set any setting, for all candidates", dest="sets")
    add_value(parser, "--out", "DIR", "folder of the comparison", type=Path, required=True)
    where = parser.add_argument_group("where to run")
    add_value(
        where,
        "--on",
        None,
        "local processes or Ray tasks; default: here",
        default="here",
        choices=PLACES,
    )
    add_value(
        where, "--address", "A", "address of the Ray cluster, or auto; default: start one here"
    )
    add_value(
        where, "--store", "S", "s3://... or a folder that all nodes share; default: DIR/gathered"
    )
    add_value(
        where,
        "--cpus",
        "N",
        "CPUs of each run on Ray; default: the threads of this process",
        type=COUNT,
    )
    add_json(parser)


def run(args: Namespace) -> int:
    configs = _read_candidates(args)
    _check(args, configs)
    place = PLACES[args.on](args)
    with working("starting"):
        with pause_collection():
            from veneer import api
        from veneer.comparison.jobs import RUNNING

    console = make_console(json=True)

    def terminate(*_: Any) -> None:
        raise KeyboardInterrupt

    previous_handlers = {
        signal_number: signal.signal(signal_number, terminate)
        for signal_number in ASKING
        if signal.getsignal(signal_number) is not signal.SIG_IGN
    }
    try:
        with console.status("") as status:

            def say(text: str) -> None:
                if text.endswith(RUNNING):
                    status.update(shown(text))
                else:
                    console.print(shown(text))

            figures = api.compare(
                configs,
                out=args.out,
                validation=args.validation,
                test=args.test,
                steps=args.steps,
                seconds=args.seconds,
                seeds=args.seeds,
                rates=_parse_rates(args.rates),
                extend=args.extend,
                metrics=_split_names(args.metrics),
                labels=args.labels,
                max_new_tokens=args.max_new_tokens,
                general=args.general,
                say=say,
                place=place,
            )
    finally:
        for signal_number, handler in previous_handlers.items():
            signal.signal(signal_number, handler)
    if args.json:
        print_json(figures)
        return 0
    screen = make_console(wraps=True)
    table = _comparison_table(figures)
    screen.print()
    screen.print(table)
    screen.print()
    for sentence in figures["conclusion"]:
        screen.print(shown(sentence))
    screen.print(f"\n{args.out / 'comparison.html'}", soft_wrap=True)
    return 0


def _check(args: Namespace, configs: Sequence[tuple[str, RunConfig]]) -> None:
    """Checks what it can before torch is loaded."""
    from veneer.evaluation.labels import read_labels
    from veneer.evaluation.metrics.registry import find_metrics

    if args.out.exists() and not args.out.is_dir():
        check_new(args.out)
    check_writable(args.out / "comparison.json")
    for _, config in configs:
        check_run(config)
    check_rows(args.validation, args.test)
    check_files([None if args.general is None else Path(args.general)])
    find_metrics(_split_names(args.metrics))
    if args.labels:
        read_labels(args.labels)


def _run_here(args: Namespace) -> JobExecutor:
    """Returns this machine. Raises ConfigError for flags that need a cluster."""
    from veneer.comparison.local import LocalExecutor

    ray_flags = [
        f"--{name}" for name in ("address", "store", "cpus") if getattr(args, name) is not None
    ]
    if ray_flags:
        raise ConfigError(
            f"{', '.join(ray_flags)}: only for runs on Ray",
            [],
            "Give --on ray too, or leave them out.",
        )
    return LocalExecutor()


def _run_on_ray(args: Namespace) -> JobExecutor:
    from veneer.comparison.ray_place import RayExecutor

    return RayExecutor(
        args.address, args.store or str((args.out / "gathered").resolve()), args.cpus
    )


PLACES: dict[str, Callable[[Namespace], JobExecutor]] = {"here": _run_here, "ray": _run_on_ray}


def _comparison_table(figures: dict[str, Any]) -> Table:
    """Builds a table of 80 columns with one line per method."""
    from rich.table import Table

    from veneer.comparison.conclusion import HEAD, facts

    table = Table(
        box=None, padding=(0, 1, 0, 0), show_edge=False, header_style="dim", pad_edge=False
    )
    for column, title in enumerate(HEAD):
        table.add_column(
            title.replace(" ", "\n"), justify="left" if column == 0 else "right", no_wrap=True
        )
    for method in figures["methods"]:
        cells = [method["name"], "failed"] if method["failure"] else facts(method, figures)
        table.add_row(*map(shown, cells))
    return table


_DECIDED = {
    "steps": "--steps or --seconds",
    "epochs": "--steps or --seconds",
    "seed": "--seeds",
    "out": "--out",
    "data.validation_share": "--validation and --test",
}
"""Settings that a comparison decides for all its runs, with the flags that say them."""


def _check_sets(sets: Sequence[str]) -> None:
    """Raises ConfigError for settings that no run would read."""
    paths = [path for text in sets if (path := text.partition("=")[0].strip()) in _DECIDED]
    if paths:
        faults = [f"--set {path}: give {_DECIDED[path]}" for path in paths]
        raise ConfigError("a comparison decides these settings for all its runs", faults)


def _read_candidates(args: Namespace) -> list[tuple[str, RunConfig]]:
    """Reads (name, settings) of every candidate.

    Raises ConfigError with the faults of all candidates.
    """
    methods, columns = _split_names(args.methods), parse_columns(args)
    _check_sets(args.sets)
    if bool(methods) == bool(args.runs):
        raise ConfigError(
            "nothing to compare", [], "Give --methods M,M with --base and --data, or run files."
        )
    candidates: list[tuple[str, RunConfig]] = []
    faults: list[str] = []
    for name in methods or args.runs:
        flags = {
            "base": args.base,
            "data": args.data,
            "out": str(args.out),
            "objective": args.objective,
        }
        try:
            if methods:
                candidates.append(
                    (name, read_run_config(None, {**flags, "method": name}, args.sets, columns))
                )
            else:
                candidates.append(
                    (Path(name).stem, read_run_config(name, flags, args.sets, columns))
                )
        except ConfigError as fault:
            faults += [
                fault_text
                for fault_text in (fault.faults or [str(fault)])
                if fault_text not in faults
            ]
    if faults:
        raise ConfigError("this comparison cannot be run", faults, "Nothing was run.")
    return candidates


def _split_names(text: str) -> list[str]:
    return [name for part in text.split(",") if (name := part.strip())]


def _parse_rates(text: str) -> list[float]:
    parts = [part.partition("/") for part in _split_names(text)]
    try:
        return [RATIO(a) / RATIO(b or "1") for a, _, b in parts]
    except ArgumentTypeError as fault:
        raise ConfigError(
            f"--rates {text!r} is not a list of numbers", [str(fault)], "For instance 1/3,1,3."
        ) from None
