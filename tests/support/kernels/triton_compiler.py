"""Triton's kernels, ours and liger-kernel's, made into machine code of a GPU that is not here:
python tests/support/kernels/triton_compiler.py CAPABILITY.

Each function that launches a kernel is called on tensors of a CPU; instead of a launch its kernel
is compiled, by the same arguments, for that GPU, as a launch would: addresses and numbers that 16
divides are known to be such. Prints one line a kernel: name, options, bytes of machine code, the
most bytes that a thread loads and stores at once, bytes of each thread that found no register,
bytes of memory that a block of threads shares.
"""

import re
import subprocess
import sys
import tempfile
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from veneer.kernels.cuda import launch
from veneer.kernels.packed import gguf
from veneer.kernels.rules import AttentionRules
from veneer.quant import nf4

POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
HALVES = (torch.bfloat16, torch.float16)


def type_of(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def aligned(value: Any) -> bool:
    """Whether a launch compiles a kernel of its own for it."""
    if isinstance(value, torch.Tensor):
        return value.data_ptr() % 16 == 0
    return isinstance(value, int) and value % 16 == 0


def widest(ptx: str, way: str) -> int:
    """Bytes that one instruction moves from or to the device's memory."""
    found = re.findall(rf"\b{way}\.global[.\w:]*?(?:\.v(\d))?\.b(\d+)", ptx)
    return max(int(count or 1) * int(bits) // 8 for count, bits in found)


def spilled(cubin: bytes) -> int:
    """Bytes of a thread's values that lie in the device's memory, for want of registers."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        told = subprocess.run(command, capture_output=True, text=True, check=True)
    (found,) = re.findall(r"STACK:(\d+)", told.stdout + told.stderr)
    return int(found)


def compiled_for(capability: int) -> Any:
    target, seen = GPUTarget("cuda", capability, 32), set()

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **named: Any) -> None:
        options = {name: named.pop(name) for name in OPTIONS if name in named}
        defaults = {param.name: param.default for param in self.params if param.has_default}
        given = defaults | dict(zip(self.arg_names, args, strict=False)) | named
        assert given.keys() == set(self.arg_names), (given.keys(), self.arg_names)
        fixed = {param.name for param in self.params if param.is_constexpr}
        fixed |= {name for name, value in given.items() if value is None}
        signature = {
            name: "constexpr" if name in fixed else type_of(given[name]) for name in self.arg_names
        }
        constants = {name: given[name] for name in fixed}
        shared = {
            (at,): [["tt.divisibility", 16]]
            for at, name in enumerate(self.arg_names)
            if name not in fixed and aligned(given[name])
        }
        key = self.fn.__qualname__, str(signature), str(constants), str(shared)
        if key in seen:
            return
        seen.add(key)
        made = triton.compile(
            ASTSource(self, signature, constants, shared), target=target, options=options
        )
        types = " ".join(kind for kind in signature.values() if kind != "constexpr")
        name, code = f"{self.fn.__module__}.{self.fn.__name__}", len(made.asm["cubin"])
        loads, stores = (widest(made.asm["ptx"], way) for way in ("ld", "st"))
        beside = f"{spilled(made.asm['cubin'])} spilled, {made.metadata.shared} shared"
        print(
            f"{name}({types}) {options}: {code} bytes of code, loads {loads}, stores {stores},"
            f" {beside}"
        )

    return run


def everything_of_liger(liger: Any, dtype: torch.dtype, targets: torch.Tensor) -> None:
    x, other, grad = (torch.randn(4, 14336).to(dtype) for _ in range(3))
    for gelu in (False, True):
        liger.gate_forward(x, other, gelu)
        liger.gate_backward(x, other, grad, gelu)
    for width in (64, 4096, 2**14):
        wide, weight = torch.empty(2, width, dtype=dtype), torch.empty(width, dtype=dtype)
        _, scale = liger.norm_forward(wide, weight, 1e-5)
        liger.norm_backward(wide, weight, wide, scale, needs_weight=True)
    q, k, turn = (torch.empty(4, *shape, dtype=dtype) for shape in ((32, 128), (8, 128), (128,)))
    for back in (False, True):
        liger.rotate(q, k, turn, turn, back=back)
    z = torch.empty(4, 128_256, dtype=dtype)
    for writes in (False, True):
        liger.entropy(z, targets, writes)


def everything() -> None:
    for dtype in (torch.float32, *HALVES):
        x, targets = torch.randn(4, 64).to(dtype), torch.zeros(4, dtype=torch.int64)
        if (liger := launch.module("liger_kernels")) is not None:
            everything_of_liger(liger, dtype, targets)
        launch.module("triton_dropout").drop(x, targets, 2**31 + 1, 5, 0.5)
        for layout in gguf.FORMATS.values():
            blocks = torch.empty(4, layout.bytes, dtype=torch.uint8)
            launch.module("triton_gguf").decode(
                blocks,
                torch.empty(4, layout.size, dtype=dtype),
                layout.number,
                layout.size,
                layout.bytes,
            )
        tables = torch.zeros(3, 3, dtype=torch.int64), torch.zeros(2, 2, dtype=torch.int64)
        for rank in (8, 64, 256):
            narrow = launch.module("triton_grouped").down(
                x, torch.empty(2, rank, 64, dtype=dtype), tables[0]
            )
            launch.module("triton_grouped").add_up(
                x, narrow, torch.empty(2, 64, rank, dtype=dtype), tables[0]
            )
            launch.module("triton_grouped").gradient(narrow, x, tables[1])
        for size in (64, 128, 256):
            keys, values = (
                torch.empty(4, 2, *of, 1, dtype=dtype) for of in ((size, 16), (16, size))
            )
            rows = [torch.empty(3, heads, size, dtype=dtype) for heads in (8, 2, 2)]
            read = torch.zeros(3, 16, dtype=torch.int64), torch.ones(3, dtype=torch.int64)
            for rules in (AttentionRules(0.1), AttentionRules(0.1, softcap=3.0, sinks=x[0, :8])):
                launch.module("triton_paged").attend(*rows, keys, values, *read, rules)
        for double in (False, True):
            packed = nf4.quantize(torch.randn(64, 64), double=double).blocks
            launch.module("triton_nf4").dequantize(
                packed, torch.empty(64, 64, dtype=dtype), start=0
            )
            launch.module("triton_nf4").product(packed, x, 64, start=0)


if __name__ == "__main__":
    JITFunction.run = compiled_for(int(sys.argv[1]))
    everything()
