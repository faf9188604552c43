"""Dry runs that an earlier process counted: the same step of the same base holds the same bytes (files/remembered.py).

The key holds all of a step: the config, the type, the method, the ids of the rows and which of them are trained. A base
whose class is not transformers' own is counted anew.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch

from veneer.files.remembered import is_known, remembered
from veneer.plan.dry_run import DryRun, Step, Whole, dry_run, whole

_NO_STEP = ("_name_or_path", "transformers_version")


def kept_whole(step: Step) -> Whole:
    """whole(step)."""
    return _kept("whole", step, _base_key(step), Whole, lambda: whole(step))


def kept_run(step: Step, known: Callable[[], Whole]) -> DryRun:
    """dry_run(step, known())."""
    rows = hashlib.sha256()
    for row in step.rows:
        for part in (row.ids, row.trained):
            rows.update(f"{part.dtype} {len(part)}\n".encode())
            rows.update(part.tobytes())
    key = {
        **_base_key(step),
        "rows": rows.hexdigest(),
        "checkpointing": step.checkpointing,
        "share_prompt": step.share_prompt,
        "offload": step.offload,
    }
    return _kept("step", step, key, DryRun, lambda: dry_run(step, known()))


def _base_key(step: Step) -> dict[str, Any]:
    """What Whole says it depends on."""
    fields = {name: value for name, value in step.config.to_dict().items() if name not in _NO_STEP}
    return {
        "config": [f"{type(step.config).__module__}.{type(step.config).__qualname__}", fields],
        "architectures": step.config.architectures,
        "attention": step.config._attn_implementation,
        "dtype": str(step.dtype),
        "method": step.method.model_dump(mode="json"),
        "optimizer": step.optimizer,
        "new_tokens": step.new_tokens,
        "on_cpu": step.on_cpu,
        "threads": torch.get_num_threads(),
    }


def _kept(what: str, step: Step, key: dict[str, Any], of: Any, make: Callable[[], Any]) -> Any:
    return remembered(what, key, of, make) if is_known(type(step.config)) else make()
