"""Runs a merge: loads the base and the adapters, chooses the weights to merge into, and checks the
result.

Over a quantised base the caller chooses:
    dequantised   W is what the quantised base computes with: the result is the trained model
    original      W is the weight before quantisation, without its error, which the adapter may
                  have learnt to correct; the effect is measured and reported
The result is never quantised again: most of an update is smaller than a 4-bit step.
"""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from veneer.adapters.combinations import refuse_merge, refuse_sum
from veneer.bases.gguf.convert import read_header
from veneer.bases.names.sources import gguf_file
from veneer.bounds import SEED, check_numbers, check_weights
from veneer.errors import ConfigError
from veneer.formats.adapter import StoredAdapter, read_adapter
from veneer.formats.loading import load_adapter
from veneer.library.names import said_of
from veneer.merge.fold.folder import DtypeChoice, MergeReport, merge_into_folder
from veneer.merge.fold.verify import ReferenceLogits, data_rows, limited, reference, text_rows
from veneer.models.frozen_base import FrozenBase
from veneer.models.load import load_base
from veneer.quant.config import Quantize, weight_format

Into = Literal["original", "dequantised"]


@dataclass(frozen=True)
class MergeInputs:
    """Holds a base with attached, inactive adapters, ready to be merged.

    acting      names of the adapters, with weights
    stored      the adapters as read from their folders
    as_trained  their logits over the quantised base, if other weights are merged into
    """

    base: FrozenBase
    acting: list[tuple[str, float]]
    stored: list[StoredAdapter]
    as_trained: ReferenceLogits | None


def open_merge(
    base: str,
    adapters: Sequence[tuple[str | Path, float]],
    *,
    quantize: Quantize | None = None,
    keep_dense: Sequence[str] = (),
    into: Into | None = None,
    original: str | None = None,
    force_base: bool = False,
    device: str = "cpu",
    rows_for: Callable[[FrozenBase], list[list[int]]] | None = None,
) -> MergeInputs:
    """Loads the weights to merge into, attaches the adapters, and checks them against their base.

    quantize, keep_dense, into, original  for adapters trained over a quantised base: how it was
                                          quantised, what to merge into, and where the original
                                          weights are (None: in `base` itself)
    rows_for                              returns the rows of as_trained; None: it is not computed
    """
    check_weights([weight for _, weight in adapters])
    refuse_unclear(base, quantize, into, original)
    stored = [(read_adapter(folder), weight) for folder, weight in adapters]
    refuse_merge([(str(adapter.folder), adapter.contents) for adapter, _ in stored])
    refuse_sum([(str(adapter.folder), adapter.contents, weight) for adapter, weight in stored])
    names = _names([adapter.folder for adapter, _ in stored])
    acting = [(name, weight) for name, (_, weight) in zip(names, stored, strict=True)]
    loaded = load_base(
        base, dtype="stored", device=device, quantize=quantize, keep_dense=keep_dense
    )
    refuse_unclear(base, loaded.quantize, into, original, loaded=True)
    for name, (adapter, _) in zip(names, stored, strict=True):
        load_adapter(loaded, adapter, name=name, force_base=force_base)
    as_trained = None
    if into == "original":
        as_trained = None if rows_for is None else reference(loaded, acting, rows_for(loaded))
        del loaded
        gc.collect()
        loaded = load_base(original or base, dtype="stored", device=device)
        if loaded.quantize is not None:
            raise ConfigError(
                f"{original or base} holds its weights as {loaded.quantize}: these are not the"
                " original ones",
                next_step=(
                    "Name the weights before quantisation with --original, or merge --into"
                    " dequantised."
                ),
            )
        for name, (adapter, _) in zip(names, stored, strict=True):
            # forced, because its fingerprint is the quantised base's
            load_adapter(loaded, adapter, name=name, force_base=True)
    return MergeInputs(loaded, acting, [adapter for adapter, _ in stored], as_trained)


def merge_adapters(
    base: str,
    adapters: Sequence[tuple[str | Path, float]],
    *,
    out: str | Path,
    dtype: DtypeChoice | None = None,
    stochastic: bool = False,
    seed: int = 0,
    quantize: Quantize | None = None,
    keep_dense: Sequence[str] = (),
    into: Into | None = None,
    original: str | None = None,
    data: str | None = None,
    check_logits: bool = True,
    force_base: bool = False,
    device: str = "cpu",
) -> MergeReport:
    """Merges adapter folders, with weights, into the base; see open_merge and merge_into_folder.

    data: names the rows on which logits are compared; None: built-in texts.
    """
    check_numbers(seed=(SEED, seed))
    rows = None if data is None else data_rows(base, data)

    def rows_for(loaded: FrozenBase) -> list[list[int]]:
        return text_rows(loaded) if rows is None else limited(rows)

    inputs = open_merge(
        base,
        adapters,
        quantize=quantize,
        keep_dense=keep_dense,
        into=into,
        original=original,
        force_base=force_base,
        device=device,
        rows_for=rows_for if check_logits else None,
    )
    loaded = inputs.base
    record = {
        "base": {
            "name": loaded.name_or_path,
            "revision": loaded.revision,
            "fingerprint": loaded.fingerprint().to_dict(),
        },
        "adapters": [
            {
                "content_hash": adapter.manifest.content_hash if adapter.manifest else None,
                "weight": weight,
            }
            for adapter, (_, weight) in zip(inputs.stored, inputs.acting, strict=True)
        ],
        "into": into,
    }
    return merge_into_folder(
        loaded,
        inputs.acting,
        out,
        dtype=dtype,
        stochastic=stochastic,
        seed=seed,
        rows=rows,
        check_logits=check_logits,
        as_trained=inputs.as_trained,
        record=record,
    )


INTO_STEP = (
    "--into dequantised keeps what was trained; --into original takes the weights before"
    " quantisation. veneer merge never quantises again: most of an update is smaller than a 4-bit"
    " step."
)


def refuse_unclear(
    base: str,
    quantize: Quantize | None,
    into: Into | None,
    original: str | None,
    *,
    loaded: bool = False,
) -> None:
    """Raises ConfigError if it is unclear, or needlessly said, which weights are merged into.

    quantize: format of the base; loaded: this format is certain, as a folder may hold packed
    weights.
    """
    file = gguf_file(base)
    from_file = weight_format(quantize).from_gguf or (
        file is not None and read_header(file).quantised
    )
    packed = from_file or quantize is not None
    faults = []
    if packed and into is None:
        format_text = "in blocks of a .gguf file" if from_file else f"as {quantize}"
        faults.append(f"{base} is held {format_text}: give --into original or --into dequantised")
    if loaded and into is not None and not packed:
        faults.append(
            f"--into {into}, but {base} is not quantised: leave it out, or give --quantize as in"
            " training"
        )
    if into == "original" and from_file and original is None:
        faults.append(
            "--into original over a .gguf file, which holds no others: name the original weights"
            " with --original"
        )
    if into != "original" and original is not None:
        faults.append("--original is read only with --into original")
    if faults:
        raise ConfigError("what is merged into is not clear", faults, INTO_STEP)


def _names(folders: Sequence[Path]) -> list[str]:
    """Returns a name for each adapter, with a number in case folders have equal names."""
    return [f"{number}: {said_of(folder)}" for number, folder in enumerate(folders, 1)]
