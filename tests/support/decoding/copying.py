"""Tiny models whose answers repeat themselves, so guesses from the text are often right."""

import torch

from tests.support.tiny import tiny_base


def copying_base(family="llama_untied", *, dtype=torch.float32, keep=0.02):
    """A tiny base whose layers say little: the next token depends on the newest one above all, so
    greedy answers end in loops."""
    base = tiny_base(family, dtype)
    with torch.no_grad():
        for name, weight in base.model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight *= keep
    return base
