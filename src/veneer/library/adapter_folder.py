"""Where an adapter is in what the user named, and which files of other programs those are that
Veneer cannot read.

Recognised by names of files and by the names of tensors in a header; nothing of them is loaded.
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
    """The folder with adapter_config.json: the one named, or `adapter/` in the run folder named.

    Raises RefusedError (a file of another program, by its name), UnsafeFileError (a pickle),
    SourceError.
    """
    if named.is_file():
        raise _refused_file(named)
    for each in (named, named / "adapter"):
        if (each / CONFIG_NAME).is_file():
            return each
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
    faults = [f"{each / CONFIG_NAME} is not there" for each in (named, named / "adapter")]
    if near := _near(named):
        raise SourceError(f"no adapter at {named}", faults, f"Did you mean {near}?")
    raise SourceError(
        f"no adapter at {named}", faults, "Give the folder of an adapter, or of a run."
    )


def _near(named: Path) -> Path | None:
    """The folder of an adapter beside the one named, if one is spelt like it."""
    try:
        beside = [each for each in named.parent.iterdir() if holds_adapter(each)]
    except OSError:
        return None
    like = get_close_matches(named.name, [each.name for each in beside], n=1)
    return named.parent / like[0] if like else None


def holds_adapter(folder: Path) -> bool:
    return any((each / CONFIG_NAME).is_file() for each in (folder, folder / "adapter"))


def _refused_file(path: Path) -> VeneerError:
    """The error that says what kind of file this is and what to do with it."""
    if path.suffix in _PICKLES:
        return UnsafeFileError(
            f"{path} is a pickle, which can run code when it is opened",
            [],
            "Where you trust it, convert it once with PEFT: PeftModel.from_pretrained(base, folder)"
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
            f"{path} is an adapter of MLX",
            ["its factors are transposed and it names no settings of PEFT"],
            "Fuse it with mlx_lm.fuse, or train it again.",
        )
    if path.suffix != ".safetensors":
        return SourceError(
            f"{path} is no adapter", [], "Give the folder of an adapter, or of a run."
        )
    from veneer.files.strict_tensors import read_header  # loads torch

    names = read_header(path)
    if (kind := _program(names)) is not None:
        return RefusedError(f"{path} is {kind}", ["Veneer does not read its layout"], _IMAGE)
    if path.name == WEIGHTS_NAME:
        return SourceError(
            f"{path.parent} holds no {CONFIG_NAME}",
            ["without it neither the scaling nor the targets are known"],
            "Copy the folder again, whole.",
        )
    return SourceError(
        f"{path} is one file of tensors, not an adapter's folder",
        [],
        f"Give a folder with {CONFIG_NAME} and {WEIGHTS_NAME}.",
    )


def _program(names: Iterable[str]) -> str | None:
    """Which program's layout the names of tensors are of."""
    listed = list(names)
    if any(
        name.startswith(("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_", "lora_transformer_"))
        for name in listed
    ):
        return "a LoRA of kohya's scripts (sd-scripts)"
    if any(
        name.startswith(("unet.", "transformer.", "text_encoder.", "text_encoder_2."))
        for name in listed
    ) and any("lora" in name for name in listed):
        return "a LoRA of diffusers"
    if any(".processor." in name and "lora" in name for name in listed):
        return "a LoRA of diffusers (attention processors)"
    return None
