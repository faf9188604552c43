"""Every call of a command that changes the file system fails once, or from one call on, or as on a
full disk.

Afterwards: an exit code of the contract and a message, no traceback; what stood there before is as
it was; the libraries verify; nothing half-written is visible; and the same command, given again,
does what it should have done. Calls are failed below the libraries that make them
(failing_writes.c), so those of safetensors and tokenizers are among them.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.soak.counts import rounds
from tests.soak.world import FROM_LIBRARY, READING, copy_world, make_world, run, train
from veneer.files.atomic import verify_manifest
from veneer.library.library import Library

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or COMPILER is None,
    reason="needs Linux and a C compiler for failing_writes.c",
)
COMMANDS = {
    "train": train(Path("{w}"), Path("{o}/result")),
    "resume": "train --resume {w}/interrupted --quiet",
    "add": "adapters add {w}/c --name x --tag best --library {w}/library",
    "first add": "adapters add {w}/c --name new --library {o}/result",
    "tag": "adapters tag x t9 --note hello --library {w}/library",
    "rename": "adapters rename x z --library {w}/library",
    "rm": "adapters rm x@1 --library {w}/library",
    "rm all": "adapters rm x --library {w}/library",
    "gc": "adapters gc --yes --library {w}/library",
    "extract": "extract --base {w}/base --model {w}/tuned --rank 3 --out {o}/result",
    "combine": "combine {w}/a {w}/b --base {w}/base --out {o}/result",
    "quantize": "quantize --base {w}/base --out {o}/result",
    "gguf adapter": "export {w}/a --to llamacpp --base {w}/base --out {o}/result.gguf",
    "gguf model": "export {w}/a --to llamacpp --merged --base {w}/base --out {o}/result.gguf",
    "predictions": "evaluate --base {w}/base --data {w}/rows.jsonl --predictions {o}/result",
    "plan": (
        "plan --base {w}/base --data {w}/rows.jsonl --batch 4 --steps 4 --length 64 --write"
        " {o}/result"
    ),
    "plan page": (
        "plan --base {w}/base --data {w}/rows.jsonl --batch 4 --steps 4 --length 64 --html"
        " {o}/result.html"
    ),
    "report": "report {w}/run",
    **FROM_LIBRARY,
    "ls": READING["ls"],
    "verify": READING["verify"],
}
SLOW = {
    "compare": (
        "compare --base {w}/base --data {w}/rows.jsonl --validation {w}/rows.jsonl --test"
        " {w}/rows.jsonl --methods lora,bottleneck --steps 2 --seeds 1 --rates 1 --extend 0 --set"
        " length=128 --out {o}/result"
    )
}
NUMBERS = [
    *(errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.ENAMETOOLONG, errno.EMFILE, errno.ESTALE),
]
MODES = {"once": 0, "from then on": 1, "full disk": 2}
CODES = {0, 2, 3, 4, 5, 130}
TIMED = (
    ".html",
    "metrics.jsonl",
    "summary.json",
    "state.json",
    "evaluation.json",
    "comparison.json",
)
"""They hold times: whether they are there and whole counts, not what they hold."""
PASSING = re.compile(r"/checkpoints/|/incoming/")
"""Where a run goes on, and a transfer."""
MAY_MISS = re.compile(r"index\.json$|\.lock$|/runs/.*/report\.html$")
"""Made again when it is wanted; a comparison needs no page of its runs."""


FURTHER = {r"--resume (\S+),": "train --quiet --resume", r"veneer report (\S+?)\.?\s": "report"}
"""What a refusal says -> the command that it names."""


class Control(ctypes.Structure):
    """What failing_writes.c shares with us."""

    _fields_ = [
        ("count", ctypes.c_long),
        ("k", ctypes.c_long),
        ("number", ctypes.c_long),
        ("mode", ctypes.c_long),
        ("failed", ctypes.c_long),
        ("under", ctypes.c_char * 4096),
        ("call", ctypes.c_char * 64),
        ("path", ctypes.c_char * 4096),
    ]


@dataclass(frozen=True)
class Outcome:
    code: int
    said: str
    calls: int
    failed: int
    where: str


class Commands:
    """The server, its control file, and the folder in which every case starts from the same
    world."""

    def __init__(self, folder: Path) -> None:
        self.case, self.template = folder / "case", folder / "template"
        self.world, self.out = self.case / "w", self.case / "o"
        self.world.parent.mkdir()
        make_world(self.world)
        self._make_interrupted()
        copy_world(self.world, self.template)
        library = folder / "failing_writes.so"
        built = [
            str(COMPILER),
            "-O1",
            "-shared",
            "-fPIC",
            "-o",
            str(library),
            str(HERE / "failing_writes.c"),
        ]
        subprocess.run(built, check=True)
        self.control, self.log = folder / "control", folder / "log"
        self.control.write_bytes(bytes(ctypes.sizeof(Control)))
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        given = {
            "LD_PRELOAD": str(library),
            "VENEER_FAULTS": str(self.control),
            "PYTHONPATH": path,
            "OMP_NUM_THREADS": "1",
            "VENEER_CACHE": str(folder / "cache"),
        }
        self.server = subprocess.Popen(
            [sys.executable, "-m", "tests.soak.failures.fault_server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | given,
            cwd=ROOT,
        )

    def _make_interrupted(self) -> None:
        """A run that stopped after its first checkpoint."""
        folder = self.world / "interrupted"
        assert run(train(self.world, folder) + " --set keep=2") == 0
        for name in ("summary.json", "report.html", "adapter", "checkpoints/000004"):
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def restore(self) -> None:
        shutil.rmtree(self.case)
        self.case.mkdir()
        copy_world(self.template, self.world)
        self.out.mkdir()

    def run(self, line: str, *, k: int = 2**40, number: int = 0, mode: int = 0) -> Outcome:
        control = Control(0, k, number, mode, 0, str(self.case).encode(), b"", b"")
        # never shorter for a moment: the server has it mapped, and may still be starting
        with self.control.open("r+b") as file:
            file.write(bytes(control))
        argv = line.format(w=self.world, o=self.out).split()
        assert self.server.stdin is not None and self.server.stdout is not None
        print(json.dumps({"argv": argv, "log": str(self.log)}), file=self.server.stdin, flush=True)
        code = int(self.server.stdout.readline())
        control = Control.from_buffer_copy(self.control.read_bytes())
        said = self.log.read_text(errors="replace")
        where = f"{control.call.decode()} {control.path.decode().removeprefix(str(self.case))}"
        return Outcome(code, said, control.count, control.failed, where)

    def tree(self) -> dict[str, str]:
        """Every visible file and what is in it, as far as that is the same each time."""
        found = {}
        for path in sorted(self.case.rglob("*")):
            name = path.relative_to(self.case).as_posix()
            if path.is_dir() or MAY_MISS.search(name) or hidden(name):
                continue
            found[name] = hashlib.sha256(_stable(name, path.read_bytes())).hexdigest()
        return found

    def libraries(self) -> list[list[tuple[str, tuple[str, ...], str]]]:
        """What readers find; fails where anything of it is not whole."""
        found = []
        for folder in (
            self.world / "library",
            self.world / "elsewhere",
            self.out / "elsewhere",
            self.out / "result",
        ):
            library = Library(folder)
            if (folder / "library.json").is_file():
                entries = library.entries(every_version=True)
                for entry in entries:
                    library.whole(entry.reference)
                found.append(
                    [(e.reference, tuple(e.version.tags), e.version.object) for e in entries]
                )
        return found

    def close(self) -> None:
        assert self.server.stdin is not None
        self.server.stdin.close()
        assert self.server.wait() == 0


def hidden(name: str) -> bool:
    return any(part.startswith((".partial-", ".replaced-", ".broken-")) for part in name.split("/"))


def _stable(name: str, content: bytes) -> bytes:
    """What of a file is the same each time; where nothing is, whether it is whole."""
    if name.endswith(".html"):
        return b"whole" if content.rstrip().endswith(b"</html>") else content
    if name.endswith("metrics.jsonl"):
        lines = content.split(b"\n")[
            :-1
        ]  # what stands after the last newline is a torn write, which no reader takes
        return b"whole" if all(json.loads(line) for line in lines) else content
    if name.endswith(TIMED) or (name.endswith("MANIFEST.json") and "/checkpoints/" in name):
        return b"whole" if json.loads(content) else content
    if "/names/" in name:
        record = json.loads(content)
        for version in record.get("versions", ()):  # a .used file has none
            version.pop("added")
        return json.dumps(record, sort_keys=True).encode()
    return content


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    made = Commands(tmp_path_factory.mktemp("faults"))
    yield made
    made.close()


def test_whichever_write_fails_it_is_told_nothing_is_lost_and_the_command_can_be_repeated(commands):
    assert_no_faults(commands, COMMANDS, rounds("writes", ci=len(COMMANDS)))


@pytest.mark.skipif(not rounds("slow_writes", ci=0), reason="takes minutes: make soak")
def test_whichever_write_of_a_comparison_fails_nothing_is_lost(commands):
    assert_no_faults(commands, SLOW, rounds("slow_writes", ci=0))


def assert_no_faults(commands: Commands, lines: dict[str, str], numbers: range) -> None:
    """Lets one call of one command fail in each round and looks for everything that should not be
    there."""
    expected: dict[str, tuple[Outcome, dict[str, str]]] = {}
    outcomes: Counter[str] = Counter()
    faults: list[str] = []
    for turn in numbers:
        name = list(lines)[turn % len(lines)]
        generator = random.Random(turn)
        if name not in expected:
            commands.restore()
            clean = commands.run(lines[name])
            assert clean.code == 0 and clean.calls > 0, (name, clean.said)
            expected[name] = clean, commands.tree()
        clean, whole = expected[name]
        mode = generator.choice(list(MODES))
        number = errno.ENOSPC if mode == "full disk" else generator.choice(NUMBERS)
        k = generator.randint(1, clean.calls)
        outcome, found = one_case(commands, lines[name], whole, k=k, number=number, mode=mode)
        outcomes["done all the same" if outcome.code == 0 else f"exit code {outcome.code}"] += 1
        case = (
            f"{turn}, {name}: call {k} of {clean.calls} ({outcome.where})"
            f" {errno.errorcode[number]}, {mode}"
        )
        faults += [f"{case}: {fault}" for fault in found]
        if found:
            print(
                f"--- {case} -> {outcome.code}\n{outcome.said[-3000:]}\n" + "\n".join(found),
                flush=True,
            )
    print(
        f"\n{len(numbers)} failing writes in {len(lines)} commands: {dict(outcomes)}, {len(faults)}"
        " faults"
    )
    assert not faults, "\n".join(faults)


def one_case(
    commands: Commands, line: str, whole: dict[str, str], *, k: int, number: int, mode: str
) -> tuple[Outcome, list[str]]:
    """What came of it, and everything about it that should not be."""
    commands.restore()
    before = commands.tree()
    outcome = commands.run(line, k=k, number=number, mode=MODES[mode])
    faults = []
    if outcome.code not in CODES:
        faults.append(f"exit code {outcome.code}")
    if "Traceback" in outcome.said or "bug in Veneer" in outcome.said:
        faults.append("a traceback: " + outcome.said.strip().splitlines()[-1][:200])
    if outcome.code and len(outcome.said.strip().splitlines()) < 2:
        faults.append(f"no next step: {outcome.said.strip()}")
    after = commands.tree()
    changed = [n for n, content in before.items() if after.get(n) not in (content, whole.get(n))]
    faults += [f"{name} was lost or changed" for name in changed]
    faults += [
        f"{n} is half-written"
        for n, content in after.items()
        if n not in before and n in whole and content != whole[n]
    ]
    faults += [
        f"{n} should not be there"
        for n in after.keys() - before.keys() - whole.keys()
        if not PASSING.search(n)
    ]
    for manifest in commands.case.rglob("MANIFEST.json"):
        folder = manifest.parent
        if not hidden(folder.relative_to(commands.case).as_posix()):
            faults += [f"{folder.name}: {fault}" for fault in verify_manifest(folder)]
    try:
        commands.libraries()
    except Exception as fault:
        faults.append(f"a library no longer verifies: {fault}")
    if faults or (outcome.code == 0 and after == whole):
        return outcome, faults
    again = commands.run(line)
    for says, instead in FURTHER.items():  # as the user would
        if again.code and (found := re.search(says, again.said)):
            again = commands.run(f"{instead} {found[1]}")
    stood = after == whole and outcome.code and "exists" in again.said
    if again.code and not stood:
        faults.append(f"given again it fails: {again.said.strip()[-300:]}")
    elif commands.tree() != whole:
        now = commands.tree()
        faults.append(
            "given again it makes something else:"
            f" {[n for n in {*now, *whole} if now.get(n) != whole.get(n)]}"
        )
    left = [p.name for p in commands.case.rglob("*") if hidden(p.name)]
    if left and not stood:
        faults.append(f"left behind: {left}")
    return outcome, faults
