"""The command line's frame: light help, exit codes, errors."""

import io
import json
import logging
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from veneer import __version__
from veneer.cli import doctor, main
from veneer.cli.completion import bash, collect_words, fish
from veneer.errors import DivergedError, DoesNotFitError, InputError, RefusedError, RunInterrupted
from veneer.wording import reflowed

HEAVY = ("torch", "transformers", "pydantic", "rich", "numpy", "yaml")


def loaded_after(code: str) -> set[str]:
    code = f"import sys\n{code}\nprint('loaded:', *(m for m in {HEAVY} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rsplit("loaded:", 1)[1].split())


def test_help_loads_nothing_heavy():
    assert loaded_after("from veneer.cli.main import main; assert main(['--help']) == 0") == set()


def test_import_veneer_loads_nothing_heavy():
    assert loaded_after("import veneer; dir(veneer)") == set()


def test_help_of_all_commands_loads_neither_torch_nor_transformers_nor_numpy():
    code = (
        "from veneer.cli.main import COMMANDS, main\n"
        "assert not [name for name in COMMANDS if main([name, '--help'])]"
    )
    assert not loaded_after(code) & {"torch", "transformers", "rich", "numpy"}


@pytest.mark.parametrize("command", ["", *main.COMMANDS])
def test_a_help_page_fits_80_columns_two_screens_and_a_windows_code_page(
    command, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "80")
    assert main.main([command, "--help"] if command else ["--help"]) == 0
    page = capsys.readouterr().out
    page.encode("cp1252")
    lines = page.splitlines()
    choices = " " * 20  # of a flag; they have no spaces
    assert not [line for line in lines if len(line) > 80 and not line.startswith(choices)]
    assert len(lines) <= 80


def test_a_page_is_written_anew_for_a_narrower_terminal_but_for_its_commands():
    page = (
        "One line that is long,\nand another.\n\n  word  what it means\n  veneer train --out "
        " somewhere"
    )
    assert reflowed(page, 80) == page
    told = "One line that\nis long, and\nanother.\n\n  word  what\n        it\n        means"
    assert reflowed(page, 14) == f"{told}\n  veneer train --out  somewhere"


def test_what_is_fetched_once_is_said_as_it_begins(capsys, monkeypatch):
    bases = logging.getLogger("veneer.bases")
    for name in ("handlers", "level", "propagate"):
        monkeypatch.setattr(bases, name, getattr(bases, name))
    main._announce_downloads()
    logging.getLogger("veneer.bases.names.packages").info("fetching %s, once", "a\x1bb")
    said = capsys.readouterr()
    assert said.err == "  fetching a·b, once\n" and not said.out


EARLY = {
    "a base of no such name": (
        "evaluate --base ./nowhere --data {0}/rows.jsonl",
        "there is no base './nowhere'",
    ),
    "an adapter of no such name": (
        "chat --adapter nowhere --library {0}",
        "there is no adapter 'nowhere'",
    ),
    "rows that are not there": (
        "data check {0}/row.jsonl --base {0}",
        "did you mean {0}/rows.jsonl?",
    ),
    "rows of a run": (
        "train --base {0} --data {0}/x.jsonl --validation {0}/y.jsonl --out {0}/new",
        "files not found",
    ),
    "a base of a run": (
        "train --base smolm2-135m --data {0}/rows.jsonl --out {0}/new",
        "did you mean  smollm2-135m",
    ),
    "a metric misspelt": (
        "evaluate --base {0} --data {0}/rows.jsonl --metrics exact_mach",
        "exact_match?",
    ),
    "predictions that are not there": (
        "evaluate --base {0} --data {0}/rows.jsonl --against {0}/p.jsonl",
        "p.jsonl was not found",
    ),
    "a run's folder that is taken": (
        "train --base {0} --data {0}/rows.jsonl --out {0}/run",
        "--resume",
    ),
    "a finished run": ("train --resume {0}/done", "is finished"),
    "a place that is taken": (
        "merge --base {0} --adapter {0}/a --out {0}/run",
        "exists and is not overwritten",
    ),
    "another place": (
        "export {0}/a --base {0} --to peft --out {0}/run",
        "exists and is not overwritten",
    ),
    "a base to compare on": (
        "compare --base nowhere --data {0}/rows.jsonl --methods lora,full --out {0}/c",
        "no base",
    ),
    "test rows": (
        (
            "compare --base {0} --data {0}/rows.jsonl --test {0}/x.jsonl --methods lora,full --out"
            " {0}/c"
        ),
        "x.jsonl",
    ),
    "a base to plan": ("plan --base lama-3.1-8b", "there is no base"),
    "rows to plan with": ("plan --base llama-3.1-8b --data {0}/x.jsonl", "file not found"),
    "a base to serve": ("serve --base ./nowhere", "there is no base"),
    "a library to serve": ("serve --base {0} --library {0}/nowhere", "is not a library"),
    "a program's other name": (
        "export {0}/a --to gguf --out x",
        "--to gguf: did you mean llamacpp?",
    ),
    "a folder of weights": ("quantize --base {0} --out {0}/run", "exists and is not overwritten"),
    "a run's folder below a file": (
        "train --base {0} --data {0}/rows.jsonl --out {0}/rows.jsonl/new",
        "new cannot be written",
    ),
    "a merged folder below a file": (
        "merge --base {0} --adapter {0}/a --out {0}/rows.jsonl/new",
        "new cannot be written",
    ),
    "predictions below a file": (
        "evaluate --base {0} --data {0}/rows.jsonl --predictions {0}/rows.jsonl/new",
        "new cannot be written",
    ),
    "a setting that a comparison decides": (
        (
            "compare --base {0} --data {0}/rows.jsonl --methods lora,full --set steps=5 --set"
            " seed=1 --out {0}/c"
        ),
        "--set steps: give --steps or --seconds",
    ),
    "a comparison below a file": (
        "compare --base {0} --data {0}/rows.jsonl --methods lora,full --out {0}/rows.jsonl/new",
        "comparison.json cannot be written",
    ),
}
"""Mistakes that are told before torch is loaded, which takes seconds."""


@pytest.fixture(scope="module")
def early(tmp_path_factory):
    """How each of these commands ends in one process: its exit code, what it says, and what is
    loaded by then."""
    folder = tmp_path_factory.mktemp("early")
    (folder / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    for run in ("run", "done"):
        (folder / run).mkdir()
        (folder / run / "run.yaml").write_text(
            f"base: {folder}\ndata: {folder}/rows.jsonl\nout: x\n"
        )
    (folder / "done" / "summary.json").write_text("{}")
    (folder / "a").mkdir()
    (folder / "a" / "adapter_config.json").write_text("{}")
    commands = {
        case: typed.replace("{0}", str(folder)).split() for case, (typed, _) in EARLY.items()
    }
    code = f"""
import contextlib, io, json, sys
from veneer.cli.main import main
ended = {{}}
for case, typed in {commands!r}.items():
    with contextlib.redirect_stderr(io.StringIO()) as err:
        code = main(typed)
    loaded = [name for name in ("torch", "transformers") if name in sys.modules]
    ended[case] = code, err.getvalue(), loaded
print(json.dumps(ended))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), str(folder)


@pytest.mark.parametrize("case", EARLY)
def test_a_mistake_is_told_before_torch_is_loaded(case, early):
    ended, folder = early
    code, told, loaded = ended[case]
    assert code == 2 and not loaded, (code, loaded, told)
    assert EARLY[case][1].replace("{0}", folder) in told, told


def test_every_command_that_prints_a_result_prints_it_as_json_too():
    without = {
        name
        for name, words in collect_words().items()
        if not words.actions and "--json" not in words.flags
    }
    assert without == {
        "serve",
        "studio",
        "chat",
        "completion",
    }  # they go on until they are ended; a script is its own format


def test_bash_completes_commands_actions_flags_and_choices(tmp_path):
    (tmp_path / "c").write_text(bash(collect_words()))

    def offered(*typed):
        words = " ".join(f"'{word}'" for word in ("veneer", *typed))
        script = (
            f"source {tmp_path}/c; COMP_WORDS=({words}); COMP_CWORD={len(typed)}; _veneer; echo"
            " ${COMPREPLY[@]}"
        )
        return subprocess.run(
            ["bash", "-c", script], capture_output=True, text=True, check=True
        ).stdout.split()

    assert offered("ex") == ["explain", "extract", "export"]
    assert offered("adapters", "p") == ["push", "pull"]
    assert offered("export", "x", "--to", "o") == ["ollama"]
    assert offered("adapters", "push", "--fig") == ["--figures"]
    assert offered("train", "") == []  # a file
    assert offered("train", "--method", "d") == ["dora"] and offered("train", "--method", "q") == [
        "qlora"
    ]
    assert offered("train", "--dtype", "b") == ["bfloat16"] and offered(
        "train", "--quantize", "f"
    ) == ["fp4", "fp8"]
    assert "-a export -d" in fish(collect_words())


def test_alone_in_a_terminal_it_says_what_to_do_next(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    main.main([])
    assert "usage: veneer COMMAND" in capsys.readouterr().out  # no terminal
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    main.main([])
    assert "veneer demo" in capsys.readouterr().out
    for run, left in {"runs/a b": "summary.json", "runs/c": "checkpoints/1/x"}.items():
        for file in ("run.yaml", left):
            (tmp_path / run / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / run / file).write_text("{}")
    (tmp_path / "rows\x1b.jsonl").write_text("")
    (tmp_path / "r.yaml").write_text("base: b\ndata: d\n")
    (tmp_path / "other.yaml").write_text("base: b\n")
    (tmp_path / "data" / "veneer" / "adapters" / "names").mkdir(parents=True)
    (tmp_path / "data" / "veneer" / "adapters" / "names" / "tickets.json").write_text("{}")
    main.main([])
    said = capsys.readouterr().out
    for line in (
        "veneer train --resume runs/c",
        "veneer chat --adapter 'runs/a b'",
        "veneer train r.yaml",
        "veneer chat --adapter tickets",
        "--out 'runs/rows·'",
    ):
        assert line in said
    assert "other.yaml" not in said and "\x1b" not in said


def test_help_names_every_command(capsys):
    assert main.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in main.COMMANDS)


def test_every_command_stands_in_one_group():
    names = [name for commands in main.GROUPS.values() for name in commands]
    assert names == [*main.COMMANDS] and max(map(len, main.GROUPS.values())) <= 8


def test_version_is_the_packages(capsys):
    assert main.main(["--version"]) == 0
    assert capsys.readouterr().out == f"veneer {__version__}\n"


def test_a_program_that_has_read_from_stdin_can_call_a_command(monkeypatch, capsys):
    stdin = io.TextIOWrapper(io.BytesIO(b"a\nb\n"))
    assert stdin.readline() == "a\n"
    monkeypatch.setattr(sys, "stdin", stdin)
    assert main.main(["--version"]) == 0
    assert __version__ in capsys.readouterr().out


def test_an_unknown_command_names_the_nearest_and_exits_2(capsys):
    assert main.main(["trian"]) == 2
    assert "did you mean `veneer train`" in capsys.readouterr().err


def test_an_unknown_flag_exits_2_and_says_where_help_is(capsys):
    assert main.main(["train", "--bach", "8"]) == 2
    assert "veneer train --help" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InputError("wrong"), 2),
        (DoesNotFitError("too large"), 3),
        (RefusedError("no"), 4),
        (DivergedError("not finite"), 5),
        (RunInterrupted("stopped"), 130),
        (KeyboardInterrupt(), 130),
    ],
)
def test_each_error_has_its_exit_code_and_no_traceback(error, code, monkeypatch, capsys):
    fail_with(error, monkeypatch)
    assert main.main(["doctor"]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert str(error) in captured.err
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    "fault",
    [
        MemoryError(),
        RuntimeError("CUDA out of memory. Tried to allocate 9 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=str,
)
def test_out_of_memory_in_any_command_exits_3_without_a_traceback(fault, monkeypatch, capsys):
    fail_with(fault, monkeypatch)
    assert main.main(["doctor"]) == 3
    err = capsys.readouterr().err
    assert "out of memory" in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        (
            NotImplementedError(
                "The operator 'aten::_linalg_eigh' is not currently implemented for the MPS device."
                " If you want this op to be considered for addition, comment on the tracker.\nAs a"
                " temporary fix, set a variable."
            ),
            "aten::_linalg_eigh",
        ),
        (
            TypeError(
                "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't"
                " support it"
            ),
            "float64",
        ),
    ],
    ids=["operation", "type"],
)
def test_what_apple_devices_lack_is_refused_by_name(fault, named, monkeypatch, capsys):
    fail_with(fault, monkeypatch)
    assert main.main(["doctor"]) == 4
    err = capsys.readouterr().err
    assert named in err and "--device cpu" in err
    assert "Traceback" not in err and "bug in Veneer" not in err and "tracker" not in err


def test_a_bug_shows_its_traceback_and_how_to_report_it(monkeypatch, capsys):
    fail_with(ZeroDivisionError("ours"), monkeypatch)
    assert main.main(["doctor"]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "report" in err
    assert "veneer doctor" in err


def test_all_faults_and_the_next_step_are_shown(monkeypatch, capsys):
    fail_with(
        InputError("2 rows are broken", ["a.jsonl:3", "a.jsonl:9"], "Mend them."), monkeypatch
    )
    main.main(["doctor"])
    assert capsys.readouterr().err == "2 rows are broken:\n  a.jsonl:3\n  a.jsonl:9\nMend them.\n"


def test_an_error_cannot_send_control_sequences_to_the_terminal(monkeypatch, capsys):
    fail_with(InputError("row \x1b]0;owned\x07 is broken"), monkeypatch)
    main.main(["doctor"])
    err = capsys.readouterr().err
    assert "\x1b" not in err
    assert "owned" in err


@pytest.mark.parametrize(("no_color", "coloured"), [("", True), ("1", False)])
def test_errors_are_red_on_a_terminal_unless_no_color(no_color, coloured, monkeypatch, capsys):
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    main.print_error("wrong\nnext")
    assert ("\x1b[1;31mwrong\x1b[0m" in capsys.readouterr().err) == coloured


def fail_with(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(args: object) -> int:
        raise error

    monkeypatch.setattr(doctor, "run", run)


def test_a_base_is_looked_for_in_nested_files_of_strangers(tmp_path, capsys):
    """YAML recurses: what names the base of an adapter is read as JSON, and a run's settings within
    limits."""
    adapter = tmp_path / "run" / "adapter"
    adapter.mkdir(parents=True)
    deep = '{"a":' * 600 + "1" + "}" * 600
    for file in (adapter / "adapter_config.json", adapter.parent / "run.yaml"):
        file.write_text(deep)
        assert main.main(["generate", "--adapter", str(adapter), "x"]) in (2, 4)
        said = capsys.readouterr().err
        assert f"{file.name} is nested deeper than 64 levels" in said


def test_what_imports_made_is_looked_at_again_as_a_command_ends():
    """Triton's bindings report every object of theirs that is still there then."""
    code = (
        "import atexit, gc; atexit.register(lambda: print(gc.get_freeze_count()))\n"
        "from veneer.cli.common import pause_collection\n"
        "with pause_collection(): import pydantic\n"
        "assert gc.get_freeze_count() > 0"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr


def test_commands_import_what_computes_without_the_collector():
    for file in sorted(Path(main.__file__).parent.rglob("*.py")):
        lines = file.read_text().splitlines()
        for above, line in pairwise(lines):
            if line.strip() == "from veneer import api":
                assert above.strip() == "with pause_collection():", file.name


def test_a_process_ends_as_python_ends_one_but_for_what_it_holds(tmp_path):
    """Threads are waited for, what was registered is called, what was written arrives, and the code
    is kept."""
    code = f"""
import atexit, sys, threading, time, weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from veneer.cli.main import leave

class Held:
    def __del__(self):
        print("taken apart")

held = Held()
atexit.register(print, "registered")
finalizer = weakref.finalize(held, print, "finalized")
kept = open({str(tmp_path / "kept")!r}, "w")
atexit.register(kept.close)
kept.write("whole")
threading.Thread(target=lambda: (time.sleep(0.3), sys.stdout.write("waited for\\n"))).start()
ThreadPoolExecutor(1).submit(lambda: (time.sleep(0.3), sys.stdout.write("submitted\\n")))
sys.stdout.write("no end of line")
leave(5)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 5 and not done.stderr
    assert {"waited for", "submitted", "registered", "finalized"} <= set(
        done.stdout.replace("no end of line", "").split("\n")
    )
    assert "taken apart" not in done.stdout and "no end of line" in done.stdout
    assert (tmp_path / "kept").read_text() == "whole"


@pytest.mark.parametrize("name", ["veneer", "veneer.cli.main"])
def test_either_way_to_start_it_keeps_the_exit_code(name):
    for argument, code in (("--version", 0), ("nothing", 2)):
        done = subprocess.run(
            [sys.executable, "-m", name, argument], capture_output=True, text=True, check=False
        )
        assert done.returncode == code, done.stderr
