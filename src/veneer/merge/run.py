"""A whole merge, from names to a folder: the base, the adapters, the weights they are merged into, the check.

Over a base that is held quantised there are two honest ways, and the caller chooses:
    dequantised   W is what the quantised base computes with: the merged model is the model that was trained
    original      W is the weight before it was quantised: free of its error, which the adapter may have learnt to
                  make up for; what that changes is measured and told
Neither is quantised again: an update is mostly smaller than a 4-bit step and would be rounded away.
"""

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from veneer.errors import ConfigError
from veneer.merge.fold import refuse_unfoldable
from veneer.merge.folder import DtypeChoice, MergeReport, merge_into_folder
from veneer.merge.verify import Reference, limited, reference, text_rows
from veneer.models.load import load_base
from veneer.quant.config import Quantize
from veneer.store.adapter import load_adapter, read_adapter

Into = Literal["original", "dequantised"]


def merge_adapters(
    base: str, adapters: Sequence[tuple[str | Path, float]], *, out: str | Path, dtype: DtypeChoice | None = None,
    stochastic: bool = False, seed: int = 0, quantize: Quantize | None = None, keep_dense: Sequence[str] = (), into: Into | None = None,
    original: str | None = None, rows: Sequence[list[int]] | None = None, check_logits: bool = True,
    force_base: bool = False, device: str = "cpu",
) -> MergeReport:  # fmt: skip
    """Merges adapter folders, each with its weight, into the base that `base` names; see merge_into_folder.

    quantize, keep_dense, into, original  for adapters trained over a quantised base: how it was held, what is merged into, and
                              where the original weights are (None: in `base` itself)
    """
    refuse_unclear(base, quantize is not None, into, original)
    stored = [(read_adapter(folder), weight) for folder, weight in adapters]
    refuse_unfoldable({str(adapter.folder): adapter.config for adapter, _ in stored})
    names = _names([adapter.folder for adapter, _ in stored])
    acting = [(name, weight) for name, (_, weight) in zip(names, stored, strict=True)]
    loaded = load_base(base, device=device, quantize=quantize, keep_dense=keep_dense)
    refuse_unclear(base, loaded.quantize is not None, into, original, loaded=True)
    for name, (adapter, _) in zip(names, stored, strict=True):
        load_adapter(loaded, adapter, name=name, force_base=force_base)
    as_trained: Reference | None = None
    if into == "original" and check_logits:
        asked = text_rows(loaded.tokenizer) if rows is None else limited(rows)
        as_trained = reference(loaded, acting, asked)
    if into == "original":
        del loaded
        gc.collect()
        loaded = load_base(original or base, device=device)
        for name, (adapter, _) in zip(names, stored, strict=True):
            load_adapter(
                loaded, adapter, name=name, force_base=True
            )  # its fingerprint is the quantised base's
    record = {
        "base": {"name": loaded.name_or_path, "revision": loaded.revision, "fingerprint": loaded.fingerprint().to_dict()},
        "adapters": [
            {"content_hash": adapter.manifest.content_hash if adapter.manifest else None, "weight": weight}
            for adapter, weight in stored
        ],
        "into": into,
    }  # fmt: skip
    return merge_into_folder(
        loaded, acting, out, dtype=dtype, stochastic=stochastic, seed=seed, rows=rows, check_logits=check_logits,
        as_trained=as_trained, record=record,
    )  # fmt: skip


INTO_STEP = (
    "--into dequantised keeps what was trained; --into original takes the weights before quantisation. "
    "veneer merge never quantises again: most of an update is smaller than a 4-bit step."
)


def refuse_unclear(
    base: str, packed: bool, into: Into | None, original: str | None, *, loaded: bool = False
) -> None:
    """ConfigError where it is not said, or said in vain, which weights are merged into.

    packed: the base is held quantised; loaded: that is certain, a folder may hold packed weights by itself.
    """
    packed = packed or base.endswith(".gguf")
    faults = []
    if packed and into is None:
        faults.append(f"{base} is held quantised: say --into original or --into dequantised")
    if loaded and into is not None and not packed:
        faults.append(
            f"--into {into}, but {base} is not quantised: leave it out, or say --quantize as in training"
        )
    if into == "original" and base.endswith(".gguf") and original is None:
        faults.append("--into original over a .gguf file: name the original weights with --original")
    if into != "original" and original is not None:
        faults.append("--original is read only with --into original")
    if faults:
        raise ConfigError("what is merged into is not clear", faults, INTO_STEP)


def _names(folders: Sequence[Path]) -> list[str]:
    """A name for each, told apart by number where folders are called alike."""
    return [f"{number}:{folder.name}" for number, folder in enumerate(folders, 1)]
