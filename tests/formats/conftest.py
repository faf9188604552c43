"""Fixtures of tests in this folder."""

import shutil
from pathlib import Path

import pytest

from tests.support.adapter_files import adapted, write


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("written") / "a"
    write(folder, *adapted())
    return folder


@pytest.fixture
def copy(written, tmp_path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "copy"))
