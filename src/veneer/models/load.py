"""From a source that the user named to a Base: found, checked, loaded, frozen, fingerprinted.

No code that comes with a model is ever run: its config is checked against what transformers itself
knows before transformers sees it, and custom code is never trusted. Weights are read in the dtype in which
they are stored, and then widened where that computes faster (compute.py): which base it is rests on the stored
values. Whatever would leave a weight at random values is refused, not reported.

Not known here: where models come from (sources.py), attention beyond transformers' own (attention.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from veneer.errors import (
    ConfigError,
    CorruptFileError,
    DoesNotFitError,
    SourceError,
    UnsafeFileError,
    VeneerError,
    is_out_of_memory,
)
from veneer.models.announced import announced_faults, built_faults
from veneer.models.base import Base, stop_token_ids
from veneer.models.bnb_files import stored_book
from veneer.models.builders import builder_for
from veneer.models.compute import DTYPES, Compute, HeldAs, choose
from veneer.models.fingerprint import fingerprint
from veneer.models.gguf_blocks import locate_blocks
from veneer.models.loaded import NEXT_DOWNLOAD, check_finite, check_generation, check_loaded, tokenizer_faults
from veneer.models.quiet import quiet
from veneer.models.sources import Found, locate, read_json, weight_files
from veneer.models.streaming import build_packed, holds_experts_apart
from veneer.models.tensor_files import StoredTensor, counted, stored_tensors
from veneer.models.widen import widen
from veneer.quant.config import Quantize
from veneer.quant.nf4 import BookName

_STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}

ATTENTION_NAMES = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3")
"""What a config may name as its attention. Any other name would be fetched from the hub and run."""

_CHANGES_LOADING = ("fusion_config", "distributed_config", "transformers_weights")
"""Config fields that make transformers load other files or rewrite modules; plain checkpoints have none."""

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")


def load_base(
    source: str, *, dtype: HeldAs = "auto", device: str = "auto", quantize: Quantize | None = None,
    keep_dense: Sequence[str] = (),
) -> Base:  # fmt: skip
    """The frozen base that `source` names (see sources.locate), with its tokenizer and fingerprint.

    dtype   auto: as stored, or float32 on a CPU whose products in the stored type are slow; stored: as stored.
            Widening to float32 keeps the fingerprint; a type that rounds the stored values is another base's
    device  auto: CUDA if there is any, else the CPU; or a torch device such as cpu, cuda:1, mps
    quantize  the format its linear layers are held in (models/builders.py); None: as they are stored, which may be
              in 4 bits: a folder that bitsandbytes quantised is read as it is, whatever `quantize` says
    keep_dense  modules (names, or endings of paths) that stay as they are stored

    Raises SourceError (not found, not a causal LM, no fast tokenizer), UnsafeFileError (pickles, code),
    CorruptFileError (damaged, missing or misshapen weights), DoesNotFitError (memory), ConfigError
    (unknown dtype, device or weight format).
    """
    build = builder_for(quantize, keep_dense)
    place = _device(device)
    if dtype not in ("auto", "stored", *DTYPES):
        raise ConfigError(
            f"unknown dtype {dtype!r}",
            next_step=f"One of auto, {', '.join(DTYPES)}; auto takes the stored one, or float32 where that is slow.",
        )
    found, tensors, held = _files(source, quantize)
    stored = counted(tensors)
    if held is not None:
        book, _ = held
        if quantize not in (None, book):
            raise ConfigError(
                f"{found.folder} holds its weights as {book}, not as {quantize}",
                next_step="Leave quantize out: such a folder is read as it is.",
            )
        quantize, build = book, partial(build_packed, book=None)
    elif build is None and holds_experts_apart(tensors):
        build = partial(build_packed, book=None)
    compute = choose(_stored_type(found.folder, stored, held, dtype), dtype, place)
    with quiet():
        config = checked_config(found.folder)
        tokenizer = _tokenizer(found.folder)
        with _explained(found, compute.held, sum(stored.values())):
            if quantize != "gguf":
                _check_size(found.folder, config, stored, len(tensors))
            read_as = compute.stored if compute.widens else compute.held
            if build is not None:
                model = build(found, config, read_as, place)
            else:
                model = _model(found.folder, config, read_as)
                torch.nn.Module.to(model, place)
            identity = as_held = fingerprint(model)
            if compute.widens:
                widen(model, compute.held)
                as_held = fingerprint(model)
            if model.generation_config is not None:
                check_generation(found.folder, model.generation_config)
            check_finite(found.folder, model.eval())
    _check_vocabulary(found.folder, tokenizer, model)
    if (generation := model.generation_config) is not None:
        generation.eos_token_id = list(stop_token_ids(tokenizer, generation)) or None
    return Base(
        model=model.eval().requires_grad_(False),
        tokenizer=tokenizer,
        source=source,
        name_or_path=found.name_or_path,
        revision=found.revision,
        quantize=quantize,
        compute=compute,
        identity=identity,
        as_held=as_held,
    )


def compute_of(source: str, *, dtype: HeldAs, device: str, quantize: Quantize | None) -> Compute:
    """What load_base would hold the weights in; only headers are read. Raises as load_base does."""
    found, tensors, held = _files(source, quantize)
    stored = counted(tensors)
    return choose(_stored_type(found.folder, stored, held, dtype), dtype, _device(device))


def _files(
    source: str, quantize: Quantize | None
) -> tuple[Found, dict[str, StoredTensor], tuple[BookName, torch.dtype] | None]:
    """Where the base is, what its files hold, and of weights that are packed in them the code book and the type before."""
    found = locate_blocks(source) if quantize == "gguf" else locate(source)
    tensors = stored_tensors(weight_files(found.folder))
    return found, tensors, None if quantize == "gguf" else stored_book(found.folder, tensors)


def _stored_type(
    folder: Path, stored: Counter[str], held: tuple[str, torch.dtype] | None, asked: HeldAs
) -> torch.dtype:
    """Of a folder that holds its weights in 4 bits, the type that they were quantised from.

    Of types that are none of ours, such as F64, what is asked for.
    """
    if held is not None:
        return held[1]
    if asked in DTYPES and not any(name in _STORED for name, _ in stored.most_common(1)):
        return DTYPES[asked]
    return most_common_dtype(folder, stored)


def load_tokenizer(source: str) -> tuple[PreTrainedTokenizerBase, PreTrainedConfig]:
    """The tokenizer and the config of the base that `source` names, without its weights. Raises as load_base does."""
    found = locate(source)
    with quiet():
        config = checked_config(found.folder)
        return _tokenizer(found.folder), config


def stored_dtypes(folder: Path) -> Counter[str]:
    """Number of values per safetensors dtype name, from the headers of a folder's weight files.

    Raises as stored_tensors does.
    """
    return counted(stored_tensors(weight_files(folder)))


def most_common_dtype(folder: Path, counts: Counter[str]) -> torch.dtype:
    """The dtype of most stored values: some checkpoints keep a few float32 weights among bf16 ones."""
    name = counts.most_common(1)[0][0] if counts else "no weights"
    if name not in _STORED:
        raise SourceError(
            f"the weights in {folder} are stored as {name}",
            next_step="Take a version of the model in bf16, f16 or f32.",
        )
    return _STORED[name]


def checked_config(folder: Path) -> PreTrainedConfig:
    """The config of a causal LM, checked as plain JSON before transformers reads it.

    Raises UnsafeFileError if it needs code or names things to fetch, SourceError if it is no causal LM.
    """
    path = folder / "config.json"
    raw = read_json(path)
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        if "auto_map" in raw:
            raise UnsafeFileError(
                f"the model in {folder} brings its own code ({kind}), which is never run",
                [str(reference) for reference in _auto_map(raw)],
                "Take a version of it that transformers supports itself, if there is one.",
            )
        raise SourceError(
            f"model type {kind!r} in {path} is not known to the installed transformers",
            next_step="Is the model newer than transformers? pip install --upgrade transformers",
        )
    _check_announced(folder, raw)
    if unsafe := [fault for where, value in _walk(raw, "") for fault in _config_faults(where, value)]:
        raise UnsafeFileError(
            f"{path} asks for more than a model's settings",
            unsafe,
            "Remove these fields if you trust the model.",
        )
    if isinstance(quantized := raw.get("quantization_config"), dict):
        _check_quantized(folder, quantized)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as fault:  # every config class checks its fields in its own way
        raise CorruptFileError(
            f"transformers cannot read {path}",
            [line.strip() for line in str(fault).splitlines()[:3]],
            NEXT_DOWNLOAD,
        ) from fault
    _check_causal(folder, config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # read by us (models/bnb_files.py), not by transformers
    return config


def _check_announced(folder: Path, raw: dict[str, Any]) -> None:
    """Raises CorruptFileError for what is no list of names, and for numbers that the files beside it cannot hold."""
    try:
        shapes = {name: tensor.shape for name, tensor in stored_tensors(weight_files(folder)).items()}
    except SourceError:  # a plan needs no weights
        shapes = None
    faults = announced_faults(_walk(raw, ""), shapes)
    names = raw.get("architectures") or []
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        faults.append(f"architectures: {str(names)[:60]} is no list of names")
    if faults:
        raise CorruptFileError(
            f"{folder / 'config.json'} does not describe the weights beside it", faults[:20], NEXT_DOWNLOAD
        )


def _check_size(folder: Path, config: PreTrainedConfig, stored: Mapping[str, int], num_tensors: int) -> None:
    # Weights of 4 bits lie two in a byte.
    num_values = sum(count * (2 if kind in ("U8", "I8") else 1) for kind, count in stored.items())
    if faults := built_faults(config, num_tensors=num_tensors, num_values=num_values):
        raise CorruptFileError(
            f"{folder / 'config.json'} does not describe the weights beside it", faults, NEXT_DOWNLOAD
        )


def _check_quantized(folder: Path, settings: dict[str, Any]) -> None:
    """4-bit weights of bitsandbytes are read; every other kind of quantised weights is refused by its name."""
    method = settings.get("quant_method", "unknown method")
    if method == "bitsandbytes" and settings.get("load_in_4bit"):
        return
    name = "bitsandbytes in 8 bits" if method == "bitsandbytes" else method
    raise SourceError(
        f"the weights in {folder} are stored quantised ({name}), which is not read yet",
        next_step="Take the model's unquantised version and quantize: nf4, or one that bitsandbytes quantised in 4 bits.",
    )


def _check_causal(folder: Path, config: PreTrainedConfig) -> None:
    names = config.architectures or []
    wanted: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if config.is_encoder_decoder or wanted is None:
        fault = "an encoder-decoder" if config.is_encoder_decoder else "no causal language model"
    elif names and not any(
        name == wanted.__name__ or name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"))
        for name in names
    ):
        fault = "no causal language model"
    else:
        return
    raise SourceError(
        f"the model in {folder} is {fault}: {', '.join(names) or config.model_type}",
        next_step="Name a causal language model, one whose architecture ends in ForCausalLM or LMHeadModel.",
    )


def _walk(value: Any, where: str) -> Iterator[tuple[str, Any]]:
    """Every field of nested JSON, with its path."""
    if isinstance(value, dict):
        for key, inner in value.items():
            path = f"{where}.{key}" if where else str(key)
            yield path, inner
            yield from _walk(inner, path)


def _config_faults(where: str, value: Any) -> Iterator[str]:
    field = where.rpartition(".")[2]
    if field.strip("_").removesuffix("_internal") in ("attn_implementation", "experts_implementation"):
        names = list(value.values()) if isinstance(value, dict) else [value]
        allowed = (*ATTENTION_NAMES, "grouped_mm", "batched_mm", None)
        yield from (f"{where}: attention {name!r} would be fetched" for name in names if name not in allowed)
    if field in _CHANGES_LOADING and value is not None:
        yield f"{where}: changes which files are read or which modules are built"


def _auto_map(raw: dict[str, Any]) -> list[Any]:
    mapping = raw["auto_map"]
    return list(mapping.values()) if isinstance(mapping, dict) else [mapping]


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    names = {path.name for path in folder.iterdir()}
    if not names.intersection(_TOKENIZER_FILES):  # transformers would make an empty one
        raise SourceError(
            f"{folder} holds no tokenizer",
            [f"none of {', '.join(_TOKENIZER_FILES)}"],
            "Copy the tokenizer's files of the model it was made from into the folder.",
        )
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        tokenizer("A text.\n1 \u00e9 \U0001f642")  # some faults show only then
    except Exception as fault:  # the tokenizers library raises plain Exception for a broken file
        faults = [f"{type(fault).__name__}: {line}" for line in str(fault).splitlines()[:3]]
        if "tokenizer.json" in names:
            raise CorruptFileError(
                f"the tokenizer in {folder} cannot be read", faults, NEXT_DOWNLOAD
            ) from fault
        raise SourceError(
            f"the tokenizer in {folder} cannot be built without a tokenizer.json",
            faults,
            "Take a version of the model with a tokenizer.json, or install the package that is named above.",
        ) from fault
    if faults := tokenizer_faults(tokenizer):
        raise CorruptFileError(f"the tokenizer in {folder} cannot be used", faults, NEXT_DOWNLOAD)
    if not tokenizer.is_fast:
        raise SourceError(
            f"the tokenizer in {folder} ({type(tokenizer).__name__}) has no fast form (tokenizer.json)",
            next_step="Take a version of the model with a tokenizer.json.",
        )
    return tokenizer


def _model(folder: Path, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model on the CPU, every weight from the files. Raises CorruptFileError otherwise."""
    loader: Any = AutoModelForCausalLM  # annotated as if it always returned the model alone
    model, info = loader.from_pretrained(
        folder,
        config=config,
        dtype=dtype,
        attn_implementation=None,  # sdpa where the class supports it, else eager; never what a file says
        experts_implementation=None,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        ignore_mismatched_sizes=True,  # they are refused below, all at once and with both shapes
        output_loading_info=True,
    )
    check_loaded(folder, model, info)
    loaded: PreTrainedModel = model
    return loaded


def _check_vocabulary(folder: Path, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    embeddings: Any = model.get_input_embeddings()
    rows = embeddings.weight.shape[0]
    if tokenizer.vocab_size > rows:
        raise CorruptFileError(
            f"the tokenizer in {folder} belongs to another model",
            [f"it has {tokenizer.vocab_size:,} tokens, the model has embeddings for {rows:,}"],
            "Copy the tokenizer's files of the model it was made from into the folder.",
        )


@contextmanager
def _explained(found: Found, dtype: torch.dtype, num_values: int) -> Iterator[None]:
    """What can go wrong while weights are read, as errors that say what to do."""
    gib = num_values * dtype.itemsize / 2**30
    too_large = DoesNotFitError(
        f"the base {found.name_or_path} does not fit into memory: its weights take {gib:.1f} GiB as {dtype}",
        next_step="Free memory, take a smaller base, or load it as bfloat16.",
    )
    try:
        yield
    except VeneerError:
        raise
    except Exception as fault:  # whatever a checkpoint makes transformers trip over is about that checkpoint
        if is_out_of_memory(fault):
            raise too_large from fault
        raise CorruptFileError(
            f"transformers cannot load the model in {found.folder}",
            [f"{type(fault).__name__}: {line}" for line in str(fault).splitlines()[:4]],
            NEXT_DOWNLOAD,
        ) from fault


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as fault:
        raise ConfigError(
            f"the device {name!r} cannot be used here", [str(fault).splitlines()[0]], "Take auto or cpu."
        ) from fault
    return device
