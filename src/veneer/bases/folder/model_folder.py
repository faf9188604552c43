"""Checks that a folder holds a model: a config, and all safetensors files of the weights.

Not known here: how it came to this machine (names/sources.py), what the files say.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from veneer.errors import CorruptFileError, SourceError, UnsafeFileError, VeneerError
from veneer.files.strict_json import read_model_json

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack", ".npz")
_SHARD = re.compile(r"[\w.-]+\.safetensors")


@dataclass(frozen=True)
class ModelFolder:
    """The folder of a base.

    folder        holds config.json, safetensors and the tokenizer
    name_or_path  the hub id, the named default, or the folder: what adapters record as their base
    revision      the commit of a hub base, else None
    file          the .gguf file whose blocks are the weights, if requested
    """

    folder: Path
    name_or_path: str
    revision: str | None = None
    file: Path | None = None


def weight_files(folder: Path) -> list[Path]:
    """Returns the safetensors files of the weights: model.safetensors, or every shard of its index.

    Raises SourceError if the folder holds no model, UnsafeFileError for pickled weights or an index
    that points out of the folder, CorruptFileError if shards are missing.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    names = {path.name for path in folder.iterdir()}
    if "config.json" not in names or not (single.is_file() or index.is_file()):
        raise no_model(str(folder), names)
    if "adapter_config.json" in names:  # transformers would silently apply it to the model
        raise SourceError(
            f"{folder} holds a model and an adapter",
            next_step=("Move adapter_config.json and adapter_model.safetensors to another folder."),
        )
    if shards := sorted(name for name in names if re.match(r"shard-\d+-model-", name)):
        raise SourceError(
            f"{folder} holds a distributed checkpoint",
            shards[:4],
            "Save it as one model with transformers' save_pretrained, and name that folder.",
        )
    if single.is_file():
        return [single]
    content = read_model_json(index)
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptFileError(f"{index} names no weights", next_step="Download the model again.")
    if not isinstance(content.get("metadata"), dict):  # transformers reads it
        raise CorruptFileError(
            f'{index} has no "metadata"',
            next_step='Download the model again, or add "metadata": {} to the file.',
        )
    shards = sorted({str(name) for name in weight_map.values()})
    if climbing := [name for name in shards if not _SHARD.fullmatch(name)]:
        raise UnsafeFileError(
            f"{index} names files that are not safetensors files beside it",
            climbing,
            "Do not use this model: its index was made to read other files.",
        )
    if missing := [name for name in shards if name not in names]:
        raise CorruptFileError(
            f"{folder} lacks {len(missing)} of the {len(shards)} files of its weights",
            missing,
            "Download the model again; the earlier download may have been interrupted.",
        )
    return [folder / name for name in shards]


def no_model(where: str, names: set[str]) -> VeneerError:
    """Explains why a folder or repository is not a base, by the files that it holds."""
    if pickles := sorted(name for name in names if name.endswith(PICKLES)):
        return pickle_error(where, pickles)
    if "adapter_config.json" in names:
        return SourceError(
            f"{where} holds an adapter, not a base",
            next_step="Name the base that it was trained on, and this folder as --adapter.",
        )
    if files := sorted(name for name in names if name.endswith(".gguf")):
        return SourceError(
            f"{where} holds .gguf files, not a model folder",
            files[:8],
            "Name one of these files (downloaded, if they are on the hub) as the base.",
        )
    missing = [] if "config.json" in names else ["config.json"]
    if not any(name.startswith("model") and name.endswith(".safetensors") for name in names):
        missing.append("model.safetensors (or its index and shards)")
    return SourceError(
        f"{where} holds no model",
        [f"missing  {name}" for name in missing]
        + [f"found    {', '.join(sorted(names)[:12]) or 'an empty folder'}"],
        "Name a folder as transformers' save_pretrained writes it.",
    )


def pickle_error(where: str, names: list[str]) -> UnsafeFileError:
    return UnsafeFileError(
        f"the weights of {where} are not safetensors files; such files can run code when read",
        names[:8],
        "Choose a safetensors version: many hub models have one, some as a pull request"
        " (org/name@refs/pr/1).\nIf you trust the author, convert it once with transformers: load"
        " it and call save_pretrained(folder).",
    )
