"""A base with adapters merged in, as one .gguf file: f16, or Q8_0 with norms in f32; written tensor
by tensor. Smaller types are made of the f16 file by llama.cpp's own program.

Matrices whose rows are no multiple of 32 stay f16 in a Q8_0 file, as llama.cpp's own quantiser
leaves them. How much of the update is left is measured on what the file decodes to. Metadata and
tokenizer come from the base: from its own .gguf file where it is one, else they are written as
llama.cpp's converter would. Source: llama.cpp, convert_hf_to_gguf.py.
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

from veneer.data.template.new_tokens import extended
from veneer.errors import RefusedError
from veneer.files.atomic import atomic_file
from veneer.kernels.wide import wide
from veneer.merge.fold.fold import SourceTensor, stored_tensors, tied_names, wanted_weights
from veneer.merge.fold.folder import LEAST_SURVIVAL
from veneer.merge.fold.rounding import Survival, SurvivalReport, survival, total
from veneer.merge.fold.tokens import refuse_tokens, tokens_of, with_rows
from veneer.merge.gguf.bytes import written
from veneer.merge.gguf.hyperparameters import rope_factors, write_hyperparameters
from veneer.merge.gguf.names import GGUFNames, names_of
from veneer.merge.gguf.quantise import quantise, quantiser
from veneer.merge.gguf.tokenizer import write_tokenizer
from veneer.merge.programs import BY_LLAMA_CPP, ModelType
from veneer.models.frozen_base import FrozenBase

_FILE_TYPES = {"q8_0": LlamaFileType.MOSTLY_Q8_0}
_BLOCK = 32
Told = Callable[[str, int, int], None]
"""(what, done, of how many)."""
_NOT_COPIED = ("GGUF.", "general.architecture", "general.file_type", "general.quantization_version")


@dataclass(frozen=True)
class GGUFReport(SurvivalReport):
    """weights: name of each changed weight -> what is left of its update. f16_instead: tensors that
    Q8_0 cannot hold. notes: what the one who uses it must know. serve: the commands that answer
    with it.

    base_rounding: ||stored - W|| / ||W|| of the same weights without the update, in the same type;
    None: llama.cpp's program made the type, and was not asked for the base."""

    out: Path
    bytes: int
    type: ModelType
    weights: Mapping[str, Survival]
    f16_instead: int
    base_rounding: float | None = None
    notes: list[str] = field(default_factory=list)
    serve: list[str] = field(default_factory=list)


def write_gguf_model(
    base: FrozenBase,
    names: Sequence[tuple[str, float]],
    out: str | Path,
    *,
    type: ModelType,
    source_file: Path | None = None,
    least_survival: float = LEAST_SURVIVAL,
    progress: Told | None = None,
) -> GGUFReport:
    """Merges loaded adapters (none: the base alone) into a new file. The base is left without these
    adapters.

    source_file: the .gguf file that the base came from, whose metadata is copied. RefusedError: a
    family or a tokenizer that is not known here, or too little of the update is left. ConfigError:
    llama.cpp's program for this type is not installed.
    """
    if type in BY_LLAMA_CPP:
        quantiser(type)
    applied = [(base.attachments[name], weight) for name, weight in names]
    wanted, tokens = wanted_weights(base.model, applied), tokens_of(applied)
    if source_file is not None:
        refuse_tokens(
            applied,
            f"the vocabulary is that of {source_file.name}",
            "Merge into a folder: veneer merge.",
        )
    base.routing.active = ()
    for name, _ in names:
        base.detach(name)
    where = names_of(base.config)
    tied = tied_names(base.model)
    parted = {alias for alias, source in tied.items() if alias in wanted or source in wanted}
    stored = stored_tensors(base.model)
    if tokens is not None:
        stored, wanted = with_rows(stored, wanted, tokens, tied)
    stored = {n: s for n, s in stored.items() if n not in tied or n in parted}
    if base.config.get_text_config() is not base.config:  # towers have no place in the file
        beside = tuple(f"{each}." for each in base.paths.left_out)
        stored = {n: s for n, s in stored.items() if not n.startswith(beside)}
    if homeless := [name for name in stored if where.of(name) is None]:
        raise RefusedError(
            "these weights have no place in a .gguf file",
            homeless[:8],
            "Merge into a folder (veneer merge) and use llama.cpp's convert_hf_to_gguf.py on it.",
        )
    kinds = {name: _kind(s, type) for name, s in stored.items()}
    kept: dict[str, Survival] = {}
    own_errors: list[float] = []  # ||stored - W||^2 of each changed weight
    with atomic_file(out) as partial:
        writer = GGUFWriter(partial, where.architecture)
        if source_file is not None:
            _copy_metadata(writer, source_file)
        else:
            shapes = {str(where.of(name)): tuple(s.shape) for name, s in stored.items()}
            write_hyperparameters(writer, base.config.get_text_config(), where, shapes)
            ids = shapes["token_embd.weight"][0]
            write_tokenizer(writer, extended(base.tokenizer, tokens.texts if tokens else ()), ids)
        writer.add_file_type(_FILE_TYPES.get(type, LlamaFileType.MOSTLY_F16))
        writer.add_quantization_version(2)
        factors = list(rope_factors(base.config.get_text_config()))
        for divisors in factors:
            writer.add_tensor_info(
                "rope_freqs.weight", divisors.shape, divisors.dtype, divisors.nbytes
            )
        _announce(writer, stored, kinds, where)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for divisors in factors:
            writer.write_tensor_data(written(divisors))
        for done, (name, s) in enumerate(stored.items()):
            if progress is not None:
                progress(f"writing {type}", done, len(stored))
            own, change, gguf_name = s.read().float().cpu(), wanted.get(name), str(where.of(name))
            new = own if change is None else change(own)
            data, decoded = _encoded(where.values(gguf_name, new), kinds[name])
            if bool(decoded.isinf().any()):
                raise RefusedError(
                    f"{gguf_name} has a value of {float(new.abs().max()):.4g}, which"
                    f" {kinds[name].name} cannot hold",
                    next_step=(
                        "Merge into a folder (veneer merge) and convert that to bf16 with"
                        " llama.cpp's converter."
                    ),
                )
            writer.write_tensor_data(written(data))
            if change is not None:  # in the file's row order, which does not matter to sums
                before = where.values(gguf_name, own)
                kept[name] = survival(before, where.values(gguf_name, new), decoded)
                own_errors.append(
                    float(wide(_encoded(before, kinds[name])[1] - before).square().sum())
                )
        writer.close()
        if type in BY_LLAMA_CPP:
            if progress is not None:
                progress(f"llama-quantize, {type}", 0, 0)
            quantise(partial, type)
            kept = _kept_in(partial, stored, wanted, where)
        whole = total(kept.values())
        if abs(1 - whole.share) > 1 - least_survival:
            raise RefusedError(
                f"{whole.share:.0%} of the update is left in {type}, below {least_survival:.0%}:"
                " nothing was written",
                [f"the update is {whole.relative_size:.2g} of the weights' size"],
                "Take --type f16, or export the adapter alone: llama.cpp adds it at run time.",
            )
    f16 = sum(kind == GGMLQuantizationType.F16 for kind in kinds.values()) if type == "q8_0" else 0
    rounding = (
        (sum(own_errors) / whole.weight) ** 0.5
        if whole.weight and type not in BY_LLAMA_CPP
        else None
    )
    return GGUFReport(Path(out), Path(out).stat().st_size, type, kept, f16, rounding)


def _kind(stored: SourceTensor, type: ModelType) -> GGMLQuantizationType:
    if len(stored.shape) < 2:
        return GGMLQuantizationType.F32
    if type == "q8_0" and stored.shape[-1] % _BLOCK == 0:
        return GGMLQuantizationType.Q8_0
    return GGMLQuantizationType.F16


def _announce(
    writer: GGUFWriter,
    stored: Mapping[str, SourceTensor],
    kinds: Mapping[str, GGMLQuantizationType],
    where: GGUFNames,
) -> None:
    for name, s in stored.items():
        kind, shape = kinds[name], tuple(s.shape)
        if kind == GGMLQuantizationType.Q8_0:
            row = shape[-1] // _BLOCK * 34
            shape_in_bytes = (*shape[:-1], row)
            size = int(np.prod(shape_in_bytes))
            writer.add_tensor_info(
                str(where.of(name)), shape_in_bytes, np.dtype(np.uint8), size, raw_dtype=kind
            )
        else:
            dtype = np.dtype(np.float32 if kind == GGMLQuantizationType.F32 else np.float16)
            writer.add_tensor_info(
                str(where.of(name)), shape, dtype, int(np.prod(shape)) * dtype.itemsize
            )


def _encoded(values: Tensor, kind: GGMLQuantizationType) -> tuple[np.ndarray[Any, Any], Tensor]:
    """The values as the file holds them, and what they decode to."""
    data = quantize(values.contiguous().numpy(), kind)
    return data, torch.from_numpy(np.array(dequantize(data, kind), dtype=np.float32)).view(
        values.shape
    )


def _kept_in(
    file: Path, stored: Mapping[str, SourceTensor], wanted: Mapping[str, Any], where: GGUFNames
) -> dict[str, Survival]:
    """What is left of each update in what a finished file decodes to."""
    tensors = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    found = {}
    for name, change in wanted.items():
        gguf_name = str(where.of(name))
        own = stored[name].read().float().cpu()
        new, tensor = change(own), tensors[gguf_name]
        decoded = torch.from_numpy(
            np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        )
        found[name] = survival(
            where.values(gguf_name, own), where.values(gguf_name, new), decoded.view(new.shape)
        )
    return found


def _copy_metadata(writer: GGUFWriter, source: Path) -> None:
    """Everything the base's file says, but what is about its own types."""
    for name, entry in GGUFReader(source).fields.items():
        if name.startswith(_NOT_COPIED):
            continue
        kind = entry.types[0]
        inner = entry.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(name, entry.contents(), kind, inner)
