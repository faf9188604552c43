"""A base's weights out of the files that they are mapped from, into memory of this process alone: one behind the other,
each on a line of the cache, on huge pages.

What reads all of them for each token, an answer's step, reads them faster there. The process is as large as before:
each tensor's part of the file leaves it as soon as it is copied. But processes that map one file share its pages, and
the system takes these back where memory is short; not so what is copied. So this is for a process that is alone with
its base on its machine, and only done where as much again stays available.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from veneer.kernels import pages

LINE = 64


@torch.no_grad()
def take_own_pages(model: nn.Module) -> int:
    """Bytes that were moved. The parameters stay the objects that they are, and keep their values; nothing has trained
    yet. What is not mapped from a file, or not on the CPU, stays where it is."""
    files = pages.MappedFiles()
    moved = [each for each in model.parameters() if each.is_cpu and each.is_contiguous() and files.hold(each)]
    starts, total = [], 0
    for each in moved:
        starts.append(total)
        total += -(-each.nbytes // LINE) * LINE
    if total < pages.HUGE or not pages.served() or 2 * total > available_bytes():
        return 0
    room = pages.room(total)
    for each, start in zip(moved, starts, strict=True):
        own = room[start : start + each.nbytes].view(each.dtype).view(each.shape).copy_(each)
        pages.leave(each)
        each.data = own
    return total


def available_bytes() -> int:
    """What this machine, or the container, has for processes without taking from others; 0 where it does not say."""
    table = Path("/proc/meminfo")
    lines = dict(line.split(":", 1) for line in table.read_text().splitlines()) if table.is_file() else {}
    kib = lines.get("MemAvailable", "0 kB").split()[0]
    limit = Path("/sys/fs/cgroup/memory.max")
    most = limit.read_text().strip() if limit.is_file() else "max"
    return min(1024 * int(kib), int(most)) if most.isdigit() else 1024 * int(kib)
