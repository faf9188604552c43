"""What a notebook does: train on rows it holds, look at what came back, and go on from it."""

import json
import os
import sys
from html import escape
from pathlib import Path
from types import SimpleNamespace

import pytest

import veneer
from tests.support.tiny import save_tiny
from veneer.errors import ConfigError, DataError, SourceError
from veneer.files.strict_json import read_json
from veneer.library.library import Library
from veneer.report.notebook import NotebookScreen, screen_here
from veneer.training.output.records import read_records
from veneer.training.output.screen import QuietScreen
from veneer.training.state.folder import resume_config, with_absolute_paths

ROWS = [{"prompt": f"number {n}", "completion": f"it is {n}"} for n in range(12)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(save_tiny(tmp_path_factory.mktemp("base") / "base", "llama"))


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    data = {"train": ROWS, "validation": ROWS[:2]}
    out = tmp_path_factory.mktemp("runs") / "a <run>"
    return veneer.train(base, data, out=out, steps=2, batch=2, show_answers=False, quiet=True)


def test_rows_stand_in_the_runs_folder_where_a_resumed_run_finds_them(run):
    config = resume_config(run.folder)
    held_out = config.data.validation
    assert [
        json.loads(line) for line in (run.folder / "rows.jsonl").read_text().splitlines()
    ] == ROWS
    assert (config.data.train, held_out) == (
        str(run.folder / "rows.jsonl"),
        str(run.folder / "validation_rows.jsonl"),
    )


def test_a_run_is_what_its_summary_holds_and_says_where_its_results_are(run):
    assert dict(run) == read_json(run.folder / "summary.json")
    assert run["steps"] == 2 and len(run) == len(dict(run))
    assert (run.adapter, run.model, run.report) == (
        run.folder / "adapter",
        None,
        run.folder / "report.html",
    )
    assert run.report.is_file()
    for place in (run.adapter, run.report):
        assert str(place) in str(run)
    assert "2 steps" in str(run) and "held-out loss" in str(run)
    html = run._repr_html_()
    assert "a &lt;run&gt;/adapter" in html and "<run>" not in html


class Clock:
    seconds = 0.0

    def __call__(self):
        self.seconds += 1
        return self.seconds


def test_a_notebook_shows_a_run_as_it_goes_and_what_came_of_it(base, tmp_path, monkeypatch, run):
    drawn = []
    shell = SimpleNamespace(kernel=object())
    display = SimpleNamespace(
        HTML=lambda text: text, display=lambda *_, **__: SimpleNamespace(update=drawn.append)
    )
    monkeypatch.setitem(
        sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell, display=display)
    )
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    assert isinstance(screen_here(quiet=False), NotebookScreen) and isinstance(
        screen_here(quiet=True), QuietScreen
    )
    screen = NotebookScreen(drawn.append, Clock())
    for record in read_records(run.folder / "metrics.jsonl"):
        told = {
            "start": screen.start,
            "step": screen.step,
            "evaluation": screen.evaluation,
            "end": None,
        }[record["kind"]]
        if told is not None:
            told(
                {
                    **record,
                    "paths": ["<b>"],
                    "sample": {"prompt": "<i>", "expected": "e", "answer": "<script>"},
                }
            )
    screen.end(run)
    assert "step 2 of 2" in drawn[-1] and "<polyline" in drawn[-1] and "adapter" in drawn[-1]
    assert "&lt;script&gt;" in drawn[-1] and "<script" not in drawn[-1] and "<b>" not in drawn[-1]


def test_bases_adapters_libraries_and_figures_are_tables_in_a_notebook(run, tmp_path):
    library = Library(tmp_path / "<library>")
    library.add(run.adapter, name="a", note="<b>")
    loaded = run.base
    figures = veneer.evaluate(loaded, ROWS)
    for shown, said in (
        (loaded, "a <run>"),
        (next(iter(loaded.attachments.values())), "lora"),
        (library, "a@1"),
        (figures, "loss"),
    ):
        html = shown._repr_html_()
        assert (
            escape(said) in html
            and "<run>" not in html
            and "<b>" not in html
            and "<library>" not in html
        )
    assert json.loads(json.dumps(figures)) == figures


def test_the_notebook_of_the_tutorials_runs(base, tmp_path, monkeypatch):
    """Its cells one after another, without a kernel, over a tiny base."""
    page = json.loads(
        (Path(__file__).parents[1] / "docs" / "tutorials" / "notebook.ipynb").read_text()
    )
    cells = ["".join(cell["source"]) for cell in page["cells"] if cell["cell_type"] == "code"]
    assert len(cells) >= 5 and all(
        not cell["outputs"] for cell in page["cells"] if cell["cell_type"] == "code"
    )
    monkeypatch.chdir(tmp_path)
    names = {}
    for cell in cells:
        code = cell.replace("smollm2-135m", base).replace("steps=60", "steps=2")
        exec(compile(code, "notebook", "exec"), names)
    assert names["run"]["steps"] == 2 and names["tuned"]["loss"] != names["untuned"]["loss"]


def test_a_run_is_evaluated_on_the_base_it_made_its_adapter_for(run, base, tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    loaded = veneer.load(base)
    untuned = veneer.evaluate(loaded, ROWS)["loss"]
    loaded.use(loaded.load_adapter(run.folder, name="a"))
    tuned = veneer.evaluate(loaded, tmp_path / "rows.jsonl")["loss"]
    assert run.evaluate(ROWS)["loss"] == tuned == run.evaluate(tuple(ROWS))["loss"] != untuned


def test_a_run_file_names_files_so_that_they_are_found_from_any_folder(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    veneer.train(
        os.path.relpath(base),
        "rows.jsonl",
        out="run",
        steps=1,
        batch=2,
        show_answers=False,
        quiet=True,
    )
    config = resume_config(tmp_path / "run")
    assert (os.path.normpath(config.base), config.data.train) == (
        base,
        str(tmp_path / "rows.jsonl"),
    )
    mixed = {
        "train": ["rows.jsonl", {"path": "more/*.jsonl", "name": "more"}],
        "validation": "org/name",
    }
    found = with_absolute_paths(veneer.RunConfig(base="smollm2-135m", out="o", data=mixed))
    assert [(train_set.path, train_set.name) for train_set in found.data.train_sets] == [
        (str(tmp_path / "rows.jsonl"), "rows.jsonl"),
        (str(tmp_path / "more/*.jsonl"), "more"),
    ]
    assert (found.base, found.data.validation) == (
        "smollm2-135m",
        "org/name",
    ) and with_absolute_paths(found) == found


def test_progress_is_told_line_by_line_where_it_cannot_be_drawn_and_not_at_all_when_quiet(
    base, tmp_path, capsys
):
    settings = {"steps": 1, "batch": 2, "show_answers": False}
    veneer.train(base, ROWS, out=tmp_path / "a", **settings)
    said = capsys.readouterr().out
    assert f"loading {base}" in said and "step 1/1" in said and "✓" in said
    veneer.train(base, ROWS, out=tmp_path / "b", quiet=True, **settings)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"nothing": "known"}], "rows.jsonl"),
        ([ROWS[0], "a text"], "row 2 is a str"),
        ([ROWS[0], {"prompt": {1, 2}}], "row 2 is no JSON"),
        ([ROWS[0], {"prompt": float("nan")}], "row 2 is no JSON"),
    ],
)
def test_rows_that_are_none_are_refused_and_leave_no_folder(rows, said, base, tmp_path):
    for _ in range(2):
        with pytest.raises(DataError, match=said):
            veneer.train(base, rows, out=tmp_path / "run", quiet=True)
        assert not (tmp_path / "run").exists()
    with pytest.raises(DataError) as caught:
        veneer.evaluate(veneer.load(base), rows)
    assert "veneer-" not in str(caught.value), (
        "rows that were given are not called by a file that is gone"
    )


def test_files_of_rows_that_somebody_has_are_never_overwritten(base, tmp_path):
    (tmp_path / "rows.jsonl").write_text("mine")
    with pytest.raises(ConfigError, match="nothing is overwritten"):
        veneer.train(base, ROWS, out=tmp_path, quiet=True)
    assert (tmp_path / "rows.jsonl").read_text() == "mine"


def test_load_adapter_takes_what_the_command_line_takes(run, base, tmp_path):
    library = Library(tmp_path / "library")
    for _ in range(2):
        library.add(run.folder, name="tickets", tags=["best"])
    loaded = veneer.load(base, library=library)
    names = [
        loaded.load_adapter(named)
        for named in ("tickets", "tickets@1", "tickets@best", run.folder, run.adapter)
    ]
    assert names == ["tickets", "tickets@1", "tickets@best", "a <run>", "adapter"]
    values = [list(loaded.attachments[name].parameters().values()) for name in names]
    assert all((a == b).all() for others in values for a, b in zip(values[0], others, strict=True))
    with pytest.raises(SourceError, match="tickest"):
        loaded.load_adapter("tickest")


def test_prompts_in_a_list_are_answered_as_one_alone_and_say_where_they_were_cut(base):
    loaded = veneer.load(base)
    prompts = ["one", [{"role": "user", "content": "two and more"}], "three"]
    alone = [loaded.generate(prompt, max_new_tokens=4) for prompt in prompts]
    together = loaded.generate(prompts, max_new_tokens=4)
    assert isinstance(together, list) and together == alone
    assert [each.cut_after for each in together] == [each.cut_after for each in alone]
    assert {each.cut_after for each in together} <= {4, None}
    assert loaded.generate([]) == []
    assert isinstance(loaded.generate(prompts[1], max_new_tokens=1), str)
    with pytest.raises(ConfigError, match="on_text"):
        loaded.generate(prompts, on_text=print)


def test_an_answer_that_ends_by_itself_was_not_cut(base, monkeypatch):
    loaded = veneer.load(base)
    for answer, cut in (([65] * 3, None), ([65] * 4, 4)):
        monkeypatch.setattr(
            "veneer.decoding.answers.generate", lambda *_, answer=answer, **__: [answer]
        )
        assert loaded.generate("one", max_new_tokens=4).cut_after == cut


def test_an_evaluation_counts_the_answers_that_were_cut(base, tmp_path):
    file = tmp_path / "p.jsonl"
    found = veneer.evaluate(
        veneer.load(base), ROWS[:3], metrics=["exact_match"], max_new_tokens=1, predictions=file
    )
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert found["cut_answers"] == sum(line["cut"] for line in lines) == 3
    assert [line["row"] for line in lines] == ["rows:1", "rows:2", "rows:3"]
