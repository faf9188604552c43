"""Shares between commands: common flags, how they find a base and an adapter, and output."""

from __future__ import annotations

import argparse
import atexit
import gc
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, get_args

from veneer.bounds import LENGTH
from veneer.cli.early import check_base
from veneer.errors import ConfigError, InputError, SourceError
from veneer.files.strict_json import finite_or_null, read_json, read_yaml
from veneer.private.argparse import Container
from veneer.quant.config import FORMATS, Quantize, weight_format
from veneer.wording import cut, shown

if TYPE_CHECKING:
    from rich.console import Console

    from veneer.adapters.preamble import Preamble
    from veneer.base import Base
    from veneer.models.frozen_base import FrozenBase


def require_stdin() -> TextIO:
    """Returns stdin. InputError if it is closed (`<&-`, or a service without stdin)."""
    if sys.stdin is None or sys.stdin.closed:
        raise InputError(
            "standard input is closed", [], "Give the text as an argument, or on stdin."
        )
    return sys.stdin


@contextmanager
def pause_collection() -> Iterator[None]:
    """Pauses the garbage collector while torch and transformers are imported: their objects stay,
    and it would take a sixth of the time. Later collections skip these objects, until the process
    ends and some libraries report what is left."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()
        atexit.register(gc.unfreeze)


def add_action(actions: Any, name: str, help: str) -> argparse.ArgumentParser:
    """Adds an action of a command; its help is also the first line of its own page."""
    description = help[0].upper() + help[1:] + "."
    parser: argparse.ArgumentParser = actions.add_parser(
        name, help=help, description=description, allow_abbrev=False
    )
    return parser


def add_json(parser: Container) -> None:
    parser.add_argument(
        "--json", action="store_true", help="print the result as JSON on stdout, messages on stderr"
    )


def add_lookup(parser: Container) -> None:
    parser.add_argument(
        "--lookup",
        default="auto",
        choices=["auto", "off"],
        help=(
            "auto: guess tokens that an answer may copy and check several in one step; off: one"
            " token a step; the text is the same; default: auto"
        ),
    )


def add_base(parser: argparse.ArgumentParser) -> None:
    """Adds --base, --adapter and the flags of how the base is loaded."""
    parser.add_argument(
        "--base",
        metavar="B",
        help="hub id, folder, .gguf file or named default; default: the adapter's own base",
    )
    parser.add_argument(
        "--adapter",
        metavar="A",
        help="name in the library (NAME or NAME@2), or folder of an adapter or a run",
    )
    add_library(parser)
    parser.add_argument(
        "--force-base",
        action="store_true",
        help="use the adapter even if it was trained on another base",
    )
    add_base_format(parser, "as the adapter was trained")


def add_dtype(parser: argparse.ArgumentParser, default: str | None = "auto") -> None:
    parser.add_argument(
        "--dtype",
        default=default,
        choices=["auto", "float32", "bfloat16", "float16"],
        help="type of the base's weights in memory; default: auto",
    )


def add_base_format(parser: argparse.ArgumentParser, default: str) -> None:
    """Adds --dtype, --quantize and --device. default: of --quantize, in words."""
    add_dtype(parser)
    parser.add_argument(
        "--quantize",
        choices=FORMATS,
        help=(
            "format of the base's linear layers in memory; gguf: the blocks of a .gguf file;"
            f" default: {default}"
        ),
    )
    parser.add_argument(
        "--device", default="auto", metavar="D", help="cpu, cuda, cuda:1, ...; default: auto"
    )


def add_map(parser: Container) -> None:
    parser.add_argument(
        "--map",
        action="append",
        default=[],
        metavar="COLUMN=NAME",
        dest="columns",
        help=(
            "rename a column: --map question=prompt --map answer=completion; COLUMN=null drops it"
        ),
    )


def parse_columns(args: argparse.Namespace) -> dict[str, str | None]:
    """Parses --map COLUMN=NAME. ConfigError if one is malformed."""
    columns: dict[str, str | None] = {}
    for text in args.columns:
        column, sign, name = text.partition("=")
        if not column or not name or not sign:
            step = "For instance --map question=prompt --map answer=completion."
            raise ConfigError(f"--map {text}: write --map COLUMN=NAME", next_step=step)
        columns[column] = None if name == "null" else name
    return columns


def add_variables(parser: argparse.ArgumentParser, what: str = "") -> None:
    parser.add_argument(
        "--variable",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        dest="variables",
        help="variable for the chat template, such as enable_thinking=false; NAME=null removes one"
        + what,
    )


def add_preamble(parser: argparse.ArgumentParser) -> None:
    """Adds --system and --variable, whose defaults are those that the adapter was trained with."""
    parser.add_argument(
        "--system",
        metavar="TEXT",
        help=(
            "system message for conversations without one; default: the one the adapter was"
            " trained with; '': none"
        ),
    )
    add_variables(parser, "; default: as the adapter was trained")


def parse_variables(args: argparse.Namespace) -> dict[str, Any]:
    """Parses --variable NAME=VALUE, with YAML values. Raises ConfigError with all faults."""
    from veneer.adapters.preamble import check_variables
    from veneer.cli.config_file import UncheckedSettings, parse_yaml

    variables: dict[str, Any] = {}
    for assignment in args.variables:
        name, sign, text = assignment.partition("=")
        if not sign or not name:
            raise ConfigError(
                f"--variable {assignment}: write --variable NAME=VALUE",
                next_step="For instance enable_thinking=false.",
            )
        variables[name] = parse_yaml(text, f"--variable {name}", UncheckedSettings())
    check_variables(variables)
    return variables


def resolve_preamble(args: argparse.Namespace, base: Base) -> Preamble:
    """Returns the preamble of conversations with these flags; prints it if the adapter brings
    one."""
    preamble = base.preamble.asked(args.system, parse_variables(args))
    if base.preamble and preamble:
        parts = [] if preamble.system is None else [f"system: {cut(preamble.system, 60)!r}"]
        parts += [
            f"{name}: {json.dumps(value, ensure_ascii=False)}"
            for name, value in preamble.variables.items()
        ]
        off = (
            "  (--system '' leaves it out)"
            if preamble.system is not None and args.system is None
            else ""
        )
        line = f"asked as the adapter was trained · {' · '.join(parts)}{off}"
        make_console(json=True).print(shown(line), style="dim", soft_wrap=True)
    return preamble


def add_card(parser: argparse.ArgumentParser) -> None:
    """Adds flags for what a model card shows beside the adapter's manifest."""
    parser.add_argument(
        "--figures",
        type=Path,
        metavar="FILE",
        help=("output of veneer evaluate --json, added to the model card"),
    )
    parser.add_argument(
        "--sample",
        action="store_true",
        help="show one of your held-out rows, with both answers, in the model card",
    )


def add_library(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--library", metavar="DIR", help="library folder; default: your own library"
    )


def add_data(parser: argparse.ArgumentParser, *others: str) -> None:
    """Adds --length, --format, --train-on and other choices of `data` settings, with their help."""
    from veneer.cli.config_file import summarize_setting
    from veneer.training.config import DataConfig, RunConfig

    length = RunConfig.model_fields["length"].default
    parser.add_argument(
        "--length",
        type=LENGTH,
        default=length,
        metavar="N",
        help=f"longest row in tokens; default: {length}",
    )
    for name in ("format", "train_on", *others):
        field = DataConfig.model_fields[name]
        parser.add_argument(
            "--" + name.replace("_", "-"),
            choices=get_args(field.annotation),
            default=field.default,
            help=summarize_setting(("data", name)),
        )


def load_base(args: argparse.Namespace) -> Base:
    """Loads the base of --base, with the adapter of --adapter in use."""
    source, adapter = locate_base_and_adapter(args.base, args.adapter, args.library)
    quantize, keep_dense = resolve_weight_format(args.quantize, adapter, force_base=args.force_base)
    base = load_bare_base(source, args, quantize, keep_dense)
    if adapter is not None:
        base.use(base.load_adapter(adapter, name=args.adapter, force_base=args.force_base))
    return base


def load_bare_base(
    source: str, args: argparse.Namespace, quantize: Quantize | None, keep_dense: Sequence[str] = ()
) -> Base:
    """Loads a base without adapters by --dtype and --device; prints it if it was widened."""
    check_base(source)
    from veneer.training.output.working import working

    with working(f"loading {source}"):
        with pause_collection():
            from veneer import api
        base = api.load(
            source, dtype=args.dtype, device=args.device, quantize=quantize, keep_dense=keep_dense
        )
    if base.compute.widens and base.compute.line is not None:
        make_console(json=True).print(base.compute.line, style="dim", soft_wrap=True)  # on stderr
    return base


def locate_base_and_adapter(
    base: str | None, adapter: str | None, library: str | None = None
) -> tuple[str, Path | None]:
    """Returns the base to load (without --base, that of the adapter), and the adapter's folder."""
    folder = locate_adapter(adapter, library) if adapter else None
    if base:
        return base, folder
    if folder is None:
        raise ConfigError(
            "no base is named",
            [],
            "Give --base (a hub id, a folder, a .gguf file or smollm2-135m) or --adapter.",
        )
    name = _read_base_name(folder)
    if not name:
        raise SourceError(
            f"{folder} does not say which base it was trained on", [], "Name it: --base B."
        )
    return name, folder


def locate_adapter(named: str, library: str | None = None) -> Path:
    """Finds an adapter's folder by its name in the library, its folder or that of its run."""
    from veneer.library.library import Library

    return Library(library).locate(named)


def _read_base_name(folder: Path) -> str | None:
    """Reads the name of the base from run.yaml, else from adapter_config.json."""
    for read, file, key in (
        (read_yaml, folder.parent / "run.yaml", "base"),
        (read_json, folder / "adapter_config.json", "base_model_name_or_path"),
    ):
        values = read(file) if file.is_file() else {}
        if isinstance(values.get(key), str) and values[key]:
            return str(values[key])
    return None


def storage_dtype(dtype: str) -> Any:
    """Reads --dtype for a command that writes or compares weights: auto is their stored type."""
    return "stored" if dtype == "auto" else dtype


def load_plain_base(args: argparse.Namespace) -> FrozenBase | None:
    """Loads the base of --base on the CPU; None without --base."""
    if not args.base:
        return None
    from veneer.models import load

    return load.load_base(args.base, dtype=storage_dtype(args.dtype), device="cpu")


def resolve_weight_format(
    given_format: Quantize | None, adapter: Path | None, *, force_base: bool
) -> tuple[Quantize | None, list[str]]:
    """Returns (quantize, keep_dense) for the base: as given, else as in the adapter's training,
    unless --force-base replaces its base."""
    quantize = given_format
    if quantize is None and adapter is not None and not force_base:
        quantize = read_quantize(adapter)
    keeps = weight_format(quantize).keeps_dense
    return quantize, read_dense_modules(adapter) if adapter is not None and keeps else []


def pair_with_weights(
    names: Sequence[str], weights: Sequence[float] | None, library: str | None
) -> list[tuple[Path, float]]:
    """Pairs the folders of adapters with their weights, 1 by default. ConfigError if the numbers of
    adapters and weights differ."""
    if weights and len(weights) != len(names):
        raise ConfigError(
            f"{len(names)} adapters and {len(weights)} weights",
            next_step="Give one weight for each.",
        )
    folders = [locate_adapter(name, library) for name in names]
    return list(zip(folders, weights or [1.0] * len(names), strict=True))


def read_quantize(folder: Path) -> Quantize | None:
    """Reads the weight format of the adapter's base from its fingerprint; None if dense or
    unknown."""
    file = folder / "veneer.json"
    if not file.is_file():
        return None
    base = read_json(file).get("base")
    fingerprint = base.get("fingerprint") if isinstance(base, dict) else None
    dtype = fingerprint.get("dtype") if isinstance(fingerprint, dict) else None
    parts = dtype.split("+") if isinstance(dtype, str) else []
    return next((name for name in FORMATS if name in parts), None)


def read_dense_modules(folder: Path) -> list[str]:
    """Reads keep_dense of the adapter's run from its recipe."""
    file = folder / "veneer.json"
    recipe = read_json(file).get("recipe") if file.is_file() else None
    module_names = recipe.get("keep_dense") if isinstance(recipe, dict) else None
    return [str(name) for name in module_names] if isinstance(module_names, list) else []


def print_json(data: Mapping[str, Any] | Sequence[Any]) -> None:
    """Prints JSON on stdout; numbers that are not finite become null."""
    print(json.dumps(finite_or_null(data), indent=2, ensure_ascii=False, allow_nan=False))


def make_console(*, json: bool) -> Console:
    """Returns the console for people: stdout, or stderr if stdout carries data. It interprets no
    markup.

    A failing write to stdout is an error (cli/main.py), one to stderr is not.
    """
    from rich.console import Console

    from veneer.training.output.talk import talking_console

    class ResultConsole(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # rich would leave by SystemExit(1)

    return (
        talking_console(stderr=True)
        if json
        else ResultConsole(highlight=False, markup=False, emoji=False)
    )
