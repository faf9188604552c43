"""What a library accepts: bases that are named, and files of other programs."""

import shutil
from pathlib import Path

import pytest

from tests.support.adapter_files import edit_config
from tests.support.libraries import references
from tests.support.tiny import tiny_base
from veneer.errors import AdapterMismatchError, RefusedError, SourceError, UnsafeFileError
from veneer.formats.loading import load_adapter

# what comes in


def test_an_adapter_that_only_names_its_base_is_marked_and_a_stated_base_is_checked(
    library, sources
):
    plain = library.add(sources / "p", name="p")
    assert (
        plain.version.facts.base_proof == "unverified" and plain.version.facts.base_digest is None
    )
    base = tiny_base("llama_untied")
    stated = library.add(sources / "p", name="p", base=base)
    assert stated.version.version == 2 and stated.version.facts.base_proof == "stated"
    assert base.attachments == {} and not any(
        "Adapted" in type(m).__name__ for m in base.model.modules()
    )
    load_adapter(base, library.path("p"), name="x")
    other = tiny_base("llama_untied", seed=1)
    load_adapter(other, library.path("p@1"), name="x")  # nothing in it speaks against this base
    with pytest.raises(AdapterMismatchError, match="values of the weights"):
        load_adapter(other, library.path("p@2"), name="y")


def test_a_stated_base_that_does_not_fit_is_refused_and_nothing_is_kept(library, sources):
    with pytest.raises(AdapterMismatchError, match="/p' does not fit"):
        library.add(sources / "p", name="p", base=tiny_base("gpt2"))
    with pytest.raises(AdapterMismatchError, match="another base"):
        library.add(sources / "a", name="a", base=tiny_base("llama_untied", seed=1))
    assert references(library) == [] and list(library.objects.iterdir()) == []


def test_files_beside_the_adapters_own_stay_outside(library, sources, tmp_path):
    shutil.copytree(sources / "a", tmp_path / "a")
    (tmp_path / "a" / "README.md").write_text("hello")
    (tmp_path / "a" / "evil.py").write_text("import os")
    library.add(tmp_path / "a", name="x")
    assert library.get("x").version.object == library.add(sources / "a", name="y").version.object


def _tensor_file(folder: Path, *names: str) -> None:
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    save_file({name: torch.ones(2, 2) for name in names}, folder / "lora.safetensors")


FOREIGN = {
    "kohya": (
        lambda f: _tensor_file(f, "lora_unet_down_0_attn.lora_down.weight"),
        RefusedError,
        "kohya",
    ),
    "diffusers": (
        lambda f: _tensor_file(f, "unet.down.0.to_q.lora_A.weight"),
        RefusedError,
        "diffusers",
    ),
    "pickle": (
        lambda f: (f.mkdir(), (f / "adapter_model.bin").write_bytes(b"x")),
        UnsafeFileError,
        "save_pretrained",
    ),
    "gguf": (
        lambda f: (f.mkdir(), (f / "lora.gguf").write_bytes(b"GGUF")),
        RefusedError,
        "llama.cpp",
    ),
    "mlx": (
        lambda f: (f.mkdir(), (f / "adapters.safetensors").write_bytes(b"x")),
        RefusedError,
        "MLX",
    ),
    "nothing": (lambda f: f.mkdir(), SourceError, "no adapter at"),
    "not there": (lambda f: None, SourceError, "no adapter at"),
    "text": (lambda f: f.write_text("hello"), SourceError, "is not an adapter"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_other_programs_wrote_is_refused_by_its_name(library, tmp_path, kind):
    make, error, words = FOREIGN[kind]
    make(tmp_path / "theirs")
    with pytest.raises(error, match=words):
        library.add(tmp_path / "theirs", name="x")
    assert references(library) == []


@pytest.mark.parametrize("peft_type", ["LOHA", "XLORA", "OFT"])
def test_a_method_that_veneer_does_not_compute_is_refused_by_name(
    library, sources, tmp_path, peft_type
):
    shutil.copytree(sources / "p", tmp_path / "p")
    edit_config(tmp_path / "p", peft_type=peft_type)
    with pytest.raises(RefusedError, match=peft_type):
        library.add(tmp_path / "p", name="x")
