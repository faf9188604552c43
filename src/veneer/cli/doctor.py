"""Show versions, processor, memory, GPU, caches and extras, for a bug report. Changes nothing."""

import os
import platform
import shutil
from argparse import ArgumentParser, Namespace
from importlib import metadata, util
from pathlib import Path
from typing import Any

from veneer import __version__
from veneer.cli.common import add_json, make_console, print_json
from veneer.files.memory import memory
from veneer.files.processor import processor
from veneer.wording import size

PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "pydantic",
    "numpy",
    "gguf",
    "jinja2",
    "google-re2",
    "peft",
)
EXTRAS = {
    "parquet": "pyarrow",
    "cuda": "liger_kernel",
    "adamw8bit": "bitsandbytes",
    "metrics": "sacrebleu",
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "mlflow": "mlflow",
    "trackio": "trackio",
    "remote": "fsspec",
    "llamacpp": "llama_cpp",
    "grammar": "llguidance",
    "serve": "uvicorn",
    "ray": "ray",
}
"""Extras of `pip install 'veneer[NAME]'`, each with a module that it installs."""
CPU_FLAGS = (
    "avx2",
    "fma",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_bf16",
    "asimd",
    "bf16",
    "sve",
)


def add_arguments(parser: ArgumentParser) -> None:
    add_json(parser)


def run(args: Namespace) -> int:
    facts = find_facts()
    if args.json:
        print_json(facts)
        return 0
    console = make_console()
    for part, values in facts.items():
        console.print(part, style="bold")
        for name, value in values.items():
            console.print(f"  {name.removesuffix('_bytes'):<18} {_shown(name, value)}")
    return 0


def find_facts() -> dict[str, dict[str, Any]]:
    """Collects facts by part. Names that end in _bytes are in bytes; None means missing."""
    import torch

    from veneer.bases.compute import DTYPES, choose
    from veneer.files.cache import cache_folder
    from veneer.files.home import expanded
    from veneer.library.library import Library

    memory_info = memory()
    cache = Path(
        os.environ.get("HF_HUB_CACHE")
        or Path(os.environ.get("HF_HOME", "~/.cache/huggingface")) / "hub"
    )
    cache = expanded(cache)
    library = Library()
    cuda, cpu = torch.cuda.is_available(), processor()
    return {
        "versions": {
            "veneer": __version__,
            "python": platform.python_version(),
            "system": platform.platform(),
            **{name: _version(name) for name in PACKAGES},
        },
        "processor": {
            "model": cpu.get("model name") or platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "cores usable": len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count(),
            "features": [
                f for f in CPU_FLAGS if f in (cpu.get("flags") or cpu.get("Features") or "").split()
            ],
            "torch uses": torch.backends.cpu.get_cpu_capability(),
            "torch threads": torch.get_num_threads(),
            "our kernels use": _kernels(),
        },
        "products": {
            f"{name} takes": f"{choice.times:.2g} times as long as float32: "
            + ("multiplied as float32" if choice.narrow else f"held as {choice.name}")
            for name in ("bfloat16", "float16")
            if (choice := choose(DTYPES[name], "auto", torch.device("cpu"))).times is not None
        },
        "memory": {
            "total_bytes": memory_info.get("MemTotal"),
            "available_bytes": memory_info.get("MemAvailable"),
        },
        "gpu": {
            "cuda": torch.version.cuda,
            "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
            if cuda
            else [],
            "memory_bytes": torch.cuda.get_device_properties(0).total_memory if cuda else None,
            "mps": torch.backends.mps.is_available(),
        },
        "disk": {
            "hub cache": str(cache),
            "hub cache exists": cache.is_dir(),
            "our cache": str(cache_folder()),
            "library": str(library.folder),
            "adapters in it": len(library.all_names()),
            "offline": bool(os.environ.get("HF_HUB_OFFLINE")),
            "free here_bytes": shutil.disk_usage(".").free,
            "free for the cache_bytes": shutil.disk_usage(_nearest_existing(cache)).free,
        },
        "extras": {name: util.find_spec(module) is not None for name, module in EXTRAS.items()},
    }


def _kernels() -> str:
    """Names the instructions that the compiled kernels use (kernels/bindings/library.py)."""
    from veneer.kernels.bindings.library import has_amx, has_bf16_products, has_vectors, level

    names = {-1: "not compiled, or switched off", 0: "plain C", 2: "AVX2", 3: "AVX-512"}
    return (
        ("NEON" if level() == 0 and has_vectors() else names[level()])
        + (" with bf16 products" if has_bf16_products() else "")
        + (", on tiles (AMX)" if has_amx() else "")
    )


def _shown(name: str, value: Any) -> str:
    if value is None:
        return "–"
    if name.endswith("_bytes"):
        return size(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return (", ".join(map(str, value)) or "none") if isinstance(value, list) else str(value)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _nearest_existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.parents) if folder.exists())
