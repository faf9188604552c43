"""One run on two processes of this machine, over gloo: what each holds beside what was planned; a
step's time by part.

    python -m benchmarks.processes memory
    python -m benchmarks.processes memory --base random --scratch FOLDER
        a Llama of 230 M weights, kept in FOLDER
    python -m benchmarks.processes time --rows ROWS.jsonl
        1 and 2 processes of one thread each, in turn

With --out FILE.json what was measured is added to a list there. Memory does not depend on other
work on the machine; for times it has to be quiet. --only takes one way of a round, --steps and
--batch are those of a run.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from veneer.child import environment_for
from veneer.training.processes.launch import MEETING, listening

ROOT = Path(__file__).resolve().parents[1]
PROCESSES = 2
MEMORY: dict[str, dict[str, Any]] = {
    "lora": {},
    "lora, exact": {"reduce": "exact"},
    "lora, in shards": {"shard": True},
    "lora, in shards, checkpointing": {"shard": True, "checkpointing": True},
    "lora over nf4": {"quantize": "nf4"},
    "lora over nf4, in shards": {"quantize": "nf4", "shard": True},
    "prefix, in shards": {"method": {"name": "prefix"}, "shard": True},
    "full": {"method": {"name": "full"}},
}


TIMES: dict[str, dict[str, Any]] = {
    "1 process": {"processes": 1},
    "2 processes": {"processes": 2},
    "2 processes, exact": {"processes": 2, "reduce": "exact"},
    "2 processes, in shards": {"processes": 2, "shard": True},
}


def together(
    config: dict[str, Any], processes: int, module: str = "processes"
) -> list[dict[str, Any]]:
    """What each process of this run says at its end, by the --one of a module of this folder."""
    with ExitStack() as stack:
        port, meeting = stack.enter_context(listening())
        common = {
            **environment_for(os.environ),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}",
        }
        common |= {
            "WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        started = [
            subprocess.Popen(
                [sys.executable, "-m", f"benchmarks.{module}", "--one", json.dumps(config)],
                env={**common, MEETING: str(meeting), "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                cwd=ROOT,
                pass_fds=(meeting,) if rank == 0 else (),
            )
            for rank in range(processes)
        ]
        found = []
        for process in started:
            out, err = process.communicate()
            if process.returncode:
                raise SystemExit(err[-2000:])
            found.append(json.loads(out.strip().splitlines()[-1]))
    return found


def one(config: dict[str, Any]) -> dict[str, Any]:
    from veneer import api
    from veneer.training.config import RunConfig
    from veneer.training.output.screen import QuietScreen

    leads = os.environ["RANK"] == "0"
    summary = api.train_run(
        RunConfig.model_validate(config) if leads else None, resume=False, screen=QuietScreen()
    )
    names = (
        "planned_memory_bytes",
        "peak_memory_bytes",
        "last_loss",
        "seconds",
        "tokens_per_second",
    )
    return {name: summary[name] for name in (*names, "seconds_by_part", "steps")}


def memory(base: str, folder: Path, only: str) -> list[dict[str, Any]]:
    from benchmarks.random_llama import write_random_llama
    from veneer.bases.names.sources import locate

    source, length = base, 256
    if base == "random":
        source = str(folder / "llama")
        if not Path(source).exists():
            shape = {"hidden": 1024, "feed_forward": 2816, "layers": 16, "heads": 16, "kv_heads": 4}
            write_random_llama(Path(source), tokenizer_of=locate("smollm2-135m").folder, **shape)
    rows = folder / "rows.jsonl"
    words = "one two three four five six seven eight nine ten "
    rows.write_text("\n".join(json.dumps({"text": f"{n} {words * 40}"}) for n in range(16)))
    found = []
    for name, own in MEMORY.items():
        if only not in name:
            continue
        with tempfile.TemporaryDirectory() as out:
            fields = {
                "base": source,
                "data": {"train": str(rows), "validation_share": 0.0, "long_rows": "cut"},
            }
            fields |= {
                "out": f"{out}/run",
                "batch": 4,
                "length": length,
                "steps": 1,
                "dtype": "float32",
                **own,
            }
            said = together(fields, PROCESSES)
        planned, measured = (
            said[0]["planned_memory_bytes"],
            [each["peak_memory_bytes"] for each in said],
        )
        found.append({"base": base, "run": name, "planned": planned, "measured": measured})
        errors = ", ".join(f"{planned / each - 1:+.1%}" for each in measured)
        print(
            f"{base:<14}{name:<32}{planned / 1e6:6.0f}  {[round(m / 1e6) for m in measured]} MB "
            f" {errors}",
            flush=True,
        )
    return found


def time(base: str, rows: str, only: str, *, steps: int, batch: int) -> list[dict[str, Any]]:
    """Micro-batches are the same on one process and on two: half a batch."""
    found = []
    for name, own in TIMES.items():
        if only not in (name, ""):
            continue
        with tempfile.TemporaryDirectory() as out:
            fields = {
                "base": base,
                "data": {"train": rows, "validation_share": 0.0},
                "out": f"{out}/run",
            }
            fields |= {
                "batch": batch,
                "micro_batch": batch // 2,
                "steps": steps,
                "order": "file",
                "dtype": "float32",
            }
            own, processes = (
                {key: value for key, value in own.items() if key != "processes"},
                own["processes"],
            )
            said = together({**fields, "show_answers": False, **own}, processes)[0]
        timed = said["steps"] - 1
        parts = {part: each / timed for part, each in (said["seconds_by_part"] or {}).items()}
        found.append(
            {
                "run": name,
                "step_seconds": said["seconds"] / timed,
                "tokens_per_second": said["tokens_per_second"],
                "parts": parts,
                "last_loss": said["last_loss"],
            }
        )
        print(json.dumps(found[-1]), flush=True)
    return found


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("what", nargs="?", choices=["memory", "time"])
    p.add_argument("--base", default="smollm2-135m", help="or random")
    p.add_argument("--only", default="", metavar="WORD", help="runs whose name holds it")
    p.add_argument("--scratch", type=Path, metavar="FOLDER")
    p.add_argument("--out", type=Path, metavar="FILE.json")
    p.add_argument("--rows", metavar="ROWS.jsonl")
    p.add_argument("--steps", type=int, default=5)
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--one", metavar="JSON", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.one:
        print(json.dumps(one(json.loads(args.one))))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.scratch or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        if args.what == "memory":
            found = memory(args.base, folder, args.only)
        else:
            found = time(
                args.base,
                str(Path(args.rows).resolve()),
                args.only,
                steps=args.steps,
                batch=args.batch,
            )
    if args.out:
        before = json.loads(args.out.read_text()) if args.out.exists() else []
        args.out.write_text(json.dumps([*before, *found], indent=1))


if __name__ == "__main__":
    main()
