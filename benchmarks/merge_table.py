"""What is left of a trained adapter after merging, by the type that is stored: logits and survival;
JSON lines.

    fp32, bf16, bf16 rounded at random, fp16     into the dense base
    nf4 dequantised, nf4 original                the two honest merges over a 4-bit base
    nf4 requantised
        NF4 of (what NF4 decodes to + update): what Veneer never does
    peft fp32, peft bf16                         PEFT's merge_and_unload, where PEFT is installed

mean_difference and max_difference compare logits with those of the adapter on the base it is merged
into; mean_effect is how far the adapter moves them: a merge that loses the adapter differs by as
much. Both sides run in float32.

    python benchmarks/merge_table.py --base smollm2-135m --adapter runs/tickets [--rows FILE.jsonl]
"""

import argparse
import gc
import importlib.util
import json
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from veneer.adapters.placement.wrapping import plain_modules
from veneer.cli.bases import locate_adapter
from veneer.formats.loading import load_adapter
from veneer.merge.fold.fold import stored_tensors, weight_changes
from veneer.merge.fold.folder import merge_into_folder
from veneer.merge.fold.rounding import Survival, survival, total
from veneer.merge.fold.verify import LogitCheck, compare, limited, reference, text_rows
from veneer.models.frozen_base import FrozenBase
from veneer.models.load import load_base
from veneer.quant import nf4
from veneer.quant.layers import HeldLinear

DENSE = {
    "fp32": {"dtype": "fp32"},
    "bf16": {"dtype": "bf16"},
    "bf16 at random": {"dtype": "bf16", "stochastic": True},
    "fp16": {"dtype": "fp16"},
}


def row(tool: str, kind: str, left: Survival, check: LogitCheck, seconds: float) -> dict[str, Any]:
    return {
        "tool": tool,
        "stored": kind,
        "survival": left.share,
        "rounding_error": left.error,
        "update_size": left.relative_size,
        **asdict(check),
        "seconds": round(seconds, 2),
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("veneer", "torch", "transformers")},
    }


def loaded(base: str, adapter: Path, *, quantize: Any = None) -> FrozenBase:
    found = load_base(base, device="cpu", quantize=quantize)
    load_adapter(
        found, adapter, name="a", force_base=True
    )  # one adapter over bases in several formats
    return found


def rows_of(base: FrozenBase, file: Path | None) -> list[list[int]]:
    if file is None:
        return text_rows(base.tokenizer)
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()[:8]]
    return limited(
        [list(base.tokenizer.apply_chat_template(line["messages"])["input_ids"]) for line in lines]
    )


def into_folder(
    base: FrozenBase, rows: list[list[int]], kind: str, **choice: Any
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as place:
        start = time.perf_counter()
        report = merge_into_folder(
            base, [("a", 1.0)], Path(place) / "m", rows=rows, least_survival=0.0, **choice
        )
        assert report.logits is not None
        return row("veneer", kind, report.total, report.logits, time.perf_counter() - start)


def requantised(base: FrozenBase, rows: list[list[int]]) -> dict[str, Any]:
    """Every changed weight decoded, updated and quantised again, in the model itself."""
    asked = reference(base, [("a", 1.0)], rows)
    start = time.perf_counter()
    wanted = weight_changes(base.model, [(base.attachments["a"], 1.0)])
    base.routing.active = ()
    base.detach("a")
    modules, stored = plain_modules(base.model), stored_tensors(base.model)
    left = []
    for name, new in wanted.items():
        module = modules[name.rpartition(".")[0]]
        if not isinstance(module, HeldLinear):
            continue
        own = stored[name].read()
        target = new(own)
        module.hold("weight", nf4.quantize(target))
        left.append(survival(own, target, module.dense_weight(torch.float32)))
    return row(
        "veneer (not offered)",
        "nf4 requantised",
        total(left),
        compare(base, asked),
        time.perf_counter() - start,
    )


def by_peft(source: str, adapter: Path, rows: list[list[int]], kind: str) -> dict[str, Any]:
    """PEFT's own merge, measured by the same check. Its weights are read back by name."""
    import peft

    ours = loaded(source, adapter)
    asked = reference(ours, [("a", 1.0)], rows)
    base = load_base(source, dtype="float32" if kind == "fp32" else "bfloat16", device="cpu")
    own = {name: s.read().float().clone() for name, s in stored_tensors(base.model).items()}
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base.model = peft.PeftModel.from_pretrained(base.model, str(adapter)).merge_and_unload()
    seconds = time.perf_counter() - start
    wanted = weight_changes(ours.model, [(ours.attachments["a"], 1.0)])
    merged = stored_tensors(base.model)
    left = total(survival(own[n], new(own[n]), merged[n].read()) for n, new in wanted.items())
    return row(f"peft {version('peft')}", kind, left, compare(base, asked), seconds)


def table(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    adapter = locate_adapter(args.adapter)
    for kind, choice in DENSE.items():
        base = loaded(args.base, adapter)
        yield into_folder(base, rows := rows_of(base, args.rows), kind, **choice)
    base = loaded(args.base, adapter, quantize="nf4")
    yield into_folder(base, rows, "nf4 dequantised, fp32", dtype="fp32")
    base = loaded(args.base, adapter, quantize="nf4")
    yield into_folder(base, rows, "nf4 dequantised, bf16", dtype="bf16")
    base = loaded(args.base, adapter, quantize="nf4")
    as_trained = reference(base, [("a", 1.0)], rows)
    base = loaded(args.base, adapter)
    with tempfile.TemporaryDirectory() as place:
        start = time.perf_counter()
        report = merge_into_folder(
            base,
            [("a", 1.0)],
            Path(place) / "m",
            dtype="fp32",
            rows=rows,
            as_trained=as_trained,
            least_survival=0.0,
        )
        assert report.as_trained is not None
        yield row(
            "veneer",
            "nf4 original, fp32",
            report.total,
            report.as_trained,
            time.perf_counter() - start,
        )
    yield requantised(loaded(args.base, adapter, quantize="nf4"), rows)
    for kind in ("fp32", "bf16") if importlib.util.find_spec("peft") else ():
        gc.collect()
        yield by_peft(args.base, adapter, rows, kind)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", required=True)
    parser.add_argument(
        "--adapter", required=True, help="a really trained one: an adapter folder or a run"
    )
    parser.add_argument(
        "--rows", type=Path, help="chat rows (.jsonl) to compare logits on; default: built-in texts"
    )
    for line in table(parser.parse_args()):
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
