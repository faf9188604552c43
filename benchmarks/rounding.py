"""How far the loss in bf16 is from float32's, batch by batch: Veneer's step and transformers' own
attention and modules.

    python benchmarks/rounding.py --base BASE --rows FILE [FILE ...]

No adapter, no step: the loss of every batch of 8 rows over the same weights. The mean says whether
a path is biased, the deviation of single batches what one first loss can say of it.
"""

import argparse
import dataclasses
import statistics
from datetime import date

import torch

from tests.support.models.routed import Routed, batch_loss
from veneer.data.encoder import RowRules
from veneer.data.examples import Example
from veneer.data.load import load_data
from veneer.execution.train_step import fused, replacements
from veneer.models.capacity import capacity_of
from veneer.models.frozen_base import FrozenBase
from veneer.models.load import load_base
from veneer.models.step import batch_of, parts_of
from veneer.training.config import DataConfig


@torch.no_grad()
def losses(base: FrozenBase, examples: list[Example], batch: int, *, own: bool) -> list[float]:
    """Mean nats per trained token of every batch, in file order. own: transformers' padded forward
    in our place."""
    paths = dataclasses.replace(base.paths, packed=False) if own else base.paths
    rows = [list(range(i, min(i + batch, len(examples)))) for i in range(0, len(examples), batch)]
    if own:
        base.model.set_attn_implementation("sdpa")
    with fused(base.model, {} if own else replacements(base.model)):
        routed = Routed(base.model, paths)
        parts = parts_of(routed, examples, rows)
        made = (batch_of(routed, examples, part, share_prompt=not own) for part in parts)
        return [batch_loss(routed, one, total=float(one.trained_tokens)).item() for one in made]


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--base", required=True)
    p.add_argument("--rows", nargs="+", required=True)
    p.add_argument("--batch", type=int, default=8)
    args = p.parse_args()
    for file in args.rows:
        found: dict[str, list[float]] = {}
        for name, dtype, own in (
            ("float32", "float32", False),
            ("veneer", "auto", False),
            ("transformers", "auto", True),
        ):
            base = load_base(args.base, dtype=dtype)
            settings = DataConfig(train=file, validation_share=0.0)
            data = load_data(
                settings, RowRules(8192, capacity_of(base)), base.tokenizer, today=date.today()
            )
            found[name] = losses(base, list(data.train), args.batch, own=own)
        exact = found.pop("float32")
        print(
            f"{file}: {len(exact)} batches of {args.batch}, float32 loss"
            f" {statistics.mean(exact):.4f}"
        )
        for name, values in found.items():
            off = [v / e - 1 for v, e in zip(values, exact, strict=True)]
            print(
                f"  {name:13} mean {statistics.mean(off):+.2%}   one batch: deviation"
                f" {statistics.stdev(off):.2%}, largest {max(off, key=abs):+.2%}"
            )


if __name__ == "__main__":
    main()
