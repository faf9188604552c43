"""Train an adapter that acts as the base does behind a long prompt, or as a larger base does.

For instance:

  veneer distil --base smollm2-135m --prompt support.txt --out runs/support
  veneer distil --base smollm2-135m --document handbook.md \\
      --questions asked.txt --out runs/handbook
  veneer distil --base smollm2-135m --document handbook.md --method prefix \\
      --out runs/cartridge
  veneer distil --base smollm2-135m \\
      --teacher HuggingFaceTB/SmolLM2-1.7B-Instruct --out runs/small

With the prompt in front, the teacher writes questions, unless --questions gives them, and answers
them with the likeliest tokens, or samples at --temperature. Then an adapter learns the teacher's
distributions over these answers without the prompt (objective distil). The teacher is the base
itself, or --teacher, a base with the same tokenizer.
--set changes any setting of that run, for instance objective.divergence=reverse or
objective.teacher.quantize=nf4.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from veneer.adapters.config import METHODS
from veneer.bounds import COUNT, NEW_TOKENS, SEED, TEMPERATURE
from veneer.cli.bases import add_base_format, load_bare_base
from veneer.cli.common import add_json, pause_collection, print_json, working
from veneer.cli.config_file import FLAGS, read_settings, resolve_run
from veneer.cli.early import check_base, check_files, check_place
from veneer.cli.flags import add_repeated, add_switch, add_value
from veneer.cli.rows.data_replay import read_questions
from veneer.data.teacher_text import ABOUT_DOCUMENT
from veneer.errors import ConfigError
from veneer.training.config import RunConfig

ROWS_FILE = "rows.jsonl"


def add_arguments(parser: ArgumentParser) -> None:
    parser.usage = (
        "veneer distil --base B [--teacher B] [--prompt FILE | --document FILE] --out DIR"
        " [--method prefix] [--questions FILE] [--set path=value]"
    )
    add_value(parser, "--base", "B", "hub id, folder, .gguf file or named default", required=True)
    add_value(
        parser,
        "--teacher",
        "B",
        "another base with the same tokenizer, which teaches; default: the base itself",
    )
    source = parser.add_mutually_exclusive_group()
    add_value(source, "--prompt", "FILE", "a text file: the system prompt to replace", type=Path)
    add_value(source, "--document", "FILE", "a text file that questions are about", type=Path)
    add_value(
        parser,
        "--method",
        None,
        "lora, or prefix: it starts as the keys and values of the text; default: lora",
        choices=[name for name, method in METHODS.items() if not method.trains_base],
    )
    add_value(parser, "--out", "DIR", "new folder of the run", required=True)
    add_value(
        parser,
        "--questions",
        "FILE",
        "questions, one per line; default: the teacher writes them",
        type=Path,
    )
    add_value(
        parser,
        "--rows",
        "N",
        "number of questions with answers; default: 300. At temperature 0 every question of"
        " --questions is answered once at most",
        type=COUNT,
        default=300,
    )
    add_value(
        parser,
        "--max-new-tokens",
        "N",
        "longest question or answer in tokens; default: 128",
        type=NEW_TOKENS,
        default=128,
    )
    add_value(
        parser,
        "--temperature",
        "T",
        "sampling temperature of the answers; default: 0, the likeliest tokens",
        type=TEMPERATURE,
        default=0.0,
    )
    add_value(parser, "--seed", "N", "random seed; default: 0", type=SEED, default=0)
    add_repeated(
        parser,
        "--set",
        "PATH=VALUE",
        "set any setting of the run, for instance epochs=5",
        dest="sets",
    )
    add_switch(parser, "--quiet", "show no progress")
    add_base_format(parser, "as it is stored")
    add_json(parser)


def run(args: Namespace) -> int:
    check_base(args.base)
    check_base(args.teacher)
    check_files([args.prompt, args.document, args.questions])
    questions = [] if args.questions is None else read_questions(args.questions)
    config = _read_config(args)
    check_place(config, resume=False)
    teacher = config.objective.teacher_text()
    system = None if teacher is None else teacher.system
    file = args.prompt or args.document
    if file is not None and system is None:
        raise ConfigError(f"{file} is empty", next_step="Write the prompt.")
    rows = _draw_rows(args, config, questions, system)
    with pause_collection():
        from veneer import api
    from veneer.training.output.screen import make_screen

    screen = make_screen(json=args.json, quiet=args.quiet)
    try:
        summary = api.train_run(config, resume=False, screen=screen, rows={ROWS_FILE: rows})
    finally:
        screen.close()
    if args.json:
        print_json(summary)
    elif not args.quiet:
        screen.message(f"next: veneer chat --adapter {args.out}")
    return 0


def _read_config(args: Namespace) -> RunConfig:
    """Returns the settings of the run over the rows that are drawn."""
    objective: dict[str, Any] = {"name": "distil"}
    if (file := args.prompt or args.document) is not None:
        objective["document"] = str(file)
    if args.document is not None:
        objective["system"] = ABOUT_DOCUMENT
    if args.teacher is not None:
        objective["teacher"] = {"base": args.teacher}
    method = {"name": args.method or "lora"}
    if file is not None:
        method |= METHODS[method["name"]].of_document
    settings = read_settings(None)
    settings.values |= {
        "method": method,
        "base": args.base,
        "data": {"train": str(Path(args.out) / ROWS_FILE)},
        "objective": objective,
        "out": args.out,
        "seed": args.seed,
        "dtype": args.dtype,
        "device": args.device,
        "quantize": args.quantize,
    }
    return resolve_run(settings, dict.fromkeys(FLAGS), args.sets, {})


def _draw_rows(
    args: Namespace, config: RunConfig, questions: Sequence[str], system: str | None
) -> list[dict[str, Any]]:
    """Returns questions with the teacher's answers behind the prompt, without the prompt."""
    teacher, adapter = config.objective.teacher_base, config.objective.teacher_adapter
    if teacher is None:
        base = load_bare_base(args.base, args, args.quantize)
    else:
        base = load_bare_base(teacher.base, args, teacher.quantize)
    if adapter is not None:
        base.use(base.load_adapter(adapter, name="teacher"))
    from veneer.decoding.replay import draw_answers

    with working("generating") as tell:
        rows = draw_answers(
            base,
            args.rows,
            questions=questions,
            system=system,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            seed=args.seed,
            progress=tell,
        )
    prompt_turns = 0 if system is None else 1
    return [{**row, "messages": row["messages"][prompt_turns:]} for row in rows]
