"""report.html: made from a run folder alone, nothing loaded, nothing run, nothing lost."""

import json
import re
from html.parser import HTMLParser

import pytest
import yaml
from markdown_it import MarkdownIt

from veneer.errors import CorruptFileError, SourceError, VeneerError
from veneer.formats.manifest import BaseIdentity, Figure, HeldOut, Manifest, SetHeldOut
from veneer.report import page
from veneer.report.card import licence_of, model_card
from veneer.report.page import write_report
from veneer.report.plots import Series, label, line_chart, smooth, thin, ticks
from veneer.report.preferences import preference_section
from veneer.training.config import RunConfig
from veneer.training.output.records import Records

HOSTILE = '<script>alert("1")</script><img src=http://evil.example/x onerror=alert(1)>\' & "'
STEPS = 40


def run_folder(
    tmp_path,
    *,
    steps: int = STEPS,
    text: str = "plain",
    summary: str | None = None,
    **settings: object,
):
    folder = tmp_path / "run"
    folder.mkdir()
    config = RunConfig.model_validate(
        {"base": text, "data": text, "out": str(folder), "batch": 3, **settings}
    )
    (folder / "run.yaml").write_text(
        yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    )
    with Records(folder / "metrics.jsonl") as records:
        records.write(
            {
                "kind": "start",
                "base": text,
                "method": text,
                "steps": steps,
                "trainable_parameters": 4_884_480,
                "total_parameters": 139_400_000,
                "modules_adapted": 210,
                "modules_total": 210,
                "adapter_bytes": 19_590_000,
                "train_rows": 1144,
                "validation_rows": 60,
                "time": 1.7e9,
            }
        )
        for step in range(steps + 1):
            if step:
                records.write(
                    {
                        "kind": "step",
                        "step": step,
                        "loss": None if step == 7 else 2 / step,
                        "gradient_norm": 1.0,
                        "learning_rate": 1e-3,
                        "tokens": 100,
                        "trained_tokens": 25,
                        "seconds": 0.5,
                        "memory_bytes": 1_300_000_000,
                    }
                )
            if step % 20 == 0:
                sample = {
                    "prompt": text,
                    "expected": text,
                    "answer": f"{text} {step}",
                    "before": f"{text} before",
                }
                loss = 2 - step / 40
                records.write(
                    {
                        "kind": "evaluation",
                        "step": step,
                        "loss": loss,
                        "best": True,
                        "seconds": 2.0,
                        "sample": sample,
                    }
                )
        records.write({"kind": "end", "reason": "done"})
    if summary is not None:
        (folder / "summary.json").write_text(summary)
    return folder


def page_of(folder) -> str:
    return write_report(folder).read_text(encoding="utf-8")


class Tags(HTMLParser):
    """Every tag and attribute that a browser would see."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.words.append(data)


def test_nothing_from_users_or_models_becomes_a_tag(tmp_path):
    folder = run_folder(tmp_path, text=HOSTILE, summary='{"versions": {"<b>x</b>": "<script>"}}')
    seen = Tags(page_of(folder))
    assert not {"script", "img", "b "} & set(seen.tags)
    assert not [
        name for name, _ in seen.attributes if name.startswith("on") or name in ("src", "href")
    ]
    text = "".join(seen.words)
    assert HOSTILE in text  # shown, as text
    assert f"{HOSTILE} before" in text


def test_the_page_refers_to_nothing_outside_itself(tmp_path):
    page = page_of(run_folder(tmp_path))
    assert not re.search(r"https?:|//\w|url\(|@import|<link|<script", page)


def test_the_page_says_what_the_time_of_several_processes_went_into(tmp_path):
    summary = '{"tokens_per_second": 1602.4, "seconds_by_part": {"compute": 9.0, "wait": 1.0}}'
    text = "".join(Tags(page_of(run_folder(tmp_path, summary=summary))).words)
    assert "compute 90% · wait 10%" in text


def test_the_page_says_what_the_run_was(tmp_path):
    summary = (
        '{"peak_memory_bytes": 1310000000, "planned_memory_bytes": 1280000000, "tokens_per_second":'
        " 1602.4}"
    )
    text = " ".join("".join(Tags(page_of(run_folder(tmp_path, summary=summary))).words).split())
    for fact in (
        "plain on plain · 40 of 40 steps",
        "finished",
        "1.00held-out loss, best",
        "1,602tokens per second",
        "0:20training time",
        "1.31 GBpeak memory",
        "4.88 Mtrainable parameters3.5% of the base",
        "210 of 210modules adapted",
        "The plan was 2.3% below what was measured.",
        "rows to train on1,144",
        "of these trained on1,000 (25%)",
        "plain before",
        "after 40 steps",
        "answers at other steps",
    ):
        assert fact in text, fact


def test_the_answer_shown_is_that_of_the_values_that_were_kept(tmp_path):
    text = "".join(Tags(page_of(run_folder(tmp_path, summary='{"best_step": 20}'))).words)
    assert "after 20 stepsplain 20" in text
    assert "step 40plain 40" in text


def test_the_recipe_shows_what_differs_from_the_defaults_and_folds_the_rest(tmp_path):
    method = {"name": "lora", "rank": 3}
    page = page_of(run_folder(tmp_path, method=method, learning_rate=2e-4))
    recipe = page[page.index("<h2>Recipe") : page.index("<h2>Run it again")]
    changed, folded = recipe.split("<details>")
    rows = dict(re.findall(r"<tr><td>(.*?)</td><td>(.*?)</td>", changed))
    assert {name: rows[name] for name in ("batch", "method.rank", "learning_rate")} == {
        "batch": "3",
        "method.rank": "3",
        "learning_rate": "0.0002",
    }
    assert "method.alpha" not in rows
    assert "<td>method.alpha</td><td>32.0</td>" in folded
    assert set(rows) == {"base", "data.train", "method.rank", "batch", "learning_rate", "out"}


def test_the_command_to_repeat_is_quoted_for_a_shell(tmp_path):
    folder = run_folder(tmp_path)
    odd = folder.rename(tmp_path / "a run; rm -rf")
    assert f"veneer train &#x27;{odd}/run.yaml&#x27; --out &#x27;{odd}-again&#x27;" in page_of(odd)


def test_a_run_that_was_cut_short_has_a_report_too(tmp_path):
    folder = run_folder(tmp_path)
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:12]) + '{"kind": "st')
    page = page_of(folder)
    assert "not finished" in page
    assert "9 of 40 steps" in page or "10 of 40 steps" in page


def test_a_run_with_no_step_has_a_report_too(tmp_path):
    assert "0 of 0 steps" in page_of(run_folder(tmp_path, steps=0))


def test_a_folder_that_is_no_run_is_refused_with_what_is_missing(tmp_path):
    with pytest.raises(SourceError) as caught:
        write_report(tmp_path)
    assert len(caught.value.faults) == 2


def test_broken_records_are_refused(tmp_path):
    folder = run_folder(tmp_path)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("nonsense\n")
    with pytest.raises(CorruptFileError):
        write_report(folder)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("run.yaml", "- a"),
        ("run.yaml", "a: " + "[" * 600 + "]" * 600),
        ("run.yaml", "a: " + "[" * 6000),
        (
            "run.yaml",
            "a0: &a0 [x]\n"
            + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 60)),
        ),
        ("run.yaml", "a: &a [*a]"),
        ("run.yaml", "a: 2024-13-45"),
        ("run.yaml", "\x00"),
        ("summary.json", "[]"),
        ("summary.json", '{"versions": 3, "seconds": "x"}'),
        ("metrics.jsonl", '{"kind": "step"}\n'),
        ("metrics.jsonl", '{"kind": "step", "step": "a", "loss": {}, "seconds": []}\n'),
        ("metrics.jsonl", '{"kind": "start", "paths": 3, "steps": "x"}\n'),
    ],
)
def test_a_folder_that_somebody_changed_is_refused_and_no_bug_of_ours(tmp_path, file, content):
    folder = run_folder(tmp_path)
    (folder / file).write_text(content)
    with pytest.raises(VeneerError) as caught:
        write_report(folder)
    assert caught.value.exit_code in (2, 4)


def test_the_same_run_gives_the_same_page_and_leaves_no_other_file(tmp_path):
    folder = run_folder(tmp_path)
    first = write_report(folder).read_bytes()
    assert write_report(folder).read_bytes() == first
    assert sorted(path.name for path in folder.iterdir()) == [
        "metrics.jsonl",
        "report.html",
        "run.yaml",
    ]


def test_a_long_run_makes_a_small_page(tmp_path):
    assert len(page_of(run_folder(tmp_path, steps=20_000))) < 300_000


def test_the_time_of_a_page_grows_with_the_steps_and_no_faster(tmp_path, monkeypatch):
    """A million steps took an hour: each mean is over a fiftieth of them."""
    taken = 0

    class Counted(list):
        def __getitem__(self, key):
            nonlocal taken
            found = super().__getitem__(key)
            taken += len(found) if isinstance(key, slice) else 1
            return found

    monkeypatch.setattr(page, "smooth", lambda values, *of, **a: smooth(Counted(values), *of, **a))
    page_of(run_folder(tmp_path, steps=20_000))
    assert 0 < taken < 30 * 20_000


def test_the_held_out_loss_shown_is_that_of_the_values_that_were_kept(tmp_path):
    """A run that only makes the held-out loss worse keeps its best step, not what it began with."""
    folder = run_folder(tmp_path, steps=0)
    with (folder / "metrics.jsonl").open("a") as file:
        for step, loss in ((20, 9.5), (40, 7.25)):
            record = {"kind": "evaluation", "step": step, "loss": loss, "seconds": 1.0}
            file.write(json.dumps(record) + "\n")
    assert "<b>7.25</b><span>held-out loss, best</span><small>first 2.00" in page_of(folder)
    (folder / "summary.json").write_text('{"best_step": 20, "validation_loss": 9.5}')
    assert "<b>9.50</b><span>held-out loss, best</span><small>step 20 · first" in page_of(folder)
    (tmp_path / "begun").mkdir()
    begun = page_of(run_folder(tmp_path / "begun", steps=0))
    assert "<b>2.00</b><span>held-out loss before step 1</span>" in begun


def test_a_chart_draws_each_point_where_it_belongs():
    chart = line_chart(
        [Series("a", [(0, 1.0), (10, 0.0)], "a")], title="t", x_label="x", y_label="y"
    )
    first, last = re.search(r'polyline class="line a" points="([^"]*)"', chart)[1].split()
    assert float(first.split(",")[0]) < float(last.split(",")[0])
    assert float(first.split(",")[1]) < float(last.split(",")[1])  # y grows downwards
    assert ">y</text>" in chart
    assert ">x</text>" in chart


def test_a_value_that_is_not_finite_leaves_a_gap():
    points = [(0, 1.0), (1, 2.0), (2, None), (3, 1.0), (4, 2.0)]
    chart = line_chart([Series("a", points, "a")], title="t", x_label="x", y_label="y")
    assert chart.count("<polyline") == 2 * 2  # two runs, in the wide and in the narrow drawing


def test_the_lines_of_the_scores_of_preferences_differ():
    accuracy = {"value": 0.5, "low": None, "high": None}
    scores = {"chosen": 0.1, "rejected": -0.1, "accuracy": accuracy}
    steps = [{"step": step, "preference": scores} for step in (1, 2)]
    keys = re.findall('class="key ([^"]+)"', preference_section(steps, steps))
    assert len(set(keys)) == len(keys) == 4


def test_a_chart_without_points_is_nothing():
    assert line_chart([Series("a", [(0, None)], "a")], title="t", x_label="x", y_label="y") == ""


def test_thinning_keeps_spikes_gaps_and_ends():
    points = [(x, None if x == 5000 else 1.0) for x in range(10_000)]
    points[1234] = (1234, 99.0)
    thinned = thin(points)
    assert len(thinned) <= 510
    assert (1234, 99.0) in thinned
    assert (5000, None) in thinned
    assert thinned[0][0] < 50
    assert thinned[-1][0] > 9950


def test_smoothing_keeps_constants_and_does_not_lag():
    assert smooth([2.0] * 9, 3) == [2.0] * 9
    assert smooth([float(x) for x in range(9)], 3) == [float(x) for x in range(9)]
    assert smooth([1.0, None, 3.0], 1) == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0, 300, [0, 100, 200, 300]),
        (2.1, 2.9, [2.2, 2.4, 2.6, 2.8]),
        (5, 5, [5]),
    ],
)
def test_ticks_are_round_numbers_within_the_range(low, high, wanted):
    assert ticks(low, high, 4) == pytest.approx(wanted)


def test_labels_are_short():
    assert [label(v) for v in (0, 2.5, 1200, 2e-4, 0.05)] == ["0", "2.5", "1,200", "2e-4", "0.05"]


def test_a_model_card_is_the_hub_s_and_holds_strangers_in_code(tmp_path):
    hostile = "a | b\n---\nlicense: mit\n```\n<script>alert(1)</script> ``x`` [x](javascript:1)"
    manifest = Manifest(
        veneer_version="1",
        method="lora",
        base=BaseIdentity(name=hostile, fingerprint={"weights_hash": "abc"}),
        data_fingerprint=hostile,
        system=hostile,
        recipe={"out": hostile, "method": {"name": "lora", "rank": 5}},
    )
    figures = {
        "rows": 40,
        "loss": 0.5,
        "exact_match": 0.25,
        hostile: 0.5,
        "data": hostile,
        "intervals": {"exact_match": [0.1, 0.4]},
    }
    sample = {"prompt": hostile, "expected": hostile, "before": hostile, "answer": hostile}
    text = model_card(
        manifest, name=hostile, commands=["veneer chat"], figures=figures, sample=sample
    )
    _, head, body = text.split("---\n", 2)
    assert yaml.safe_load(head) == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["veneer", "lora"],
    }
    page = MarkdownIt().enable("table").render(body)
    assert "<script>" not in page and "href" not in page
    assert "<td><code>0.250</code></td>\n<td><code>0.100 to 0.400</code></td>" in page
    assert page.count("<h2>") == 6 and "method.rank" in page


@pytest.mark.parametrize(
    "figures", [None, {"rows": 4, "loss": 0.5, "intervals": {"loss": [0.4, 0.6]}}]
)
def test_a_card_says_what_training_measured_with_intervals(figures):
    measured = {
        "rows": 9,
        "loss": Figure(value=0.5, low=0.25, high=0.75),
        "before": Figure(value=2.0, low=1.5, high=2.5),
    }
    change = Figure(value=-1.5, low=-1.75, high=-1.25)
    found = HeldOut(tokens=1234, change=change, sets={"x|<b>": SetHeldOut(**measured)}, **measured)
    identity = BaseIdentity(name="b", fingerprint={"weights_hash": "w"})
    manifest = Manifest(
        veneer_version="1",
        method="lora",
        base=identity,
        held_out=found,
        metrics={"validation_loss": 0.5},
    )
    text = model_card(manifest, name="a", commands=["x"], figures=figures)
    for line in (
        "held-out loss before | `2.00` | `1.50 to 2.50`",
        "held-out loss after | `0.500` | `0.250 to 0.750`",
        "held-out loss change | `-1.50` | `-1.75 to -1.25`",
        "`held-out loss of x\\|<b> after` | `0.500` | `0.250 to 0.750`",
    ):
        assert line in text
    assert "over 9 rows, 1,234 tokens" in text and ("`0.400 to 0.600`" in text) == (
        figures is not None
    )
    assert text.count("## Figures") == 1 and "no interval" not in text
    older = manifest.model_copy(update={"held_out": None})
    assert "Held-out loss 0.500 nats a token, as training measured it; no interval" in model_card(
        older, name="a", commands=["x"]
    )


def test_the_licence_of_a_stranger_s_file_is_read_within_what_the_file_holds(tmp_path):
    announced = b"GGUF" + (3).to_bytes(4, "little") + (2**50).to_bytes(8, "little") * 2 + b"\0" * 25
    (tmp_path / "base.gguf").write_bytes(announced)
    with pytest.raises(CorruptFileError, match="not a complete"):
        licence_of(str(tmp_path / "base.gguf"))


def test_the_card_names_the_licence_of_a_named_default():
    manifest = Manifest(
        veneer_version="1",
        method="lora",
        base=BaseIdentity(name="smollm2-135m", fingerprint={"weights_hash": "w"}),
    )
    text = model_card(manifest, name="a", commands=["x"], licence=licence_of("smollm2-135m"))
    assert "\nlicense: apache-2.0\n" in text and text.endswith("The base's: `apache-2.0`.\n")


@pytest.mark.parametrize(
    "head",
    [
        "---\nlicense: mit\ndate: 2024-13-45\n---\n",
        "---\n" + "[" * 5000 + "\n---\n",
        "---\nlicense: &a mit\nother: *a\n---\n",
        "---\n[license]: mit\n---",
        "---\n- license\n---",
        "---" + "\n" * 50_000,
        "license: mit",
    ],
)
def test_a_stranger_s_card_without_a_head_that_can_be_read_names_no_licence(head, tmp_path):
    (tmp_path / "README.md").write_text(head)
    assert licence_of(str(tmp_path)) is None
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n" + head)
    assert licence_of(str(tmp_path)) == "mit"


@pytest.mark.parametrize("base", ["a" * 5000, "a\0b", "", "nowhere"])
def test_a_base_that_is_no_folder_names_no_licence(base):
    assert licence_of(base) is None


@pytest.mark.parametrize(
    "figures",
    [
        {"rows": "x"},
        {"rows": [1]},
        {"rows": None},
        {"loss": 10**400},
        {"loss": 1.0, "intervals": {"loss": [10**400, 1]}},
    ],
)
def test_figures_that_are_none_are_refused(figures):
    manifest = Manifest(
        veneer_version="1", method="lora", base=BaseIdentity(name="a", fingerprint={})
    )
    with pytest.raises(CorruptFileError, match="not figures of veneer evaluate"):
        model_card(manifest, name="a", commands=[], figures=figures)
