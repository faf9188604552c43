"""Reads an untrusted model's config.json: checked as plain JSON before transformers sees it.

No code that comes with a model is ever run, and nothing is downloaded because a file says so:
fields that request either are refused by name. What the config announces is compared with the
weights beside it (bases/config/announced.py).
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from veneer.bases.config.announced import announced_faults, built_faults
from veneer.bases.config.model_class import model_class
from veneer.bases.folder.faults import NEXT_DOWNLOAD
from veneer.bases.folder.model_folder import weight_files
from veneer.bases.folder.score_head import has_score_head
from veneer.bases.folder.tensor_files import stored_tensors
from veneer.bases.packed.formats import refuse_unread, stored_settings
from veneer.errors import CorruptFileError, SourceError, UnsafeFileError
from veneer.files.strict_json import read_model_json

ATTENTION_NAMES = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3")
"""Attention names that a config may use. Any other name would be fetched from the hub and run."""

_MOST_VALUES = {"U8": 2, "I8": 2, "I32": 8}
"""Weights that one stored value may hold: 4-bit weights are two in a byte."""

_CHANGES_LOADING = ("fusion_config", "distributed_config", "transformers_weights")
"""Config fields that make transformers load other files or rewrite modules; plain checkpoints have
none."""


def checked_config(folder: Path) -> PreTrainedConfig:
    """Reads the config of a causal LM, checked as plain JSON before transformers reads it.

    Raises UnsafeFileError if it needs code or names things to fetch, SourceError if it is not a
    causal LM.
    """
    path = folder / "config.json"
    raw = read_model_json(path)
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        if "auto_map" in raw:
            raise UnsafeFileError(
                f"the model in {folder} brings its own code ({kind}), which is never run",
                [str(reference) for reference in _auto_map(raw)],
                "Choose a version that transformers supports itself, if there is one.",
            )
        raise SourceError(
            f"model type {kind!r} in {path} is not known to the installed transformers",
            next_step="Is the model newer than transformers? pip install --upgrade transformers",
        )
    raw.pop("quantization_config", None)  # bases/packed checks its numbers
    _check_announced(folder, raw)
    if unsafe := [
        fault for where, value in _walk(raw, "") for fault in _config_faults(where, value)
    ]:
        raise UnsafeFileError(
            f"{path} asks for more than a model's settings",
            unsafe,
            "Remove these fields if you trust the model.",
        )
    if settings := stored_settings(folder):
        refuse_unread(folder, settings)
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
    _remove_quantization(config)
    return config


def _remove_quantization(config: PreTrainedConfig) -> None:
    """Removes quantization_config: bases/packed/formats.py reads it, not transformers."""
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    for name in config.sub_configs:
        if isinstance(part := getattr(config, name, None), PreTrainedConfig):
            _remove_quantization(part)


def _check_announced(folder: Path, raw: dict[str, Any]) -> None:
    """Raises CorruptFileError for numbers that the files beside the config cannot hold.

    Also for architectures that are not a list of names.
    """
    try:
        shapes = {
            name: tensor.shape for name, tensor in stored_tensors(weight_files(folder)).items()
        }
    except SourceError:  # a plan needs no weights
        shapes = None
    faults = announced_faults(_walk(raw, ""), shapes)
    names = raw.get("architectures") or []
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        faults.append(f"architectures: {str(names)[:60]} is not a list of names")
    if faults:
        raise CorruptFileError(
            f"{folder / 'config.json'} does not describe the weights beside it",
            faults[:20],
            NEXT_DOWNLOAD,
        )


def check_size(
    folder: Path, config: PreTrainedConfig, stored: Mapping[str, int], num_tensors: int
) -> None:
    """Raises CorruptFileError if the config's model is many times as large as the stored values."""
    num_values = sum(count * _MOST_VALUES.get(kind, 1) for kind, count in stored.items())
    if faults := built_faults(config, num_tensors=num_tensors, num_values=num_values):
        raise CorruptFileError(
            f"{folder / 'config.json'} does not describe the weights beside it",
            faults,
            NEXT_DOWNLOAD,
        )


def _check_causal(folder: Path, config: PreTrainedConfig) -> None:
    names = config.architectures or []
    expected_class = model_class(config)
    if config.is_encoder_decoder or expected_class is None:
        fault = "an encoder-decoder" if config.is_encoder_decoder else "no causal language model"
    elif has_score_head(folder):
        return  # it has the weights of a causal LM, too
    elif names and not any(
        name == expected_class.__name__
        or name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"))
        for name in names
    ):
        fault = "no causal language model"
    else:
        return
    raise SourceError(
        f"the model in {folder} is {fault}: {', '.join(names) or config.model_type}",
        next_step=(
            "Name a causal language model, one whose architecture ends in ForCausalLM or"
            " LMHeadModel."
        ),
    )


def _walk(value: Any, where: str) -> Iterator[tuple[str, Any]]:
    """Yields every field of nested JSON with its path."""
    if isinstance(value, dict):
        for key, inner in value.items():
            path = f"{where}.{key}" if where else str(key)
            yield path, inner
            yield from _walk(inner, path)


def _config_faults(where: str, value: Any) -> Iterator[str]:
    field = where.rpartition(".")[2]
    if field.strip("_").removesuffix("_internal") in (
        "attn_implementation",
        "experts_implementation",
    ):
        names = list(value.values()) if isinstance(value, dict) else [value]
        allowed = (*ATTENTION_NAMES, "grouped_mm", "batched_mm", None)
        yield from (
            f"{where}: attention {name!r} would be fetched" for name in names if name not in allowed
        )
    if field in _CHANGES_LOADING and value is not None:
        yield f"{where}: changes which files are read or which modules are built"


def _auto_map(raw: dict[str, Any]) -> list[Any]:
    mapping = raw["auto_map"]
    return list(mapping.values()) if isinstance(mapping, dict) else [mapping]
