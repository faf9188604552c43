"""The weight formats a base can be held in. No torch here: `--help` reads this."""

from typing import Literal, get_args

Quantize = Literal["nf4", "fp4", "gguf"]
"""nf4, fp4: 4-bit code books with block scales, made while the weights are read; gguf: the blocks of a .gguf file."""

FORMATS: tuple[Quantize, ...] = get_args(Quantize)
