"""veneer adapters: screens, JSON and exit codes."""

import json
import re
import shlex
import shutil

import pytest

from tests.support.adapter_files import adapted, edit_config, write
from tests.support.helpers import filled_lora
from tests.support.tiny import save_tiny
from veneer.cli.main import main
from veneer.errors import CorruptFileError, SourceError, VeneerError
from veneer.formats.adapter import WEIGHTS_NAME, manifest_for, write_adapter
from veneer.library.library import Library
from veneer.models.load import load_base

# the command line


def adapters(library: Library, *arguments: str) -> int:
    return main(["adapters", *arguments, "--library", str(library.folder)])


def test_every_action_prints_json_alone_on_stdout(library, sources, capsys):
    def printed(*arguments: str):
        assert adapters(library, *arguments, "--json") == 0
        return json.loads(capsys.readouterr().out)

    assert printed("add", str(sources / "a"), "--name", "x", "--tag", "best")["reference"] == "x@1"
    assert printed("add", str(sources / "b"))["reference"] == "b@1"
    assert [entry["name"] for entry in printed("ls")] == ["b", "x"]
    printed("add", str(sources / "b"), "--name", "trial-0123")
    assert [entry["name"] for entry in printed("ls")] == ["b", "x"], "the studio has not kept it"
    assert [entry["name"] for entry in printed("ls", "--name", "trial-*")] == ["trial-0123"]
    printed("rm", "trial-0123")
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
    assert [entry["reference"] for entry in printed("rm", "c")] == ["c@1"]
    assert printed("gc", "--yes")["removed"] is True


@pytest.fixture
def odd_place(sources, tmp_path, monkeypatch, capsys):
    """Returns a function that runs an action in a library with a space in its name, and one that
    runs the command that was printed after the given words."""
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "p"):
        shutil.copytree(sources / name, tmp_path / f"my {name}")
    library = Library("my library")

    def run(*words: str) -> str:
        main(["adapters", *words, "--library", "my library"])
        said = capsys.readouterr()
        return said.out + said.err

    def run_printed(said: str, before: str, **replaced: str) -> Library:
        command = re.search(rf"{before}: (veneer adapters .*)", said)[1]
        words = [replaced.get(word, word) for word in shlex.split(command)]
        assert main(words[1:]) == 0
        capsys.readouterr()
        return library

    return run, run_printed


def test_the_printed_command_deletes_what_was_listed_and_no_more(odd_place):
    run, run_printed = odd_place
    for number in range(5):
        run("add", f"my {'ab'[number % 2]}", "--name", "x")
    said = run("gc", "--keep", "3")
    listed = re.findall(r"x@\d", said)
    assert listed == ["x@1", "x@2"]
    library = run_printed(said, "To delete them")
    left = [entry.reference for entry in library.entries(every_version=True)]
    assert left == ["x@3", "x@4", "x@5"]


def test_the_printed_commands_bring_a_removed_version_back_or_list_its_files(odd_place, capsys):
    run, run_printed = odd_place
    run("add", "my a", "--name", "x", "--tag", "best", "--note", "as it was")
    before = Library("my library").get("x").version
    said = run("rm", "x")
    after = run_printed(said, "to add x@1 again as the next version").get("x").version
    assert (after.object, after.tags, after.note) == (before.object, ["best"], "as it was")
    said = run("rm", "x")
    command = re.search("veneer (adapters gc .*)", said)[1]
    assert main(shlex.split(command)) == 0
    assert "unused: 1 object," in capsys.readouterr().out


@pytest.mark.parametrize("action", ["add", "pull"])
def test_the_printed_command_checks_that_an_adapter_fits(action, odd_place, tmp_path):
    run, run_printed = odd_place
    Library(tmp_path / "other").add("my p", name="x")
    words = {"add": ["my p", "--name", "x"], "pull": ["other", "x"]}[action]
    said = run(action, *words)
    save_tiny(tmp_path / "base", "llama_untied")
    library = run_printed(said, "To check that it fits", B="base")
    assert library.get("x").version.facts.base_proof == "stated"


def test_the_printed_commands_add_to_a_library_that_is_new_or_empty(odd_place, sources):
    run, run_printed = odd_place
    library = run_printed(run("ls"), "Make one", ADAPTER=str(sources / "a"))
    assert library.has("a")
    run("rm", "a")
    run_printed(run("ls"), "To add one", **{"runs/RUN": "my a", "NAME": "x"})
    assert library.has("x")


def test_no_library_is_advised_where_another_file_is(tmp_path, capsys):
    (tmp_path / "rows.jsonl").touch()
    assert main(["adapters", "ls", "--library", str(tmp_path / "rows.jsonl")]) == 2
    assert "Give the folder of a library, or a new one." in capsys.readouterr().err


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


@pytest.mark.parametrize(
    "base", ["evil\n$(x)\t\u2028\x1b[2J", "y" * 4000], ids=["controls", "long"]
)
def test_a_base_is_one_short_line_whatever_the_files_name(library, sources, tmp_path, capsys, base):
    folder = shutil.copytree(sources / "p", tmp_path / "p")
    edit_config(folder, base_model_name_or_path=base)
    assert adapters(library, "add", str(folder), "--name", "stranger") == 0
    assert adapters(library, "ls") == 0
    assert adapters(library, "show", "stranger") == 0
    screen = capsys.readouterr().out
    assert "\n$(x)" not in screen and not set("\t\u2028\x1b") & set(screen)
    assert max(map(len, screen.splitlines())) < 300
    edit_config(folder, base_model_name_or_path="y" * 4097)
    with pytest.raises(CorruptFileError, match="has 4,097 characters, the limit is 4,096"):
        library.add(folder, name="longer")


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
