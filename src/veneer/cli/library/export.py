"""Write an adapter for another program, or base and adapter as one .gguf model. Prints the commands
to use it.

  peft          PEFT's two files
  transformers  the same files, if load_adapter applies them correctly
  vllm          one rank and one scaling for all modules, as vLLM requires
  llamacpp      a .gguf file for llama.cpp's --lora; with --merged a whole model
  ollama        a folder with the whole model and a Modelfile

For instance:

  veneer export runs/tickets --to vllm --out served
  veneer export runs/tickets --to llamacpp --out tickets.gguf
  veneer export runs/tickets --to llamacpp --merged --type q8_0 --out model.gguf
  veneer export runs/tickets --to ollama --type q8_0 --out tickets
"""

from __future__ import annotations

import shlex
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from veneer.cli.bases import locate_base_and_adapter, resolve_weight_format
from veneer.cli.common import (
    add_card,
    add_json,
    add_library,
    make_console,
    pause_collection,
    print_json,
    working,
)
from veneer.cli.early import check_base, check_files, check_new
from veneer.cli.flags import add_switch, add_value
from veneer.errors import ConfigError
from veneer.merge.programs import ONE_FILE, WHOLE_MODEL, AdapterType, ModelType, Program
from veneer.wording import shown, size

if TYPE_CHECKING:
    from rich.console import Console

    from veneer.merge.gguf.model import GGUFReport


def add_arguments(parser: ArgumentParser) -> None:
    parser.usage = "veneer export A --to PROGRAM --out PATH [--merged] [--type TYPE] ..."
    add_value(parser, "adapter", "A", "name in the library, or folder of an adapter or a run")
    add_value(parser, "--to", None, "target program", choices=get_args(Program), required=True)
    add_value(parser, "--out", "PATH", "new folder, or new file for llamacpp", required=True)
    add_value(parser, "--base", "B", "base; default: the adapter's base")
    add_switch(
        parser, "--merged", "llamacpp: merge the adapter into the base and write the whole model"
    )
    add_value(
        parser,
        "--type",
        None,
        (
            "type of an adapter's tensors: f32 (default), f16 or bf16 (no .gguf file); of a .gguf"
            " model: f16 (default), q8_0 or a type of llama.cpp's llama-quantize"
        ),
        choices=[*dict.fromkeys((*get_args(AdapterType), *get_args(ModelType)))],
    )
    add_value(
        parser,
        "--into",
        None,
        "for a merged model of a quantised base: which weights to add to",
        choices=["original", "dequantised"],
    )
    add_value(
        parser, "--original", "B", "the original weights, for --into original with a .gguf file"
    )
    add_switch(parser, "--force-base", "merge even if the adapter was trained on another base")
    add_card(parser)
    add_library(parser)
    add_json(parser)


def run(args: Namespace) -> int:
    check_new(args.out)
    check_files([args.figures])
    base, folder = locate_base_and_adapter(args.base, args.adapter, args.library)
    _check(args)
    check_base(base)
    console = make_console(json=args.json)
    assert folder is not None
    if _is_whole_model(args):
        return _export_model(args, base, folder, console)
    with working(f"writing for {args.to}"):
        with pause_collection():
            from veneer import api
        card = partial(_card, args, base, folder)
        exported = api.export_adapter(
            folder, to=args.to, base=base, out=args.out, dtype=args.type or "f32", card=card
        )
    if args.json:
        print_json(
            {
                "out": str(exported.out),
                "bytes": exported.bytes,
                "notes": exported.notes,
                "serve": exported.serve,
            }
        )
    else:
        lines = [
            f"{exported.out}: {size(exported.bytes)}, for {args.to}",
            *_format_notes(exported.notes, exported.serve),
        ]
        console.print("\n".join(lines))
    return 0


def _is_whole_model(args: Namespace) -> bool:
    return args.merged or args.to in WHOLE_MODEL


def _export_model(args: Namespace, base: str, folder: Path, console: Console) -> int:
    quantize, keep_dense = resolve_weight_format(None, folder, force_base=args.force_base)
    type: ModelType = args.type or "f16"
    with working(f"loading {base}") as tell:
        with pause_collection():
            from veneer import api
        weights = api.WeightSource(quantize, keep_dense, args.into, args.original, args.force_base)
        options: dict[str, Any] = {
            "base": base,
            "out": args.out,
            "type": type,
            "weights": weights,
            "progress": tell,
        }
        if args.to in WHOLE_MODEL:
            report = api.export_ollama(folder, card=partial(_card, args, base, folder), **options)
        else:
            report = api.export_merged_gguf([(folder, 1.0)], **options)
    if args.json:
        fields = {
            "out": str(report.out),
            "bytes": report.bytes,
            "type": report.type,
            "survival": report.total.share,
        }
        print_json({**fields, "notes": report.notes, "serve": report.serve})
    else:
        console.print(
            "\n".join([*_format_merged(report), *_format_notes(report.notes, report.serve)])
        )
    return 0


def _card(args: Namespace, base: str, folder: Path, serve: Sequence[str]) -> str | None:
    from veneer.report.card import card_for, figures_in

    ours = [] if _is_whole_model(args) else [f"veneer chat --adapter {shlex.quote(args.out)}"]
    return card_for(
        folder,
        name=Path(args.out).name,
        commands=[*ours, *serve],
        base=base,
        whole_model=_is_whole_model(args),
        figures=figures_in(args.figures),
        sample=args.sample,
    )


def _format_notes(notes: Sequence[str], serve: Sequence[str]) -> list[str]:
    return [
        *(f"  {shown(note)}" for note in notes),
        *(f"  $ {shown(command)}" for command in serve),
    ]


def _check(args: Namespace) -> None:
    faults = []
    if args.merged and args.to not in (*ONE_FILE, *WHOLE_MODEL):
        faults.append("--merged: use veneer merge for a merged folder")
    elif _is_whole_model(args) and args.type not in (None, *get_args(ModelType)):
        faults.append(f"--type {args.type}: whole models are {', '.join(get_args(ModelType))}")
    elif not _is_whole_model(args) and args.type not in (None, *get_args(AdapterType)):
        faults.append(f"--type {args.type}: adapters are {', '.join(get_args(AdapterType))}")
    elif args.type == "bf16" and args.to in ONE_FILE:
        faults.append("--type bf16: a .gguf adapter is f32 or f16")
    for option, value in (("--into", args.into), ("--original", args.original)):
        if value and not _is_whole_model(args):
            faults.append(f"{option} {value}: only for a merged model")
    if args.force_base and not _is_whole_model(args):
        faults.append("--force-base: only for a merged model")
    if faults:
        raise ConfigError("these options cannot be combined", faults)


def _format_merged(report: GGUFReport) -> list[str]:
    from veneer.cli.library.merge import format_survival

    lines = [f"{report.out}: {size(report.bytes)}, {report.type}, sums in float32"]
    if report.f16_instead:
        lines.append(
            f"  {report.f16_instead} matrices stay f16: their row length is not a multiple of 32"
        )
    if not report.weights:
        return lines
    return [*lines, *format_survival(report.total, report.layers), *_explain_rounding(report)]


def _explain_rounding(report: GGUFReport) -> list[str]:
    """Explains what the rounding means for answers."""
    from veneer.cli.library.merge import format_percent

    type = report.type
    if report.base_rounding is None:
        cause = f"this is the rounding of {type} itself"
    else:
        error = format_percent(report.base_rounding)
        cause = f"rounding the base alone to {type} gives an error of {error}"
    return [
        f"  {cause}.",
        f"  Expect answers to differ about as much as the base's answers in {type} do;",
        "  veneer evaluate --base FILE.gguf measures it.",
    ]
