"""Exports an adapter to another program's format, and checks it beforehand."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

from veneer.adapters.placement.reads import may_be_refused_by_peft
from veneer.adapters.preamble import Preamble
from veneer.bases.loading.without_weights import load_skeleton
from veneer.bases.names.sources import gguf_file
from veneer.bases.tokenizer import load_tokenizer
from veneer.data.template.new_tokens import extended
from veneer.data.template.template import ChatTemplate
from veneer.errors import ConfigError, RefusedError
from veneer.files.atomic import atomic_file, atomic_folder
from veneer.formats.adapter import StoredAdapter, read_adapter
from veneer.formats.manifest import CARD_NAME, MANIFEST_NAME
from veneer.library.names import said_of
from veneer.merge.combine.low_rank_adapters import fit_adapter, place
from veneer.merge.export.folders import (
    ExportReport,
    OtherFiles,
    export_peft,
    export_vllm,
    rounding_note,
)
from veneer.merge.export.lint import LintFinding, lint, peft_refusal
from veneer.merge.export.ollama import modelfile
from veneer.merge.export.serving import commands, whole_model_commands
from veneer.merge.export.turns import turns_of
from veneer.merge.fold.merge_run import Into, open_merge
from veneer.merge.gguf.adapter import write_gguf_adapter
from veneer.merge.gguf.model import GGUFReport, ReportProgress, write_gguf_model
from veneer.merge.programs import AdapterType, ModelType, Program
from veneer.models.capacity import configured_capacity
from veneer.models.frozen_base import FrozenBase
from veneer.models.load import load_base
from veneer.quant.config import Quantize

Card = Callable[[Sequence[str]], str | None]
"""Takes the commands that serve the adapter; returns the text of a README.md, or None."""


def _no_card(serve: Sequence[str]) -> str | None:
    return None


def export_adapter(
    folder: str | Path,
    *,
    to: Program,
    base: str,
    out: str | Path,
    dtype: AdapterType = "f32",
    card: Card = _no_card,
) -> ExportReport:
    """Writes the adapter for another program. base: only its config is read.

    dtype: of the tensors; f32 keeps a folder's as they are. card: makes a folder's README.md.
    RefusedError: the program would not apply all of it.
    """
    stored = read_adapter(folder)

    def other_files(rank: int | None) -> dict[str, str]:
        text = card(commands(to, base=base, out=out, rank=rank))
        return {} if text is None else {CARD_NAME: text}

    report = _export(stored, to, base, out, dtype, other_files)
    system_notes = (
        [] if stored.manifest is None or stored.manifest.system is None else [SYSTEM_NOTE]
    )
    return replace(
        report,
        notes=[*report.notes, *system_notes],
        serve=commands(to, base=base, out=out, rank=report.rank),
    )


SYSTEM_NOTE = f"its rows began with a system turn: send it too (system in {MANIFEST_NAME})"


def _export(
    stored: StoredAdapter,
    to: Program,
    base: str,
    out: str | Path,
    dtype: AdapterType,
    other_files: OtherFiles,
) -> ExportReport:
    if to == "peft":
        _check_peft_loads(stored, base)
        return export_peft(stored, out, other_files, dtype)
    skeleton = load_skeleton(base)
    if to == "transformers":  # it reads PEFT's layout of some methods
        if findings := lint(stored, skeleton.model, to):
            fix = next((finding.mended for finding in findings if finding.mended), "")
            raise RefusedError(
                "transformers would not apply this adapter as it is",
                [finding.what for finding in findings],
                fix,
            )
        return export_peft(stored, out, other_files, dtype)
    placed = place(stored, skeleton.model)
    if to == "vllm":
        return export_vllm(placed, skeleton, out, other_files, dtype, base=base)
    _require_gguf_name(out)
    with atomic_file(out) as partial:
        size, rounding = write_gguf_adapter(partial, placed, skeleton.model, dtype=dtype)
    notes = [] if rounding is None else [rounding_note(dtype, rounding)]
    return ExportReport(Path(out), size, notes)


def _check_peft_loads(stored: StoredAdapter, base: str) -> None:
    """Raises RefusedError if PEFT refuses LoRA on a module of the adapter; reads the base if
    needed.
    """
    if not stored.layout.peft_reads or not may_be_refused_by_peft(stored.tensors):
        return
    model = load_skeleton(base).model
    if (refusal := peft_refusal(fit_adapter(stored, model).scaling, model)) is not None:
        step = f"Merge it into the base instead: {refusal.mended}."
        raise RefusedError("PEFT would not load this adapter", [refusal.what], step)


@dataclass(frozen=True)
class WeightSource:
    """Says which weights of a base a merged model is made of; see open_merge."""

    quantize: Quantize | None = None
    keep_dense: Sequence[str] = ()
    into: Into | None = None
    original: str | None = None
    force_base: bool = False


def export_merged_gguf(
    adapters: Sequence[tuple[str | Path, float]],
    *,
    base: str,
    out: str | Path,
    type: ModelType = "f16",
    weights: WeightSource = WeightSource(),
    progress: ReportProgress | None = None,
) -> GGUFReport:
    """Writes base and adapters as one .gguf model; copies metadata if the base is a .gguf file."""
    _require_gguf_name(out)
    loaded, acting = _open_base(adapters, base, weights)
    report = write_gguf_model(
        loaded, acting, out, type=type, source_file=gguf_file(loaded.source), progress=progress
    )
    return replace(report, serve=whole_model_commands("llamacpp", out))


def export_ollama(
    folder: str | Path,
    *,
    base: str,
    out: str | Path,
    type: ModelType = "f16",
    weights: WeightSource = WeightSource(),
    progress: ReportProgress | None = None,
    card: Card = _no_card,
) -> GGUFReport:
    """Writes a folder with base and adapter as one .gguf model, and a Modelfile for Ollama.

    RefusedError: the base's chat template cannot be written in Ollama's language; raised before any
    weight is read.
    """
    stored, serve = read_adapter(folder), whole_model_commands("ollama", out)
    preamble = Preamble() if stored.manifest is None else stored.manifest.preamble
    turns_of(ChatTemplate(load_tokenizer(base)[0], variables=preamble.variables))
    with atomic_folder(out) as partial:
        loaded, acting = _open_base([(folder, 1.0)], base, weights)
        generation, positions = (
            loaded.model.generation_config,
            configured_capacity(loaded.config).positions,
        )
        end_ids = generation.eos_token_id if generation is not None else None
        text, notes = modelfile(
            extended(loaded.tokenizer, preamble.tokens),
            preamble,
            model=MODEL_NAME,
            stops=end_ids if isinstance(end_ids, list) else [],
            positions=positions,
            made_of=f"Veneer {version('veneer')}: {said_of(stored.folder)} over {base}",
        )
        file, source = partial / MODEL_NAME, gguf_file(loaded.source)
        report = write_gguf_model(
            loaded, acting, file, type=type, source_file=source, progress=progress
        )
        (partial / "Modelfile").write_text(text, encoding="utf-8")
        if (card_text := card(serve)) is not None:
            (partial / CARD_NAME).write_text(card_text, encoding="utf-8")
    return replace(report, out=Path(out), notes=notes, serve=serve)


MODEL_NAME = "model.gguf"


def _open_base(
    adapters: Sequence[tuple[str | Path, float]], base: str, weights: WeightSource
) -> tuple[FrozenBase, list[tuple[str, float]]]:
    if not adapters:
        return load_base(base, dtype="stored", device="cpu", quantize=weights.quantize), []
    inputs = open_merge(
        base,
        adapters,
        quantize=weights.quantize,
        keep_dense=weights.keep_dense,
        into=weights.into,
        original=weights.original,
        force_base=weights.force_base,
    )
    return inputs.base, inputs.acting


def lint_adapter(folder: str | Path, consumer: Program, *, base: str) -> list[LintFinding]:
    """Lists what the consumer would refuse or apply wrongly. base: only its config is read."""
    return lint(read_adapter(folder), load_skeleton(base).model, consumer)


def _require_gguf_name(out: str | Path) -> None:
    if gguf_file(str(out)) is None:
        raise ConfigError(
            f"{out} must be a file named ….gguf",
            next_step=f"Give --out {Path(out).with_suffix('.gguf')}.",
        )
