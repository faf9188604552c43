"""The weight formats a base can be held in, and what each means to the rest. No torch here:
`--help` reads this."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from veneer.errors import ConfigError

Quantize = Literal["nf4", "fp4", "gguf", "fp8", "mxfp4", "gptq", "awq"]
"""nf4, fp4: 4-bit code books with block scales, made while the weights are read; gguf: the blocks
of a .gguf file; the others: as a folder's files hold them, which nothing here makes."""


@dataclass(frozen=True, kw_only=True)
class WeightFormat:
    """What those ask who load, plan, write and start: nobody compares a format's name.

    from_gguf      held as the blocks of a .gguf file: no other base can be, and the file's own
                   checks hold
    from_folder    held as the files of a folder hold it: no other base can be
    keeps_dense    keep_dense can leave single modules as they are stored
    has_original   made of weights that the base still has: LoftQ reads them to bring back what was
                   lost
    writes_folder  such a base can be written as a folder (formats/packed_base.py)
    before_method  what a plan's label puts before the method's name
    """

    from_gguf: bool = False
    from_folder: bool = False
    keeps_dense: bool = False
    has_original: bool = False
    writes_folder: bool = False
    before_method: str = ""


DENSE = WeightFormat()
"""What a base is without one: its linear layers as they are stored."""
_CODES = WeightFormat(keeps_dense=True, has_original=True, writes_folder=True, before_method="q")
_STORED = WeightFormat(from_folder=True)
FORMATS: Mapping[Quantize, WeightFormat] = {
    "nf4": _CODES,
    "fp4": _CODES,
    "gguf": WeightFormat(from_gguf=True),
    "fp8": _STORED,
    "mxfp4": _STORED,
    "gptq": _STORED,
    "awq": _STORED,
}
assert tuple(FORMATS) == get_args(Quantize)
FOUR_BITS: Quantize = "nf4"
"""Taken where only "4 bits" is said."""


def weight_format(quantize: Quantize | None) -> WeightFormat:
    """DENSE for None. ConfigError: there is no such format."""
    if quantize is None:
        return DENSE
    if quantize not in FORMATS:
        raise ConfigError(
            f"a base cannot be loaded as {quantize!r}",
            next_step=f"One of {', '.join(FORMATS)}; or leave it out.",
        )
    return FORMATS[quantize]


def formats_that(declare: str) -> list[Quantize]:
    """Names of the formats whose field `declare` is set, for messages and choices."""
    return [name for name, found in FORMATS.items() if getattr(found, declare)]
