"""Runs `veneer plan --probe`: one real step on the longest batch, compared with its plan."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from veneer.cli.common import make_console, pause_collection, print_json
from veneer.cli.training.plan_flags import read_flags
from veneer.errors import ConfigError
from veneer.wording import size


def run_probe(args: argparse.Namespace) -> int:
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
    console = make_console(json=False)
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
