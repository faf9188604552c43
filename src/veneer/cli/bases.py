"""Flags that name a base and an adapter, and how commands find and load them."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.cli.common import add_library, make_console, pause_collection, working
from veneer.cli.early import check_base
from veneer.cli.flags import add_switch, add_value
from veneer.errors import ConfigError, SourceError
from veneer.files.strict_json import read_json, read_yaml
from veneer.quant.config import FORMATS, Quantize, weight_format

if TYPE_CHECKING:
    from veneer.base import Base
    from veneer.models.frozen_base import FrozenBase


def add_base(parser: ArgumentParser, *, several: bool = False) -> None:
    """Adds --base, --adapter and the flags of how the base is loaded.

    several: --adapter takes several names, and args.adapter is a list
    """
    add_value(
        parser,
        "--base",
        "B",
        "hub id, folder, .gguf file or named default; default: the adapter's own base",
    )
    help_of_adapter = "name in the library (NAME or NAME@2), or folder of an adapter or a run"
    if several:
        add_value(
            parser,
            "--adapter",
            "A",
            f"{help_of_adapter}; several may be given; default: the base alone",
            nargs="+",
            default=[],
        )
    else:
        add_value(parser, "--adapter", "A", help_of_adapter)
    add_library(parser)
    add_switch(parser, "--force-base", "use the adapter even if it was trained on another base")
    add_base_format(parser, "as the adapter was trained")


def add_dtype(parser: ArgumentParser, default: str | None = "auto") -> None:
    add_value(
        parser,
        "--dtype",
        None,
        "type of the base's weights in memory; default: auto",
        default=default,
        choices=["auto", "float32", "bfloat16", "float16"],
    )


def add_base_format(parser: ArgumentParser, default: str) -> None:
    """Adds --dtype, --quantize and --device. default: of --quantize, in words."""
    add_dtype(parser)
    add_value(
        parser,
        "--quantize",
        None,
        (
            "format of the base's linear layers in memory; gguf: the blocks of a .gguf file;"
            f" default: {default}"
        ),
        choices=FORMATS,
    )
    add_value(parser, "--device", "D", "cpu, cuda, cuda:1, ...; default: auto", default="auto")


def load_base(args: Namespace) -> Base:
    """Loads the base of --base, with the adapter of --adapter in use."""
    source, adapter = locate_base_and_adapter(args.base, args.adapter, args.library)
    quantize, keep_dense = resolve_weight_format(args.quantize, adapter, force_base=args.force_base)
    base = load_bare_base(source, args, quantize, keep_dense)
    if adapter is not None:
        base.use(base.load_adapter(adapter, name=args.adapter, force_base=args.force_base))
    return base


def load_bare_base(
    source: str, args: Namespace, quantize: Quantize | None, keep_dense: Sequence[str] = ()
) -> Base:
    """Loads a base without adapters by --dtype and --device; prints its type if it was widened."""
    check_base(source)
    with working(f"loading {source}"):
        with pause_collection():
            from veneer import api
        base = api.load(
            source, dtype=args.dtype, device=args.device, quantize=quantize, keep_dense=keep_dense
        )
    if base.compute.widens and base.compute.line is not None:
        make_console(json=True, wraps=True).print(base.compute.line, style="dim")  # on stderr
    return base


def locate_base_and_adapter(
    base: str | None, adapter: str | None, library: str | None = None
) -> tuple[str, Path | None]:
    """Returns the base to load (without --base, that of the adapter), and the adapter's folder."""
    folder = locate_adapter(adapter, library) if adapter else None
    if base:
        return base, folder
    if folder is None:
        raise ConfigError(
            "no base is named",
            [],
            "Give --base (a hub id, a folder, a .gguf file or smollm2-135m) or --adapter.",
        )
    name = _read_base_name(folder)
    if not name:
        raise SourceError(
            f"{folder} does not say which base it was trained on", [], "Name it: --base B."
        )
    return name, folder


def locate_adapter(named: str, library: str | None = None) -> Path:
    """Finds an adapter's folder by its name in the library, its folder or that of its run."""
    from veneer.library.library import Library

    return Library(library).locate(named)


def _read_base_name(folder: Path) -> str | None:
    """Reads the name of the base from run.yaml, else from adapter_config.json."""
    for read, file, key in (
        (read_yaml, folder.parent / "run.yaml", "base"),
        (read_json, folder / "adapter_config.json", "base_model_name_or_path"),
    ):
        values = read(file) if file.is_file() else {}
        if isinstance(values.get(key), str) and values[key]:
            return str(values[key])
    return None


def storage_dtype(dtype: str) -> Any:
    """Reads --dtype for a command that writes or compares weights: auto is their stored type."""
    return "stored" if dtype == "auto" else dtype


def load_plain_base(args: Namespace) -> FrozenBase | None:
    """Loads the base of --base on the CPU; None without --base."""
    if not args.base:
        return None
    from veneer.models import load

    return load.load_base(args.base, dtype=storage_dtype(args.dtype), device="cpu")


def resolve_weight_format(
    given_format: Quantize | None, adapter: Path | None, *, force_base: bool
) -> tuple[Quantize | None, list[str]]:
    """Returns (quantize, keep_dense) for the base: as given, else as in the adapter's training,
    unless --force-base replaces its base."""
    quantize = given_format
    if quantize is None and adapter is not None and not force_base:
        quantize = read_quantize(adapter)
    keeps = weight_format(quantize).keeps_dense
    return quantize, read_dense_modules(adapter) if adapter is not None and keeps else []


def pair_with_weights(
    names: Sequence[str], weights: Sequence[float] | None, library: str | None
) -> list[tuple[Path, float]]:
    """Pairs the folders of adapters with their weights, 1 by default. ConfigError if the numbers of
    adapters and weights differ, or if two are the same adapter."""
    if weights and len(weights) != len(names):
        raise ConfigError(
            f"{len(names)} adapters and {len(weights)} weights",
            next_step="Give one weight for each.",
        )
    folders = [locate_adapter(name, library) for name in names]
    names_by_content: dict[str, str] = {}
    for name, folder in zip(names, folders, strict=True):
        content = _hash_content(folder)
        if content in names_by_content:
            raise ConfigError(
                f"{names_by_content[content]} and {name} are the same adapter",
                next_step="Give it once, with the sum of its weights.",
            )
        names_by_content[content] = name
    return list(zip(folders, weights or [1.0] * len(names), strict=True))


def _hash_content(folder: Path) -> str:
    """Returns an adapter's content hash; without weights its path, and reading reports what is
    missing."""
    from veneer.formats.manifest import content_hash
    from veneer.library.adapter_folder import CONFIG_NAME, WEIGHTS_NAME

    weights = folder / WEIGHTS_NAME
    if not weights.is_file():
        return str(folder)
    return content_hash(weights, read_json(folder / CONFIG_NAME))


def read_quantize(folder: Path) -> Quantize | None:
    """Reads the weight format of the adapter's base from its fingerprint; None if dense or
    unknown."""
    file = folder / "veneer.json"
    if not file.is_file():
        return None
    base = read_json(file).get("base")
    fingerprint = base.get("fingerprint") if isinstance(base, dict) else None
    dtype = fingerprint.get("dtype") if isinstance(fingerprint, dict) else None
    parts = dtype.split("+") if isinstance(dtype, str) else []
    return next((name for name in FORMATS if name in parts), None)


def read_dense_modules(folder: Path) -> list[str]:
    """Reads keep_dense of the adapter's run from its recipe."""
    file = folder / "veneer.json"
    recipe = read_json(file).get("recipe") if file.is_file() else None
    module_names = recipe.get("keep_dense") if isinstance(recipe, dict) else None
    return [str(name) for name in module_names] if isinstance(module_names, list) else []
