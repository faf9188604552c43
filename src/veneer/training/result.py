"""The result of a run: the adapter or the model folder, its manifest, and the summary."""

import platform
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from veneer.adapters.placement.attachment import Attachment
from veneer.adapters.placement.score_head import ScoreHead
from veneer.bases.folder.score_head import classifier_class, score_head_files, with_head
from veneer.bases.quiet_transformers import quiet
from veneer.data.load import DataSet
from veneer.files.atomic import atomic_folder
from veneer.formats.adapter import manifest_for, write_adapter
from veneer.formats.manifest import HeldOut, Manifest, make_readable
from veneer.library.prompts import NAME as PROMPTS
from veneer.library.prompts import question_of, sample_prompts, write_prompts
from veneer.models.frozen_base import FrozenBase
from veneer.objectives.registry import make_objective
from veneer.training.config import RunConfig
from veneer.training.output.records import Record, peak_memory_bytes
from veneer.training.state.progress import RunProgress


def run_manifest(
    config: RunConfig,
    base: FrozenBase,
    data: DataSet,
    *,
    best_loss: float | None = None,
    held_out: HeldOut | None = None,
) -> Manifest:
    """Returns the content of veneer.json. Raises if it could not be read back."""
    return make_readable(
        lambda: manifest_for(
            base,
            method=config.method.name,
            data_fingerprint=data.fingerprint,
            recipe=config.model_dump(mode="json"),
            preamble=data.preamble,
            parents=[(parent.content or "", parent.weight) for parent in config.from_adapter],
            template_hash=base.template_hash(),
            metrics={} if best_loss is None else {"validation_loss": best_loss},
            held_out=held_out,
        )
    )


def _figures(config: RunConfig, progress: RunProgress) -> Record:
    """Returns the objective's figures before step 1 and of the kept values; empty without any."""
    kept = progress.preference.get(str(progress.best_step))
    before = progress.preference.get("0")
    name = make_objective(config.objective).figures_name
    return {} if kept is None else {name: {**kept, "before": before}}


def write_trained_adapter(
    folder: Path, attachment: Attachment, manifest: Manifest, base: FrozenBase
) -> Record:
    """Writes the adapter; returns its fields of summary.json."""
    written = write_adapter(folder, attachment, manifest, model=base.model, replace=True)
    return {
        "adapter": str(written.path),
        "adapter_bytes": written.bytes,
        "adapter_sha256": written.sha256,
    }


def write_prompt_sample(folder: Path, data: DataSet) -> None:
    """Writes a sample of the questions of its rows beside the adapter (library/prompts.py). Writes
    nothing for rows without questions, or with labels, which no answer follows."""
    rows = data.train_rows or data.validation_rows  # of tokens in files, only some held-out rows
    sample = sample_prompts(question_of(row.messages) for row in rows if row.label is None)
    if sample:
        write_prompts(folder / PROMPTS, sample)


def write_model(
    folder: Path, base: FrozenBase, state: dict[str, Tensor] | None, head: ScoreHead | None
) -> Record:
    """Writes the whole model after full fine-tuning; returns its fields of summary.json.

    state: the weights of a sharded base. head: the score head that was trained with them
    """
    if head is not None:
        state = with_head(base.model.state_dict() if state is None else state, head)
    with atomic_folder(folder, replace=True) as partial:
        with quiet():
            base.model.save_pretrained(partial, state_dict=state)
        base.tokenizer.save_pretrained(partial)
        if head is not None:
            name = classifier_class(base.model)
            for file, text in score_head_files(partial, head.settings, name).items():
                (partial / file).write_text(text, "utf-8")
    return {
        "model": str(folder),
        "adapter_bytes": sum(file.stat().st_size for file in folder.iterdir()),
    }


def run_summary(
    config: RunConfig,
    base: FrozenBase,
    start: Record,
    progress: RunProgress,
    *,
    reason: str,
    held_out: HeldOut | None,
    damaged_best: Record | None,
) -> Record:
    """Returns the content of summary.json, without the fields of what was written."""
    seconds = progress.timed_seconds
    return {
        "reason": reason,
        "steps": progress.step,
        "seconds": seconds,
        "total_seconds": progress.total_seconds,
        "seconds_by_part": progress.timed_parts or None,
        "examples_per_second": progress.timed_examples / seconds if seconds else None,
        "tokens_per_second": progress.timed_tokens / seconds if seconds else None,
        "trained_tokens": progress.trained_tokens,
        "peak_memory_bytes": peak_memory_bytes(str(base.device)),
        "idle_memory_bytes": start["idle_memory_bytes"],
        "planned_memory_bytes": start["planned_memory_bytes"],
        "trainable_parameters": start["trainable_parameters"],
        "total_parameters": start["total_parameters"],
        "first_loss": progress.first_loss,
        "last_loss": progress.last_loss,
        "validation_loss": progress.best_loss,
        "held_out": None if held_out is None else held_out.model_dump(mode="json"),
        **_figures(config, progress),
        **({"class_weights": start["class_weights"]} if "class_weights" in start else {}),
        "best_step": progress.best_step,
        "damaged_best": damaged_best,
        "base_fingerprint": base.fingerprint().digest,
        "method": config.method.name,
        "objective": config.objective.name,
        "base": config.base,
        "versions": {
            "veneer": version("veneer"),
            "torch": torch.__version__,
            "transformers": version("transformers"),
            "python": platform.python_version(),
        },
    }
