"""A .gguf file, converted once into a folder that transformers loads, kept in the cache.

    config     every hyperparameter of the header is used or refused by name (config.py)
    tensors    each tensor of the file has one place in the model, and each weight comes from the
               file (weights.py)
    tokenizer  rebuilt by transformers; refused if tokenizer.ggml.pre, how text is cut before
               merges, is unknown
    stop       every token that ends a turn is in generation_config.json
    manifest   the hash of every file: a folder that was changed afterwards is converted again

Weights of quantised files are written as bf16, those of f32, f16 and bf16 files in the type of most
of their matrices. Source of the format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
Not known here: where the file came from.
"""

from __future__ import annotations

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
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from veneer.bases.config.announced import announced_faults, built_faults, without_storage
from veneer.bases.gguf.config import ARCHITECTURES, OTHER_SOURCE, described_config
from veneer.bases.gguf.layout import LayoutError, check_layout
from veneer.bases.gguf.weights import dense_values, merged, num_merged, places, stored_shape
from veneer.bases.kept import converted_folder, is_whole, making, publish
from veneer.bases.quiet_transformers import quiet
from veneer.bases.stop_tokens import stop_token_ids
from veneer.errors import (
    CorruptFileError,
    DoesNotFitError,
    SourceError,
    VeneerError,
    is_out_of_memory,
)
from veneer.files.atomic import write_manifest

_log = logging.getLogger(__name__)

_FLOATS = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}

# tokenizer.ggml.pre: how text is cut before merges. llama.cpp's names and groups, from
# src/llama-vocab.cpp.
_SPLIT_BY_TRANSFORMERS = (
    *(
        "llama3",
        "llama-v3",
        "llama-bpe",
        "falcon3",
        "falcon-h1",
        "pixtral",
        "midm-2.0",
        "dbrx",
        "smaug-bpe",
    ),
    *("tekken", "qwen2", "deepseek-r1-qwen", "kormo", "megrez", "gpt-4o", "llama4", "kanana2"),
)
_SPLIT_LIKE_GPT2 = (
    "gpt-2",
    "phi-2",
    "olmo",
    "mpt",
    "jais",
    "gigachat",
    "trillion",
)  # also by transformers
_SPLIT_SINGLE_DIGITS = (
    "smollm",
    "starcoder",
    "refact",
    "command-r",
    "codeshell",
    "exaone",
    "minerva-7b",
)
# A word that is a token is that token, whether or not merges lead to it.
_WHOLE_WORDS = (
    "llama3",
    "llama-v3",
    "llama-bpe",
    "falcon3",
    "falcon-h1",
    "pixtral",
    "midm-2.0",
    "tekken",
)


@dataclass(frozen=True)
class Header:
    """What is read of a file before anything is converted."""

    architecture: str
    pre_tokenizer: str | None
    rope_factors: np.ndarray[Any, Any] | None  # what Llama 3's rotary frequencies are divided by
    dtype: torch.dtype
    fields: Mapping[str, Any]  # hyperparameters and ids of special tokens, by their keys
    num_values: int  # of all tensors that are weights
    tensors: Mapping[str, ReaderTensor]  # those weights by their names in the file, mapped
    licence: object = None  # as the file says it

    @property
    def quantised(self) -> bool:
        """Whether any weight is stored in blocks."""
        return any(tensor.tensor_type not in _FLOATS for tensor in self.tensors.values())


def convert(path: Path, sha256: str) -> Path:
    """The folder that `path`, whose bytes have this hash, was converted to, now or earlier.

    Peak memory: the weights as they are written, and the largest tensor in float32. Raises
    SourceError if the file holds what cannot be converted faithfully, CorruptFileError if it is
    damaged, DoesNotFitError if memory or disk do not suffice.
    """
    target = converted_folder(sha256)
    if not is_whole(target):
        with converting(path, target) as (alone, header, folder):
            tokenizer = rebuilt_tokenizer(alone, header)
            model = dense_model(header)
            model.generation_config = matched(tokenizer, model)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    return target


def header_config(path: Path) -> tuple[PreTrainedConfig, torch.dtype]:
    """The config that a .gguf file's header describes, and the dtype its weights would be converted
    to.

    Raises as convert does, but reads no weights.
    """
    header = read_header(path)
    return file_config(header), header.dtype


def file_config(header: Header) -> PreTrainedConfig:
    """The config that the header describes. Raises SourceError, CorruptFileError if it is another
    model's."""
    shapes = {name: stored_shape(tensor) for name, tensor in header.tensors.items()}
    try:
        config = described_config(header.architecture, header.fields, shapes, header.rope_factors)
    except VeneerError:
        raise
    except Exception as fault:  # a config class refuses values in its own way
        raise SourceError(
            "transformers cannot read the header of the .gguf file",
            [f"{type(fault).__name__}: {line}" for line in str(fault).splitlines()[:3]],
            f"Download the file again; if it stays, {OTHER_SOURCE[0].lower()}{OTHER_SOURCE[1:]}",
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


def _alone(path: Path, scratch: Path) -> Path:
    """A folder that holds the file as model.gguf and nothing else: transformers also reads what
    lies beside it."""
    alone = scratch / "alone"
    alone.mkdir()
    link = alone / "model.gguf"
    try:
        link.symlink_to(path.resolve())
    except OSError:  # Windows asks for a privilege
        shutil.copyfile(path, link)
    return alone


@contextmanager
def converting(path: Path, target: Path) -> Iterator[tuple[Path, Header, Path]]:
    """`target` is made of the .gguf file at `path`: it is there, whole, after a block that wrote
    it.

    For the block: a folder that holds the file alone, as model.gguf; its header; the folder to make
    and write.
    """
    header = read_header(path)
    _log.info("converting %s, once", path.name)
    with making(target.parent) as scratch:
        alone, folder = _alone(path, scratch), scratch / "model"
        with (
            quiet(),
            contextlib.redirect_stderr(io.StringIO()),
        ):  # one progress bar there heeds no setting
            yield alone, header, folder
        write_manifest(folder)
        publish(folder, target)


def matched(tokenizer: PreTrainedTokenizerFast, model: PreTrainedModel) -> GenerationConfig:
    """Which tokens end a turn; the tokenizer learns how long a row may be, and forgets how it was
    loaded."""
    positions = getattr(
        model.config, "max_position_embeddings", None
    )  # Bloom has no limit of its own
    tokenizer.model_max_length = positions or model.config.seq_length
    for passing in ("local_files_only", "is_local"):  # how it was loaded is not about the tokenizer
        tokenizer.init_kwargs.pop(passing, None)
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=list(stop_token_ids(tokenizer, model.generation_config)),
        pad_token_id=tokenizer.pad_token_id,
    )


def dense_model(header: Header) -> PreTrainedModel:
    """The dense model, on the CPU, in header.dtype. Raises SourceError if file and model do not
    match."""
    model = without_storage(file_config(header), header.dtype)
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    try:
        values, faults = _dense_tensors(header, model)
    except (MemoryError, RuntimeError) as fault:
        if is_out_of_memory(fault):
            raise _out_of_memory(header) from fault
        raise
    faults += [f"not in the file  {name}" for name in wanted if name not in values]
    for name in values.keys() & wanted.keys():
        if tuple(values[name].shape) != wanted[name]:
            faults.append(
                f"{name}: {tuple(values[name].shape)} in the file, {wanted[name]} in the model"
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
    """Every tensor of the file under the name of its parameter; and what is wrong with them."""
    names = places(header.architecture, model)
    values: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    faults = [f"{name} has no place in the model" for name in header.tensors if name not in names]
    for name, place in names.items():
        if name not in header.tensors:
            continue
        dense = dense_values(header.tensors[name], header.architecture, model.config, header.dtype)
        if header.dtype == torch.float16 and not bool(dense.isfinite().all()):
            faults.append(
                f"{name}: a value is too large for f16, the type of most matrices, or is no number"
            )
        if num_merged(place) == 1:
            values[place] = dense
        elif len(group := parts.setdefault(place, {})) == num_merged(place) - 1:
            values[place] = merged({**group, name: dense})
            del parts[place]
        else:
            group[name] = dense
    return values, faults


def rebuilt_tokenizer(folder: Path, header: Header) -> PreTrainedTokenizerFast:
    try:
        tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(  # type: ignore[assignment]
            folder, gguf_file="model.gguf", local_files_only=True
        )
    except Exception as fault:  # each kind of vocabulary fails in its own way
        raise SourceError(
            "the tokenizer in the .gguf file cannot be rebuilt",
            [f"{type(fault).__name__}: {fault}"],
            OTHER_SOURCE,
        ) from fault
    if header.pre_tokenizer in _SPLIT_SINGLE_DIGITS:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    if header.pre_tokenizer in _WHOLE_WORDS:
        tokenizer.backend_tokenizer.model.ignore_merges = True
    return tokenizer


def read_header(path: Path) -> Header:
    """Raises CorruptFileError for what is no whole GGUF file, SourceError for what is not
    convertible."""
    try:
        check_layout(path)
        reader = GGUFReader(path)
        fields = {
            name: field.contents()
            for name, field in reader.fields.items()
            if not name.startswith("tokenizer.ggml.")
            or name.endswith((".pre", ".model", "_token_id"))
        }
    except Exception as fault:  # names that are not UTF-8, values that are not what their key says
        raise CorruptFileError(
            f"{path} is not a whole .gguf file",
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
    """The type that most values of the matrices have; bf16 where any matrix is stored in blocks.

    Vectors do not count: they are f32 in every file. Of an f16 file some matrices are f32 too:
    GPT-2's positions, routers of experts.
    """
    values: Counter[GGMLQuantizationType] = Counter()
    for tensor in tensors.values():
        if len(tensor.shape) > 1:
            values[tensor.tensor_type] += int(tensor.n_elements)
    if not values or any(kind not in _FLOATS for kind in values):
        return torch.bfloat16
    if {GGMLQuantizationType.F16, GGMLQuantizationType.BF16} <= values.keys():
        return torch.float32  # neither of the two holds the other
    return _FLOATS[values.most_common(1)[0][0]]


def _faults(
    architecture: str, pre: str | None, fields: Mapping[str, Any], names: list[str]
) -> list[str]:
    """Every reason why a conversion would not be faithful."""
    faults = []
    if architecture not in ARCHITECTURES:
        faults.append(f"architecture {architecture}: not among {', '.join(ARCHITECTURES)}")
    if fields.get("general.type", "model") != "model":
        faults.append(f"general.type {fields['general.type']}: it is no model")
    if fields.get("split.count", 1) not in (0, 1):
        faults.append(
            f"it is one of {fields['split.count']} parts: join them with llama-gguf-split --merge"
        )
    if odd := [name for name in names if name.startswith("rope_")]:
        faults.append(f"rope factors {', '.join(odd)}: not known here")
    known = (*_SPLIT_BY_TRANSFORMERS, *_SPLIT_LIKE_GPT2, *_SPLIT_SINGLE_DIGITS)
    if pre is not None and pre not in known:
        faults.append(
            f"tokenizer.ggml.pre {pre}: how it cuts text is not known; known are {', '.join(known)}"
        )
    return faults


def _out_of_memory(header: Header) -> VeneerError:
    gib = header.num_values * header.dtype.itemsize / 2**30
    return DoesNotFitError(
        f"the conversion of the .gguf file does not fit into memory: its weights are {gib:.1f} GiB",
        next_step="Convert it on a larger machine and name the folder, or take a smaller model.",
    )
