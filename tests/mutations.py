"""Do the tests notice? Small changes of lines, one at a time, in a copy: each should fail a test of
its module's area.

    python tests/mutations.py
        150 mutations drawn by seed; the report as a table and as JSON
    python tests/mutations.py --number 40 --only training/ --out found.json

edits.py says what a mutation is, areas.py which tests are those of a module's area. Python comes
first, then C file by file. First run the tests of the area that call the changed function, then
those of other areas that do, the shortest first and some twenty seconds of either. For C, and where
no test is known to call the function, the files of the area run in turn, the nearest first.

Which tests call what is seen by watching them (callers.py): those of a mutation's area, the nearest
first, for some minutes, or all tests at first with `--all-callers`. `--callers FILE` keeps it; with
an empty file none is watched.

A survivor is to be read: a missing test, or a change that means the same. Not part of `make test`:
it takes an hour.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CACHED_CC = ROOT / "tests" / "support" / "kernels" / "cached_cc.sh"
sys.path.insert(0, str(ROOT))  # as a script
from tests.areas import Areas  # noqa: E402
from tests.callers import Callers, Calls  # noqa: E402
from tests.edits import Mutation, edits_of  # noqa: E402

SECONDS, SECONDS_WAITED = 300, 900
"""A test that has computed or waited for as long hangs: the change was noticed. Others may be at
work here too."""
SECONDS_OF_CALLERS, SECONDS_OF_FILE, SECONDS_OF_AREA = 20, 90, 180
"""Of tests that call a function; of a test file, watched or asked whole; of the files of an area,
watched or asked. All but the waiting is computing."""


def computed() -> float:
    """Seconds that this process and those that it has waited for have computed."""
    return sum(os.times()[:4])


def all_mutations(areas: Areas, only: str) -> dict[str, list[Mutation]]:
    return {
        file: edits_of(file, (areas.source / file).read_text(encoding="utf-8"))
        for file in areas.modules()
        if re.search(only, file)
    }


def chosen(found: dict[str, list[Mutation]], number: int, seed: int) -> list[Mutation]:
    """The files in turn, each mutation of a file as likely as any other of it."""
    randoms = random.Random(seed)
    order = {file: randoms.sample(all_of_it, len(all_of_it)) for file, all_of_it in found.items()}
    taken: list[Mutation] = []
    while len(taken) < number and any(order.values()):
        for file in randoms.sample(sorted(order), len(order)):
            if order[file] and len(taken) < number:
                taken.append(order[file].pop())
    return taken


class Copy:
    """The project in a folder of its own; what is mutated there is put back."""

    def __init__(self, folder: Path) -> None:
        self.root = folder
        skip = shutil.ignore_patterns("__pycache__", "*.o", "build")
        for name in ("src", "tests", "docs"):
            shutil.copytree(ROOT / name, folder / name, ignore=skip)
        for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, folder / name)
        self.libraries = {
            path: path.read_bytes() for path in (folder / "src/veneer/kernels").glob("_native*.so")
        }
        self.sound: set[str] = set()  # tests that are known to pass without a mutation
        self.callers = Callers([])
        self.areas = Areas(folder)

    def with_callers(self, file: Path, names: Iterable[str]) -> None:
        """Which tests call what is kept in the file. If it is new, the named files are watched."""
        self.calls = file.absolute()
        self.watched = set(self.areas.files.values()) if file.exists() else set[str]()
        self.calls.touch()
        for name in names:
            self._watch(name)
        self.callers = Callers(self.calls.read_text().splitlines())

    def _watch(self, name: str) -> None:
        """Runs a test file once for what its tests call."""
        if name not in self.watched:
            calls = Calls(self.calls, self.root / "src" / "veneer")
            self.tested([f"tests/{name}"], calls, seconds=SECONDS_OF_FILE)
            self.watched.add(name)
            self.callers = Callers(self.calls.read_text().splitlines())
            print(f"     {name} was watched", flush=True)

    def watch_area(self, function: str, names: Sequence[str]) -> None:
        """Watches these files in turn, until their tests that call the function take as long as is
        asked of them, or for the time of an area."""
        end = computed() + SECONDS_OF_AREA
        for name in names:
            tests = self.callers.tests.get(function, ())
            known = sum(self.callers.seconds[test] for test in tests)
            if known > SECONDS_OF_CALLERS or computed() > end:
                break
            self._watch(name)

    def tried(self, mutation: Mutation) -> tuple[str, str]:
        """(the result, what noticed the change). The result is "caught" by tests of the area or
        "elsewhere", "survived", or "unknown" if the tests do not pass without it."""
        path = self.areas.source / mutation.file
        own = path.read_bytes()
        if mutation.file.endswith(".py"):
            function = f"{mutation.file}:{mutation.function}"
            self.watch_area(function, self.areas.of(mutation.file))
        path.write_bytes(mutation.of(own))
        try:
            if not mutation.file.endswith(".py") and not self.built():
                return "caught", "does not compile"
            result, by = self._asked(mutation)
        finally:
            path.write_bytes(own)
            for path, library in self.libraries.items():
                path.write_bytes(library)
        if "::" in by and by not in self.sound:
            if not self.tested([by])[0]:
                return "unknown", f"{by} fails without any mutation"
            self.sound.add(by)
        return result, by

    def _asked(self, mutation: Mutation) -> tuple[str, str]:
        names, function = self.areas.of(mutation.file), f"{mutation.file}:{mutation.function}"
        files = [f"tests/{name}" for name in names]
        near, far = self.callers.of(function, files, SECONDS_OF_CALLERS)
        for result, tests in (("caught", near), ("elsewhere", far)):
            if tests and not (answer := self.tested(tests))[0]:
                return result, answer[1]
        end = computed() + SECONDS_OF_AREA
        for file in [] if near else files:
            passed, by = self.tested([file], seconds=SECONDS_OF_FILE)
            if not passed and not by.startswith("no end"):  # its tests may be as many as that
                return "caught", by
            if computed() > end:
                break
        return "survived", ""

    def built(self) -> bool:
        """Builds the library, and compiles only files whose preprocessed text is new. Returns False
        if a file does not compile."""
        build = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
        objects = str(self.root / "objects")
        environment = os.environ | {"CC": str(CACHED_CC), "OBJECT_CACHE": objects}
        done = subprocess.run(build, cwd=self.root, env=environment, capture_output=True)
        return done.returncode == 0

    def tested(
        self, tests: list[str], *plugins: object, seconds: float = SECONDS
    ) -> tuple[bool, str]:
        """Whether these pass, and the first that does not: in a fork, which has torch and
        transformers already."""
        log, end = self.root / "tests.log", time.monotonic() + SECONDS_WAITED
        if (child := os.fork()) == 0:
            resource.setrlimit(
                resource.RLIMIT_CPU, (int(seconds), int(seconds))
            )  # of each process of it
            self._run(tests, log, plugins)
        while True:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                break
            if time.monotonic() > end:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return False, f"no end after {SECONDS_WAITED} s"
            time.sleep(0.05)
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            return False, f"no end after {seconds} s of computing"
        failed = re.search(
            r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", log.read_text(errors="replace"), re.M
        )
        code = os.waitstatus_to_exitcode(status)
        return code in (0, 5), failed.group(1) if failed else f"exit code {code}"

    def _run(self, tests: list[str], log: Path, plugins: Sequence[object]) -> None:
        code = 1
        try:
            os.setsid()
            signal.signal(
                signal.SIGINT, signal.default_int_handler
            )  # ignored where a shell put us behind
            os.chdir(self.root)
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(out, 1)
            os.dup2(out, 2)
            paths = [str(self.root / "src"), str(self.root)]
            os.environ["PYTHONPATH"] = os.pathsep.join(paths)
            sys.path[:] = [*paths, *(path for path in sys.path if not path.startswith(str(ROOT)))]
            for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
                del sys.modules[name]  # the copy's own
            import pytest

            flags = ["-q", "-p", "no:cacheprovider", "-W", "ignore", *([] if plugins else ["-x"])]
            code = int(pytest.main([*flags, *tests], plugins=plugins))
        finally:
            sys.stdout.flush()
            os._exit(code)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--number", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only",
        default="",
        help="expression for the modules to mutate, for instance training/ or py$",
    )
    parser.add_argument("--out", type=Path, default=Path("mutations.json"))
    parser.add_argument(
        "--callers", type=Path, help="which tests call what; made where it is not there"
    )
    parser.add_argument(
        "--all-callers", action="store_true", help="watch all tests for what they call"
    )
    parser.add_argument("--list", action="store_true", help="say which mutations would be tried")
    args = parser.parse_args()
    areas = Areas(ROOT)
    mutations = chosen(all_mutations(areas, args.only), args.number, args.seed)
    # C last and file by file: fewer objects to compile.
    mutations.sort(key=lambda mutation: mutation.file if mutation.file[-2:] in (".c", ".h") else "")
    if args.list:
        print(*mutations, sep="\n")
        return
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    import pytest  # noqa: F401  # what every fork then has: seconds of each
    import torch  # noqa: F401
    import transformers

    for name in (
        "AutoModelForCausalLM",
        "GenerationConfig",
        "LlamaForCausalLM",
        "PreTrainedTokenizerFast",
    ):
        getattr(transformers, name)  # loaded at their first use

    results: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Copy(Path(folder))
        callers = args.callers or Path(folder) / "callers.jsonl"
        copy.with_callers(callers, sorted(areas.files.values()) if args.all_callers else [])
        for number, mutation in enumerate(mutations, 1):
            result, by = copy.tried(mutation)
            results.append({**asdict(mutation), "result": result, "by": by or None})
            word = result.upper() if result == "survived" else result
            print(f"{number:4} {word:9} {mutation}", flush=True)
            args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    counts = Counter(str(result["result"]) for result in results)
    print("\n" + ", ".join(f"{n} {word}" for word, n in counts.items()) + f"; see {args.out}")


if __name__ == "__main__":
    main()
