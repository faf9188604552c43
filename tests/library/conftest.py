"""Fixtures of tests in this folder."""

import shutil
from pathlib import Path

import pytest

from tests.support.adapter_files import adapted, write
from veneer.formats.manifest import MANIFEST_NAME, read_manifest
from veneer.library.library import Library


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """Three adapters: a, b (another rank), and p (a without veneer.json, as PEFT writes it)."""
    folder = tmp_path_factory.mktemp("sources")
    write(folder / "a", *adapted(), metrics={"validation_loss": 1.5}, data_fingerprint="d" * 64)
    write(
        folder / "b",
        *adapted(rank=3),
        parents=[(read_manifest(folder / "a" / MANIFEST_NAME).content_hash, 1.0)],
    )
    shutil.copytree(folder / "a", folder / "p")
    (folder / "p" / MANIFEST_NAME).unlink()
    return folder


@pytest.fixture
def library(tmp_path) -> Library:
    return Library(tmp_path / "library")
