"""Converts a .gguf file once into a folder that transformers loads, kept in the cache.

config     every hyperparameter of the header is used or refused by name (config.py)
tensors    each tensor of the file maps to one parameter, and each weight comes from the file
           (weights.py)
tokenizer  rebuilt by transformers; refused if tokenizer.ggml.pre, the rule that splits text before
           merges, is unknown
stop       every token that ends a turn, here or in llama.cpp, is in generation_config.json
manifest   the hash of every file: a folder that was changed afterwards is converted again

Weights of quantised files are written as bf16, those of f32, f16 and bf16 files in the type of most
of their matrices. Source of the format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
Not known here: where the file came from.
"""

import contextlib
import io
import logging
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, ReaderTensor
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from veneer.bases.config.announced import announced_faults, built_faults, without_storage
from veneer.bases.gguf.config import ARCHITECTURES, OTHER_SOURCE, described_config
from veneer.bases.gguf.layout import LayoutError, check_layout
from veneer.bases.gguf.tokenizer import end_token_ids, rebuild_tokenizer, split_rule_faults
from veneer.bases.gguf.weights import (
    count_parts,
    dense_values,
    merge_experts,
    parameter_names,
    stored_shape,
)
from veneer.bases.kept import converted_folder, is_whole, publish, working_folder
from veneer.bases.quiet_transformers import quiet
from veneer.bases.stop_tokens import stop_token_ids
from veneer.errors import (
    CorruptFileError,
    DoesNotFitError,
    SourceError,
    VeneerError,
    fault_lines,
    is_out_of_memory,
)
from veneer.files.atomic import write_manifest

_log = logging.getLogger(__name__)

_FLOATS = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}


@dataclass(frozen=True)
class Header:
    """The header of a file, read before any conversion."""

    architecture: str
    pre_tokenizer: str | None
    rope_factors: np.ndarray[Any, Any] | None  # divisors of Llama 3's rotary frequencies
    dtype: torch.dtype
    fields: Mapping[str, Any]  # hyperparameters and ids of special tokens, by their keys
    num_values: int  # of all tensors that are weights
    tensors: Mapping[str, ReaderTensor]  # those weights by their names in the file, mapped
    licence: object = None  # as named by the file

    @property
    def quantised(self) -> bool:
        """Whether any weight is stored in blocks."""
        return any(tensor.tensor_type not in _FLOATS for tensor in self.tensors.values())


def convert(path: Path, sha256: str) -> Path:
    """Returns the folder that the file at `path` is converted to, now or earlier. sha256: of its
    bytes

    Peak memory: the weights as they are written, and the largest tensor in float32. Raises
    SourceError if the file cannot be converted faithfully, CorruptFileError if it is damaged,
    DoesNotFitError if memory or disk do not suffice.
    """
    target = converted_folder(sha256)
    if not is_whole(target):
        with converted_into(path, target) as (isolated, header, folder):
            tokenizer = rebuild_tokenizer(isolated, header.pre_tokenizer)
            model = dense_model(header)
            model.generation_config = generation_settings(tokenizer, model, header.fields)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    return target


def header_config(path: Path) -> tuple[PreTrainedConfig, torch.dtype]:
    """Returns the config that the header describes, and the dtype of a conversion.

    Raises as convert does, but reads no weights.
    """
    header = read_header(path)
    return file_config(header), header.dtype


def file_config(header: Header) -> PreTrainedConfig:
    """Returns the config that the header describes.

    Raises SourceError, or CorruptFileError if it belongs to another model.
    """
    shapes = {name: stored_shape(tensor) for name, tensor in header.tensors.items()}
    try:
        config = described_config(header.architecture, header.fields, shapes, header.rope_factors)
    except VeneerError:
        raise
    except Exception as fault:  # every config class fails differently
        raise SourceError(
            "transformers cannot read the header of the .gguf file",
            fault_lines(fault),
            "Download the file again; if the error stays,"
            f" {OTHER_SOURCE[0].lower()}{OTHER_SOURCE[1:]}",
        ) from fault
    if faults := built_faults(
        config, num_tensors=len(header.tensors), num_values=header.num_values
    ):
        raise CorruptFileError(
            "the header of the .gguf file does not describe its tensors",
            faults,
            "Download the file again.",
        )
    return config


def _isolate(path: Path, scratch: Path) -> Path:
    """Links the file as model.gguf in an empty folder: transformers also reads neighbouring
    files."""
    folder = scratch / "alone"
    folder.mkdir()
    link = folder / "model.gguf"
    try:
        link.symlink_to(path.resolve())
    except OSError:  # Windows requires a privilege for links
        shutil.copyfile(path, link)
    return folder


@contextmanager
def converted_into(path: Path, target: Path) -> Iterator[tuple[Path, Header, Path]]:
    """Publishes `target` after the block has written it.

    Yields a folder that holds only the file, as model.gguf; the file's header; and the folder to
    create and write.
    """
    header = read_header(path)
    _log.info("converting %s, once", path.name)
    with working_folder(target.parent) as scratch:
        isolated, folder = _isolate(path, scratch), scratch / "model"
        with (
            quiet(),
            contextlib.redirect_stderr(io.StringIO()),
        ):  # one progress bar ignores all settings
            yield isolated, header, folder
        write_manifest(folder)
        publish(folder, target)


def generation_settings(
    tokenizer: PreTrainedTokenizerFast, model: PreTrainedModel, fields: Mapping[str, Any]
) -> GenerationConfig:
    """Returns the generation config with the tokens that end a turn or a text.

    fields: of the header. Also sets the tokenizer's longest row, and removes settings of how it was
    loaded.
    """
    positions = getattr(
        model.config, "max_position_embeddings", None
    )  # Bloom has no limit of its own
    tokenizer.model_max_length = positions or model.config.seq_length
    for setting in ("local_files_only", "is_local"):  # these describe how it was loaded
        tokenizer.init_kwargs.pop(setting, None)
    ends = {*stop_token_ids(tokenizer, model.generation_config), *end_token_ids(tokenizer, fields)}
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=sorted(ends),
        pad_token_id=tokenizer.pad_token_id,
    )


def dense_model(header: Header) -> PreTrainedModel:
    """Builds the dense model on the CPU in header.dtype. Raises SourceError if file and model
    differ."""
    model = without_storage(file_config(header), header.dtype)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    try:
        values, faults = _dense_tensors(header, model)
    except (MemoryError, RuntimeError) as fault:
        if is_out_of_memory(fault):
            raise _out_of_memory(header) from fault
        raise
    faults += [f"not in the file  {name}" for name in shapes if name not in values]
    for name in values.keys() & shapes.keys():
        if tuple(values[name].shape) != shapes[name]:
            faults.append(
                f"{name}: {tuple(values[name].shape)} in the file, {shapes[name]} in the model"
            )
    if faults:
        raise SourceError(
            f"this {header.architecture} .gguf file and transformers' model do not match",
            faults[:12],
            OTHER_SOURCE,
        )
    model.load_state_dict(values, strict=False, assign=True)
    model.tie_weights()
    model.config.architectures = [type(model).__name__]
    return model


def _dense_tensors(header: Header, model: PreTrainedModel) -> tuple[dict[str, Tensor], list[str]]:
    """Decodes every tensor of the file by its parameter's name. Returns them and the faults."""
    names = parameter_names(header.architecture, model)
    values: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    faults = [f"{name} is not in the model" for name in header.tensors if name not in names]
    for name, parameter in names.items():
        if name not in header.tensors:
            continue
        dense = dense_values(header.tensors[name], header.architecture, model.config, header.dtype)
        if header.dtype == torch.float16 and not bool(dense.isfinite().all()):
            faults.append(
                f"{name}: a value is too large for f16, the type of most matrices, or is not a"
                " number"
            )
        if count_parts(parameter) == 1:
            values[parameter] = dense
        elif len(group := parts.setdefault(parameter, {})) == count_parts(parameter) - 1:
            values[parameter] = merge_experts({**group, name: dense})
            del parts[parameter]
        else:
            group[name] = dense
    return values, faults


def read_header(path: Path) -> Header:
    """Reads the header. Raises CorruptFileError for an incomplete file, SourceError for an
    unsupported one."""
    try:
        check_layout(path)
        reader = GGUFReader(path)
        fields = {
            name: field.contents()
            for name, field in reader.fields.items()
            if not name.startswith("tokenizer.ggml.")
            or name.endswith((".pre", ".model", "_token_id"))
        }
    except Exception as fault:  # names that are not UTF-8, values of the wrong type
        raise CorruptFileError(
            f"{path} is not a complete .gguf file",
            [str(fault) if isinstance(fault, LayoutError) else f"{type(fault).__name__}: {fault}"],
            "Download it again; the earlier download may have been interrupted.",
        ) from fault
    architecture = str(fields.get("general.architecture", "not named"))
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    factors = tensors.pop("rope_freqs.weight", None)
    pre = fields.get("tokenizer.ggml.pre") if fields.get("tokenizer.ggml.model") == "gpt2" else None
    if faults := _faults(architecture, pre, fields, list(tensors)):
        raise SourceError(f"{path.name} cannot be converted", faults, OTHER_SOURCE)
    shapes = {name: stored_shape(tensor) for name, tensor in tensors.items()}
    if faults := announced_faults(fields.items(), shapes):
        raise CorruptFileError(
            f"the header of {path.name} does not describe its tensors",
            faults[:20],
            "Download the file again.",
        )
    return Header(
        architecture=architecture,
        pre_tokenizer=pre,
        rope_factors=None if factors is None else np.array(factors.data, dtype=np.float64),
        dtype=_file_dtype(tensors),
        fields=fields,
        num_values=sum(int(tensor.n_elements) for tensor in tensors.values()),
        tensors=tensors,
        licence=fields.get("general.license"),
    )


def _file_dtype(tensors: Mapping[str, ReaderTensor]) -> torch.dtype:
    """Returns the type of most values of the matrices; bf16 if any matrix is stored in blocks.

    Vectors do not count: they are f32 in every file. In an f16 file some matrices are f32 too:
    GPT-2's positions, routers of experts.
    """
    values: Counter[GGMLQuantizationType] = Counter()
    for tensor in tensors.values():
        if len(tensor.shape) > 1:
            values[tensor.tensor_type] += int(tensor.n_elements)
    if not values or any(kind not in _FLOATS for kind in values):
        return torch.bfloat16
    if {GGMLQuantizationType.F16, GGMLQuantizationType.BF16} <= values.keys():
        return torch.float32  # neither type holds all values of the other
    return _FLOATS[values.most_common(1)[0][0]]


def _faults(
    architecture: str, pre: str | None, fields: Mapping[str, Any], names: list[str]
) -> list[str]:
    """Reports every reason why a conversion would not be faithful."""
    faults = []
    if architecture not in ARCHITECTURES:
        faults.append(f"architecture {architecture}: not among {', '.join(ARCHITECTURES)}")
    if fields.get("general.type", "model") != "model":
        faults.append(f"general.type {fields['general.type']}: it is not a model")
    if fields.get("split.count", 1) not in (0, 1):
        faults.append(
            f"it is one of {fields['split.count']} parts: join them with llama-gguf-split --merge"
        )
    if odd := [name for name in names if name.startswith("rope_")]:
        faults.append(f"rope factors {', '.join(odd)}: not known here")
    faults += split_rule_faults(pre)
    return faults


def _out_of_memory(header: Header) -> VeneerError:
    gib = header.num_values * header.dtype.itemsize / 2**30
    return DoesNotFitError(
        f"the conversion of the .gguf file does not fit into memory: its weights are {gib:.1f} GiB",
        next_step="Convert it on a larger machine and name the folder, or choose a smaller model.",
    )
