"""Writing an adapter: the same bytes every time, complete or not at all."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError
from safetensors.torch import save_file

from tests.support.adapter_files import WEIGHTS, adapted, write
from tests.support.tiny import tiny_base
from veneer.errors import ConfigError, CorruptFileError, DoesNotFitError
from veneer.formats import adapter as store
from veneer.formats.adapter import manifest_for, read_adapter, write_adapter
from veneer.formats.loading import load_adapter
from veneer.formats.manifest import MANIFEST_NAME, read_manifest
from veneer.formats.peft.config import CONFIG_NAME

# writing


def test_the_folder_holds_three_files_and_says_what_it_is(tmp_path):
    base, attachment = adapted()
    result = write(
        tmp_path / "a",
        base,
        attachment,
        metrics={"loss": 1.5},
        recipe={"steps": 3},
        parents=[("p", 1.0)],
    )
    assert {p.name for p in (tmp_path / "a").iterdir()} == {CONFIG_NAME, WEIGHTS, MANIFEST_NAME}
    assert result.bytes == (tmp_path / "a" / WEIGHTS).stat().st_size
    manifest = read_manifest(tmp_path / "a" / MANIFEST_NAME)
    assert manifest.base.fingerprint == base.fingerprint().to_dict()
    assert (
        manifest.metrics == {"loss": 1.5}
        and manifest.recipe == {"steps": 3}
        and manifest.parent == "p"
    )
    assert manifest.scaling["model.layers.0.self_attn.v_proj"] == 7 / 2
    assert manifest.scaling["model.layers.0.self_attn.q_proj"] == 7 / 4


def test_written_twice_or_loaded_and_written_it_is_the_same_to_the_byte(tmp_path):
    base, attachment = adapted(bias="all", dropout=0.1)
    write(tmp_path / "one", base, attachment)
    write(tmp_path / "two", base, attachment)
    fresh = tiny_base("llama_untied")
    fresh.fingerprint()
    write(tmp_path / "three", fresh, load_adapter(fresh, tmp_path / "one", name="other"))
    for name in (CONFIG_NAME, WEIGHTS, MANIFEST_NAME):
        one = (tmp_path / "one" / name).read_bytes()
        assert (tmp_path / "two" / name).read_bytes() == one
        assert (tmp_path / "three" / name).read_bytes() == one


def test_the_bytes_do_not_depend_on_the_process(written, tmp_path):
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from tests.support.adapter_files import adapted, write\n"
        "write(Path(sys.argv[1]), *adapted())\n"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    root = Path(__file__).parents[2]
    subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "b")], env=environment, cwd=root, check=True
    )
    for name in (CONFIG_NAME, WEIGHTS, MANIFEST_NAME):
        assert (tmp_path / "b" / name).read_bytes() == (written / name).read_bytes()


@pytest.mark.parametrize(
    "name", ["lora", "lora_A", "weight", "q_proj", "a.b.c", "default", "ünïcode ☃", "../x", ""]
)
def test_no_name_of_an_adapter_enters_its_files(written, tmp_path, name):
    write(tmp_path / "a", *adapted(name=name))
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == (written / WEIGHTS).read_bytes()
    assert (tmp_path / "a" / CONFIG_NAME).read_bytes() == (written / CONFIG_NAME).read_bytes()
    base = tiny_base("llama_untied")
    load_adapter(base, tmp_path / "a", name=name)
    assert base.attachments.keys() == {name}


def test_values_that_are_not_finite_are_not_written(tmp_path):
    base, attachment = adapted()
    attachment.layers["model.layers.1.mlp.up_proj"].B.data[0, 0] = float("nan")
    with pytest.raises(CorruptFileError, match=r"layers\.1\.mlp\.up_proj\.lora_B"):
        write(tmp_path / "a", base, attachment)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_kept_unless_replaced_on_purpose(copy, tmp_path):
    base, attachment = adapted(rank=3)
    with pytest.raises(ConfigError, match="exists"):
        write(copy, base, attachment)
    assert read_adapter(copy).config.rank == 4
    write_adapter(
        copy, attachment, manifest_for(base, method="lora"), model=base.model, replace=True
    )
    assert read_adapter(copy).config.rank == 3


def test_a_full_disk_leaves_nothing_and_says_how_much_is_needed(tmp_path, monkeypatch):
    base, attachment = adapted()

    def full(*_, **__):
        raise SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        )

    monkeypatch.setattr(store, "save_file", full)
    with pytest.raises(DoesNotFitError, match=r"[\d,]+ bytes are needed, [\d,]+ are free"):
        write(tmp_path / "a", base, attachment)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["flip", "drop", "append"])
def test_what_the_disk_changes_while_writing_is_found_before_it_is_visible(
    tmp_path, monkeypatch, damage
):
    def save_and_damage(tensors, path, metadata):
        tensors = dict(tensors)
        if damage == "drop":
            tensors.popitem()
        save_file(tensors, path, metadata=metadata)
        data = bytearray(path.read_bytes())
        if damage == "flip":
            data[-1] ^= 1
        path.write_bytes(data + (b"\0" if damage == "append" else b""))

    monkeypatch.setattr(store, "save_file", save_and_damage)
    with pytest.raises(CorruptFileError):
        write(tmp_path / "a", *adapted())
    assert list(tmp_path.iterdir()) == []
