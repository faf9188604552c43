"""Odd adapter folders, and every command that reads one."""

from __future__ import annotations

import json
import shutil
import struct
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import yaml

from tests.soak.inputs.odd import as_json, mutated, times, torn, yaml_of
from veneer.formats.manifest import MANIFEST_NAME, content_hash

ADAPTER_WORDS = """
    r lora_alpha target_modules rank_pattern alpha_pattern use_rslora use_dora bias modules_to_save
    all-linear
    q_proj LORA format_version base fingerprint scaling recipe metrics content_hash parents weight
    method lora prefix trained_by peft layers_to_transform exclude_modules target_parameters F32
    BF16
    shape dtype data_offsets __metadata__ revision
""".split()


def adapters(random: Random, folder: Path, world: Path) -> list[str]:
    source = world / random.choice(["a", "a", "b", "run/adapter", "prefixes", "bottleneck", "dora"])
    adapter = Path(shutil.copytree(source, folder / "adapter"))
    for _ in range(max(1, times(random))):
        file = random.choice(sorted(adapter.iterdir()))
        if random.random() < 0.05:
            file.unlink()
            (file.mkdir if random.random() < 0.5 else file.touch)()
            break
        data = file.read_bytes()
        if file.suffix == ".json":
            whole = random.random() < 0.9
            changed = mutated(random, json.loads(data), ADAPTER_WORDS) if whole else None
            data = as_json(random, changed) if whole else torn(random, data)
        else:
            data = torn_tensors(random, data)
        file.write_bytes(data)
        if file.suffix == ".json" and not _reads(data):
            break
    if random.random() < 0.7:
        _made_consistent(random, adapter)
    named, base = str(adapter), ["--base", str(world / random.choice(["base", "base", "untied"]))]
    out = ["--out", str(folder / "out")]
    library = ["--library", str(folder / "library")]
    lines = [
        ["adapters", "show", named],
        ["adapters", "show", named, *base],
        ["adapters", "show", named, "--json"],
        ["adapters", "diff", named, str(world / "a")],
        ["adapters", "add", named, *library],
        ["adapters", "add", named, *library, *base],
        ["adapters", "verify", named, *base],
        [
            "lint",
            named,
            "--for",
            random.choice(["vllm", "llamacpp", "transformers", "peft"]),
            *base,
        ],
        [
            "export",
            named,
            "--to",
            random.choice(["peft", "transformers", "vllm", "llamacpp"]),
            *out,
            *base,
        ],
        ["generate", "--adapter", named, "--max-new-tokens", "1", "x"],
        ["generate", "--adapter", named, *base, "--max-new-tokens", "1", "x"],
        ["generate", "--adapter", named, *base, "--force-base", "--max-new-tokens", "1", "x"],
        ["merge", "--adapter", named, *base, *out],
        ["combine", named, str(world / "a"), *base, *out],
    ]
    return random.choice(lines)


RUN_FILES = ["run.yaml", "metrics.jsonl", "summary.json", "adapter/adapter_config.json"]
RECORD_WORDS = """
    kind step evaluation start end loss best_step sample before answer prompt seconds tokens rows
    validation_loss
    versions base method learning_rate peak_memory_bytes planned_memory_bytes paths reason
    trainable_parameters
    data train
""".split()


def run_folders(random: Random, folder: Path, world: Path) -> list[str]:
    """A run that somebody sent along."""
    run = Path(shutil.copytree(world / "run", folder / "run"))
    file = run / random.choice(RUN_FILES)
    data = file.read_bytes()
    if random.random() < 0.2:
        file.write_bytes(torn(random, data))
    elif file.suffix == ".yaml":
        file.write_bytes(yaml_of(mutated(random, yaml.safe_load(data), RECORD_WORDS)))
    elif file.suffix == ".json":
        file.write_bytes(as_json(random, mutated(random, json.loads(data), RECORD_WORDS)))
    else:
        records: list[Any] = [json.loads(line) for line in data.splitlines()]
        for at in random.choices(range(len(records)), k=max(1, times(random))):
            records[at] = mutated(random, records[at], RECORD_WORDS)
        file.write_bytes(b"".join(as_json(random, record) + b"\n" for record in records))
    if random.random() < 0.3 and file.name != "summary.json":
        (run / "summary.json").unlink()
    lines = [
        ["report", str(run)],
        ["report", str(run)],
        ["train", "--resume", str(run), "--quiet"],
        ["generate", "--adapter", str(run), "--max-new-tokens", "1", "x"],
        ["adapters", "add", str(run), "--library", str(folder / "library")],
    ]
    return random.choice(lines)


def _made_consistent(random: Random, adapter: Path) -> None:
    """As one that another program wrote, or with a manifest that knows what was changed: else its
    hash tells."""
    manifest, config = adapter / MANIFEST_NAME, adapter / "adapter_config.json"
    if config.is_file() and not manifest.is_dir() and random.random() < 0.5:
        manifest.unlink(missing_ok=True)
        return
    with suppress(OSError, ValueError, TypeError, StopIteration):
        (tensors,) = (file for file in adapter.iterdir() if file.suffix == ".safetensors")
        settings = config if config.is_file() else adapter / "veneer_config.json"
        told = json.loads(manifest.read_bytes())
        told["content_hash"] = content_hash(tensors, json.loads(settings.read_bytes()))
        manifest.write_text(json.dumps(told))


def _reads(data: bytes) -> bool:
    try:
        json.loads(data)
    except (ValueError, RecursionError):
        return False
    return True


def torn_tensors(random: Random, data: bytes) -> bytes:
    length = int.from_bytes(data[:8], "little")
    what = random.random() if 8 + length < len(data) - 4 else 1.0
    if what < 0.5:
        try:
            header = mutated(random, json.loads(data[8 : 8 + length]), ADAPTER_WORDS)
        except ValueError:
            return torn(random, data)
        text = json.dumps(header).encode("utf-8", "surrogatepass")
        return (
            struct.pack("<Q", random.choice([len(text)] * 5 + [2**63, 0, length]))
            + text
            + data[8 + length :]
        )
    if what < 0.8:  # a value that is not finite, or any other
        at = random.randrange(8 + length, len(data) - 4)
        return (
            data[:at]
            + struct.pack("<f", random.choice([float("nan"), float("inf"), 1e38, -0.0]))
            + data[at + 4 :]
        )
    return torn(random, data)
