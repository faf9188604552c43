"""What is run on a GPU, in this order: what is cheap and what everything else rests on first.

Each item gives a JSON value. It is run in a process of its own (__main__.py), so a fault, a hang or
memory that is gone ends one item. Sizes are those of an 8 B model on a GPU of 80 GB, or tiny ones
on the CPU (place.py).
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import one_pass
import torch
from answers import Answers
from peers import peft_step, unsloth_step
from place import TINY, Place
from steps import Training, attention_case, random_model, write_tokenizer

from veneer import api
from veneer.adapters.config import LoRA
from veneer.kernels.attention import flash, flex
from veneer.kernels.attention import packed as attention
from veneer.kernels.bindings.row_calls import SILU
from veneer.kernels.cuda import launch
from veneer.kernels.dense import fused
from veneer.kernels.layout import Group
from veneer.kernels.packed import gguf, nf4_reference
from veneer.kernels.packed import nf4 as kernels
from veneer.kernels.rules import AttentionRules
from veneer.quant import nf4
from veneer.training.config import DataConfig, RunConfig
from veneer.training.output.screen import QuietScreen


def versions(at: Place) -> dict[str, Any]:
    cuda = at.device.type == "cuda"
    return {
        **{name: version(name) for name in ("veneer", "torch", "transformers")},
        "triton": version("triton") if importlib.util.find_spec("triton") else None,
        "cuda": torch.version.cuda,
        "gpu": torch.cuda.get_device_name(at.device) if cuda else None,
        "capability": list(torch.cuda.get_device_capability(at.device)) if cuda else None,
        "memory_bytes": torch.cuda.get_device_properties(at.device).total_memory if cuda else None,
    }


def product_roof(at: Place) -> dict[str, Any]:
    """TFLOP/s of x (rows, hidden) times the widths of the model."""
    shape, rows, found = at.model, at.rows * at.length, {}
    x = torch.randn(rows, shape.hidden, device=at.device).bfloat16()
    for width in (shape.hidden, shape.hidden // shape.heads * shape.kv_heads, shape.feed_forward):
        w = torch.randn(width, shape.hidden, device=at.device).bfloat16()
        seconds = at.seconds(lambda w=w: torch.nn.functional.linear(x, w))
        found[f"{rows} x {shape.hidden} x {width}"] = (
            2 * rows * shape.hidden * width / seconds / 1e12
        )
    return {"teraflops": found, "named_teraflops": at.peak and at.peak / 1e12}


def copy_bandwidth(at: Place) -> dict[str, Any]:
    """GB/s read and written by a copy on the device, and from pinned host memory."""
    count = 2**28 if at.device.type == "cuda" else 2**16
    a = torch.empty(count, dtype=torch.uint8, device=at.device)
    b = torch.empty_like(a)
    found = {"on the device": 2 * count / at.seconds(lambda: b.copy_(a)) / 1e9}
    if at.device.type == "cuda":
        host = torch.empty(count, dtype=torch.uint8, pin_memory=True)
        found["from pinned memory"] = (
            count / at.seconds(lambda: a.copy_(host, non_blocking=True)) / 1e9
        )
        found["to pinned memory"] = (
            count / at.seconds(lambda: host.copy_(a, non_blocking=True)) / 1e9
        )
    return found


def decoded_bits(at: Place) -> dict[str, Any]:
    """Values of NF4 that are decoded to other bits there than by plain torch on the CPU. Raises
    where there are any."""
    found, shape = {}, (96, 160)
    for double in (False, True):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            weight = nf4.quantize(torch.randn(shape).to(dtype), double=double)
            own = weight.blocks
            scales, count = own.float_scales(), shape[0] * shape[1]
            plain = nf4_reference.dequantize(
                own.packed, scales, own.table, own.block, start=0, count=count, dtype=dtype
            )
            there = torch.empty(shape, dtype=dtype, device=at.device)
            kernels.dequantize(moved(weight, at.device).blocks, there)
            differ = int((there.cpu().flatten() != plain).sum())
            found[f"{str(dtype).removeprefix('torch.')}, double {double}"] = differ
    assert not any(found.values()), found
    return {
        "values_that_differ": found,
        "bitsandbytes": launch.module("bitsandbytes_nf4") is not None,
    }


def moved(weight: nf4.Packed, device: torch.device) -> nf4.Packed:
    return weight.holding({name: tensor.to(device) for name, tensor in weight.tensors.items()})


def same_as_the_cpu(at: Place) -> dict[str, Any]:
    """A tiny model's first steps in float32, there and on the CPU: losses and trained values."""
    found: dict[str, Any] = {}
    ends = []
    for device in (torch.device("cpu"), at.device):
        training = Training(
            random_model(TINY, torch.float32, torch.device("cpu")).to(device), rows=4, length=40
        )
        found[device.type] = [training.step() for _ in range(3)]
        ends.append(training.values())
    worst = float((ends[0] - ends[1]).abs().max() / ends[0].abs().max())
    assert worst < 1e-3, worst
    return {"losses": found, "values_apart_relative": worst}


def resume_bits(at: Place) -> dict[str, Any]:
    """A run of four steps, the same again, and one that goes on from its second step: bits of the
    adapter."""
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        base, rows = Path(scratch) / "base", Path(scratch) / "rows.jsonl"
        random_model(TINY, torch.float32, torch.device("cpu")).save_pretrained(base)
        write_tokenizer(base)
        rows.write_text("".join(f'{{"text": "river {n} runs to the sea"}}\n' for n in range(16)))
        for dtype in ("float32", "bfloat16"):
            outs = [Path(scratch) / f"{dtype}-{name}" for name in ("once", "again", "resumed")]
            config = RunConfig(
                base=str(base),
                out=str(outs[0]),
                method=LoRA(rank=4, dropout=0.1),
                data=DataConfig(train=str(rows), validation_share=0.0),
                steps=4,
                save_every=2,
                keep=9,
                batch=4,
                dtype=dtype,
                device=str(at.device),
                show_answers=False,
            )
            for out in outs[:2]:
                api.train_run(
                    config.model_copy(update={"out": str(out)}), resume=False, screen=QuietScreen()
                )
            shutil.copytree(outs[0], outs[2])
            for name in ("checkpoints/000004", "adapter"):
                shutil.rmtree(outs[2] / name)
            (outs[2] / "summary.json").unlink()
            resumed = api.resume_config(outs[2])
            api.train_run(resumed, resume=True, screen=QuietScreen())
            hashes = [digest(out / "adapter" / "adapter_model.safetensors") for out in outs]
            found[dtype] = {"repeated": hashes[0] == hashes[1], "resumed": hashes[0] == hashes[2]}
    return found


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def attention_of(
    at: Place,
    prompt: int,
    lengths: tuple[int, ...],
    window: int | None = None,
    softcap: float | None = None,
) -> dict[str, Any]:
    """Packed attention forward and backward: flash kernels, or flex attention, beside the plain
    path, and all against float32."""
    group = Group(prompt, lengths, at.device)
    rules = AttentionRules(at.model.head**-0.5, window, softcap)
    dtype = torch.bfloat16 if at.device.type == "cuda" else torch.float32
    q, k, v, grad = attention_case(at.model, group.rows, dtype, at.device)
    exact = run_attention(
        attention.plain_attention, [t.float() for t in (q, k, v, grad)], group, rules
    )
    paths = {"plain": attention.plain_attention}
    declined = flash.declined(q, k, v, group, rules)
    if declined is None:
        paths["flash"] = flash.flash_attention
    elif softcap is not None:
        declined = flex.declined(q, k, v, group, rules, attention.plain_attention)
        if declined is None:
            paths["flex"] = flex.flex_packed_attention
    found: dict[str, Any] = {"rows": group.rows, "declined": declined}
    for name, path in paths.items():
        ours = run_attention(path, [q, k, v, grad], group, rules)
        apart = [
            float((a.float() - b).abs().max() / b.abs().max().clamp_min(1e-6))
            for a, b in zip(ours, exact, strict=True)
        ]
        found[name] = {
            "milliseconds": 1000
            * at.seconds(lambda path=path: run_attention(path, [q, k, v, grad], group, rules)),
            "peak_bytes": at.peak_bytes(
                lambda path=path: run_attention(path, [q, k, v, grad], group, rules)
            ),
            "apart_from_float32": dict(zip(("out", "dq", "dk", "dv"), apart, strict=True)),
        }
        assert max(apart) < 0.05, found
    return found


def largest_apart(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative to the largest value."""
    return float((found.float() - exact).abs().max() / exact.abs().max().clamp_min(1e-6))


def run_attention(
    path: Any, tensors: list[torch.Tensor], group: Group, rules: AttentionRules
) -> list[torch.Tensor]:
    *inputs, grad = tensors
    leaves = [each.detach().requires_grad_() for each in inputs]
    out = path(*leaves, group, rules)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def decode_rate(at: Place) -> dict[str, Any]:
    """GB/s of packed bytes read and dense ones written, by shape."""
    found = {}
    for out, width in (
        (at.model.hidden, at.model.hidden),
        (at.model.feed_forward, at.model.hidden),
    ):
        weight = moved(nf4.quantize(torch.randn(out, width).bfloat16()), at.device)
        dense = torch.empty(out, width, dtype=torch.bfloat16, device=at.device)
        blocks = weight.blocks
        seconds = at.seconds(lambda blocks=blocks, dense=dense: kernels.dequantize(blocks, dense))
        found[f"{out} x {width}"] = (weight.bytes + dense.nbytes) / seconds / 1e9
    return {"gigabytes_per_second": found}


def drawn(at: Place) -> Callable[..., torch.Tensor]:
    """Values near 1 in bf16, the same each time."""
    draw = torch.Generator(at.device).manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=draw, device=at.device).bfloat16()


def one_pass_kernels(at: Place) -> dict[str, Any]:
    """Norm, gates, rotation and dropout, forward and backward, beside plain torch."""
    rows, shape, draw = at.rows * at.length, at.model, drawn(at)
    cases = {
        "norm": one_pass.norm_case(rows, shape.hidden, draw),
        "silu gate": one_pass.gate_case(rows, shape.feed_forward, draw, gelu=False),
        "gelu gate": one_pass.gate_case(rows, shape.feed_forward, draw, gelu=True),
        "rotation": one_pass.rotary_case(rows, shape.heads, shape.head, draw),
        "dropout": one_pass.dropout_case(rows, shape.hidden, draw),
    }
    return {name: one_pass.compared(case, at.seconds) for name, case in cases.items()}


def entropy_kernel(at: Place) -> dict[str, Any]:
    case = one_pass.entropy_case(min(1024, at.rows * at.length), at.model.vocabulary, drawn(at))
    return one_pass.compared(case, at.seconds)


def gguf_kernels(at: Place) -> dict[str, Any]:
    """Blocks of every format to bf16: bits, and time beside plain torch."""
    found = {}
    for kind in gguf.FORMATS:
        case = one_pass.gguf_case(
            kind, at.model.hidden, 256 * max(1, at.model.hidden // 256), at.device
        )
        found[kind] = one_pass.compared(case, at.seconds)
    return found


def updates_kernels(at: Place) -> dict[str, Any]:
    """Rows with adapters of their own: an answer's single rows, and segments of unlike lengths."""
    lengths = {"64 single rows": [1] * 64, "16 segments": [3 + number for number in range(16)]}
    cases = {
        name: one_pass.updates_case(each, at.model.hidden, drawn(at))
        for name, each in lengths.items()
    }
    return {name: one_pass.compared(case, at.seconds) for name, case in cases.items()}


def compiled_by_torch(at: Place) -> dict[str, Any]:
    """torch.compile beside the kernels: where it pays."""
    rows, shape, draw = at.rows * at.length, at.model, drawn(at)
    norm = one_pass.norm_case(rows, shape.hidden, draw)
    gate = one_pass.gate_case(rows, shape.feed_forward, draw, gelu=False)
    return {
        "norm": one_pass.by_compiler(
            norm, lambda x, w: fused.rms_norm_reference(x, w, 1e-5), at.seconds
        ),
        "silu gate": one_pass.by_compiler(
            gate, partial(fused.gated_reference, activation=SILU), at.seconds
        ),
    }


def training_step(
    at: Place,
    *,
    quantize: bool = False,
    length: int | None = None,
    plain: bool = False,
    chunk: int | None = None,
) -> dict[str, Any]:
    """Tokens a second of whole steps, LoRA r 16: the loop's own."""
    long = length is not None
    model = random_model(at.model, torch.bfloat16, at.device, quantize=quantize)
    rows, length = (1, length) if length is not None else (at.rows, at.length)
    with Training.settings(plain_attention=plain, loss_chunk=chunk):
        training = Training(model, rows=rows, length=length, checkpointing=long)
        training.step()
        peak = at.peak_bytes(training.step)
        held = torch.cuda.memory_allocated(at.device) if at.device.type == "cuda" else None
        seconds = at.seconds(training.step)
    flops = training.flops_per_step()
    return {
        "rows": rows,
        "length": length,
        "tokens_per_second": rows * length / seconds,
        "milliseconds": 1000 * seconds,
        "share_of_peak": None if at.peak is None else flops / seconds / at.peak,
        "peak_bytes": None if peak is None or held is None else peak + held,
        "planned_peak_bytes": training.planned_bytes(at.device),
        "checkpointing": long,
    }


def traced_step(at: Place) -> dict[str, Any]:
    """Where one step's time goes: milliseconds by operation, the first 40."""
    from torch.profiler import ProfilerActivity, profile

    training = Training(
        random_model(at.model, torch.bfloat16, at.device), rows=at.rows, length=at.length
    )
    training.step()
    cuda = at.device.type == "cuda"
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=kinds) as seen:
        training.step()
        at.wait()
    own = [
        (e.key, (e.self_device_time_total if cuda else e.self_cpu_time_total) / 1000)
        for e in seen.key_averages()
    ]
    return {"milliseconds": dict(sorted(own, key=lambda each: -each[1])[:40])}


def waits_of_a_step(at: Place) -> dict[str, Any]:
    """How often the host waits in a step, as CUDA's own debug mode counts."""
    import warnings

    training = Training(random_model(TINY, torch.bfloat16, at.device), rows=2, length=24)
    training.step()
    if at.device.type != "cuda":
        training.step()
        return {"waits": None}
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            training.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return {"waits": sum("synchroniz" in str(each.message) for each in told)}


def answers_of(
    at: Place, *, rows: int, adapters: int = 0, quantize: bool = False
) -> dict[str, Any]:
    """Tokens a second of answers, each step a graph, and launched call by call."""
    model = random_model(at.model, torch.bfloat16, at.device, quantize=quantize)
    asked = Answers(model, adapters=adapters)
    with torch.no_grad():
        return asked.compared(rows=rows, prompt=at.length // 2, steps=at.steps, wait=at.wait)


def graph_bits(at: Place) -> dict[str, Any]:
    """A tiny model's answers as graphs and call by call. Raises where a step is refused, or answers
    differ much."""
    found = {}
    for name, adapters, quantize in (("base", 0, False), ("adapters", 2, False), ("nf4", 1, True)):
        asked = Answers(
            random_model(TINY, torch.float32, at.device, quantize=quantize), adapters=adapters
        )
        with torch.no_grad():
            found[name] = asked.compared(rows=6, prompt=20, steps=12, wait=at.wait)
        assert not found[name]["graphs"]["refused"], found
        assert found[name]["answers_alike"] == found[name]["answers"], found
        assert at.device.type != "cuda" or found[name]["graphs"]["graphs"], found
    return found


@dataclass(frozen=True)
class Item:
    """most_seconds: after which it is ended. needs: a package without which it is passed over, said
    as such."""

    name: str
    run: Callable[[Place], dict[str, Any]]
    most_seconds: int = 120
    needs: str | None = None

    @property
    def missing(self) -> str | None:
        absent = self.needs is not None and importlib.util.find_spec(self.needs) is None
        return f"{self.needs} is not installed" if absent else None


def items(at: Place) -> list[Item]:
    """In the order in which they are run: what a rented hour is paid for comes before what explains
    it."""
    long, short = at.rows * at.length, at.length // 8
    documents = (short,) * (64 if at.device.type == "cuda" else 3)
    rows = (at.length,) * at.rows
    return [
        Item("1.1 versions", versions, 60),
        Item("1.2 product roof", product_roof),
        Item("1.3 copy bandwidth", copy_bandwidth, 60),
        Item("2.1 decoded bits", decoded_bits),
        Item("2.2 a tiny model as on the CPU", same_as_the_cpu),
        Item("2.3 waits of a step", waits_of_a_step),
        Item("2.4 answers as graphs", graph_bits),
        Item("3.1 lora step", training_step, 180),
        Item("3.2 qlora step", lambda at: training_step(at, quantize=True), 180),
        Item("3.3 peft step", peft_step, 180, "peft"),
        Item(
            "3.4 peft step over bitsandbytes",
            lambda at: peft_step(at, quantize=True),
            180,
            "bitsandbytes",
        ),
        Item("3.5 unsloth step", unsloth_step, 180, "unsloth"),
        Item(
            "3.6 unsloth step in four bits",
            lambda at: unsloth_step(at, quantize=True),
            180,
            "unsloth",
        ),
        Item("4.1 answers, one", lambda at: answers_of(at, rows=1)),
        Item("4.2 answers, 32", lambda at: answers_of(at, rows=32)),
        Item(
            "4.3 answers, 32 of the base and 7 adapters",
            lambda at: answers_of(at, rows=32, adapters=7),
        ),
        Item("4.4 answers, one in four bits", lambda at: answers_of(at, rows=1, quantize=True)),
        Item("5.1 attention, one document", lambda at: attention_of(at, 0, (long,))),
        Item("5.2 attention, rows of the step", lambda at: attention_of(at, 0, rows)),
        Item(
            "5.3 attention, many behind a prompt",
            lambda at: attention_of(at, at.length // 2, documents),
        ),
        Item("5.4 attention, a window", lambda at: attention_of(at, 0, rows, at.length // 4)),
        Item(
            "5.5 attention, a window and a prompt",
            lambda at: attention_of(at, short, documents, short // 2 + 1),
        ),
        Item(
            "5.6 attention, a soft cap", lambda at: attention_of(at, short, documents, None, 50.0)
        ),
        Item(
            "5.7 attention, a soft cap and a window",
            lambda at: attention_of(at, 0, rows, at.length // 4, 50.0),
        ),
        Item("6.1 decode rate", decode_rate),
        Item("6.2 norm, gates, rotation, dropout", one_pass_kernels),
        Item("6.3 loss from logits", entropy_kernel),
        Item("6.4 gguf blocks decoded", gguf_kernels),
        Item("6.5 updates of rows with adapters of their own", updates_kernels),
        Item("6.6 torch.compile beside the kernels", compiled_by_torch),
        Item("7.1 lora step, traced", traced_step, 180),
        Item("7.2 lora step, plain attention", lambda at: training_step(at, plain=True), 180),
        Item(
            "7.3 lora step, loss in chunks of 4,096", lambda at: training_step(at, chunk=4096), 180
        ),
        Item(
            "7.4 qlora step, one long row",
            lambda at: training_step(at, quantize=True, length=at.long),
            180,
        ),
        Item("7.5 bits repeated and resumed", resume_bits),
    ]
