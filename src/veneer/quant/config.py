"""Weight formats of a base and their properties. Imports no torch, because `--help` reads it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from veneer.errors import ConfigError

Quantize = Literal["nf4", "fp4", "gguf", "fp8", "mxfp4", "gptq", "awq"]
"""nf4, fp4: 4-bit code books with block scales, packed while weights are read. gguf: blocks of a
.gguf file. The others are read from folders that were packed by other programs."""


@dataclass(frozen=True, kw_only=True)
class WeightFormat:
    """Properties of a format. No other code compares a format's name.

    from_gguf      only for bases in a .gguf file
    from_folder    only for bases in a folder that was packed by another program
    keeps_dense    keep_dense can leave modules unpacked
    has_original   packed from weights that the base still has, which LoftQ reads
    writes_folder  such a base can be saved as a folder (formats/packed_base.py)
    before_method  prefix of the method's name in a plan's labels
    """

    from_gguf: bool = False
    from_folder: bool = False
    keeps_dense: bool = False
    has_original: bool = False
    writes_folder: bool = False
    before_method: str = ""


DENSE = WeightFormat()
"""Linear layers as they are stored, without packing."""
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
"""The format of "4 bits"."""


def weight_format(quantize: Quantize | None) -> WeightFormat:
    """Returns the properties of a format; DENSE for None. Raises ConfigError for an unknown
    name."""
    if quantize is None:
        return DENSE
    if quantize not in FORMATS:
        raise ConfigError(
            f"a base cannot be loaded as {quantize!r}",
            next_step=f"One of {', '.join(FORMATS)}; or leave it out.",
        )
    return FORMATS[quantize]


def formats_that(declare: str) -> list[Quantize]:
    """Returns the names of the formats with the property `declare`, for messages and choices."""
    return [name for name, properties in FORMATS.items() if getattr(properties, declare)]
