"""The line of what goes on: what it says as time goes by, and where it says nothing."""

import io
import sys

from rich.console import Console

from veneer.comparison.pace import Pace
from veneer.training.output import working as module
from veneer.training.output.working import ProgressLine, working


class Clock:
    seconds = 0.0

    def __call__(self):
        return self.seconds


def test_the_line_counts_up_and_then_down():
    clock = Clock()
    line = ProgressLine("loading b\x1b", clock)
    clock.seconds = 3
    assert line.text() == "  loading b· · 0:03"
    line.update("writing", 0, 40)
    assert line.text() == "  writing 0/40 · 0:03"
    clock.seconds = 13
    line.update("writing", 10, 40)
    assert (
        line.text() == "  writing 10/40 · 0:30 left"
    )  # 10 s for 10 of them, whatever loading took


def test_a_terminal_sees_it_after_a_moment_and_nobody_else_does(monkeypatch):
    monkeypatch.setattr(module, "SILENT_SECONDS", 0.0)
    for terminal in (True, False):
        console = Console(file=io.StringIO(), force_terminal=terminal, width=80)
        with working("merging", console) as tell:
            tell("merging", 2, 4)
        said = console.file.getvalue()
        assert ("merging 2/4" in said) == terminal and (terminal or not said)


def test_what_is_to_load_torch_shows_at_once(monkeypatch):
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    with working("loading b", console):
        pass
    assert "loading b" in console.file.getvalue()


def test_a_comparison_says_which_run_of_how_many_and_the_time_left():
    clock = Clock()
    pace = Pace(4, clock)
    assert pace.line("lora, step 1") == "run 1 of 4 · lora, step 1"
    pace.finished(made=False)  # found finished: it says nothing of how long one takes
    clock.seconds = 60
    assert pace.line("x") == "run 2 of 4 · x"
    pace.finished(made=True)
    assert pace.line("x") == "run 3 of 4 · about 2:00 left · x"
    clock.seconds = 90  # of the third run, half
    assert pace.line("x") == "run 3 of 4 · about 1:30 left · x"
    clock.seconds = 600  # it takes longer: the fourth is still to come
    assert pace.line("x") == "run 3 of 4 · about 1:00 left · x"
    pace.one_more()
    assert pace.line("x") == "run 3 of 5 · about 2:00 left · x"
    for _ in range(4):
        pace.finished(made=True)
    assert pace.line("x") == "run 6 of 6 · x"
