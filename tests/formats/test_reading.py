"""Reading an adapter without a base: files, names and manifests are strict."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from tests.support.adapter_files import WEIGHTS, edit_config, edit_tensors
from tests.support.tiny import tiny_base
from veneer.bases.identity.fingerprint import Fingerprint
from veneer.errors import CorruptFileError, SourceError, UnsafeFileError
from veneer.files import strict_tensors
from veneer.files.nesting import MAX_JSON_DEPTH
from veneer.formats.adapter import read_adapter
from veneer.formats.loading import load_adapter
from veneer.formats.manifest import (
    MANIFEST_NAME,
    BaseIdentity,
    Manifest,
    content_hash_of,
    read_manifest,
)
from veneer.formats.peft.config import CONFIG_NAME, MAX_EXPRESSIONS, MAX_PATTERN

# reading


def test_reading_needs_no_base(written):
    stored = read_adapter(written)
    assert (
        stored.manifest is not None
        and stored.notes == []
        and stored.name_or_path == "tiny-llama_untied"
    )
    assert (
        stored.config.rank == 4
        and stored.config.alpha == 7
        and stored.config.train_modules == ["model.norm"]
    )
    assert len(stored.tensors) == 2 * 14 + 1


def test_a_folder_changed_after_writing_is_refused_until_the_manifest_is_removed(copy):
    edit_config(copy, lora_alpha=8)
    with pytest.raises(CorruptFileError, match="changed after Veneer wrote it"):
        read_adapter(copy)
    (copy / MANIFEST_NAME).unlink()
    assert read_adapter(copy).config.alpha == 8


@pytest.mark.parametrize(
    ("prepare", "error", "words"),
    [
        (lambda f: shutil.rmtree(f), SourceError, "not a folder"),
        (lambda f: (f / CONFIG_NAME).unlink(), SourceError, f"no {CONFIG_NAME}"),
        (lambda f: (f / WEIGHTS).unlink(), SourceError, f"no {WEIGHTS}"),
        (
            lambda f: (f / WEIGHTS).rename(f / "adapter_model.bin"),
            UnsafeFileError,
            "save_pretrained",
        ),
        (lambda f: (f / WEIGHTS).rename(f / "adapter.pt"), UnsafeFileError, "adapter.pt"),
        (lambda f: (f / MANIFEST_NAME).write_text("{"), CorruptFileError, "not valid JSON"),
        (
            lambda f: (f / MANIFEST_NAME).write_text('{"format_version": 2}'),
            CorruptFileError,
            "newer one",
        ),
        (
            lambda f: (f / MANIFEST_NAME).write_text('{"format_version": 1, "x": 1}'),
            CorruptFileError,
            "x: ",
        ),
    ],
)
def test_a_folder_that_is_no_adapter_is_told_with_the_way_out(copy, prepare, error, words):
    prepare(copy)
    with pytest.raises(error, match=words):
        read_adapter(copy)


def test_the_adapters_inside_a_folder_are_named(copy, tmp_path):
    (tmp_path / "outer").mkdir()
    copy.rename(tmp_path / "outer" / "sql")
    with pytest.raises(SourceError, match=r"Use .*outer/sql"):
        read_adapter(tmp_path / "outer")


def test_tensor_names_that_hold_an_adapter_s_name_are_repaired_and_told(copy):
    def rename(tensors) -> None:
        for name in list(tensors):
            if name.endswith(("lora_A.weight", "lora_B.weight")):
                tensors[name.removesuffix("weight") + "sql.weight"] = tensors.pop(name)

    edit_tensors(copy, rename)
    stored = read_adapter(copy)
    assert stored.notes == ["28 tensor names held an adapter's name, which was removed"]
    load_adapter(tiny_base("llama_untied"), stored, name="x")


def test_two_names_of_one_tensor_are_refused(copy):
    def double(tensors) -> None:
        name = next(n for n in tensors if n.endswith("lora_A.weight"))
        tensors[name.removesuffix("weight") + "default.weight"] = tensors[name].clone()

    edit_tensors(copy, double)
    with pytest.raises(CorruptFileError, match="ambiguous"):
        read_adapter(copy)


def test_a_file_without_the_prefix_is_read(copy):
    edit_tensors(
        copy, lambda t: t.update({n.removeprefix("base_model.model."): t.pop(n) for n in list(t)})
    )
    load_adapter(tiny_base("llama_untied"), copy, name="x")


def test_a_file_without_factors_is_refused(copy):
    edit_tensors(copy, lambda t: [t.pop(name) for name in list(t) if "lora_" in name])
    with pytest.raises(CorruptFileError, match="no low-rank factors"):
        read_adapter(copy)


def test_manifests_are_strict_and_their_text_is_fixed(written):
    text = (written / MANIFEST_NAME).read_text()
    manifest = Manifest.model_validate_json(text)
    assert manifest.to_json() == text
    for change in ({"metrics": {"loss": float("nan")}}, {"time": "now"}, {"scaling": {"a": "x"}}):
        with pytest.raises(ValueError):
            Manifest.model_validate(manifest.model_dump() | change)


def test_a_config_that_json_cannot_say_has_no_content_hash():
    with pytest.raises(ValueError, match="not JSON compliant"):
        content_hash_of("", {"alpha": float("nan")})


def test_the_content_hash_is_what_the_format_document_says(written):
    tensors = hashlib.sha256((written / WEIGHTS).read_bytes()).hexdigest()
    settings = json.dumps(
        json.loads((written / CONFIG_NAME).read_text()), sort_keys=True, separators=(",", ":")
    )
    expected = hashlib.sha256(f"{tensors}\n{settings}".encode()).hexdigest()
    assert read_manifest(written / MANIFEST_NAME).content_hash == expected


def test_the_format_document_names_every_field_and_every_refusal():
    text = (Path(__file__).parents[2] / "docs" / "format.md").read_text()
    fields = [*Manifest.model_fields, *BaseIdentity.model_fields, *Fingerprint.__dataclass_fields__]
    assert [name for name in fields if f"`{name}`" not in text] == []
    for limit in (
        f"{strict_tensors.MAX_TENSORS:,} tensors",
        f"{MAX_JSON_DEPTH} levels",
        f"{MAX_PATTERN:,} characters",
        f"{MAX_EXPRESSIONS} expressions",
    ):
        assert limit in text
