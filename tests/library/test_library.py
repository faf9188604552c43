"""A library keeps every version, finds it by name and tag, and takes in only what can be read."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.formats.test_adapter import adapted, edit_config, write
from tests.support.helpers import filled_lora
from tests.support.tiny import save_tiny, tiny_base
from veneer.cli.main import main
from veneer.errors import (
    AdapterMismatchError,
    ConfigError,
    CorruptFileError,
    RefusedError,
    SourceError,
    UnsafeFileError,
    VeneerError,
)
from veneer.files.atomic import MANIFEST
from veneer.formats.adapter import WEIGHTS_NAME, manifest_for, read_adapter, write_adapter
from veneer.formats.loading import load_adapter
from veneer.formats.manifest import MANIFEST_NAME, read_manifest
from veneer.library.index import INDEX
from veneer.library.library import Library
from veneer.library.names import check_name, parse_reference
from veneer.models.load import load_base


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


def references(library: Library, **filters) -> list[str]:
    return [entry.reference for entry in library.entries(**filters)]


# names and versions


def test_adding_again_makes_a_version_and_the_same_bytes_do_not(library, sources):
    assert library.add(sources / "a", name="tickets").reference == "tickets@1"
    assert library.add(sources / "a", name="tickets").reference == "tickets@1"
    assert library.add(sources / "b", name="tickets").reference == "tickets@2"
    assert library.add(sources / "a", name="tickets").reference == "tickets@3"
    assert references(library) == ["tickets@3"]
    assert references(library, every_version=True) == ["tickets@1", "tickets@2", "tickets@3"]
    assert len(list(library.objects.glob("[0-9a-f]*"))) == 2


def test_a_stored_adapter_is_the_one_that_was_added_and_peft_finds_its_files(library, sources):
    library.add(sources / "a", name="tickets")
    folder = library.whole("tickets@1")
    for name in ("adapter_config.json", WEIGHTS_NAME, MANIFEST_NAME):
        assert (folder / name).read_bytes() == (sources / "a" / name).read_bytes()
    assert {path.name for path in folder.iterdir()} == {
        "adapter_config.json",
        WEIGHTS_NAME,
        MANIFEST_NAME,
        MANIFEST,
    }


def test_a_run_folder_is_taken_for_its_adapter(library, sources, tmp_path):
    shutil.copytree(sources / "a", tmp_path / "run" / "adapter")
    assert library.add(tmp_path / "run", name="x").version.facts.metrics == {"validation_loss": 1.5}


def test_tags_are_on_one_version_of_a_name_and_find_it(library, sources):
    library.add(sources / "a", name="tickets", tags=["best"])
    library.add(sources / "b", name="tickets")
    assert library.get("tickets@best").reference == "tickets@1"
    library.change("tickets@2", tag=["best", "live"], note="rank 3")
    assert library.get("tickets@best").reference == "tickets@2"
    assert library.get("tickets@1").version.tags == []
    library.change("tickets", untag=["live"], note="")
    assert library.get("tickets").version.tags == ["best"]
    assert library.get("tickets").version.note == ""
    with pytest.raises(ConfigError, match=r"Its tags: best"):
        library.change("tickets", untag=["live"])
    library.add(sources / "a", name="tickets", tags=["best"])
    assert references(library, tag="best") == ["tickets@3"]


def test_versions_are_never_numbered_twice_and_a_removed_one_is_gone(library, sources):
    library.add(sources / "a", name="x")
    library.add(sources / "b", name="x")
    assert [entry.reference for entry in library.remove("x@2")] == ["x@2"]
    assert library.add(sources / "b", name="x").reference == "x@3"
    with pytest.raises(ConfigError, match=r"there is no x@2[\s\S]*x has @1, @3"):
        library.get("x@2")
    library.remove("x")
    with pytest.raises(ConfigError, match="no adapter 'x'"):
        library.get("x")


def test_a_rename_keeps_versions_and_overwrites_nothing(library, sources):
    library.add(sources / "a", name="x", tags=["best"])
    library.add(sources / "b", name="y")
    with pytest.raises(ConfigError, match="already"):
        library.rename("x", "y")
    library.rename("x", "z")
    assert references(library) == ["y@1", "z@1"]
    assert library.get("z@best").version.facts.metrics == {"validation_loss": 1.5}


def test_an_unknown_name_is_answered_with_the_nearest(library, sources):
    library.add(sources / "a", name="tickets")
    with pytest.raises(ConfigError, match="Did you mean 'tickets'"):
        library.get("tikets")


def test_filters_and_orders(library, sources):
    library.add(sources / "a", name="support-de", tags=["best"])
    library.add(sources / "b", name="support-en")
    library.add(sources / "p", name="foreign")
    assert references(library, name="support-*") == ["support-de@1", "support-en@1"]
    assert references(library, tag="best") == ["support-de@1"]
    assert references(library, base="tiny-*") == ["foreign@1", "support-de@1", "support-en@1"]
    digest = library.get("support-de").version.facts.base_digest
    assert references(library, base=digest[:10]) == ["support-de@1", "support-en@1"]
    assert references(library, base="qwen*") == references(library, method="dora") == []
    sizes = [entry.version.facts.bytes for entry in library.entries(sort="size")]
    assert sizes == sorted(sizes, reverse=True)


NAMES_THAT_ARE_NONE = [
    "",
    ".",
    "..",
    "../x",
    "a/b",
    "a\\b",
    "C:x",
    "a:b",
    "x.",
    ".x",
    "x ",
    " x",
    "CON",
    "con",
    "com1",
    "nul.tar",
    "A",
    "a..b",
    "a--b",
    "ä",
    "x\0",
    "x\n",
    "-x",
    "x" * 65,
    "~",
    "%41",
    "aux",
    "a@b",
    "ａ",
    "a\u202eb",
]


@pytest.mark.parametrize("name", NAMES_THAT_ARE_NONE)
def test_unsafe_and_reserved_names_are_refused_before_anything_is_written(library, sources, name):
    with pytest.raises(ConfigError, match="not a valid name"):
        library.add(sources / "a", name=name)
    assert not library.folder.exists()


@given(st.text(max_size=70))
def test_what_passes_as_a_name_is_the_same_file_on_every_system(name):
    try:
        check_name(name)
    except ConfigError:
        return
    assert name == name.casefold() and name.isascii() and name.isprintable()
    assert Path(f"{name}.json").name == f"{name}.json" and name[-1] != "." and len(name) <= 64
    assert str(parse_reference(f"{name}@3")) == f"{name}@3"


@given(st.text(max_size=30))
def test_a_reference_reads_back_or_is_refused(text):
    try:
        found = parse_reference(text)
    except ConfigError:
        return
    assert str(found) == text


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


# verify and collect


def test_verify_finds_every_kind_of_damage(library, sources):
    library.add(sources / "a", name="x")
    base = tiny_base("llama_untied")
    assert library.verify(base=lambda folder: base) == {"x@1": []}
    folder = library.path("x")

    def faults_after(change) -> str:
        kept = {path.name: path.read_bytes() for path in folder.iterdir()}
        change()
        found = library.verify()["x@1"]
        for path in folder.iterdir():
            path.unlink()
        for name, content in kept.items():
            (folder / name).write_bytes(content)
        return "\n".join(found)

    def flip(name: str) -> None:
        data = bytearray((folder / name).read_bytes())
        data[-3] ^= 1
        (folder / name).write_bytes(data)

    for name in ("adapter_config.json", WEIGHTS_NAME, MANIFEST_NAME):
        assert f"{name} changed" in faults_after(lambda name=name: flip(name))
        assert f"{name} is missing" in faults_after((folder / name).unlink)
    assert "not listed" in faults_after(lambda: (folder / "extra.py").write_text("x"))
    assert MANIFEST in faults_after(lambda: flip(MANIFEST))
    assert library.verify(base=lambda folder: tiny_base("gpt2"))["x@1"]
    assert library.verify() == {"x@1": []}


def test_a_record_that_says_other_things_than_the_files_is_found(library, sources):
    library.add(sources / "a", name="x")
    path = library.names / "x.json"
    record = json.loads(path.read_text())
    record["versions"][0]["facts"]["base_proof"] = "stated"
    path.write_text(json.dumps(record))
    assert "base_proof" in library.verify()["x@1"][0]


def test_collecting_keeps_what_is_named_or_tagged_and_removes_the_rest(library, sources):
    library.add(sources / "a", name="x", tags=["best"])
    library.add(sources / "b", name="x")
    library.add(sources / "p", name="x")
    library.add(sources / "p", name="other")
    library.add(sources / "b", name="gone")
    library.remove("gone")
    (library.objects / ".partial-1-1").mkdir()
    (library.objects / ".partial-1-1" / "half").write_text("x")
    told = library.collect(apply=False)
    assert told.versions == ["x@2"] and len(told.objects) == 1 and told.bytes > 0
    assert len(references(library, every_version=True)) == 4
    assert library.collect() == told
    assert references(library, every_version=True) == ["other@1", "x@1", "x@3"]
    assert all(faults == [] for faults in library.verify().values())
    assert not [path for path in library.objects.iterdir() if path.name.startswith(".")]
    assert library.collect().bytes == 0
    assert library.add(sources / "b", name="x").reference == "x@4"


def test_a_broken_object_is_replaced_when_the_same_adapter_is_added_again(library, sources):
    library.add(sources / "a", name="x")
    (library.path("x") / WEIGHTS_NAME).write_bytes(b"broken")
    with pytest.raises(CorruptFileError, match="damaged"):
        library.whole("x")
    library.add(sources / "a", name="x")
    assert library.verify() == {"x@1": []}


# the index


def test_the_index_may_vanish_break_or_lie_and_the_listing_is_the_same(
    library, sources, monkeypatch
):
    from veneer.library import index

    monkeypatch.setattr(index, "_SETTLED_NS", -(10**18))
    library.add(sources / "a", name="x")
    library.add(sources / "b", name="y")
    expected = references(library)
    path = library.folder / INDEX
    whole = path.read_bytes()
    for broken in (b"", b"{}", b"\n{}", whole[:-5], whole.replace(b'"x"', b'"q"')):
        path.write_bytes(broken)
        assert references(library) == expected
    path.unlink()
    assert references(library) == expected
    library.remove("y")
    assert references(library) == ["x@1"]
    assert set(index._cached(path)) == {"x"}
    library.rename("x", "z")
    assert references(library) == ["z@1"]
    assert references(library) == ["z@1"]


def test_a_listing_of_many_reads_one_file(library, sources, monkeypatch):
    from veneer.library import index

    monkeypatch.setattr(index, "_SETTLED_NS", -(10**18))
    library.add(sources / "a", name="x0")
    for number in range(1, 50):
        shutil.copy(library.names / "x0.json", library.names / f"x{number}.json")
    assert len(references(library)) == 50
    monkeypatch.setattr(index, "read_json", lambda path: pytest.fail(f"{path} was read again"))
    assert len(references(library)) == 50


def test_a_folder_that_is_no_library_is_not_taken_for_one(tmp_path, sources):
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(SourceError, match="not a library"):
        Library(tmp_path).entries()
    with pytest.raises(ConfigError, match="other files"):
        Library(tmp_path).add(sources / "a", name="x")
    with pytest.raises(SourceError, match="not a library"):
        Library(tmp_path / "mistyped").get("x")


def test_the_users_own_library_lies_where_the_system_says_and_may_be_empty(
    tmp_path, monkeypatch, sources
):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert Library().entries() == []
    Library().add(sources / "a", name="x")
    assert (tmp_path / "veneer" / "adapters" / "names" / "x.json").is_file()


# paths and names


def test_a_folder_wins_unless_the_library_has_the_name_too(library, sources, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    library.add(sources / "a", name="x")
    assert library.locate("x") == library.path("x")
    (tmp_path / "x").mkdir()
    assert library.locate("x") == library.path("x")  # a folder without an adapter is not meant
    shutil.copytree(sources / "b", tmp_path / "x" / "adapter")
    with pytest.raises(ConfigError, match=r"Write \./x for the folder, x@1"):
        library.locate("x")
    assert read_adapter(library.locate("./x")).config.rank == 3
    assert read_adapter(library.locate("x@1")).config.rank == 4
    with pytest.raises(SourceError, match="no such name"):
        library.locate("y")


# the command line


def adapters(library: Library, *arguments: str) -> int:
    return main(["adapters", *arguments, "--library", str(library.folder)])


def test_every_action_prints_json_alone_on_stdout(library, sources, capsys):
    def printed(*arguments: str):
        assert adapters(library, *arguments, "--json") == 0
        return json.loads(capsys.readouterr().out)

    assert printed("add", str(sources / "a"), "--name", "x", "--tag", "best")["reference"] == "x@1"
    assert printed("add", str(sources / "b"))["reference"] == "b@1"
    assert [each["name"] for each in printed("ls")] == ["b", "x"]
    shown = printed("show", "x")
    assert shown["modules"]["model.layers.0.self_attn.v_proj"]["scaling"] == 7 / 2
    assert shown["modules"]["model.layers.0.self_attn.v_proj"]["norm"] > 0
    assert shown["other_tensors"] == {"model.norm.weight": [32]}
    assert "(x@1)" in printed("show", "b")["lineage"][0]
    compared = printed("diff", "x", "b")
    assert compared["settings"]["rank"] == [4, 3] and -1 <= compared["cosine"] <= 1
    assert printed("tag", "b", "live")["tags"] == ["live"]
    assert printed("rename", "b", "c") == {"old": "b", "new": "c"}
    assert printed("verify")["checked"] == 2
    assert [each["reference"] for each in printed("rm", "c")] == ["c@1"]
    assert printed("gc", "--yes")["removed"] is True


def test_screens_hold_in_80_columns_and_name_what_is_unverified(
    library, sources, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "80")
    assert adapters(library, "add", str(sources / "p"), "--name", "foreign") == 0
    assert "base: unverified" in capsys.readouterr().out
    adapters(library, "add", str(sources / "a"), "--name", "x")
    adapters(library, "ls")
    assert "tiny-llama_untied (unverified)" in capsys.readouterr().out
    for action in (("show", "x"), ("diff", "x", "foreign")):
        capsys.readouterr()
        assert adapters(library, *action) == 0
        screen = capsys.readouterr().out
        assert action[0] != "show" or " · float32 · by fingerprint" in screen
        assert max(map(len, screen.splitlines())) <= 80


def test_what_is_wider_than_the_screen_stands_below_each_other_setting_by_setting(
    library, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "80")
    for name, train in (
        ("a", "/somewhere/rows.jsonl"),
        ("b", [{"path": "/somewhere/rows.jsonl", "weight": 0.5}]),
    ):
        recipe = {"data": {"train": train, "format": "auto"}, "out": f"/some/{'deep/' * 12}{name}"}
        write(tmp_path / name, *adapted(), recipe=recipe)
    assert adapters(library, "diff", str(tmp_path / "a"), str(tmp_path / "b")) == 0
    screen = capsys.readouterr().out
    assert max(map(len, screen.splitlines())) <= 80 or str(tmp_path) in max(
        screen.splitlines(), key=len
    )
    assert "recipe data.train.1.weight\n  A  –\n  B  0.500\n" in screen
    assert "recipe data.train\n  A  /somewhere/rows.jsonl\n  B  –\n" in screen
    assert "format" not in screen


def test_damage_and_mistakes_have_their_exit_codes(library, sources, capsys):
    adapters(library, "add", str(sources / "a"), "--name", "x")
    assert adapters(library, "show", "y") == 2
    assert adapters(library, "tag", "x") == 2
    (library.path("x") / WEIGHTS_NAME).write_bytes(b"broken")
    assert adapters(library, "verify") == 4
    assert adapters(library, "nonsense") == 2
    assert "Traceback" not in capsys.readouterr().err


def test_listing_loads_no_torch(library, sources):
    import subprocess
    import sys

    library.add(sources / "a", name="x")
    code = (
        "import sys; from veneer.cli.main import main; "
        f"main(['adapters', 'ls', '--library', {str(library.folder)!r}]); "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_errors_are_ours_whatever_stands_in_a_record(library, sources):
    library.add(sources / "a", name="x")
    path = library.names / "x.json"
    good = json.loads(path.read_text())
    for change in (
        {"format_version": 2},
        {"versions": []},
        {"versions": [3]},
        {"next_version": 1},
        {"more": 1},
        {"versions": [{**good["versions"][0], "object": None}]},
    ):
        path.write_text(json.dumps(good | change))
        with pytest.raises(VeneerError):
            library.get("x")
        with pytest.raises(VeneerError):
            library.entries()


def test_verify_holds_the_base_as_each_adapter_was_trained_over_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "base", "llama", hidden_size=64, intermediate_size=96, head_dim=16)
    for name, settings in {
        "dense": {},
        "packed": {"quantize": "nf4", "keep_dense": ["v_proj"]},
    }.items():
        base = load_base("base", **settings)
        made = filled_lora(base)
        manifest = manifest_for(base, method="lora", recipe=settings or None)
        write_adapter(name, made, manifest, model=base.model)
        Library("lib").add(name, name=name)
    assert main(["adapters", "verify", "--base", "base", "--library", "lib"]) == 0
    save_tiny(
        tmp_path / "other", "llama", seed=5, hidden_size=64, intermediate_size=96, head_dim=16
    )
    assert main(["adapters", "verify", "dense", "--base", "other", "--library", "lib"]) == 4
    said = capsys.readouterr().out
    assert "dense@1: faulty" in said and "another base" in said and "on trial" not in said


def test_a_folder_that_is_misspelt_is_told_with_the_one_beside_it(sources, tmp_path):
    with pytest.raises(SourceError) as caught:
        Library(tmp_path / "library").locate(str(sources / "aa"))
    assert caught.value.next_step == f"Did you mean {sources / 'a'}?"
