"""Which format a folder holds its weights in, and its weights so. One line in READERS for each
quant_method.

What bitsandbytes packed is told by its tensors' names (bnb_files.py), the others by
quantization_config in config.json.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from veneer.bases.folder.stored_type import most_common_dtype
from veneer.bases.folder.tensor_files import StoredTensor, counted
from veneer.bases.packed.bnb_files import bnb_weights, is_bnb
from veneer.bases.packed.fp8_files import (
    blocks_compressed,
    blocks_fp8,
    fp8_weights,
    unread_compressed,
    unread_fp8,
)
from veneer.bases.packed.int4_files import AWQ, GPTQ, int4_weights, unread_awq, unread_gptq
from veneer.bases.packed.moving import NEXT, Waiting
from veneer.bases.packed.mxfp4_files import mxfp4_weights, unread_mxfp4
from veneer.errors import CorruptFileError, SourceError
from veneer.files.strict_json import read_model_json
from veneer.quant.config import FOUR_BITS, Quantize
from veneer.quant.nf4 import BOOKS
from veneer.quant.weight import PackedSize

Settings = Mapping[str, Any]
Tensors = Mapping[str, StoredTensor]
Read = Callable[[Tensors, Settings], tuple[dict[str, Waiting], set[str], list[str]]]
"""(by name, the tensors that they are made of, what does not belong together)"""


_DENSE = ("F64", "F32", "F16", "BF16")
_WEIGHTS = (".weight", "_proj")
"""Ends of names; a model's masks and positions may be whole numbers."""


@dataclass(frozen=True)
class Reader:
    """unread: what of the settings is not read."""

    format: Quantize
    unread: Callable[[Settings], list[str]]
    weights: Read


READERS: Mapping[str, Reader] = {
    "fp8": Reader("fp8", unread_fp8, partial(fp8_weights, blocks=blocks_fp8)),
    "compressed-tensors": Reader(
        "fp8", unread_compressed, partial(fp8_weights, blocks=blocks_compressed)
    ),
    "mxfp4": Reader("mxfp4", unread_mxfp4, mxfp4_weights),
    "gptq": Reader("gptq", unread_gptq, partial(int4_weights, layout=GPTQ)),
    "awq": Reader("awq", unread_awq, partial(int4_weights, layout=AWQ)),
}


def refuse_unread(folder: Path, settings: Settings) -> None:
    """SourceError, by name, for quantised weights that are not read. settings:
    quantization_config."""
    method = settings.get("quant_method", "unknown method")
    if method == "bitsandbytes":
        faults = [] if settings.get("load_in_4bit") else ["in 8 bits"]
    elif isinstance(method, str) and method in READERS:
        faults = READERS[method].unread(settings)
    else:
        faults = ["of these nothing is known here"]
    if faults:
        raise SourceError(
            f"the weights in {folder} are stored quantised ({str(method)[:60]}) in a way that is"
            " not read yet",
            faults[:8],
            "Take the model's unquantised version and quantize: nf4, or one that bitsandbytes"
            f" quantised in 4 bits, or one of {', '.join(READERS)}.",
        )


def stored_settings(folder: Path) -> Settings:
    """The quantization_config of config.json; {} if none. A model of texts and images may have it
    beside its text's.

    Raises CorruptFileError for one that is no mapping, SourceError for two that differ.
    """
    path = folder / "config.json"
    found: list[Settings] = []
    for each in _settings_in(read_model_json(path)):
        if not isinstance(each, dict):
            raise CorruptFileError(
                f"quantization_config in {path} is {str(each)[:60]}, not a mapping", next_step=NEXT
            )
        if each and each not in found:
            found.append(each)
    if len(found) > 1:
        raise SourceError(
            f"{path} has {len(found)} quantization_config, and one for all weights is read",
            next_step="Take the model's unquantised version.",
        )
    return found[0] if found else {}


def _settings_in(value: Mapping[str, Any]) -> Iterator[Any]:
    for key, inner in value.items():
        if key == "quantization_config":
            yield from () if inner is None else (inner,)
        elif isinstance(inner, dict):
            yield from _settings_in(inner)


def announced_format(folder: Path) -> Quantize | None:
    """By config.json alone. SourceError as refuse_unread."""
    if not (settings := stored_settings(folder)):
        return None
    refuse_unread(folder, settings)
    found = READERS.get(str(settings["quant_method"]))
    if found is not None:
        return found.format
    said = settings.get("bnb_4bit_quant_type")
    return next((book for book in BOOKS if book == said), FOUR_BITS)


def stored_weights(folder: Path, tensors: Tensors) -> dict[str, Any]:
    """The weights of a folder: dense ones as they are, packed ones with all their parts as one
    Waiting.

    Raises CorruptFileError with every packed weight whose parts do not belong together, SourceError
    for weights that are neither packed in a way that is read nor dense: numbers of another
    program's, which as such mean nothing.
    """
    settings = stored_settings(folder)
    read = _reader(folder, tensors, settings)
    weights, taken, faults = read(tensors, settings) if read is not None else ({}, set(), [])
    dense = {name: tensor for name, tensor in tensors.items() if name not in taken}
    if faults := faults + [
        f"{name} is there both packed and dense" for name in weights if name in dense
    ]:
        raise CorruptFileError("packed weights in the files cannot be read", faults[:20], NEXT)
    if read is not None and not weights:
        raise CorruptFileError(
            f"{folder / 'config.json'} says that the weights are stored as"
            f" {settings['quant_method']}, and the {len(tensors):,} tensors beside it are none of"
            " these",
            next_step="If they are dense, take quantization_config out of config.json.",
        )
    if unread := [
        f"{n} is {t.kind}"
        for n, t in dense.items()
        if n.endswith(_WEIGHTS) and t.kind not in _DENSE
    ]:
        raise SourceError(
            f"of the weights in {folder} {len(unread):,} are stored packed, and config.json does"
            " not say how",
            unread[:8],
            "Take a version of the model in bf16, f16 or f32, or one with its quantization_config."
            f" {NEXT}",
        )
    return {**weights, **dense}


def stored_format(folder: Path, tensors: Tensors) -> tuple[Quantize, torch.dtype] | None:
    """(format, type of the weights before they were packed) of a folder's tensors; None: none is
    packed.

    Where the files do not say that type, it is the one of most of the values beside the packed
    ones.
    """
    weights = stored_weights(folder, tensors)
    packed = [weight for weight in weights.values() if isinstance(weight, Waiting)]
    if not packed:
        return None
    if len(formats := {weight.format for weight in packed}) > 1:
        raise CorruptFileError(f"{folder} mixes {' and '.join(sorted(formats))}", [], NEXT)
    dense = {name: tensor for name, tensor in weights.items() if not isinstance(tensor, Waiting)}
    return packed[0].format, packed[0].before or most_common_dtype(folder, counted(dense))


def packed_sizes(folder: Path, tensors: Tensors) -> tuple[PackedSize, ...]:
    """What each packed weight of a folder takes once it is read."""
    weights = stored_weights(folder, tensors).values()
    return tuple(
        PackedSize(each.name, each.shape, each.bytes)
        for each in weights
        if isinstance(each, Waiting)
    )


def _reader(folder: Path, tensors: Tensors, settings: Settings) -> Read | None:
    if is_bnb(tensors):
        return bnb_weights
    if settings:
        refuse_unread(folder, settings)
    found = READERS.get(str(settings.get("quant_method")))
    return None if found is None else found.weights
