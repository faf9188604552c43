"""Remembers dry runs and facts of a base: the same step of the same base takes the same bytes.

If everything is remembered (files/remembered.py), neither transformers nor the dry run is imported.
The key of a dry run holds all of a step: config, type, method, the ids of the rows and which of
them are trained. A base whose class is not transformers' own is counted again.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from veneer.bases.loading.blueprint import Blueprint
from veneer.child import code_command, environment_for
from veneer.data.examples import Example
from veneer.files.remembered import is_known, remember
from veneer.plan.simulation.step_counts import DryRun, Step
from veneer.private.transformers import attention_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from veneer.plan.simulation.dry_run import AttachedFacts, BaseFacts

_IDLE = """
import veneer.training.run
from veneer.training.output.records import process_memory_bytes
print(process_memory_bytes())
"""
_NO_STEP = ("_name_or_path", "transformers_version")


@dataclass(frozen=True)
class ConfigFacts:
    """Holds what a plan reads of a config. identity: all that a step depends on, as text; None for
    a class that package versions do not identify.
    """

    positions: int | None
    layers: int
    identity: str | None


def config_facts(base: Blueprint) -> ConfigFacts:
    """Returns facts of a config; those of a named size are remembered."""
    if not isinstance(base.config_or_fields, Mapping):
        return _facts(base.config)
    return remember(
        "shape", {"fields": dict(base.config_or_fields)}, ConfigFacts, lambda: _facts(base.config)
    )


def remember_idle_bytes() -> int:
    """Returns the memory of a process that has imported training and nothing else, 0 if unknown."""
    return remember("idle", {}, int, idle_bytes)


@cache
def idle_bytes() -> int:
    """Measures it in a process of its own: this one may have converted a base or answered
    before."""
    answer = subprocess.run(
        code_command(_IDLE),
        env=environment_for(os.environ),
        capture_output=True,
        text=True,
        check=False,
    )
    return int(answer.stdout) if answer.returncode == 0 and answer.stdout.strip().isdigit() else 0


def remember_attached_facts(
    step: Step, base_facts: dict[torch.dtype, BaseFacts] | None = None
) -> AttachedFacts:
    """Remembers attached_facts(step, base_facts)."""
    from veneer.plan.simulation.dry_run import AttachedFacts, attached_facts

    key = _base_key(step)
    return (
        attached_facts(step, base_facts)
        if key is None
        else remember("whole", key, AttachedFacts, lambda: attached_facts(step, base_facts))
    )


def remember_run(step: Step, find_facts: Callable[[], AttachedFacts]) -> DryRun:
    """Remembers dry_run(step, find_facts())."""

    def counted() -> DryRun:
        from veneer.plan.simulation.dry_run import dry_run

        return dry_run(step, find_facts())

    key = _base_key(step)
    if key is None:
        return counted()
    key |= {
        "rows": rows_digest(step.rows),
        "checkpointing": step.checkpointing,
        "share_prompt": step.share_prompt,
        "offload": step.offload,
    }
    if step.teacher is not None:
        teacher = config_facts(step.teacher.base).identity
        if teacher is None:
            return counted()
        key |= {"teacher": teacher, "teacher_dtype": str(step.teacher.dtype)}
    return remember("step", key, DryRun, counted)


def rows_digest(rows: Sequence[Example]) -> str:
    """Returns the SHA-256 of ids, masks, which examples came from one row, and which a teacher
    reads."""
    digest, previous_row = hashlib.sha256(), None
    for row in rows:
        digest.update(
            b"one row\n" if row.row is not None and row.row == previous_row else b"another row\n"
        )
        previous_row = row.row
        if row.kind == "teacher":
            digest.update(b"teacher\n")
        for part in (row.ids, row.trained):
            digest.update(f"{part.dtype} {len(part)}\n".encode())
            digest.update(part.tobytes())
    return digest.hexdigest()


def _facts(config: PreTrainedConfig) -> ConfigFacts:
    from veneer.models.capacity import configured_capacity

    layers = config.get_text_config().num_hidden_layers
    return ConfigFacts(configured_capacity(config).positions, layers, _identity(config))


def _identity(config: PreTrainedConfig) -> str | None:
    if not is_known(type(config)):
        return None
    identity = {
        "class": f"{type(config).__module__}.{type(config).__qualname__}",
        "fields": {name: value for name, value in config.to_dict().items() if name not in _NO_STEP},
        "architectures": config.architectures,
        "attention": attention_of(config),
    }
    return json.dumps(identity, sort_keys=True, default=str)


def _base_key(step: Step) -> dict[str, Any] | None:
    """Returns the key of a step's AttachedFacts; None if the config cannot be identified."""
    base = step.base
    identity = config_facts(base).identity if isinstance(base, Blueprint) else _identity(base)
    if identity is None:
        return None
    return {
        "config": identity,
        "dtype": str(step.dtype),
        "method": step.method.model_dump(mode="json"),
        "optimizer": step.optimizer,
        "new_tokens": step.new_tokens,
        "outputs": 0 if step.head is None else step.head.num_outputs,
        "on_cpu": step.on_cpu,
        "threads": torch.get_num_threads(),
    }
