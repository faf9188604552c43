"""Reads the run that the flags of `veneer plan` describe, and probes it."""

import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

from veneer.cli.common import make_console, parse_columns, pause_collection, print_json
from veneer.cli.config_file import FLAGS, read_run_config
from veneer.errors import ConfigError
from veneer.training.config import RunConfig
from veneer.wording import size

SETTINGS = (
    "base",
    "models",
    "objective",
    "method",
    "rank",
    "quantize",
    "dtype",
    "batch",
    "micro_batch",
    "length",
    "checkpointing",
    "shard",
    "reduce",
    "data",
    "steps",
    "epochs",
)
"""Flags that a run file replaces."""


def list_bases(args: Namespace) -> list[str]:
    """Returns the bases of --models, else that of --base."""
    if args.models:
        return [name.strip() for name in args.models.split(",") if name.strip()]
    return [args.base] if args.base else []


def read_flags(args: Namespace, *sets: str, out: str = "planned") -> RunConfig:
    """Returns the run that the flags describe; without --data, its rows are not to be read."""
    if args.sets:
        raise ConfigError("--set needs a run file", next_step="veneer plan RUN.yaml --set ...")
    bases = list_bases(args)
    if not bases:
        raise ConfigError(
            "no base is named", next_step="Give --base (or --models A,B), or a run file."
        )
    if args.columns and not args.data:
        raise ConfigError("--map needs rows", next_step="Give --data too.")
    flags = {name: getattr(args, name) for name in SETTINGS if name in FLAGS}
    flags |= {"base": bases[0], "data": args.data or "ROWS.jsonl", "out": out}
    if args.reduce:
        sets = (*sets, f"reduce={args.reduce}")
    return read_run_config(None, flags, sets, parse_columns(args))


def run_probe(args: Namespace) -> int:
    """Runs one real step on the longest batch, and compares it with its plan."""
    if not args.base or not args.data:
        raise ConfigError("--probe needs real rows", next_step="Give --base and --data.")
    if args.processes > 1:
        raise ConfigError(
            "--probe runs its step in one process", next_step="Leave --processes out."
        )
    with pause_collection():
        from veneer import api
    from veneer.training.output.screen import QuietScreen

    with tempfile.TemporaryDirectory(prefix="veneer-probe-") as folder:
        args.steps, args.epochs = 2, None
        sets = ("data.long_rows=cut", "data.validation_share=0")
        config = read_flags(args, *sets, out=str(Path(folder) / "run"))
        summary = api.train_run(config, resume=False, screen=QuietScreen())
    planned, measured = summary["planned_memory_bytes"], summary["peak_memory_bytes"]
    figures: dict[str, Any] = {
        "planned_memory_bytes": planned,
        "measured_memory_bytes": measured,
        "difference": None if not planned or not measured else (planned - measured) / measured,
        "step_seconds": summary["seconds"],
        "tokens_per_second": summary["tokens_per_second"],
    }
    if args.json:
        print_json(figures)
        return 0
    console = make_console(wraps=True)
    console.print(f"planned   {size(planned) if planned else '–'}")
    console.print(f"measured  {size(measured)}, longest batch and two steps")
    if figures["difference"] is not None:
        console.print(
            f"the plan is {abs(figures['difference']):.1%}"
            f" {'above' if figures['difference'] > 0 else 'below'}"
        )
    if summary["tokens_per_second"]:
        console.print(f"{summary['tokens_per_second']:,.0f} tokens/s")
    return 0
