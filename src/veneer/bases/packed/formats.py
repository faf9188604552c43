"""Finds the format of packed weights in a folder and reads them; READERS has one line per
quant_method.

bitsandbytes weights are recognised by their tensors' names (bnb_files.py), others by
quantization_config in config.json.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from veneer.bases.folder.stored_type import most_common_dtype
from veneer.bases.folder.tensor_files import StoredTensor, count_values_by_type
from veneer.bases.packed.bnb_files import bnb_weights, is_bnb
from veneer.bases.packed.fp8_files import (
    blocks_compressed,
    blocks_fp8,
    fp8_weights,
    unread_compressed,
    unread_fp8,
)
from veneer.bases.packed.int4_files import AWQ, GPTQ, int4_weights, unread_awq, unread_gptq
from veneer.bases.packed.moving import NEXT, StoredPackedWeight
from veneer.bases.packed.mxfp4_files import mxfp4_weights, unread_mxfp4
from veneer.errors import CorruptFileError, SourceError
from veneer.files.strict_json import read_model_json
from veneer.quant.config import FOUR_BITS, Quantize
from veneer.quant.nf4 import BOOKS
from veneer.quant.weight import PackedSize

Settings = Mapping[str, Any]
Tensors = Mapping[str, StoredTensor]
Read = Callable[[Tensors, Settings], tuple[dict[str, StoredPackedWeight], set[str], list[str]]]
"""Returns the weights by name, the names of the tensors they use, and the faults."""


_DENSE = ("F64", "F32", "F16", "BF16")
_WEIGHTS = (".weight", "_proj")
"""Endings of weight names; masks and positions may be whole numbers."""


@dataclass(frozen=True)
class FormatReader:
    """Reads one format. unread: reports unsupported settings"""

    format: Quantize
    unread: Callable[[Settings], list[str]]
    weights: Read


READERS: Mapping[str, FormatReader] = {
    "fp8": FormatReader("fp8", unread_fp8, partial(fp8_weights, blocks=blocks_fp8)),
    "compressed-tensors": FormatReader(
        "fp8", unread_compressed, partial(fp8_weights, blocks=blocks_compressed)
    ),
    "mxfp4": FormatReader("mxfp4", unread_mxfp4, mxfp4_weights),
    "gptq": FormatReader("gptq", unread_gptq, partial(int4_weights, layout=GPTQ)),
    "awq": FormatReader("awq", unread_awq, partial(int4_weights, layout=AWQ)),
}


def refuse_unread(folder: Path, settings: Settings) -> None:
    """Raises SourceError that names unsupported quantised weights. settings: quantization_config"""
    method = settings.get("quant_method", "unknown method")
    if method == "bitsandbytes":
        faults = [] if settings.get("load_in_4bit") else ["in 8 bits"]
    elif isinstance(method, str) and method in READERS:
        faults = READERS[method].unread(settings)
    else:
        faults = ["unknown quantisation method"]
    if faults:
        raise SourceError(
            f"the weights in {folder} are quantised ({str(method)[:60]}) in a way that is not"
            " supported",
            faults[:8],
            "Choose the model's unquantised version and quantize: nf4, or one that bitsandbytes"
            f" quantised in 4 bits, or one of {', '.join(READERS)}.",
        )


def stored_settings(folder: Path) -> Settings:
    """Returns the quantization_config of config.json; {} if none.

    A model of texts and images may have it beside its text's config. Raises CorruptFileError if it
    is not a mapping, SourceError for two that differ.
    """
    path = folder / "config.json"
    configs: list[Settings] = []
    for settings in _settings_in(read_model_json(path)):
        if not isinstance(settings, dict):
            raise CorruptFileError(
                f"quantization_config in {path} is {str(settings)[:60]}, not a mapping",
                next_step=NEXT,
            )
        if settings and settings not in configs:
            configs.append(settings)
    if len(configs) > 1:
        raise SourceError(
            f"{path} has {len(configs)} different quantization_config; only one for all weights"
            " is supported",
            next_step="Choose the model's unquantised version.",
        )
    return configs[0] if configs else {}


def _settings_in(value: Mapping[str, Any]) -> Iterator[Any]:
    for key, inner in value.items():
        if key == "quantization_config":
            yield from () if inner is None else (inner,)
        elif isinstance(inner, dict):
            yield from _settings_in(inner)


def announced_format(folder: Path) -> Quantize | None:
    """Returns the format by config.json alone. Raises SourceError as refuse_unread."""
    if not (settings := stored_settings(folder)):
        return None
    refuse_unread(folder, settings)
    reader = READERS.get(str(settings["quant_method"]))
    if reader is not None:
        return reader.format
    bnb_type = settings.get("bnb_4bit_quant_type")
    return next((book for book in BOOKS if book == bnb_type), FOUR_BITS)


def stored_weights(folder: Path, tensors: Tensors) -> dict[str, Any]:
    """Returns the weights of a folder: dense ones as they are, packed ones as StoredPackedWeight.

    Raises CorruptFileError with every packed weight whose parts do not match, SourceError for
    weights that are neither dense nor packed in a known format: their raw numbers would mean
    nothing.
    """
    settings = stored_settings(folder)
    read = _find_reader(folder, tensors, settings)
    weights, used, faults = read(tensors, settings) if read is not None else ({}, set(), [])
    dense = {name: tensor for name, tensor in tensors.items() if name not in used}
    if faults := faults + [f"{name} is both packed and dense" for name in weights if name in dense]:
        raise CorruptFileError("packed weights in the files cannot be read", faults[:20], NEXT)
    if read is not None and not weights:
        raise CorruptFileError(
            f"{folder / 'config.json'} says that the weights are stored as"
            f" {settings['quant_method']}, and none of the {len(tensors):,} tensors beside it is",
            next_step="If they are dense, remove quantization_config from config.json.",
        )
    if unread := [
        f"{n} is {t.kind}"
        for n, t in dense.items()
        if n.endswith(_WEIGHTS) and t.kind not in _DENSE
    ]:
        raise SourceError(
            f"{len(unread):,} of the weights in {folder} are packed, and config.json does not say"
            " how",
            unread[:8],
            "Choose a version of the model in bf16, f16 or f32, or one with its"
            " quantization_config."
            f" {NEXT}",
        )
    return {**weights, **dense}


def stored_format(folder: Path, tensors: Tensors) -> tuple[Quantize, torch.dtype] | None:
    """Returns the format and the type of the weights before they were packed; None if none is
    packed.

    If the files do not name that type, it is the type of most dense values.
    """
    weights = stored_weights(folder, tensors)
    packed = [weight for weight in weights.values() if isinstance(weight, StoredPackedWeight)]
    if not packed:
        return None
    if len(formats := {weight.format for weight in packed}) > 1:
        raise CorruptFileError(f"{folder} mixes {' and '.join(sorted(formats))}", [], NEXT)
    dense = {
        name: tensor
        for name, tensor in weights.items()
        if not isinstance(tensor, StoredPackedWeight)
    }
    return packed[0].format, packed[0].before or most_common_dtype(
        folder, count_values_by_type(dense)
    )


def packed_sizes(folder: Path, tensors: Tensors) -> tuple[PackedSize, ...]:
    """Returns the size of each packed weight of a folder in memory."""
    weights = stored_weights(folder, tensors).values()
    return tuple(
        PackedSize(weight.name, weight.shape, weight.bytes)
        for weight in weights
        if isinstance(weight, StoredPackedWeight)
    )


def _find_reader(folder: Path, tensors: Tensors, settings: Settings) -> Read | None:
    if is_bnb(tensors):
        return bnb_weights
    if settings:
        refuse_unread(folder, settings)
    reader = READERS.get(str(settings.get("quant_method")))
    return None if reader is None else reader.weights
