"""What is drawn follows from seeds and names as it did when the runs and adapters that lie on disks
were made.

A resumed run, a repeated merge: each gives the same bits only if no release draws otherwise.
`python -m tests.adapters.test_drawn` prints the table (first printed with numpy 2.4 and torch
2.13).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from veneer.adapters.config import Bottleneck
from veneer.adapters.methods.bottleneck import BottleneckLayer
from veneer.adapters.methods.lora import LoRALayer
from veneer.adapters.placement.acting import TokenKeys
from veneer.data.batching import plan_epoch, prefix_keys
from veneer.data.examples import Example, RowRef
from veneer.data.load import _fingerprint
from veneer.kernels.dense.dropout import keep_mask
from veneer.merge.combine.combine import FactorPair, Recipe, combine_updates
from veneer.merge.fold.folder import _generator

ROWS = torch.from_numpy(prefix_keys(np.array([5, 0, 150_000], dtype=np.int32)))


def lora(among: int, expert: int) -> Any:
    layer = LoRALayer(
        "linear", torch.ones(2, 16), torch.ones(4, 2), alpha=1.0, rslora=False, dropout=0.5, key=7
    )
    dropout = layer.active_dropout(
        torch.ones(3, 16), TokenKeys(ROWS, 4099, 3, among), expert=expert
    )
    assert dropout is not None
    return dropout.apply(torch.ones(3, 16)) != 0


def bottleneck() -> Any:
    settings = Bottleneck(size=16, dropout=0.5, activation="relu", norm=False)
    layer = BottleneckLayer(torch.eye(16), settings, key=7)
    layer.parts()["up"].data.copy_(torch.eye(16))
    return layer.update(torch.ones(3, 16), TokenKeys(ROWS, 4099, 3)).detach() != 0


def dare(place: str, seed: int | None) -> Any:
    update = FactorPair(torch.eye(12), torch.ones(12, 12))
    cut = combine_updates([{}, {place: update}], [1.0, 1.0], Recipe("dare", seed=seed))[place]
    return cut.B @ cut.A > 1


def examples(*lengths: int) -> list[Example]:
    return [
        Example(np.arange(n, dtype=np.int32), np.arange(n) % 3 == 1, RowRef("rows", n), n)
        for n in lengths
    ]


LENGTHS = [(n * 7) % 31 + 1 for n in range(70)]
DRAWN: dict[str, Callable[[], Any]] = {
    "keys of rows": lambda: ROWS,
    "a dropout mask": lambda: keep_mask(ROWS, 40, key=(9 << 32) + 5, dropout=0.3),
    "a LoRA's mask": lambda: lora(0, 0),
    "of one that acts beside others, of an expert": lambda: lora(2, 3),
    "a bottleneck's mask": bottleneck,
    "bucketed rows": lambda: [*plan_epoch(LENGTHS, batch=2, seed=3, epoch=2, order="bucketed")],
    "shuffled rows": lambda: [*plan_epoch(LENGTHS, batch=3, seed=3, epoch=2, order="shuffled")],
    "entries that DARE keeps": lambda: (dare("a.b", 3), dare("a.b", None)),
    "stochastic rounding": lambda: _generator(3, "a.weight").initial_seed(),
    "a data set's fingerprint": lambda: _fingerprint(examples(5, 9), examples(3), mixture=None),
}


def digest(name: str) -> str:
    found = DRAWN[name]()
    parts = found if isinstance(found, tuple) else (found,)
    plain = [part.tolist() if isinstance(part, torch.Tensor) else part for part in parts]
    return hashlib.sha256(repr(plain).encode()).hexdigest()[:16]


KNOWN = {
    "keys of rows": "e642a9670287f9b3",
    "a dropout mask": "3605e3f3fdc9d26e",
    "a LoRA's mask": "9cb1c68581f2c285",
    "of one that acts beside others, of an expert": "ac04bca81489a690",
    "a bottleneck's mask": "9cb1c68581f2c285",
    "bucketed rows": "00dc21a7525b4371",
    "shuffled rows": "7b5dddd82a75179b",
    "entries that DARE keeps": "e0f3522880a6b893",
    "stochastic rounding": "4e867e908fe7653b",
    "a data set's fingerprint": "a8795b5cc451eb1c",
}


@pytest.mark.parametrize("name", DRAWN)
def test_what_is_drawn_is_what_was_drawn(name: str) -> None:
    assert digest(name) == KNOWN[name]


if __name__ == "__main__":
    for name in DRAWN:
        print(f'    "{name}": "{digest(name)}",')
