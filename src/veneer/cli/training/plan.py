"""Predict memory, time and cost of a run before it starts, and help to choose a method.

For instance:

  veneer plan --base llama-70b --method lora --length 2048 --batch 1 --gpu H100
  veneer plan --base smollm2-135m --data tickets.jsonl --compare --memory 8GiB
  veneer plan --base smollm2-135m --data tickets.jsonl --kind format \\
      --write run.yaml
  veneer plan --models llama-3.2-1b,qwen3-4b,llama-70b --gpu H100 --batch 1
  veneer plan --base smollm2-135m --data tickets.jsonl --probe
  veneer plan RUN.yaml --processes 4 --link 10Gb/s
  veneer plan JOBS.yaml
  veneer plan --base llama-70b --batch 8 --gpu H100 --processes 8 --shard \\
      --link 200Gb/s

RUN.yaml is planned with its own settings and rows. If it lists `jobs:`, each is planned, and all
together, as `veneer train` would train them. --base is a folder, a .gguf file, a hub id (only
its config is downloaded) or a named size such as llama-70b. The exit code is 3 if there is one plan
and it does not fit, or if jobs do not fit.
"""

from __future__ import annotations

import re
from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING

from veneer.bounds import BYTES, COUNT, EPOCHS, LENGTH, PRICE, PROCESSES, RANK, ROWS
from veneer.cli.bases import add_dtype
from veneer.cli.common import add_json, add_map, make_console, pause_collection, print_json, working
from veneer.cli.config_file import read_settings, resolve_run
from veneer.cli.early import check_plannable, check_rows, check_writable
from veneer.cli.flags import add_repeated, add_switch, add_value
from veneer.cli.job_settings import read_jobs
from veneer.cli.training.plan_flags import SETTINGS, list_bases, read_flags, run_probe
from veneer.cli.training.plan_output import print_plan, write_run_file
from veneer.errors import ConfigError
from veneer.quant.config import FORMATS
from veneer.training.config import RunConfig

if TYPE_CHECKING:
    from veneer.plan.ask import PlanQuestion

UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
}
DOES_NOT_FIT = 3


def add_arguments(parser: ArgumentParser) -> None:
    parser.usage = (
        "veneer plan [RUN.yaml | --base B [--method M] [--data D]] [--memory 24GiB] [--compare]"
        " [--gpu NAME]"
    )
    add_value(parser, "run", "RUN.yaml", "run file, instead of the settings below", nargs="?")
    add_repeated(parser, "--set", "PATH=VALUE", "set any setting of RUN.yaml", dest="sets")
    add_value(
        parser,
        "--base",
        "B",
        "folder, .gguf file, hub id, or named size (llama-70b, qwen3-4b, ...)",
    )
    add_value(parser, "--models", "A,B", "several bases: plans every base with every method")
    add_value(
        parser, "--objective", "O", "answers, dpo, ipo, kto, orpo or classify; default: answers"
    )
    add_value(parser, "--method", "M", "lora, qlora, prefix, full, ...; default: lora")
    add_value(parser, "--rank", "R", "rank of lora and dora", type=RANK)
    add_value(
        parser, "--quantize", None, "format of the base's linear layers in memory", choices=FORMATS
    )
    add_dtype(parser, None)
    add_value(parser, "--batch", "N", "rows per optimizer step; default: 8", type=ROWS)
    add_value(parser, "--micro-batch", "N", "rows computed at once; default: --batch", type=ROWS)
    add_value(parser, "--length", "N", "longest row in tokens; default: 2048", type=LENGTH)
    add_switch(
        parser,
        "--checkpointing",
        "recompute activations in backward instead of storing them",
        default=None,
    )
    add_value(
        parser,
        "--processes",
        "N",
        "number of processes, each on a machine like this one",
        type=PROCESSES,
        default=1,
    )
    add_switch(parser, "--shard", "split the base's layers over the processes", default=None)
    add_value(
        parser,
        "--reduce",
        None,
        "how processes add their gradients; default: plain",
        choices=["plain", "exact"],
    )
    add_value(
        parser, "--link", "SPEED", "network between processes, 10Gb/s (bits) or 3GB/s (bytes)"
    )
    add_value(
        parser,
        "--data",
        "D",
        "rows to plan with; default: rows of --length with all tokens trained",
    )
    add_map(parser)
    add_value(parser, "--steps", "N", "optimizer steps of the run", type=COUNT)
    add_value(parser, "--epochs", "E", "passes over --data; default: 3", type=EPOCHS)
    add_value(
        parser, "--memory", "M", "available memory, for instance 24GiB; default: this machine's"
    )
    add_value(
        parser, "--gpu", "NAME", "plan for a named GPU (published figures) instead of this machine"
    )
    add_value(parser, "--price", "P", "price per hour, to compute the cost", type=PRICE)
    add_switch(parser, "--compare", "plan all methods")
    add_value(
        parser,
        "--kind",
        None,
        "kind of task: also recommends a method",
        choices=["style", "format", "task", "instructions", "knowledge"],
    )
    add_value(
        parser,
        "--variants",
        "N",
        "number of adapters you want on one base, for --kind",
        type=COUNT,
        default=1,
    )
    add_switch(parser, "--merge", "you want to merge the result into the base, for --kind")
    add_value(parser, "--write", "RUN.yaml", "write the recommended (or planned) run as a run file")
    add_switch(
        parser,
        "--probe",
        "run one real step on the longest batch of --data and compare it with the plan",
    )
    add_value(parser, "--html", "FILE", "write the plan as an HTML page")
    add_json(parser)


def run(args: Namespace) -> int:
    if args.probe:
        return run_probe(args)
    config = _read_run_file(args) if args.run else read_flags(args)
    if isinstance(config, list):
        from veneer.cli.training.plan_jobs import print_jobs, refuse_flags

        refuse_flags(config, args)
        questions = [read_question(args, job) for job in config]
        return 0 if print_jobs(config, questions, args) else DOES_NOT_FIT
    with working("planning") as show_progress:
        question = read_question(args, config)
        from veneer.plan.ask import answer_question

        with pause_collection():  # a plan that is not remembered imports transformers
            answer = answer_question(
                question, lambda done, total: show_progress("planning", done, total)
            )
    if args.json:
        print_json(answer.to_dict())
    console = make_console(json=args.json, wraps=True)
    if not args.json:
        print_plan(console, answer, question)
    if args.html:
        from veneer.files.atomic import write_text
        from veneer.report.plan_page import plan_page

        title = f"Plan for {', '.join(question.bases)}"
        page = plan_page(title, answer.rows, memory_bytes=answer.memory or None, notes=answer.notes)
        write_text(args.html, page, replace=True)
        console.print(f"wrote {args.html}")
    if args.write:
        write_run_file(args, answer)
        processes_flag = f" --processes {args.processes}" if args.processes > 1 else ""
        console.print(
            f"wrote {args.write} · veneer train {args.write} --out runs/NAME{processes_flag}"
        )
    single_row = answer.rows[0] if len(answer.rows) == 1 else None
    return DOES_NOT_FIT if single_row is not None and single_row.fits is False else 0


def parse_size(text: str) -> int:
    """24GiB, 24 GB, 512MiB, 1000000 -> bytes. ConfigError otherwise."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?b?)\s*", text, re.IGNORECASE)
    unit = match[2].upper() if match else "?"
    unit = unit if unit in UNITS else unit + "B"
    size_bytes = 0 if match is None or unit not in UNITS else float(match[1]) * UNITS[unit]
    if match is None or not BYTES.least <= size_bytes <= BYTES.most:
        raise ConfigError(
            f"{text!r} is not a memory size", next_step="Write for instance 24GiB, 24GB or 512MiB."
        )
    if not match[2] and size_bytes < UNITS["MB"]:
        raise ConfigError(
            f"{text!r} has no unit, and no base fits into so few bytes",
            next_step=f"Write for instance {match[1]}GB.",
        )
    return int(size_bytes)


def read_question(args: Namespace, config: RunConfig) -> PlanQuestion:
    """Returns the question about this run that the flags ask."""
    memory = parse_size(args.memory) if args.memory else None
    bases = list_bases(args) or [config.base]
    for base in bases:
        check_plannable(base)
    check_rows(args.data)
    check_writable(args.write, args.html)
    with pause_collection():
        from veneer.plan.ask import PlanQuestion
        from veneer.plan.choice import Choice
        from veneer.plan.spread import parse_link
        from veneer.plan.workload import Workload

    link = parse_link(args.link) if args.link else None
    data = None
    if args.run or args.data:
        with pause_collection():
            from veneer import api
            from veneer.objectives.labels import resolved
            from veneer.training.state.parents import with_parent_settings

        config = with_parent_settings(config)
        data = api.run_rows(config)
        objective = resolved(config.objective, data.head)
        config = config.model_copy(update={"objective": objective})
    return PlanQuestion(
        bases,
        Choice.of(config, args.processes),
        Workload.of(config, data),
        compare=args.compare,
        memory=memory,
        gpu=args.gpu,
        link=link,
        price_per_hour=args.price,
        kind=args.kind,
        variants=args.variants,
        merge=args.merge,
    )


def _read_run_file(args: Namespace) -> RunConfig | list[RunConfig]:
    """Returns the run of the file, or its jobs."""
    conflicting = [name for name in SETTINGS if getattr(args, name) is not None]
    conflicting += ["map"] * bool(args.columns) + ["write"] * bool(args.write)
    if conflicting:
        flags = ", ".join("--" + name.replace("_", "-") for name in conflicting)
        raise ConfigError(
            f"{args.run} already sets what to plan; also given: {flags}",
            next_step="Leave them out, or change settings with --set path=value.",
        )
    settings = read_settings(args.run)  # once: the file may be a pipe
    jobs = read_jobs(settings, {}, args.sets, {}, None)
    return jobs or resolve_run(settings, {"out": "planned"}, args.sets, {})
