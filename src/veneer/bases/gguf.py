"""A .gguf file, converted once into a folder that transformers loads, kept in the cache.

transformers reads the file (it undoes the q/k row permutation of llama-family files and rebuilds the
vocabulary); what it passes over in silence is checked or mended here, because a base that is nearly right
answers nearly right:

    numbers    GGUF keeps 1e-5 in single precision; it is 1e-5 again afterwards
    rope       Llama 3's frequency factors come back as rope_type llama3; any other scaling is refused
    tensors    every value of the file has a place in the model, and every weight came from the file
    text       how text is cut into words before merges is refused if tokenizer.ggml.pre is unknown
    stop       every token that ends a turn is in generation_config.json

Weights of quantised files are written as bf16, those of f32, f16 and bf16 files in their own dtype.
Source of the format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
Not known here: where the file came from.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, ReaderTensor
from tokenizers import pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from veneer.bases.announced import announced_faults, built_faults, without_storage
from veneer.bases.gguf_layout import LayoutError, check_layout
from veneer.bases.kept import converted_folder, making, publish
from veneer.bases.quiet_transformers import quiet
from veneer.bases.stop_tokens import stop_token_ids
from veneer.errors import CorruptFileError, DoesNotFitError, SourceError, VeneerError, is_out_of_memory

_log = logging.getLogger(__name__)

ARCHITECTURES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen2moe",
    "qwen3",
    "qwen3moe",
    "gemma2",
    "gemma3",
    "phi3",
    "falcon",
    "bloom",
    "gpt2",
    "stablelm",
    "starcoder2",
    "nemotron",
)
"""Causal LMs whose .gguf files transformers turns into its own weights."""

_FLOATS = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}

# tokenizer.ggml.pre: how text is cut before merges. llama.cpp's names and groups, from src/llama-vocab.cpp.
_SPLIT_BY_TRANSFORMERS = (
    *("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "dbrx", "smaug-bpe"),
    *("tekken", "qwen2", "deepseek-r1-qwen", "kormo", "megrez", "gpt-4o", "llama4", "kanana2"),
)
_SPLIT_LIKE_GPT2 = ("gpt-2", "phi-2", "olmo", "mpt", "jais", "gigachat", "trillion")  # also by transformers
_SPLIT_SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
# A word that is a token is that token, whether or not merges lead to it.
_WHOLE_WORDS = ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "tekken")


@dataclass(frozen=True)
class Header:
    """What is read of a file before anything is converted."""

    architecture: str
    pre_tokenizer: str | None
    rope_factors: np.ndarray[Any, Any] | None  # what Llama 3's rotary frequencies are divided by
    dtype: torch.dtype
    num_values: int  # of all tensors that are weights
    tensors: Mapping[str, ReaderTensor]  # those weights by their names in the file, mapped
    licence: object = None  # as the file says it

    @property
    def quantised(self) -> bool:
        """Whether any weight is stored in blocks."""
        return any(tensor.tensor_type not in _FLOATS for tensor in self.tensors.values())


def convert(path: Path, sha256: str) -> Path:
    """The folder that `path`, whose bytes have this hash, was converted to, now or earlier.

    Peak memory: about three times the weights as they are written.
    Raises SourceError if the file holds what cannot be converted faithfully, CorruptFileError if it is
    damaged, DoesNotFitError if memory or disk do not suffice.
    """
    target = converted_folder(sha256)
    if not target.is_dir():
        with converting(path, target) as (alone, header, folder):
            tokenizer = rebuilt_tokenizer(alone, header)
            model = _model(alone, header)
            model.generation_config = matched(tokenizer, model)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    return target


def header_config(path: Path) -> tuple[PreTrainedConfig, torch.dtype]:
    """The config that a .gguf file's header describes, and the dtype its weights would be converted to.

    Raises as convert does, but reads no weights.
    """
    header = read_header(path)
    with tempfile.TemporaryDirectory(prefix="veneer-") as scratch:
        return file_config(_alone(path, Path(scratch)), header), header.dtype


def file_config(alone: Path, header: Header) -> PreTrainedConfig:
    """The config that the header describes, repaired. Raises SourceError, CorruptFileError if it is another model's."""
    try:
        config = AutoConfig.from_pretrained(alone, gguf_file="model.gguf", local_files_only=True)
        config = repaired_config(config, header)
    except VeneerError:
        raise
    except Exception as fault:  # whatever a file makes transformers trip over is about that file
        raise SourceError(
            "transformers cannot read the header of the .gguf file",
            [f"{type(fault).__name__}: {line}" for line in str(fault).splitlines()[:3]],
            "Download the file again; if it stays, take the model's safetensors version.",
        ) from fault
    if faults := built_faults(config, num_tensors=len(header.tensors), num_values=header.num_values):
        raise CorruptFileError(
            "the header of the .gguf file does not describe its tensors", faults, "Download the file again."
        )
    return config


def _alone(path: Path, scratch: Path) -> Path:
    """A folder that holds the file as model.gguf and nothing else: transformers also reads what lies beside it."""
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
    """`target` is made of the .gguf file at `path`: it is there, whole, after a block that wrote it.

    For the block: a folder that holds the file alone, as model.gguf; its header; the folder to make and write.
    """
    header = read_header(path)
    if importlib.util.find_spec("accelerate") is None:
        raise SourceError(
            "transformers needs the package accelerate to read .gguf files", next_step="pip install accelerate"
        )
    _log.info("converting %s, once", path.name)
    with making(target.parent) as scratch:
        alone, folder = _alone(path, scratch), scratch / "model"
        with quiet(), contextlib.redirect_stderr(io.StringIO()):  # one progress bar there heeds no setting
            yield alone, header, folder
        publish(folder, target)


def matched(tokenizer: PreTrainedTokenizerFast, model: PreTrainedModel) -> GenerationConfig:
    """Which tokens end a turn; the tokenizer learns how long a row may be, and forgets how it was loaded."""
    tokenizer.model_max_length = model.config.max_position_embeddings
    for passing in ("local_files_only", "is_local"):  # how it was loaded is not about the tokenizer
        tokenizer.init_kwargs.pop(passing, None)
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=list(stop_token_ids(tokenizer, model.generation_config)),
        pad_token_id=tokenizer.pad_token_id,
    )


def _model(folder: Path, header: Header) -> PreTrainedModel:
    """The dense model, on the CPU, in header.dtype."""
    file_config(folder, header)  # before anything is built from it
    try:
        loader: Any = AutoModelForCausalLM  # annotated as if it always returned the model alone
        loaded, info = loader.from_pretrained(
            folder,
            gguf_file="model.gguf",
            # Else blocks may stay packed, for kernels that come off the hub.
            quantization_config=GgufConfig(dequantize=True),
            dtype=header.dtype,
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as fault:  # whatever a file makes transformers trip over is about that file
        if is_out_of_memory(fault):
            raise _out_of_memory(header) from fault
        raise CorruptFileError(
            f"transformers cannot build a {header.architecture} model from the .gguf file",
            [f"{type(fault).__name__}: {line}" for line in str(fault).splitlines()[:3]],
            "Download the file again; if it stays, take the model's safetensors version.",
        ) from fault
    # What was loaded knows that it came from a .gguf file and does not let itself be saved: same weights,
    # new model. On the meta device, so that they exist once.
    config = repaired_config(loaded.config, header)
    model = without_storage(config, header.dtype)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    num_values = sum(parameter.numel() for parameter in model.parameters())
    missing = sorted(info["missing_keys"])
    if missing or num_values != header.num_values:
        raise SourceError(
            f"this {header.architecture} .gguf file and transformers' model do not match",
            [f"not in the file  {name}" for name in missing[:8]]
            + [f"values in the file {header.num_values:,}, in the model {num_values:,}"],
            "Take the model's safetensors version (a hub id or a folder).",
        )
    return model


def repaired_config(config: PreTrainedConfig, header: Header) -> PreTrainedConfig:
    """Numbers as they were before single precision, Llama 3's rope scaling, nothing about GGUF."""
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    for name, value in config.to_dict().items():
        if isinstance(value, float):
            setattr(config, name, _undo_single_precision(value))
    rope = (
        {
            name: _undo_single_precision(value) if isinstance(value, float) else value
            for name, value in (config.rope_parameters or {}).items()
        }
        if hasattr(config, "rope_parameters")
        else {}
    )
    if header.rope_factors is not None:
        rope |= _llama3_scaling(header.rope_factors, rope["rope_theta"])
    if rope:
        config.rope_parameters = rope
    return config


def _undo_single_precision(value: float) -> float:
    """9.99999974e-06, the nearest single-precision number to 1e-5, becomes 1e-5; others stay."""
    return float(f"{value:.7g}") if value == float(np.float32(value)) else value


def _llama3_scaling(factors: np.ndarray[Any, Any], theta: float) -> dict[str, Any]:
    """The parameters of rope_type llama3 whose frequencies are the plain ones divided by `factors` (H/2,).

    The file keeps only the result, so they are found by trying the values of the released models.
    """
    half = len(factors)
    frequencies = theta ** -(np.arange(half, dtype=np.float64) / half)
    wavelengths = 2 * np.pi / frequencies
    low, high, factor = 1.0, 4.0, float(factors.max())
    for original in (8192, 4096, 16384, 32768):
        smooth = np.clip((original / wavelengths - low) / (high - low), 0.0, 1.0)
        if np.allclose(1 / ((1 - smooth) / factor + smooth), factors, rtol=1e-4):
            return {
                "rope_type": "llama3",
                "factor": _undo_single_precision(factor),
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
    raise SourceError(
        "the .gguf file scales its rotary frequencies in a way that is not Llama 3's",
        [f"factors from {factors.min():g} to {factors.max():g} over {half} frequencies"],
        "Take the model's safetensors version (a hub id or a folder).",
    )


def rebuilt_tokenizer(folder: Path, header: Header) -> PreTrainedTokenizerFast:
    try:
        tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(  # type: ignore[assignment]
            folder, gguf_file="model.gguf", local_files_only=True
        )
    except Exception as fault:  # each kind of vocabulary fails in its own way
        raise SourceError(
            "the tokenizer in the .gguf file cannot be rebuilt",
            [f"{type(fault).__name__}: {fault}"],
            "Take the model's safetensors version (a hub id or a folder).",
        ) from fault
    if header.pre_tokenizer in _SPLIT_SINGLE_DIGITS:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    if header.pre_tokenizer in _WHOLE_WORDS:
        tokenizer.backend_tokenizer.model.ignore_merges = True
    return tokenizer


def read_header(path: Path) -> Header:
    """Raises CorruptFileError for what is no whole GGUF file, SourceError for what is not convertible."""
    try:
        check_layout(path)
        reader = GGUFReader(path)
        fields = {
            name: field.contents()
            for name, field in reader.fields.items()
            if not name.startswith("tokenizer.ggml.") or name.endswith((".pre", ".model"))
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
    scaling = fields.get(f"{architecture}.rope.scaling.type")
    pre = fields.get("tokenizer.ggml.pre") if fields.get("tokenizer.ggml.model") == "gpt2" else None
    if faults := _faults(architecture, scaling, pre, fields, list(tensors)):
        raise SourceError(
            f"{path.name} cannot be converted", faults, "Take the model's safetensors version (a hub id or a folder)."
        )
    shapes = {name: tuple(int(size) for size in tensor.shape) for name, tensor in tensors.items()}
    if faults := announced_faults(fields.items(), shapes):
        raise CorruptFileError(
            f"the header of {path.name} does not describe its tensors", faults[:20], "Download the file again."
        )
    # A file's norms are f32 whatever its matrices are, so the matrices say what kind of file it is.
    kinds = {tensor.tensor_type for tensor in tensors.values() if len(tensor.shape) > 1}
    return Header(
        architecture=architecture,
        pre_tokenizer=pre,
        rope_factors=None if factors is None else np.array(factors.data, dtype=np.float64),
        dtype=_FLOATS.get(next(iter(kinds)), torch.bfloat16) if len(kinds) == 1 else torch.bfloat16,
        num_values=sum(int(tensor.n_elements) for tensor in tensors.values()),
        tensors=tensors,
        licence=fields.get("general.license"),
    )


def _faults(
    architecture: str, scaling: str | None, pre: str | None, fields: Mapping[str, Any], names: list[str]
) -> list[str]:
    """Every reason why a conversion would not be faithful."""
    faults = []
    if architecture not in ARCHITECTURES:
        faults.append(f"architecture {architecture}: not among {', '.join(ARCHITECTURES)}")
    if fields.get("split.count", 1) not in (0, 1):
        faults.append(f"it is one of {fields['split.count']} parts: join them with llama-gguf-split --merge")
    if scaling not in (None, "none"):
        faults.append(f"rope scaling {scaling}: transformers does not read it from .gguf files")
    if odd := [name for name in names if name.startswith("rope_")]:
        faults.append(f"rope factors {', '.join(odd)}: transformers does not read them from .gguf files")
    known = (*_SPLIT_BY_TRANSFORMERS, *_SPLIT_LIKE_GPT2, *_SPLIT_SINGLE_DIGITS)
    if pre is not None and pre not in known:
        faults.append(f"tokenizer.ggml.pre {pre}: how it cuts text is not known; known are {', '.join(known)}")
    return faults


def _out_of_memory(header: Header) -> VeneerError:
    gib = header.num_values * header.dtype.itemsize / 2**30
    return DoesNotFitError(
        f"the conversion of the .gguf file does not fit into memory: its weights are {gib:.1f} GiB, three times "
        f"that is needed",
        next_step="Convert it on a larger machine and name the folder, or take a smaller model.",
    )
