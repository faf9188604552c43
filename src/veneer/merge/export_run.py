"""A whole export, from an adapter's folder to what another program reads; and the check beforehand."""

from collections.abc import Sequence
from pathlib import Path

from veneer.bases.sources import gguf_file
from veneer.bases.without_weights import load_skeleton
from veneer.errors import ConfigError, RefusedError
from veneer.files.atomic import atomic_file
from veneer.formats.adapter import read_adapter
from veneer.merge.adapters import place
from veneer.merge.export import ExportReport, export_peft, export_vllm
from veneer.merge.gguf_adapter import AdapterType, write_gguf_adapter
from veneer.merge.gguf_model import GGUFReport, ModelType, write_gguf_model
from veneer.merge.lint import Finding, lint
from veneer.merge.merge_run import Into, open_merge
from veneer.merge.programs import Program
from veneer.models.load import load_base
from veneer.quant.config import Quantize


def export_adapter(
    folder: str | Path, *, to: Program, base: str, out: str | Path, dtype: AdapterType = "f32"
) -> ExportReport:
    """Writes the adapter for another program. base: only its config is read. dtype: of a .gguf adapter's tensors.

    RefusedError: the program would not apply all of it.
    """
    stored = read_adapter(folder)
    if to == "peft":
        return export_peft(stored, out)
    skeleton = load_skeleton(base)
    if to == "transformers":  # which reads PEFT's layout, of some methods
        if found := lint(stored, skeleton.model, to):
            way = next((each.mended for each in found if each.mended), "")
            raise RefusedError("transformers would not apply this adapter as it is", [f.what for f in found], way)
        return export_peft(stored, out)
    placed = place(stored, skeleton.model)
    if to == "vllm":
        return export_vllm(placed, skeleton, out, base=base)
    _named_gguf(out)
    with atomic_file(out) as partial:
        size = write_gguf_adapter(partial, placed, skeleton.model, dtype=dtype)
    return ExportReport(Path(out), size)


def export_merged_gguf(
    adapters: Sequence[tuple[str | Path, float]],
    *,
    base: str,
    out: str | Path,
    type: ModelType = "f16",
    quantize: Quantize | None = None,
    keep_dense: Sequence[str] = (),
    into: Into | None = None,
    original: str | None = None,
    force_base: bool = False,
) -> GGUFReport:
    """Writes base and adapters as one .gguf model. Metadata is copied where the weights come from a .gguf file.

    quantize, keep_dense, into, original: for adapters trained over a quantised base, see merge_run.py's open_merge.
    """
    _named_gguf(out)
    if adapters:
        opened = open_merge(
            base,
            adapters,
            quantize=quantize,
            keep_dense=keep_dense,
            into=into,
            original=original,
            force_base=force_base,
        )
        loaded, acting = opened.base, opened.acting
    else:
        loaded, acting = load_base(base, dtype="stored", device="cpu", quantize=quantize), []
    return write_gguf_model(loaded, acting, out, type=type, source_file=gguf_file(loaded.source))


def lint_adapter(folder: str | Path, consumer: Program, *, base: str) -> list[Finding]:
    """What the consumer would refuse of the adapter, or apply wrongly. base: only its config is read."""
    return lint(read_adapter(folder), load_skeleton(base).model, consumer)


def _named_gguf(out: str | Path) -> None:
    if gguf_file(str(out)) is None:
        raise ConfigError(
            f"{out} is to be a file called ….gguf", next_step=f"Give --out {Path(out).with_suffix('.gguf')}."
        )
