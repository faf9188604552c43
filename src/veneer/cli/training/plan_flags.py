"""The run that the flags of `veneer plan` describe."""

from __future__ import annotations

import argparse

from veneer.adapters.config import METHODS
from veneer.cli.common import parse_columns
from veneer.cli.config_file import FLAGS, read_run_config
from veneer.errors import ConfigError
from veneer.training.config import RunConfig

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


def list_bases(args: argparse.Namespace) -> list[str]:
    """Returns the bases of --models, else that of --base."""
    if args.models:
        return [name.strip() for name in args.models.split(",") if name.strip()]
    return [args.base] if args.base else []


def read_flags(args: argparse.Namespace, *sets: str, out: str = "planned") -> RunConfig:
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
    config = read_run_config(None, flags, sets, parse_columns(args))
    if args.rank is None:
        return config
    return config.model_copy(update={"method": METHODS[config.method.name]().of_rank(args.rank)})
