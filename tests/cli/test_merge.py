"""merge, combine, extract, export and lint as typed: what they print, what they write, how they
end."""

import json
import re
import shutil

import pytest

from tests.support.go_template import read_modelfile
from tests.support.helpers import fill
from tests.support.tiny import save_tiny
from veneer.adapters.attach import attach
from veneer.adapters.config import LoRA
from veneer.cli.main import main
from veneer.formats.adapter import manifest_for, write_adapter
from veneer.formats.manifest import MANIFEST_NAME
from veneer.library.library import Library
from veneer.models.load import load_base
from veneer.training.output.records import Records


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A base and two adapters in the working folder; the second has what vLLM would ignore."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    folder = save_tiny(tmp_path / "base", "llama_untied")
    base = load_base(str(folder))
    for number, (name, fields) in enumerate(
        {"a": {}, "b": {"rslora": True, "rank_pattern": {"v_proj": 2}}}.items()
    ):
        adapter = attach(
            base.model,
            LoRA(rank=4, alpha=7, **fields),
            name=name,
            routing=base.routing,
            head=base.model.get_output_embeddings(),
        )
        fill(adapter.parameters().values(), seed=number, scale=0.2)
        write_adapter(tmp_path / name, adapter, manifest_for(base, method="lora"), model=base.model)
    return tmp_path


def test_merge_prints_what_is_left_and_how_the_logits_compare(made, capsys):
    assert main(["merge", "--adapter", "a", "--out", "m"]) == 0
    said = capsys.readouterr().out
    assert "sums in float32" in said and "of it is left after rounding" in said
    assert re.search(r"rounding adds an error of \S+% of the weights' size", said)
    assert "logits against the adapter on its base" in said and "same first choice 100.0%" in said
    assert all(len(line) <= 80 for line in said.splitlines())
    assert (made / "m" / "model.safetensors").is_file()


def test_merge_json_has_every_layer_and_nothing_else_on_stdout(made, capsys):
    assert (
        main(["merge", "--adapter", "a", "b", "--weights", "1", "-0.5", "--out", "m", "--json"])
        == 0
    )
    report = json.loads(capsys.readouterr().out)
    assert report["layers"].keys() == {"0", "1"}
    assert report["survival"]["survival"] == pytest.approx(1, abs=1e-4)
    assert report["logits"]["mean_effect"] > 0.1


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (
            ["merge", "--adapter", "a", "b", "--weights", "1", "--out", "m"],
            "2 adapters and 1 weights",
        ),
        (
            ["merge", "--adapter", "a", "--adapter", "b", "--weights", "1", "--out", "m"],
            "2 adapters and 1 weights",
        ),
        (
            ["combine", "a", "b", "--weights", "1", "2", "--weights", "3", "--out", "c"],
            "2 adapters and 3 weights",
        ),
        (
            ["evaluate", "--adapter", "a", "--adapter", "b", "--data", "rows.jsonl"],
            "veneer evaluate: --adapter: takes one value, and is given several times",
        ),
        (["merge", "--adapter", "a", "--into", "original", "--out", "m"], "is not quantised"),
        (["combine", "a", "b", "--rank", "3", "--out", "c"], "keeps the exact sum"),
        (
            ["extract", "--base", "base", "--model", "base", "--out", "e"],
            "either a rank or an energy share",
        ),
        (["export", "a", "--to", "vllm", "--merged", "--out", "v"], "--merged: use veneer merge"),
        (
            ["export", "a", "--to", "llamacpp", "--type", "q8_0", "--out", "v.gguf"],
            "adapters are f32, f16, bf16",
        ),
        (
            ["export", "a", "--to", "llamacpp", "--type", "bf16", "--out", "v.gguf"],
            "a .gguf adapter is f32 or f16",
        ),
        (["export", "a", "--to", "llamacpp", "--out", "v"], "v.gguf"),
    ],
)
def test_what_does_not_go_together_is_told_and_nothing_is_written(typed, said, made, capsys):
    before = sorted(path.name for path in made.iterdir())
    assert main(typed) == 2
    assert said in capsys.readouterr().err
    assert sorted(path.name for path in made.iterdir()) == before


@pytest.mark.parametrize("command", ["merge --adapter", "combine"])
@pytest.mark.parametrize("second", ["a", "copy", "kept", "foreign"])
def test_two_names_of_one_adapter_are_refused(command, second, made, capsys):
    shutil.copytree("a", "copy")
    shutil.copytree("a", "foreign")
    (made / "foreign" / MANIFEST_NAME).unlink()
    Library(made / "library").add("a", name="kept")
    words = [*command.split(), "a", "b", second, "--library", "library", "--out", "out"]
    assert main(words) == 2
    assert f"a and {second} are the same adapter" in capsys.readouterr().err
    assert not (made / "out").exists()


def test_combine_prints_its_error(made, capsys):
    assert main(["combine", "a", "b", "--how", "svd", "--rank", "2", "--out", "c"]) == 0
    assert "of the exact weighted sum of the updates" in capsys.readouterr().out
    assert main(["combine", "a", "b", "--out", "d", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["error"] == 0


def test_extract_prints_the_error_by_kind_of_module(made, capsys):
    assert main(["merge", "--adapter", "a", "--out", "m", "--json"]) == 0
    capsys.readouterr()
    assert main(["extract", "--base", "base", "--model", "m", "--rank", "2", "--out", "e"]) == 0
    said = capsys.readouterr().out
    assert "q_proj" in said and "all" in said and "the fine-tuned model" in said
    assert all(len(line) <= 80 for line in said.splitlines())


def test_lint_ends_with_4_where_something_would_go_wrong(made, capsys):
    assert main(["lint", "b", "--for", "vllm"]) == 4
    said = capsys.readouterr().out
    assert "silently wrong" in said and "veneer export --to vllm" in said
    assert main(["lint", "a", "--for", "vllm"]) == 0
    capsys.readouterr()
    assert main(["export", "b", "--to", "vllm", "--out", "v"]) == 0
    assert main(["lint", "v", "--for", "vllm"]) == 0
    capsys.readouterr()
    assert main(["lint", "b", "--for", "llamacpp", "--json"]) == 4
    assert {finding["silent"] for finding in json.loads(capsys.readouterr().out)["findings"]} == {
        True
    }


@pytest.mark.parametrize(
    "typed", [["--out", "x.gguf"], ["--merged", "--type", "q8_0", "--out", "x.gguf"]]
)
def test_export_writes_a_gguf_file_and_says_so(typed, made, capsys):
    assert main(["export", "a", "--to", "llamacpp", *typed]) == 0
    assert "x.gguf: " in capsys.readouterr().out
    assert (made / "x.gguf").read_bytes()[:4] == b"GGUF"


def test_export_to_ollama_writes_model_modelfile_and_card(made, capsys):
    assert main(["export", "a", "--to", "ollama", "--type", "q8_0", "--out", "Served Here"]) == 0
    said = capsys.readouterr().out
    assert "$ ollama create served-here -f 'Served Here/Modelfile'" in said
    facts = dict(read_modelfile((made / "Served Here" / "Modelfile").read_text()))
    assert facts["FROM"] == "./model.gguf" and facts["stop"] == "<|im_end|>"
    assert (made / "Served Here" / "model.gguf").read_bytes()[:4] == b"GGUF"
    assert "ollama run served-here" in (made / "Served Here" / "README.md").read_text()
    assert main(["lint", "a", "--for", "ollama"]) == 0


def test_a_held_out_row_stands_in_the_card_only_where_it_is_asked_for(made):
    shutil.copytree(made / "a", made / "run" / "adapter")
    sample = {"prompt": "what a customer asked", "expected": "e", "before": "b"}
    with Records(made / "run" / "metrics.jsonl") as records:
        for step, loss in ((0, 3.0), (1, 2.0), (2, 4.0)):
            fields = {"step": step, "loss": loss, "best": step == 1, "seconds": 2.0}
            sample["answer"] = f"as of step {step}"
            records.write({"kind": "evaluation", **fields, "sample": dict(sample)})
    (made / "run" / "summary.json").write_text('{"best_step": 1}')
    for typed, shown in ([], False), (["--sample"], True):
        out = f"out{len(typed)}"
        assert main(["export", "run", "--to", "peft", "--out", out, *typed]) == 0
        card = (made / out / "README.md").read_text()
        assert ("what a customer asked" in card) is shown
        assert ("as of step 1" in card) is shown, "the answer of the values that were kept"
        assert "as of step 2" not in card


def test_a_rounded_file_says_what_its_error_is_beside_the_base_rounded_alike(made, capsys):
    assert (
        main(["export", "a", "--to", "llamacpp", "--merged", "--type", "q8_0", "--out", "m.gguf"])
        == 0
    )
    said = " ".join(capsys.readouterr().out.split())
    pattern = r"an error of (\S+)% of the weights.* q8_0 gives an error of (\S+)%"
    found = re.search(pattern, said)
    assert found is not None
    error, base = found.groups()
    # Blocks of 32 values of one size, whose largest is 127 steps: half a step at most, evenly
    # spread.
    assert 0.2 < float(error) < 0.8 and float(base) == pytest.approx(float(error), rel=0.2)
    assert "veneer evaluate --base FILE.gguf" in said


def test_a_type_that_llama_cpp_makes_is_made_by_its_program_or_refused(made, capsys, monkeypatch):
    """Beside it stands a program of that name that keeps the file as it is: what is left is read
    out of its result."""
    typed = [
        "export",
        "a",
        "--to",
        "llamacpp",
        "--merged",
        "--type",
        "q4_k_m",
        "--out",
        "m.gguf",
        "--json",
    ]
    monkeypatch.setenv("PATH", str(made))
    assert main(typed) == 2 and "llama-quantize" in capsys.readouterr().err
    tool = made / "llama-quantize"
    tool.write_text('#!/bin/sh\n[ "$3" = Q4_K_M ] && /bin/cp "$1" "$2"\n')
    tool.chmod(0o755)
    assert main(typed) == 0
    assert json.loads(capsys.readouterr().out)["survival"] == pytest.approx(1, abs=0.01)
    tool.write_text("#!/bin/sh\necho no such type >&2\nexit 1\n")
    assert main([*typed[:-2], "n.gguf"]) == 4 and "no such type" in capsys.readouterr().err
    assert not [path for path in made.iterdir() if "n.gguf" in path.name]
