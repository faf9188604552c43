"""Describes a base from its config alone; only config.json is downloaded, and any size can be
built.

The config comes from a folder, a .gguf file's header, the hub (config.json alone is fetched), or a
named size (shapes.py). The model is built on the meta device: a model of 70 B takes a few
megabytes. Configs that config/model_config.py refuses are refused here too.
"""

import difflib
from pathlib import Path

import torch
from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from transformers import PreTrainedConfig, PreTrainedModel

from veneer.bases.compute import DTYPES
from veneer.bases.config.announced import without_storage
from veneer.bases.config.model_config import checked_config
from veneer.bases.folder.model_folder import weight_files
from veneer.bases.folder.stored_type import most_common_dtype
from veneer.bases.folder.tensor_files import count_values_by_type, stored_tensors
from veneer.bases.gguf.convert import header_config
from veneer.bases.kept import converted_folder, is_whole
from veneer.bases.loading.blueprint import Blueprint, blueprint_of_fields
from veneer.bases.loading.shapes import SHAPES, shape_of
from veneer.bases.names.hub import PATIENCE_SECONDS, HubUnreachableError, is_pinned, within
from veneer.bases.names.named import HUB_ID, NAMED
from veneer.bases.names.sources import gguf_file
from veneer.bases.packed.formats import announced_format, packed_sizes, stored_format
from veneer.bases.quiet_transformers import quiet
from veneer.errors import SourceError, VeneerError
from veneer.files.home import expanded


def build(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Builds a model without storage. Its attention is that of load_base."""
    with quiet():
        model = without_storage(config, dtype)
    return model.eval().requires_grad_(False)


def blueprint(source: str) -> Blueprint:
    """Finds the config that `source` names: a named size, a folder, a .gguf file, a hub id.

    Raises SourceError with a list of existing names.
    """
    if source in NAMED and is_whole(converted := converted_folder(NAMED[source].sha256)):
        return _from_folder(source, converted)
    path = expanded(source)
    if source.strip() and path.is_dir():
        return _from_folder(source, path)
    if (file := gguf_file(source)) is not None and file.is_file():
        with quiet():
            config, dtype = header_config(file)
        return Blueprint(source, config, dtype)
    if (fields := shape_of(source)) is not None:
        return blueprint_of_fields(source, fields)
    if match := HUB_ID.fullmatch(source):
        return _from_hub(source, match["repo"], match["revision"])
    raise SourceError(
        f"there is no base {source!r} to plan for: no folder, no .gguf file, no hub id (org/name),"
        " no named size",
        [
            f"did you mean  {name}"
            for name in difflib.get_close_matches(source.lower(), SHAPES, n=3, cutoff=0.4)
        ],
        f"Named sizes: {', '.join(sorted(SHAPES))}.",
    )


def _from_folder(source: str, folder: Path) -> Blueprint:
    with quiet():
        config = checked_config(folder)
    try:
        files = weight_files(folder)
    except VeneerError:
        return Blueprint(source, config, _config_dtype(config), announced_format(folder))
    tensors = stored_tensors(files)
    if (packed := stored_format(folder, tensors)) is not None:
        return Blueprint(source, config, packed[1], packed[0], packed_sizes(folder, tensors))
    return Blueprint(source, config, most_common_dtype(folder, count_values_by_type(tensors)))


def _from_hub(source: str, repo: str, revision: str | None) -> Blueprint:
    """Fetches config.json only.

    The cached file is used for a full commit hash, or if the hub does not answer: a branch may have
    moved meanwhile.
    """
    cached = try_to_load_from_cache(repo, "config.json", revision=revision)
    if not (isinstance(cached, str) and (is_pinned(revision) or constants.HF_HUB_OFFLINE)):
        try:
            cached = _config_of_hub(repo, revision)
        except HubUnreachableError as fault:
            if not isinstance(cached, str):
                raise _unreachable_error(repo, str(fault)) from fault
    with quiet():
        config = checked_config(Path(cached).parent)
    return Blueprint(source, config, _config_dtype(config), announced_format(Path(cached).parent))


def _config_of_hub(repo: str, revision: str | None) -> str:
    """Returns the path of the hub's current config.json; downloaded only if it is not cached."""
    if constants.HF_HUB_OFFLINE:
        raise HubUnreachableError("HF_HUB_OFFLINE is set")
    return within(
        PATIENCE_SECONDS, repo, lambda: hf_hub_download(repo, "config.json", revision=revision)
    )


def _unreachable_error(repo: str, reason: str) -> SourceError:
    similar = difflib.get_close_matches(repo.rpartition("/")[2].lower(), SHAPES, n=3, cutoff=0.4)
    return SourceError(
        f"the config of {repo} is not in the cache and the hub gave no answer: {reason}",
        [f"similar name  {name}" for name in similar],
        "Name a folder with its config.json, or a named size: " + ", ".join(sorted(SHAPES)) + ".",
    )


def _config_dtype(config: PreTrainedConfig) -> torch.dtype:
    """Returns the dtype that the config names; float32 if none, as in transformers."""
    dtype = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    if isinstance(dtype, str):
        dtype = DTYPES.get(dtype)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32
