"""Makes .gguf models in types of llama.cpp's own program, which chooses the type of each tensor."""

import shutil
import subprocess
from pathlib import Path

from veneer.errors import ConfigError, RefusedError
from veneer.merge.programs import BY_LLAMA_CPP

TOOL = "llama-quantize"


def quantiser(type: str) -> str:
    """Returns the program's path. ConfigError if it is not installed."""
    if (path := shutil.which(TOOL)) is None:
        raise ConfigError(
            f"{type} is made by llama.cpp's {TOOL}, which is not installed here",
            next_step=f"Install llama.cpp so that {TOOL} is found, or take --type q8_0.",
        )
    return path


def quantise(file: Path, type: str) -> None:
    """Replaces the file by one of that type. RefusedError with the program's message."""
    f16_file = file.with_name(f"{file.name}.f16")
    file.rename(f16_file)
    try:
        process = subprocess.run(
            [quantiser(type), str(f16_file), str(file), BY_LLAMA_CPP[type]],
            capture_output=True,
            text=True,
            errors="replace",
        )
    finally:
        f16_file.unlink()
    if process.returncode or not file.is_file():
        message = [
            line for line in (process.stderr or process.stdout).splitlines() if line.strip()
        ][-5:]
        raise RefusedError(f"{TOOL} made no {type}", message, "Take --type q8_0 or f16.")
