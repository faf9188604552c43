"""What a run shows: the facts before step 1, figures that are true, nothing that a terminal would
obey."""

import io

import pytest
from rich.console import Console

from veneer.training.output.job_screen import make_job_screens
from veneer.training.output.screen import (
    LiveScreen,
    PlainScreen,
    StepFigures,
    end_lines,
    make_screen,
    start_lines,
)
from veneer.wording import clock, cut, folded, millions, number, percent, shown, size

INFO = {
    "base": "smollm2-135m",
    "method": "lora",
    "steps": 40,
    "train_rows": 1144,
    "validation_rows": 60,
    "trainable_parameters": 4_884_480,
    "total_parameters": 139_400_000,
    "modules_adapted": 210,
    "optimizer": "adamw",
    "modules_total": 210,
    "adapter_bytes": 19_590_000,
    "paths": ["packed rows", "shared prompt (57 tokens)"],
}
SUMMARY = {
    "first_loss": 2.5,
    "last_loss": 0.25,
    "validation_loss": 0.31,
    "tokens_per_second": 1602.4,
    "peak_memory_bytes": 1.31e9,
    "adapter": "runs/t/adapter",
    "adapter_bytes": 19_590_000,
    "adapter_sha256": "9f3c" * 16,
}
SAMPLE = {
    "prompt": "what is 2+2?",
    "expected": '{"sum": 4}',
    "answer": '{"sum": 5}',
    "before": None,
}


def step(number: int, **changes: object) -> dict[str, object]:
    loss = 2.0 / number
    return {
        "kind": "step",
        "step": number,
        "loss": loss,
        "tokens": 900,
        "seconds": 0.5,
        "memory_bytes": 13e8,
    } | changes


def evaluation(
    number: int, loss: float | None, sample: dict[str, object] | None = None
) -> dict[str, object]:
    return {
        "kind": "evaluation",
        "step": number,
        "loss": loss,
        "best": True,
        "seconds": 1.0,
        "sample": sample,
    }


def shown_by(kind: type[LiveScreen] | type[PlainScreen], width: int = 80) -> str:
    out = io.StringIO()
    screen = kind(
        Console(file=out, width=width, force_terminal=kind is LiveScreen, highlight=False)
    )
    screen.start(INFO)
    screen.evaluation(evaluation(0, 2.4, SAMPLE))
    for each in range(1, 41):
        screen.step(step(each))
    screen.evaluation(evaluation(40, 0.31, SAMPLE))
    screen.message("largest batch fits")
    screen.end(SUMMARY)
    screen.close()
    return out.getvalue()


@pytest.mark.parametrize("kind", [PlainScreen, LiveScreen])
def test_before_step_1_it_says_what_is_trained_and_how(kind):
    text = " ".join(shown_by(kind).split())
    before = text[: text.index("held-out loss")]
    for fact in (
        "210 of 210 modules adapted",
        "4.88 M trainable (3.5%)",
        "19.6 MB on disk",
        "78.2 MB in memory",  # 16 bytes a parameter: value, gradient, two moments
        "1,144 rows to train on · 60 held out",
        "packed rows · shared prompt (57 tokens)",
    ):
        assert fact in before, fact


def test_full_fine_tuning_says_that_every_weight_trains():
    info = INFO | {
        "method": "full",
        "modules_adapted": None,
        "modules_total": None,
        "adapter_bytes": None,
    }
    facts = start_lines(info | {"trainable_parameters": 139_400_000})[1]
    assert facts == "  every weight trains · 139 M trainable (100%) · 2.23 GB in memory"
    facts = start_lines(info | {"trainable_parameters": 139_400_000, "optimizer": "adamw8bit"})[1]
    assert facts.endswith("1.40 GB in memory")


def test_the_end_says_where_the_result_is():
    assert end_lines(SUMMARY) == [
        "  loss 2.50 → 0.250 · held-out loss 0.310 · 1,602 tokens/s · peak 1.31 GB",
        "  ✓ runs/t/adapter · 19.6 MB · sha256 9f3c9f3c9f3c…",
    ]


def test_a_loss_that_did_not_change_is_one_figure():
    assert end_lines({**SUMMARY, "last_loss": 2.501})[0].startswith("  loss 2.50 · ")


def test_a_few_jobs_say_each_sentence_once(capsys):
    names = [f"job{place}" for place in range(6)]
    for place, screen in enumerate(make_job_screens(names)):
        screen.start({**INFO, "train_rows": 1100 + place})
        screen.message(f"largest batch fits: 2 rows, up to {30 + place} tokens")
    shown_lines = [" ".join(line.split()[1:]) for line in capsys.readouterr().out.splitlines()]
    assert len(shown_lines) == len(set(shown_lines))
    assert sum("rows to train on" in line for line in shown_lines) == len(names)
    assert sum("modules adapted" in line for line in shown_lines) == 1
    assert sum("largest batch fits" in line for line in shown_lines) == 1


def test_the_end_says_what_the_held_out_loss_was_and_how_sure_it_is():
    held_out = {"loss": {"low": 0.25, "high": 0.5}, "before": {"value": 2.0}}
    assert (
        "held-out loss 2.00 → 0.310 (95% interval 0.250 to 0.500) · "
        in end_lines({**SUMMARY, "held_out": held_out})[0]
    )
    without = {**held_out, "before": None}  # a run that an earlier version began
    assert (
        "held-out loss 0.310 (95% interval 0.250 to 0.500) · "
        in end_lines({**SUMMARY, "held_out": without})[0]
    )


def test_the_end_of_a_run_of_several_processes_says_what_its_time_went_into():
    parts = {"compute": 8.5, "wait": 0.5, "reduce": 1.0}
    assert "  a step's time: compute 85% · wait 5.0% · reduce 10%" in end_lines(
        {**SUMMARY, "seconds_by_part": parts}
    )


@pytest.mark.parametrize("kind", [PlainScreen, LiveScreen])
def test_an_evaluation_shows_the_answer_beside_the_expected_one(kind):
    text = shown_by(kind)
    assert "what is 2+2?" in text
    assert '{"sum": 4}' in text
    assert '{"sum": 5}' in text
    assert "held-out loss 0.310▼" in text


@pytest.mark.parametrize("kind", [PlainScreen, LiveScreen])
@pytest.mark.parametrize("width", [40, 80, 200])
def test_screens_work_at_every_width(kind, width):
    assert "0.250" in shown_by(kind, width)


def test_plain_lines_have_no_escape_sequences():
    assert "\x1b" not in shown_by(PlainScreen)


def test_plain_lines_show_the_first_and_the_last_step_but_not_every_step():
    text = shown_by(PlainScreen)
    assert "step 1/40" in text
    assert "step 40/40" in text
    assert text.count("tokens/s") < 40


@pytest.mark.parametrize("kind", [PlainScreen, LiveScreen])
def test_an_answer_cannot_write_markup_or_escape_sequences(kind):
    out = io.StringIO()
    screen = kind(Console(file=out, width=100))
    screen.start(INFO)
    screen.evaluation(
        evaluation(1, None, SAMPLE | {"answer": "[red]x[/red] \x1b]0;owned\x07 \u202e"})
    )
    screen.close()
    assert "[red]x[/red] ·]0;owned· ·" in out.getvalue()


def test_progress_leaves_the_first_step_out_of_rate_and_time_left():
    progress = StepFigures(INFO)
    progress.step(step(1, seconds=60.0))
    assert progress.tokens_per_second is None
    progress.step(step(2, seconds=0.5))
    assert progress.tokens_per_second == 1800
    assert progress.seconds_left == 0.5 * 38


def test_progress_of_a_resumed_run_counts_from_where_it_stands():
    progress = StepFigures(INFO)
    progress.step(step(31))
    progress.step(step(32))
    assert progress.seconds_left == 0.5 * 8


def test_the_arrow_follows_the_loss():
    progress = StepFigures(INFO)
    progress.step(step(1, loss=2.0))
    progress.step(step(2, loss=1.0))
    assert "▼" in progress.figures()
    progress.step(step(3, loss=9.0))
    assert "▲" in progress.figures()


def test_without_a_terminal_lines_are_plain_and_go_to_stderr_when_stdout_is_data(capsys):
    screen = make_screen(json=True)
    assert isinstance(screen, PlainScreen)
    screen.start(INFO)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "210 of 210" in captured.err


def test_a_quiet_screen_shows_nothing(capsys):
    screen = make_screen(quiet=True)
    screen.start(INFO)
    screen.step(step(1))
    screen.evaluation(evaluation(1, 2.0, SAMPLE))
    screen.message("x")
    screen.end(SUMMARY)
    screen.close()
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        (size(0), "0 B"),
        (size(999), "999 B"),
        (size(1000), "1.00 kB"),
        (size(19_590_000), "19.6 MB"),
        (size(999_600_000), "1.00 GB"),
        (size(1.31e9), "1.31 GB"),
        (size(2.5e13), "25,000 GB"),
        (millions(512), "512"),
        (millions(4_884_480), "4.88 M"),
        (millions(1_240_000_000), "1.24 B"),
        (clock(0), "0:00"),
        (clock(370.4), "6:10"),
        (clock(3970), "1:06:10"),
        (percent(1, 1), "100%"),
        (percent(4.88, 139.4), "3.5%"),
        (percent(1, 8000), "0.013%"),
        (percent(0, 0), "0%"),
        (number(None), "–"),
        (number(2.5), "2.50"),
        (number(123.4), "123"),
        (cut("abcdef", 4), "abc…"),
        (folded("  aa · bb · cc", 9), "  aa · bb\n  cc"),
        (folded("  a long fact · bb", 5), "  a long fact\n  bb"),
        (shown("a\x1b[31m\u202eb\nc\td"), "a·[31m·b\nc\td"),
    ],
)
def test_figures_are_said_in_few_characters(said, wanted):
    assert said == wanted
