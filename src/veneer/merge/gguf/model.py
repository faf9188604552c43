"""Writes a base with merged adapters as one .gguf file: f16, or Q8_0 with norms in f32, tensor by
tensor.

llama.cpp's own program makes smaller types from the f16 file. Matrices whose rows are not a
multiple of 32 stay f16 in a Q8_0 file, as in llama.cpp's own quantiser. How much of the update is
left is measured on the decoded file. Metadata and tokenizer come from the base's own .gguf file if
it has one, else they are written as llama.cpp's converter would. Source: llama.cpp,
convert_hf_to_gguf.py.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import (
    GGMLQuantizationType,
    GGUFReader,
    GGUFValueType,
    GGUFWriter,
    LlamaFileType,
    dequantize,
    quantize,
)
from torch import Tensor

from veneer.adapters.placement.token_rows import NewTokens
from veneer.bases.gguf.rope import Factors
from veneer.data.template.new_tokens import extended
from veneer.errors import RefusedError
from veneer.files.atomic import atomic_file
from veneer.kernels.wide import wide
from veneer.merge.fold.fold import (
    SourceTensor,
    names_to_untie,
    stored_tensors,
    tied_names,
    weight_changes,
)
from veneer.merge.fold.folder import LEAST_SURVIVAL
from veneer.merge.fold.rounding import Survival, SurvivalReport, survival, total
from veneer.merge.fold.tokens import WeightChanges, refuse_tokens, tokens_of, with_rows
from veneer.merge.gguf.bytes import as_writable
from veneer.merge.gguf.hyperparameters import rope_factors, write_hyperparameters
from veneer.merge.gguf.names import GGUFNames, names_of
from veneer.merge.gguf.quantise import quantise, quantiser
from veneer.merge.gguf.tokenizer import write_tokenizer
from veneer.merge.programs import BY_LLAMA_CPP, ModelType
from veneer.models.frozen_base import FrozenBase

_FILE_TYPES = {"q8_0": LlamaFileType.MOSTLY_Q8_0}
_BLOCK = 32
ReportProgress = Callable[[str, int, int], None]
"""Reports (label, done, total)."""
_NOT_COPIED = ("GGUF.", "general.architecture", "general.file_type", "general.quantization_version")


@dataclass(frozen=True)
class GGUFReport(SurvivalReport):
    """Reports an export. weights: name of each changed weight -> survival of its update.

    f16_instead: number of tensors that Q8_0 cannot hold. notes: for its user. serve: commands to
    serve it. base_rounding: ||stored - W|| / ||W|| of the same weights without the update; None for
    types that llama.cpp's program makes.
    """

    out: Path
    bytes: int
    type: ModelType
    weights: Mapping[str, Survival]
    f16_instead: int
    base_rounding: float | None = None
    notes: list[str] = field(default_factory=list)
    serve: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Weights:
    """Holds the weights of a file by their names in the base: as the base stores them, what
    adapters change, the types in the file, and the names in the file."""

    stored: Mapping[str, SourceTensor]
    changes: WeightChanges
    kinds: Mapping[str, GGMLQuantizationType]
    names: GGUFNames


def write_gguf_model(
    base: FrozenBase,
    names: Sequence[tuple[str, float]],
    out: str | Path,
    *,
    type: ModelType,
    source_file: Path | None = None,
    least_survival: float = LEAST_SURVIVAL,
    progress: ReportProgress | None = None,
) -> GGUFReport:
    """Merges loaded adapters (none: the base alone) into a new file, and detaches them from the
    base.

    source_file: the .gguf file of the base, whose metadata is copied. RefusedError: an unknown
    family or tokenizer, or too little of the update left. ConfigError: llama.cpp's program for this
    type is not installed.
    """
    if type in BY_LLAMA_CPP:
        quantiser(type)
    applied = [(base.attachments[name], weight) for name, weight in names]
    changes, tokens = weight_changes(base.model, applied), tokens_of(applied)
    if source_file is not None:
        refuse_tokens(
            applied,
            f"the vocabulary is that of {source_file.name}",
            "Merge into a folder: veneer merge.",
        )
    base.routing.active = ()
    for name, _ in names:
        base.detach(name)
    weights, report = _weights_of(base, changes, tokens, type), progress or (lambda *_: None)
    with atomic_file(out) as partial:
        writer = GGUFWriter(partial, weights.names.architecture)
        if source_file is not None:
            _copy_metadata(writer, source_file)
        else:
            shapes = {
                str(weights.names.of(name)): tuple(tensor.shape)
                for name, tensor in weights.stored.items()
            }
            write_hyperparameters(writer, base.config.get_text_config(), weights.names, shapes)
            ids = shapes["token_embd.weight"][0]
            write_tokenizer(writer, extended(base.tokenizer, tokens.texts if tokens else ()), ids)
        writer.add_file_type(_FILE_TYPES.get(type, LlamaFileType.MOSTLY_F16))
        writer.add_quantization_version(2)
        _write_header(writer, weights, list(rope_factors(base.config.get_text_config())))
        survivals, own_error = _write_weights(
            writer, weights, lambda done: report(f"writing {type}", done, len(weights.stored))
        )
        writer.close()
        if type in BY_LLAMA_CPP:
            report(f"llama-quantize, {type}", 0, 0)
            quantise(partial, type)
            survivals = _survivals(partial, weights)
        overall = total(survivals.values())
        if abs(1 - overall.share) > 1 - least_survival:
            raise RefusedError(
                f"{overall.share:.0%} of the update is left in {type}, below {least_survival:.0%}:"
                " nothing was written",
                [f"the update is {overall.relative_size:.2g} of the weights' size"],
                "Take --type f16, or export the adapter alone: llama.cpp adds it at run time.",
            )
    f16 = list(weights.kinds.values()).count(GGMLQuantizationType.F16) if type == "q8_0" else 0
    is_ours = overall.weight and type not in BY_LLAMA_CPP
    rounding = (own_error / overall.weight) ** 0.5 if is_ours else None
    return GGUFReport(Path(out), Path(out).stat().st_size, type, survivals, f16, rounding)


def _weights_of(
    base: FrozenBase, changes: WeightChanges, tokens: NewTokens | None, type: ModelType
) -> _Weights:
    """Chooses the weights of the file. Raises RefusedError for those without a place in it."""
    names, tied = names_of(base.config), tied_names(base.model)
    untied, stored = names_to_untie(tied, changes), stored_tensors(base.model)
    if tokens is not None:
        stored, changes = with_rows(stored, changes, tokens, tied)
    # Towers have no place in the file.
    has_towers = base.config.get_text_config() is not base.config
    left_out = tuple(f"{path}." for path in base.paths.left_out) if has_towers else ()
    stored = {
        name: tensor
        for name, tensor in stored.items()
        if (name not in tied or name in untied) and not name.startswith(left_out)
    }
    if unnamed := [name for name in stored if names.of(name) is None]:
        raise RefusedError(
            "these weights have no place in a .gguf file",
            unnamed[:8],
            "Merge into a folder (veneer merge) and use llama.cpp's convert_hf_to_gguf.py on it.",
        )
    kinds = {name: _kind(tensor, type) for name, tensor in stored.items()}
    return _Weights(stored, changes, kinds, names)


def _write_header(writer: GGUFWriter, weights: _Weights, factors: Sequence[Factors]) -> None:
    """Writes all metadata, and the factors of rotation, which are the first tensors."""
    for divisors in factors:
        writer.add_tensor_info("rope_freqs.weight", divisors.shape, divisors.dtype, divisors.nbytes)
    _announce(writer, weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for divisors in factors:
        writer.write_tensor_data(as_writable(divisors))


def _write_weights(
    writer: GGUFWriter, weights: _Weights, report: Callable[[int], None]
) -> tuple[dict[str, Survival], float]:
    """Writes the weights one by one. Returns how much of each update is left, and the sum of
    ||stored - W||^2 of the changed weights."""
    survivals: dict[str, Survival] = {}
    own_errors: list[float] = []
    for done, (name, tensor) in enumerate(weights.stored.items()):
        report(done)
        kind, change, gguf_name = (
            weights.kinds[name],
            weights.changes.get(name),
            str(weights.names.of(name)),
        )
        value = tensor.read().float().cpu()
        merged = value if change is None else change(value)
        data, decoded = _encoded(weights.names.values(gguf_name, merged), kind)
        if bool(decoded.isinf().any()):
            raise RefusedError(
                f"{gguf_name} has a value of {float(merged.abs().max()):.4g}, which {kind.name}"
                " cannot hold",
                next_step=(
                    "Merge into a folder (veneer merge) and convert that to bf16 with"
                    " llama.cpp's converter."
                ),
            )
        writer.write_tensor_data(as_writable(data))
        if change is not None:  # in the file's row order, which does not matter to sums
            own = weights.names.values(gguf_name, value)
            survivals[name] = survival(own, weights.names.values(gguf_name, merged), decoded)
            own_errors.append(float(wide(_encoded(own, kind)[1] - own).square().sum()))
    return survivals, sum(own_errors)


def _kind(stored: SourceTensor, type: ModelType) -> GGMLQuantizationType:
    if len(stored.shape) < 2:
        return GGMLQuantizationType.F32
    if type == "q8_0" and stored.shape[-1] % _BLOCK == 0:
        return GGMLQuantizationType.Q8_0
    return GGMLQuantizationType.F16


def _announce(writer: GGUFWriter, weights: _Weights) -> None:
    for name, tensor in weights.stored.items():
        gguf_name, kind = str(weights.names.of(name)), weights.kinds[name]
        shape = tuple(tensor.shape)
        if kind == GGMLQuantizationType.Q8_0:
            row = shape[-1] // _BLOCK * 34
            shape_in_bytes = (*shape[:-1], row)
            size = int(np.prod(shape_in_bytes))
            writer.add_tensor_info(
                gguf_name, shape_in_bytes, np.dtype(np.uint8), size, raw_dtype=kind
            )
        else:
            dtype = np.dtype(np.float32 if kind == GGMLQuantizationType.F32 else np.float16)
            writer.add_tensor_info(gguf_name, shape, dtype, int(np.prod(shape)) * dtype.itemsize)


def _encoded(values: Tensor, kind: GGMLQuantizationType) -> tuple[np.ndarray[Any, Any], Tensor]:
    """Returns the values as the file stores them, and as they are decoded."""
    data = quantize(values.contiguous().numpy(), kind)
    return data, torch.from_numpy(np.array(dequantize(data, kind), dtype=np.float32)).view(
        values.shape
    )


def _survivals(file: Path, weights: _Weights) -> dict[str, Survival]:
    """Measures how much of each update is left in the values that a finished file decodes to."""
    tensors = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    survivals = {}
    for name, change in weights.changes.items():
        gguf_name = str(weights.names.of(name))
        own = weights.stored[name].read().float().cpu()
        new, tensor = change(own), tensors[gguf_name]
        decoded = torch.from_numpy(
            np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        )
        survivals[name] = survival(
            weights.names.values(gguf_name, own),
            weights.names.values(gguf_name, new),
            decoded.view(new.shape),
        )
    return survivals


def _copy_metadata(writer: GGUFWriter, source: Path) -> None:
    """Copies everything that the base's file says, but what is about its own types."""
    for name, entry in GGUFReader(source).fields.items():
        if name.startswith(_NOT_COPIED):
            continue
        kind = entry.types[0]
        inner = entry.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(name, entry.contents(), kind, inner)
