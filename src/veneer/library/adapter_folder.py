"""Finds the adapter in a folder that the user named, and recognises files of other programs.

Recognises them by file names and by the names of tensors in a header; loads nothing of them.
"""

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

from veneer.errors import RefusedError, SourceError, UnsafeFileError, VeneerError
from veneer.library.objects import ADAPTER_FILES

CONFIG_NAME, WEIGHTS_NAME, _ = ADAPTER_FILES
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_IMAGE = "It adapts a model that makes images; Veneer adapts language models."


def adapter_folder(named: Path) -> Path:
    """Returns the folder with adapter_config.json: `named`, or `adapter/` in a run's folder.

    Raises RefusedError (a file of another program), UnsafeFileError (a pickle), SourceError.
    """
    if named.is_file():
        raise _refused_file(named)
    for folder in (named, named / "adapter"):
        if (folder / CONFIG_NAME).is_file():
            return folder
    if (named / "model" / "config.json").is_file():
        raise SourceError(
            f"{named} is a run of full fine-tuning: it made a model, not an adapter",
            [],
            f"Leave --adapter out and give --base {named / 'model'}.",
        )
    if named.is_dir():
        for path in sorted(named.iterdir()):
            if path.is_file() and path.suffix in (".safetensors", ".gguf", ".npz", *_PICKLES):
                raise _refused_file(path)
    faults = [f"{folder / CONFIG_NAME} is missing" for folder in (named, named / "adapter")]
    if similar := _near(named):
        raise SourceError(f"no adapter at {named}", faults, f"Did you mean {similar}?")
    raise SourceError(
        f"no adapter at {named}", faults, "Give the folder of an adapter, or of a run."
    )


def _near(named: Path) -> Path | None:
    """Returns an adapter's folder with a similar name next to the one named."""
    try:
        folders = [folder for folder in named.parent.iterdir() if holds_adapter(folder)]
    except OSError:
        return None
    matches = get_close_matches(named.name, [folder.name for folder in folders], n=1)
    return named.parent / matches[0] if matches else None


def holds_adapter(folder: Path) -> bool:
    return any((place / CONFIG_NAME).is_file() for place in (folder, folder / "adapter"))


def _refused_file(path: Path) -> VeneerError:
    """Returns the error that says what kind of file this is and what to do with it."""
    if path.suffix in _PICKLES:
        return UnsafeFileError(
            f"{path} is a pickle, which can run code when it is opened",
            [],
            "If you trust it, convert it once with PEFT: PeftModel.from_pretrained(base, folder)"
            ".save_pretrained(new_folder), then add that folder.",
        )
    if path.suffix == ".gguf":
        return RefusedError(
            f"{path} is an adapter or a model for llama.cpp (GGUF)",
            [],
            "Add the folder it was made from.",
        )
    if path.suffix == ".npz" or path.name == "adapters.safetensors":
        return RefusedError(
            f"{path} is an MLX adapter",
            ["its factors are transposed and it has no PEFT settings"],
            "Fuse it with mlx_lm.fuse, or train it again.",
        )
    if path.suffix != ".safetensors":
        return SourceError(
            f"{path} is not an adapter", [], "Give the folder of an adapter, or of a run."
        )
    from veneer.files.strict_tensors import read_header  # loads torch

    names = read_header(path)
    if (kind := _program(names)) is not None:
        return RefusedError(f"{path} is {kind}", ["Veneer does not read its layout"], _IMAGE)
    if path.name == WEIGHTS_NAME:
        return SourceError(
            f"{path.parent} holds no {CONFIG_NAME}",
            ["without it the scaling and the targets are unknown"],
            "Copy the whole folder again.",
        )
    return SourceError(
        f"{path} is a file of tensors, not the folder of an adapter",
        [],
        f"Give a folder with {CONFIG_NAME} and {WEIGHTS_NAME}.",
    )


def _program(names: Iterable[str]) -> str | None:
    """Returns the program whose layout these tensor names have, None if unknown."""
    tensor_names = list(names)
    if any(
        name.startswith(("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_", "lora_transformer_"))
        for name in tensor_names
    ):
        return "a LoRA of kohya's scripts (sd-scripts)"
    if any(
        name.startswith(("unet.", "transformer.", "text_encoder.", "text_encoder_2."))
        for name in tensor_names
    ) and any("lora" in name for name in tensor_names):
        return "a LoRA of diffusers"
    if any(".processor." in name and "lora" in name for name in tensor_names):
        return "a LoRA of diffusers (attention processors)"
    return None
