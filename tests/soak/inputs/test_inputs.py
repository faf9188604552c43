"""Whatever strangers and typos hand to a command ends in an exit code of the contract: no
traceback, no hang.

    VENEER_SOAK_INPUTS=2000 VENEER_SOAK_FIRST=5000 pytest tests/soak/inputs/test_inputs.py -s
        numbers 5,000 to 6,999

Each number is an input of its own (inputs.py), of one kind after the other, run in this process. Of
a failure its number is told: with FIRST and a count of 1 it runs alone.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import json
import shutil
import signal
import sys
from collections import Counter
from pathlib import Path
from random import Random
from types import FrameType

import pytest
from transformers import AutoTokenizer

from tests.soak.counts import rounds
from tests.soak.inputs.kinds import KINDS
from tests.soak.inputs.packed import make_packed
from tests.soak.world import make_world, run
from tests.support.helpers import fill
from tests.support.tiny import save_tiny
from veneer.adapters.attach import attach
from veneer.adapters.config import Bottleneck, DoRA, Prefix
from veneer.cli.main import main
from veneer.formats.adapter import manifest_for, write_adapter
from veneer.models.load import load_base

CONTRACT = {0, 2, 3, 4, 5, 130}
SECONDS, SECONDS_WAITED = 60, 900
"""Of computing: nothing here takes more than a few. Others at work on the machine make it wait, but
not for ever."""

if sys.platform == "win32":
    pytest.skip("needs an alarm", allow_module_level=True)


class Hang(BaseException):
    """Not an Exception: the commands catch those."""


def _hang(number: int, frame: FrameType | None) -> None:
    said = f"{SECONDS} s of computing" if number == signal.SIGPROF else f"{SECONDS_WAITED} s"
    raise Hang(f"after {said} in {frame.f_code.co_qualname if frame is not None else '?'}")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bases, adapters and rows that inputs are made from; nothing writes into it."""
    world = make_world(tmp_path_factory.mktemp("inputs") / "world")
    base = load_base(str(world / "base"), dtype="float32", device="cpu")
    _, head = base.paths, base.model.get_output_embeddings()
    methods = {
        "prefixes": Prefix(tokens=2, start="random"),
        "bottleneck": Bottleneck(size=2),
        "dora": DoRA(rank=2),
    }
    for name, method in methods.items():
        made = attach(base.model, method, name=name, routing=base.routing, head=head)
        fill(made.parameters().values(), seed=1, scale=0.05)
        write_adapter(world / name, made, manifest_for(base, method=method.name), model=base.model)
    save_tiny(world / "short", "gpt2", max_position_embeddings=40)
    save_tiny(world / "untied", "llama_untied")
    make_packed(world / "packed")
    bare = save_tiny(world / "bare")
    tokenizer = AutoTokenizer.from_pretrained(bare)
    tokenizer.chat_template = None
    (bare / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(bare)
    rows = (world / "rows.jsonl").read_text().splitlines()
    (world / "few.jsonl").write_text("\n".join(rows[:3]) + "\n")
    line = (
        f"evaluate --base {world}/base --data {world}/few.jsonl --metrics exact_match"
        f" --max-new-tokens 2 --predictions {world}/predictions.jsonl"
    )
    assert run(line) == 0
    for file in world.rglob("*"):
        file.chmod(0o555 if file.is_dir() else 0o444)
    return world


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names without a folder, and everything that has a place of its own in a home, land here."""
    monkeypatch.chdir(tmp_path)
    for name in ("HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PIP_NO_INDEX", "1")


def outcome(words: list[str]) -> tuple[int | str, str]:
    """(exit code, or what came instead; what was said)."""
    out, err = io.StringIO(), io.StringIO()
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.alarm(SECONDS_WAITED)
    faulthandler.dump_traceback_later(
        2 * SECONDS_WAITED, exit=True
    )  # for what never comes back to Python
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code: int | str = main(words)
    except BaseException as fault:
        code = f"{type(fault).__name__}: {fault}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        faulthandler.cancel_dump_traceback_later()
    return code, out.getvalue()[-2000:] + err.getvalue()[-4000:]


def test_every_input_ends_in_an_exit_code_of_the_contract(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    before = {which: signal.signal(which, _hang) for which in (signal.SIGALRM, signal.SIGPROF)}
    codes: Counter[tuple[str, int | str]] = Counter()
    failed: list[str] = []
    try:
        for number in rounds("inputs", ci=300):
            kind = list(KINDS)[number % len(KINDS)]
            folder = tmp_path / "input"
            folder.mkdir()
            words = KINDS[kind](Random(number), folder, world)
            code, said = outcome(words)
            codes[kind, code] += 1
            if code not in CONTRACT or "bug in Veneer" in said or "Traceback" in said:
                shown = json.dumps(
                    [word if len(word) < 300 else word[:300] + "…" for word in words]
                )
                failed.append(f"{number} ({kind}) {shown}: {code}\n{said}")
                print(failed[-1], file=sys.__stderr__, flush=True)
            shutil.rmtree(folder)
    finally:
        for which, own in before.items():
            signal.signal(which, own)
    print(
        *(
            f"{kind}: exit {code} {times:,} times"
            for (kind, code), times in sorted(codes.items(), key=str)
        ),
        sep="\n",
    )
    assert not failed, "\n\n".join(failed[:20])
