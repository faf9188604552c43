"""A .gguf model in a type that llama.cpp's own program makes: its choice of types, tensor by
tensor, is its own."""

import shutil
import subprocess
from pathlib import Path

from veneer.errors import ConfigError, RefusedError
from veneer.merge.programs import BY_LLAMA_CPP

TOOL = "llama-quantize"


def quantiser(type: str) -> str:
    """Where the program is. ConfigError: nowhere."""
    if (found := shutil.which(TOOL)) is None:
        raise ConfigError(
            f"{type} is made by llama.cpp's {TOOL}, which is not installed here",
            next_step=f"Install llama.cpp so that {TOOL} is found, or take --type q8_0.",
        )
    return found


def quantise(file: Path, type: str) -> None:
    """Puts the file in that type in its place. RefusedError: the program failed, with what it
    said."""
    whole = file.with_name(f"{file.name}.f16")
    file.rename(whole)
    try:
        done = subprocess.run(
            [quantiser(type), str(whole), str(file), BY_LLAMA_CPP[type]],
            capture_output=True,
            text=True,
            errors="replace",
        )
    finally:
        whole.unlink()
    if done.returncode or not file.is_file():
        said = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()][-5:]
        raise RefusedError(f"{TOOL} made no {type}", said, "Take --type q8_0 or f16.")
