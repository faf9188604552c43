"""What is computed on CUDA in Triton, by the functions that everybody calls: on a GPU where there
is one, else on a pretended one, in Triton's interpreter, and launched on the device that holds the
tensors."""

from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from importlib.util import find_spec

import pytest
import torch
from torch.nn import functional as F

from tests.kernels.dense import test_segments
from tests.support.accelerator import Accelerator
from tests.support.kernels.interpreter import DEVICE  # before whatever loads Triton
from tests.support.models.tiny_gguf import random_blocks
from veneer.kernels.attention.paged import KeyValueBlocks
from veneer.kernels.attention.paged_rows import BlockTables, paged_rows, paged_rows_reference
from veneer.kernels.bindings import library as native
from veneer.kernels.bindings.row_calls import GELU_TANH, SILU
from veneer.kernels.cuda import launch, trials
from veneer.kernels.dense import dropout, fused, grouped, loss, segments
from veneer.kernels.packed import gguf
from veneer.kernels.packed import nf4 as nf4_kernels
from veneer.kernels.rules import AttentionRules
from veneer.linear import DenseLinear
from veneer.quant import nf4

TYPES = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
"""Largest difference to float64, relative to the largest value: two roundings."""
every_type = pytest.mark.parametrize("dtype", TYPES, ids=str)
liger_type = pytest.mark.parametrize(
    "dtype", [t for t in TYPES if DEVICE == "cuda" or t is not torch.bfloat16], ids=str
)
"""Triton's interpreter does not multiply two bf16 values, which liger-kernel's kernels do."""
needs_liger = pytest.mark.skipif(
    find_spec("liger_kernel") is None, reason="liger-kernel is not installed (veneer[cuda])"
)
WORDS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


class There:
    """to: a copy of a tensor there; launches: the devices that kernels of `name` were launched
    on."""

    def __init__(self, device, launches):
        self.device, self.launches = device, launches

    def to(self, *tensors):
        moved = [t.detach().to(self.device) for t in tensors]
        return moved[0] if len(moved) == 1 else moved


@pytest.fixture
def there(monkeypatch):
    launches = []
    module = launch.module

    def seen(name):
        launches.append(name)
        return module(name)

    monkeypatch.setattr(launch, "module", seen)
    with nullcontext() if DEVICE == "cuda" else Accelerator("cuda:1") as pretended:
        devices = []
        if pretended is not None:
            from triton.runtime import interpreter

            run = interpreter.GridExecutor.__call__
            monkeypatch.setattr(
                interpreter.GridExecutor,
                "__call__",
                lambda *args, **kwargs: (
                    devices.append(torch.cuda.current_device()),
                    run(*args, **kwargs),
                )[1],
            )
        yield There(torch.device(DEVICE if pretended is None else "cuda:1"), launches)
        assert launches, "nothing was launched"
        assert set(devices) <= {1} and torch.cuda.current_device() == 0
        assert pretended is None or devices


def draws(seed, *shapes):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=draw) for shape in shapes]


def near(found, exact, tolerance):
    scale = exact.abs().max().clamp_min(1e-3)
    assert found.shape == exact.shape
    assert ((found.cpu().double() - exact).abs().max() / scale) <= tolerance


def gradients(function, inputs, grad):
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    out = function(*inputs)
    (out if grad is None else (out * grad).sum()).backward()
    return out.detach(), [tensor.grad for tensor in inputs]


@needs_liger
@liger_type
@pytest.mark.parametrize("kind", [SILU, GELU_TANH])
def test_the_gates_are_their_references(kind, dtype, there):
    gate, up, grad = (4 * tensor.to(dtype) for tensor in draws(0, *[(3, 700)] * 3))
    gate[0, :3] = torch.tensor([-200.0, 200.0, 0.0])
    out, found = gradients(
        partial(fused.gated, activation=kind), there.to(gate, up), there.to(grad)
    )
    plain = partial(fused.gated_reference, activation=kind)
    exact, expected = gradients(plain, [gate.double(), up.double()], grad.double())
    for one, other in zip((out, *found), (exact, *expected), strict=True):
        assert one.dtype is dtype
        near(one, other, TYPES[dtype])
    assert there.launches == ["liger_kernels"] * 2


@needs_liger
@liger_type
@pytest.mark.parametrize("shape", [(5, 300), (2, 3, 64), (1, 7)], ids=str)
def test_the_norm_is_its_reference(dtype, shape, there):
    x, weight, grad = (tensor.to(dtype) for tensor in draws(1, shape, shape[-1:], shape))
    out, found = gradients(
        lambda *given: fused.rms_norm(*given, 1e-5), there.to(x, weight + 1), there.to(grad)
    )
    wide = [x.double(), (weight + 1).double()]
    exact, expected = gradients(
        lambda *given: fused.rms_norm_reference(*given, 1e-5), wide, grad.double()
    )
    for one, other in zip((out, *found), (exact, *expected), strict=True):
        near(one, other, 2 * TYPES[dtype])
    assert there.launches == ["liger_kernels"] * 2


@needs_liger
@liger_type
@pytest.mark.parametrize("size", [6, 32, 128])
def test_the_rotation_is_its_reference(dtype, size, there):
    heads, key = (21, 3, size), (21, 1, size)
    q, k, g, h = (tensor.to(dtype) for tensor in draws(3, heads, key, heads, key))
    cos, sin = (tensor.repeat(1, 2).to(dtype) for tensor in draws(4, *[(21, size // 2)] * 2))
    before = q.clone(), k.clone()
    given = [each.requires_grad_() for each in there.to(q, k)]
    ours = fused.rotary(*given, *there.to(cos, sin))
    theirs = fused.rotary_reference(q.requires_grad_(), k.requires_grad_(), cos, sin)
    for (a, b), grads in ((ours, there.to(g, h)), (theirs, (g, h))):
        ((a * grads[0]).sum() + (b * grads[1]).sum()).backward()
    pairs = zip((*ours, *(tensor.grad for tensor in given)), (*theirs, q.grad, k.grad), strict=True)
    for one, other in pairs:
        near(one.detach(), other.detach().double(), 4 * TYPES[dtype])
    assert all(torch.equal(a.detach().cpu(), b) for a, b in zip(given, before, strict=True))
    assert there.launches == ["liger_kernels"] * 2


@needs_liger
@liger_type
@pytest.mark.parametrize("vocabulary", [5, 1000, 9001])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_the_loss_and_its_gradient_are_the_references(dtype, vocabulary, softcap, there):
    h, weight = (tensor.to(dtype) for tensor in draws(2, (37, 24), (vocabulary, 24)))
    targets = torch.randint(0, vocabulary, (37,), generator=torch.Generator().manual_seed(0))

    def head(weight):
        return loss.Head(weight, None, 1.5, softcap)

    there_targets, there_head = there.to(targets), head(there.to(weight))
    ours, (d_h,) = gradients(
        lambda h: loss.frozen_head_loss(h, there_targets, there_head, 11.0), [there.to(h)], None
    )
    nats = loss.head_nats(there.to(h), there_targets, there_head)
    theirs, (e_h,) = gradients(
        lambda h: loss.head_loss_reference(h, targets, head(weight), 11.0), [h], None
    )
    each = F.cross_entropy(head(weight).logits(h).float(), targets, reduction="none")
    near(ours, theirs.double(), 1e-5)
    near(nats, each.double(), 1e-5)
    near(d_h, e_h.double(), {torch.float32: 1e-5}.get(dtype, 2**-5))
    assert set(there.launches) == {"liger_kernels"}


@needs_liger
def test_logits_without_a_largest_and_targets_outside_of_them_make_a_loss_that_stops_the_run(there):
    z = torch.tensor(
        [[0.0, float("nan"), 1.0], [0.0, float("inf"), 1.0], [1.0, 2.0, 3.0], [1.0, 2.0, 3.0]]
    ).half()
    losses = launch.kernels_for("liger_kernels", there.to(z)).entropy(
        *there.to(z, torch.tensor([0, 0, 3, -1])), False
    )
    assert losses.cpu().isnan().all()
    x = torch.full((2, 16), float("nan")).half()
    assert fused.rms_norm(*there.to(x, torch.ones(16).half()), 1e-5).cpu().isnan().all()


@every_type
@pytest.mark.parametrize("share", [0.1, 0.75])
@pytest.mark.parametrize("key", [0, (0xFFFFFFFF << 32) | 0x80000001, 2**62 + 12345], ids=hex)
def test_dropout_has_the_masks_and_bits_of_the_cpu(dtype, share, key, there):
    (x,) = (tensor.to(dtype) for tensor in draws(4, (9, 1300)))
    rows = torch.randint(
        -(2**63), 2**63 - 1, (9,), generator=torch.Generator().manual_seed(key % 1000)
    )
    found = dropout.drop_out(*there.to(x, rows), key=key, dropout=share)
    expected = dropout.drop_out_reference(x, rows, key=key, dropout=share)
    assert torch.equal(found.cpu(), expected) and (expected == 0).any()


@every_type
@pytest.mark.parametrize("kind", gguf.FORMATS)
def test_gguf_blocks_are_decoded_to_the_bits_of_the_reference(kind, dtype, there):
    for rows, per_row in ((1, 1), (7, 5)):
        blocks = random_blocks(kind, rows, per_row * gguf.FORMATS[kind].size, rows)
        expected = gguf.dequantise_reference(blocks, kind).to(dtype)
        out = gguf.dequantise(
            there.to(blocks), kind, there.to(torch.full(expected.shape, 7.0, dtype=dtype))
        )
        assert torch.equal(out.cpu().view(WORDS[dtype]), expected.view(WORDS[dtype]))


MIXES = [
    "single rows",
    "like lengths",
    "unlike lengths and ranks",
    "long ones among short ones",
    "dropout",
    "out of order",
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mix", MIXES)
def test_rows_with_adapters_of_their_own_are_those_of_the_plain_loop(mix, dtype, there):
    x, weight = (tensor.to(dtype) for tensor in draws(6, (test_segments.LONG + 10, 24), (40, 24)))
    updates = test_segments.MIXES[mix]
    pairs = [
        test_segments.Pair(*(factor.detach().to(dtype) for factor in u.layer.factors()))
        for u in updates
    ]

    def ran(way, to, *, trains):
        base = DenseLinear(torch.nn.Linear(24, 40, bias=False, device="meta"))
        base.module.weight = torch.nn.Parameter(to(weight), requires_grad=False)
        own = [
            test_segments.Pair(*(to(each).requires_grad_(trains) for each in (p.A, p.B)))
            for p in pairs
        ]
        dropped = [
            u.dropout and replace(u.dropout, rows=to_place(to, u.dropout.rows)) for u in updates
        ]
        acting = [
            replace(u, layer=o, dropout=d) for u, o, d in zip(updates, own, dropped, strict=True)
        ]
        leaves = [to(x).requires_grad_(trains), *(f for o in own for f in (o.A, o.B))]
        with torch.set_grad_enabled(trains):
            y = way(leaves[0], None, base, acting)
        if trains:
            (y * to(torch.linspace(-1, 1, y.numel()).view(y.shape))).sum().backward()
        return [y.detach(), *(leaf.grad for leaf in leaves if trains)]

    def to_place(to, rows):
        return rows if to is wide else there.to(rows)

    def wide(tensor):
        return tensor.detach().double()

    def moved(tensor):
        return there.to(tensor.to(dtype))

    expected = ran(segments.linear_with_updates_reference, wide, trains=True)
    plan = segments.UpdateCache()
    for trains in (True, False):
        found = ran(lambda *given: segments.linear_with_updates(*given, plan), moved, trains=trains)
        for one, other in zip(found, expected, strict=False):
            near(one, other, 8 * TYPES[dtype])
    assert "triton_grouped" in there.launches


@pytest.mark.parametrize("double", [False, True])
def test_weights_of_four_bits_are_decoded_and_multiplied_where_they_lie(double, there, monkeypatch):
    monkeypatch.setattr(launch, "works_on", lambda package, device: package == "triton")
    x, weight = (tensor.bfloat16() for tensor in draws(7, (3, 64), (48, 64)))
    packed = nf4.quantize(weight, double=double)
    dense = nf4.dequantize(packed)
    moved = packed.holding({name: there.to(tensor) for name, tensor in packed.tensors.items()})
    assert torch.equal(nf4.dequantize(moved).cpu(), dense)
    near(
        nf4_kernels.product(moved.blocks, there.to(x), 48),
        x.double() @ dense.double().T,
        TYPES[torch.bfloat16],
    )
    assert there.launches == ["triton_nf4"] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "case", ["plain", "window", "soft cap and sinks", "heads of unlike sizes", "many parts"]
)
def test_single_tokens_over_tables_are_those_of_the_reference(case, dtype, there):
    lengths, slots = [1, 16, 17, 40, 600 if case == "many parts" else 100], 16
    K, G, D, E = 2, 3, 24, 40 if case == "heads of unlike sizes" else 24
    rules = AttentionRules(
        0.3, window=21 if case == "window" else None, softcap=2.0 if "cap" in case else None
    )
    sinks = torch.linspace(-1, 2, K * G).to(dtype) if "sinks" in case else None
    q, k, v = (tensor.to(dtype) for tensor in draws(8, (5, K * G, D), (5, K, D), (5, K, E)))
    count = 40
    blocks = torch.stack([(torch.arange(count) * 5 + n).clamp_max(199) for n in range(5)])
    keys, values = (
        tensor.to(dtype) for tensor in draws(9, (200, K, D, slots, 1), (200, K, slots, E, 1))
    )
    at = torch.tensor(lengths)

    def ran(way, to):
        stored = KeyValueBlocks(to(keys.clone()), to(values.clone()))
        own = replace(rules, sinks=None if sinks is None else to(sinks))
        # rows of heads as models hand them over: not side by side
        given = [to(each.transpose(0, 1).contiguous()).transpose(0, 1) for each in (q, k, v)]
        out = way(*given, stored, BlockTables(there_or_not(to, blocks), there_or_not(to, at)), own)
        return out, stored

    def there_or_not(to, numbers):
        return there.to(numbers) if to is there.to else numbers

    ours, mine = ran(paged_rows, there.to)
    theirs, yours = ran(paged_rows_reference, lambda each: each.double())
    near(ours, theirs, 4 * TYPES[dtype])
    assert torch.equal(mine.keys.cpu().double(), yours.keys) and torch.equal(
        mine.values.cpu().double(), yours.values
    )
    assert there.launches == ["triton_paged"]


def test_a_gpu_where_triton_does_not_launch_takes_plain_torch(there):
    x, packed = there.to(torch.ones(2, 64)), nf4.quantize(torch.ones(64, 64)).blocks
    with pytest.MonkeyPatch.context() as context:
        context.setattr(launch, "works_on", lambda package, device: device.type == "meta")
        assert launch.kernels_for("triton_gguf", x) is None
        assert launch.module_on("triton_gguf", torch.device("meta")) is not None
        assert grouped.CudaBundle.of((0,), (slice(0, 2),), torch.float32, x.device) is None
        assert not nf4_kernels.has_product(packed, x)
    assert nf4_kernels.has_product(packed, x)
    dropout.drop_out(x, there.to(torch.arange(2)), key=1, dropout=0.5)


def test_what_fails_to_launch_or_computes_something_else_is_reported():
    here = torch.device("cpu")

    def no_compiler(_):
        raise RuntimeError("Failed to find C compiler. Please specify via CC.\nmore")

    assert launch.find_fault(lambda _: 1e-6, here) is None
    assert (
        launch.find_fault(no_compiler, here)
        == "RuntimeError: Failed to find C compiler. Please specify via CC."
    )
    assert launch.find_fault(lambda _: 8.6e-3, here) == "it differs by 8.6e-03"
    assert launch.find_fault(lambda _: float("nan"), here) == "it differs by nan"


@pytest.mark.parametrize("package", ["triton", pytest.param("liger", marks=needs_liger)])
def test_the_trial_of_each_package_agrees_with_plain_torch(package, there):
    assert launch.find_fault(trials.TRIALS[package], there.device) is None
    there.launches.append(package)


@needs_liger
def test_while_a_step_is_planned_nothing_is_launched_and_as_much_is_allocated(there):
    x = torch.empty(4, 64, dtype=torch.bfloat16, device="meta")
    with native.planning("cuda"):
        assert launch.kernels_for("liger_kernels", x) is not None
        assert fused.rms_norm(x, x[0], 1e-5).shape == x.shape
    assert launch.kernels_for("liger_kernels", x) is None
    fused.gated(*there.to(torch.ones(2, 16), torch.ones(2, 16)), SILU)


def test_what_the_kernels_do_not_take_goes_the_plain_way(there):
    wide = [tensor.double() for tensor in draws(5, (4, 24), (4, 24))]
    assert launch.kernels_for("triton_gguf", *there.to(*wide)) is None
    turned = there.to(wide[0].float()).T
    for tensor in (turned, wide[0].float()):
        assert launch.kernels_for("triton_gguf", tensor) is None
    assert not there.launches
    near(
        fused.gated(turned, turned, SILU),
        fused.gated_reference(*[wide[0].float().double().T] * 2, SILU),
        1e-6,
    )
