"""A library keeps every version, finds it by name and tag, and takes in only what can be read."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.libraries import references
from tests.support.tiny import tiny_base
from veneer.errors import ConfigError, CorruptFileError, InputError, SourceError
from veneer.files.atomic import MANIFEST
from veneer.formats.adapter import WEIGHTS_NAME, read_adapter
from veneer.formats.manifest import MANIFEST_NAME
from veneer.library.index import INDEX
from veneer.library.library import Library
from veneer.library.names import check_name, parse_reference


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="a folder that takes no files")
def test_a_place_where_nothing_can_be_written_is_refused_before_the_work():
    with pytest.raises(InputError, match="/proc"):
        Library("/proc/library").require_place()


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


def test_a_name_that_comes_back_counts_on(library, sources):
    library.add(sources / "a", name="x", tags=["best"])
    library.add(sources / "b", name="x")
    library.remove("x")
    assert "x" not in library.all_names() and not library.has("x")
    assert library.add(sources / "p", name="x").reference == "x@3"
    for gone in ("x@1", "x@2", "x@best"):
        with pytest.raises(ConfigError, match="there is no x@"):
            library.get(gone)
    library.remove("x@3")
    library.collect()
    assert library.add(sources / "a", name="x").reference == "x@4"
    library.rename("x", "y")
    assert library.add(sources / "b", name="x").reference == "x@5"


def test_a_rename_gives_no_number_that_meant_another_adapter(library, sources):
    library.add(sources / "a", name="x")
    library.add(sources / "b", name="x")
    library.remove("x")
    library.add(sources / "p", name="y")
    with pytest.raises(ConfigError, match=r"x@1 was another adapter[\s\S]*as x@3"):
        library.rename("y", "x")
    assert references(library) == ["y@1"]
    library.rename("y", "z")
    library.rename("z", "y")
    assert library.add(sources / "a", name="y").reference == "y@2"
    library.rename("y", "z")
    library.remove("z@2")
    library.rename("z", "y")
    assert library.add(sources / "b", name="y").reference == "y@3"


def test_a_rename_counts_on_from_the_higher_of_both_names(library, sources):
    for source in "abp":
        library.add(sources / source, name="x")
    library.remove("x@2")
    library.rename("x", "y")
    library.remove("y@3")
    library.add(sources / "a", name="x")
    library.remove("x")
    library.rename("y", "z")
    assert library.add(sources / "b", name="z").reference == "z@4"


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
    (library.names / "Copy of tickets.json").write_text("no name of a library")
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
