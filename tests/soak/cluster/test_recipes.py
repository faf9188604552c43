"""The recipes of docs/guides/several_machines.md, as they stand there: two machines with one
process each, which are this machine twice. What a launcher would set is set as it does; what it
would run is run."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.comparison.test_compare import write_rows
from tests.soak.counts import chosen
from tests.support.tiny import save_tiny
from veneer.child import environment_for
from veneer.training.processes.launch import listening

GUIDE = (Path(__file__).parents[3] / "docs" / "guides" / "several_machines.md").read_text()
LAUNCHERS = ["SLURM", "Kubeflow TrainJob", "SkyPilot", "ssh alone"]
RUN = chosen(LAUNCHERS, "recipes", ci=0)
SCONTROL = '#!/bin/sh\n[ "$*" = "show hostnames node[1-2]" ] && echo 127.0.0.1 && echo 127.0.0.1\n'
SRUN = """#!/bin/bash
SLURM_PROCID=0 SLURM_NODEID=0 "$@" & a=$!
SLURM_PROCID=1 SLURM_NODEID=1 "$@" & b=$!
wait $a && wait $b
"""
SSH = '#!/bin/bash\nshift\nexec bash -c "$*"\n'
"""Stands in for a machine behind a name: what it is asked runs here."""


def recipe(launcher: str) -> str:
    """The code under its heading."""
    section = GUIDE.partition(f"## {launcher}\n")[2].partition("\n## ")[0]
    return re.findall(r"```\n(.*?)```", section, flags=re.DOTALL)[-1]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a run file, where commands begin; the port and the number of GPUs are this
    test's."""
    rows = write_rows(tmp_path / "rows.jsonl", 9)
    settings = {
        "base": str(save_tiny(tmp_path / "base")),
        "data": {"train": str(rows), "validation_share": 0.2},
    }
    settings |= {
        "steps": 2,
        "batch": 4,
        "micro_batch": 2,
        "show_answers": False,
        "dtype": "float32",
        "length": 256,
    }
    (tmp_path / "run.yaml").write_text(
        json.dumps({**settings, "out": str(tmp_path / "runs" / "tickets")})
    )
    (tmp_path / "bin").mkdir()
    for name, text in (("scontrol", SCONTROL), ("srun", SRUN), ("ssh", SSH)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def shell(script: str, place: Path, **variables: str) -> subprocess.Popen[str]:
    known = {
        name: value
        for name, value in os.environ.items()
        if not re.match(r"RANK|WORLD|LOCAL|MASTER|PET|SLURM", name)
    }
    common = {
        **environment_for(known),
        "OMP_NUM_THREADS": "1",
        "VENEER_WAIT_SECONDS": "300",
        "CUDA_VISIBLE_DEVICES": "",
    }
    common["PATH"] = os.pathsep.join([str(place / "bin"), common["PATH"]])
    output: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(
        ["bash", "-c", script], cwd=place, env={**common, **variables}, **output
    )


def commands(launcher: str, place: Path) -> list[subprocess.Popen[str]]:
    """As each machine gets them."""
    with listening() as (free, _):  # closed again: the launchers bind it themselves
        port = str(free)
    text = (
        recipe(launcher)
        .replace("29500", port)
        .replace("/data/run.yaml", "run.yaml")
        .replace("cd tickets", f"cd {place}")
    )
    text = re.sub(r"\bhost\d?(?=[ \\\n])", "127.0.0.1", text.replace("host$rank", "localhost"))
    if launcher == "SLURM":
        variables = {
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_ID": "4711",
        }
        return [shell(text.replace("--nproc-per-node 4", "--nproc-per-node 1"), place, **variables)]
    if launcher == "Kubeflow TrainJob":
        command = " ".join(yaml.safe_load(text)["spec"]["trainer"]["command"])
        known = {
            "PET_NNODES": "2",
            "PET_NPROC_PER_NODE": "1",
            "PET_MASTER_ADDR": "127.0.0.1",
            "PET_MASTER_PORT": port,
        }
        return [shell(command, place, **known, PET_NODE_RANK=str(rank)) for rank in range(2)]
    if launcher == "SkyPilot":
        known = {
            "SKYPILOT_NUM_NODES": "2",
            "SKYPILOT_NUM_GPUS_PER_NODE": "1",
            "SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.1",
        }
        run = yaml.safe_load(text)["run"]
        return [shell(run, place, **known, SKYPILOT_NODE_RANK=str(rank)) for rank in range(2)]
    return [shell(text, place)]


@pytest.mark.parametrize("launcher", RUN)
def test_a_recipe_starts_one_run_of_two_processes(launcher: str, place: Path) -> None:
    started = commands(launcher, place)
    said = [process.communicate(timeout=600)[0] for process in started]
    assert [process.returncode for process in started] == [0] * len(started), said
    assert "2 processes, each with micro-batches of its own" in " ".join("".join(said).split()), (
        said
    )
    assert (place / "runs" / "tickets" / "adapter").is_dir()


def test_every_recipe_of_the_guide_is_tried() -> None:
    headings = re.findall(r"^## (.*)$", GUIDE, flags=re.MULTILINE)
    assert [
        heading
        for heading in headings
        if heading
        not in ("How it works", "A base in shards", "What to expect", "torchrun", "What was tested")
    ] == LAUNCHERS
