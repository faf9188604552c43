"""Jobs that train in the same forwards, for tests: a base, settings, and what makes runs equal."""

import json
import random

import gguf
import pytest
import torch
from safetensors.torch import load_file

from tests.support.models.tiny_gguf import tiny, write_gguf
from tests.support.tiny import save_tiny
from veneer.training.config import RunConfig
from veneer.training.output.records import read_records
from veneer.training.output.screen import QuietScreen
from veneer.training.run import Job, run_jobs, run_training
from veneer.training.state.checkpoint import load_checkpoint, newest_valid

FLOAT32 = 2e-6
"""Largest difference of losses and tensors in float32: products over more rows add in another
order."""
WIDE = {"hidden_size": 128, "intermediate_size": 224, "num_hidden_layers": 4, "head_dim": 32}
"""A model whose decoder layers are one node (kernels/layers/block.py)."""
BLOCKS = gguf.GGMLQuantizationType.Q8_0


def make_world(folder):
    """Fills a folder with bases and rows of ragged lengths."""
    save_tiny(folder / "base")
    save_tiny(folder / "bf16", "llama", torch.bfloat16)
    for family in ("bloom", "falcon"):
        save_tiny(folder / family, family)
    save_tiny(folder / "wide", "llama", torch.bfloat16, **WIDE)
    write_gguf(folder / "blocks.gguf", tiny("llama", head_dim=16), "llama", kind=BLOCKS)
    chance = random.Random(1)
    for name, count in (("rows", 14), ("others", 9)):
        lines = [
            json.dumps({"prompt": f"{name} {n}", "completion": "is " * chance.randrange(1, 9)})
            for n in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def write_preferences(folder, count):
    """Writes files of pairs and of ratings, with ragged lengths."""
    pairs = [
        {"prompt": f"pairs {n}", "chosen": "yes " * (1 + n % 4), "rejected": "no " * (1 + n % 3)}
        for n in range(count)
    ]
    ratings = [
        {"prompt": f"rated {n}", "completion": "is " * (1 + n % 5), "label": n % 2 == 0}
        for n in range(count)
    ]
    for name, rows in (("pairs", pairs), ("ratings", ratings)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")


def config(world, out, *, base="base", rows="rows", **settings):
    fields = {
        "base": str(world / base),
        "data": {"train": str(world / f"{rows}.jsonl"), "validation_share": 0.2},
        "method": {"name": "lora", "rank": 2},
        "steps": 6,
        "batch": 3,
        "evaluate_every": 2,
        "learning_rate": 0.01,
        "show_answers": False,
    }
    return RunConfig.model_validate({**fields, "out": str(out), **settings})


JOBS = {
    "lora": {"seed": 3},
    "dropout": {"method": {"name": "lora", "rank": 5, "alpha": 7, "dropout": 0.3}, "seed": 1},
    "targets": {
        "method": {"name": "lora", "rank": 3, "targets": ["q_proj", "down_proj"], "rslora": True},
        "rows": "others",
        "clip": 0.01,
    },
    "batch": {"batch": 5, "micro_batch": 2, "weight_decay": 0.3, "steps": 4, "seed": 7},
    "dora": {"method": {"name": "dora", "rank": 2, "dropout": 0.2}, "schedule": "linear"},
    "bottleneck": {"method": {"name": "bottleneck", "size": 4}, "order": "shuffled", "steps": 3},
    "prefix": {"method": {"name": "prefix", "tokens": 3}, "rows": "others", "batch": 2},
    "activation": {
        "method": {"name": "lora", "rank": 3, "alpha": 5, "activation": "rows "},
        "batch": 4,
        "steps": 5,
    },
    "exact": {"reduce": "exact", "batch": 4, "learning_rate": 0.003},
}


def alone(world, out, **settings):
    return run_training(config(world, out, **settings), resume=False, screen=QuietScreen())


def together(configs, **options):
    return run_jobs([Job(each, False, QuietScreen()) for each in configs], **options)


def losses(out):
    """(kind, step, loss) of steps and evaluations."""
    return [
        (record["kind"], record["step"], record["loss"])
        for record in read_records(out / "metrics.jsonl")
        if record["kind"] in ("step", "evaluation")
    ]


def assert_same_run(ours, theirs, *, tolerance=FLOAT32):
    """Two folders hold the same run: losses, tensors of the adapter and of the last checkpoint."""
    first, second = losses(ours), losses(theirs)
    assert [record[:2] for record in first] == [record[:2] for record in second]
    assert [r[2] for r in first] == pytest.approx([r[2] for r in second], rel=tolerance)
    for name in ("adapter", "checkpoints"):
        folders = ours / name, theirs / name
        if name == "checkpoints":
            tensors = [load_checkpoint(newest_valid(folder)[0])[0] for folder in folders]
        else:
            tensors = [load_file(next(folder.glob("*.safetensors"))) for folder in folders]
        assert tensors[0].keys() == tensors[1].keys()
        for key, value in tensors[0].items():
            assert torch.allclose(value, tensors[1][key], rtol=tolerance, atol=tolerance), key
