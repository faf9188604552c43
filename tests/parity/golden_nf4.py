"""Prints what bitsandbytes gives for fixed weights, as tests/parity/golden_nf4.json holds it.

    python -m tests.parity.golden_nf4 > tests/parity/golden_nf4.json        (needs bitsandbytes)

Per case the SHA-256 of the packed bytes and of the scales.
"""

import hashlib
import json

import torch
from torch import Tensor

SHAPES = ((64, 64), (5, 192), (1, 64), (3, 50), (33, 7), (1, 1), (17, 4304))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def weights(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The same on every machine and in every version: integer arithmetic, then exactly rounded
    operations."""
    n = shape[0] * shape[1]
    uniform = (torch.arange(n, dtype=torch.int64) * 2654435761 + 12345) % 2**32
    centred = uniform.double() / 2**31 - 1
    values = (centred * centred * centred * 0.125).float()
    if n > 256:
        values[64:128] = 0
        values[130:192] = 1e-39
    return values.to(dtype).view(shape)


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def cases() -> list[tuple[str, tuple[int, int], str, int]]:
    found = [("nf4", shape, dtype, 64) for shape in SHAPES for dtype in DTYPES]
    found += [("nf4", (5, 192), "bfloat16", block) for block in (32, 128, 256)]
    return [*found, ("fp4", (5, 192), "bfloat16", 64), ("fp4", (33, 7), "float32", 64)]


def name(case: tuple[str, tuple[int, int], str, int]) -> str:
    book, (rows, width), dtype, block = case
    return f"{book} {rows}x{width} {dtype} {block}"


def main() -> None:
    import bitsandbytes
    from bitsandbytes.functional import quantize_4bit

    golden = {}
    for case in cases():
        book, shape, dtype, block = case
        packed, state = quantize_4bit(
            weights(shape, DTYPES[dtype]), blocksize=block, quant_type=book
        )
        golden[name(case)] = {"packed": digest(packed), "absmax": digest(state.absmax)}
    versions = {"bitsandbytes": bitsandbytes.__version__, "torch": torch.__version__}
    print(json.dumps({"versions": versions, "cases": golden}, indent=1))


if __name__ == "__main__":
    main()
