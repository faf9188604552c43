"""The list of bases that are on this machine."""

from pathlib import Path

import pytest
from huggingface_hub import constants

from tests.support.tiny import save_tiny
from veneer.bases import on_this_machine
from veneer.bases.on_this_machine import local_base, local_bases


def test_models_of_the_hub_cache_and_of_allowed_folders_are_listed_without_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert local_bases() == []

    repo, commit = tmp_path / "hub" / "models--org--tiny", "0" * 40
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    save_tiny(repo / "snapshots" / commit)
    models = tmp_path / "models"
    weights = (save_tiny(models / "own") / "model.safetensors").stat().st_size
    (models / "notes").mkdir()
    (models / "broken").mkdir()
    (models / "broken" / "config.json").write_text("{}")
    (models / "small.gguf").write_bytes(b"GGUF")

    bases = {base.name: base for base in local_bases([models, tmp_path / "missing"])}
    assert sorted(bases) == ["models/own", "models/small.gguf", "org/tiny"]
    assert bases["models/own"].bytes == bases["org/tiny"].bytes == weights
    assert bases["models/own"].source == str(models / "own")
    assert bases["org/tiny"].source == "org/tiny"
    assert (bases["models/own"].title, bases["models/own"].folder) == ("own", "models")
    assert (bases["org/tiny"].title, bases["org/tiny"].folder) == ("org/tiny", None)
    assert {name: local_base(name, [models]) for name in bases} == bases
    for name in ("models/broken", "models/../models", "models/" + "x" * 300, "org/other", ""):
        assert local_base(name, [models]) is None


def test_a_base_is_found_without_reading_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    models, read = tmp_path / "models", []
    for name in ("own", "other"):
        (models / name).mkdir(parents=True)
    monkeypatch.setattr(on_this_machine, "_model_bytes", lambda path: read.append(path) or 1)
    assert local_base("models/own", [models]) is not None
    assert read == [models / "own"]


def test_what_is_no_base_hides_none_of_its_name_and_folders_are_listed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part of org/own is in the hub's cache, and a second folder of this name holds notes."""
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "hub" / "models--org--own").mkdir(parents=True)
    folders = [tmp_path / "first" / "org", tmp_path / "second" / "org"]
    save_tiny(folders[0] / "own")
    save_tiny(folders[0] / "small")
    folders[1].mkdir(parents=True)
    (folders[1] / "small").write_text("notes")
    listed: list[Path] = []
    iterate = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda path: listed.append(path) or iterate(path))
    bases = local_bases(folders)
    assert [base.name for base in bases] == ["org/own", "org/small"]
    assert [listed.count(folder) for folder in folders] == [1, 1]
    assert [local_base(base.name, folders) for base in bases] == bases
