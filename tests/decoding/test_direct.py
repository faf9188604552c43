"""A step through a model's parts gives what the model gives, whatever acts there; what does not
agree says why."""

import gc
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.adapters.test_methods import move
from tests.decoding.test_engine import METHODS
from tests.support.helpers import Limited
from tests.support.tiny import tiny_base
from veneer.adapters.attach import attach
from veneer.adapters.config import Bottleneck, LoRA
from veneer.adapters.placement.acting import Acting, in_turn
from veneer.decoding.engine import Engine, decode_step_of
from veneer.decoding.schedule.adapters import FixedAdapters
from veneer.execution.agreement import difference as apart
from veneer.execution.decode_step import LayersForward, forward_by_layers, own_forward
from veneer.execution.proofs.steps import read_and_continued
from veneer.kernels.bindings.arguments import observe_calls
from veneer.kernels.bindings.row_calls import GELU_ERF, GELU_TANH, RELU, RELU_SQUARED, SIGMOID, SILU
from veneer.kernels.decoding import decoder_step
from veneer.kernels.dense import few_rows

PROMPTS = [list(range(30, 60)), [7, 90, 4], list(range(100, 117))]
MEMORY = ("view", "as_strided", "empty", "zeros", "unsqueeze", "select")
FAMILIES = [
    "llama",
    "llama_untied",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma",
    "gemma2",
    "gemma3",
    "olmo2",
    "exaone4",
    "smollm3",
    "granite",
    "phi3",
    "glm4",
    "cohere",
    "stablelm",
    "starcoder2",
    "phi",
    "mixtral",
    "qwen3_moe",
    "olmoe",
]
BOUND = {torch.float32: 1e-5, torch.bfloat16: 0.1}


def based(family, dtype=torch.float32, **overrides):
    base = tiny_base(family, dtype, **overrides)
    _ = base.paths
    return base


def by_parts(base):
    found = forward_by_layers(base.model)
    assert isinstance(found, LayersForward), found
    return found


def test_an_engine_says_why_it_goes_another_way():
    for family, said in (("llama", None), ("gemma2", None), ("phi3", None)):
        base = based(family)
        engine = Engine(base, budget_bytes=2**20, adapters=FixedAdapters({}))
        reason = engine.decode_step.not_by_parts
        assert reason is None if said is None else said in reason


def test_a_layer_with_a_limit_that_the_trial_does_not_reach_is_called_whole():
    base = based("llama", num_hidden_layers=3)
    for layer, limit in zip(base.model.model.layers, (0, 0, 10.0), strict=True):
        for parameter in layer.mlp.parameters():
            parameter.mul_(0.01)
        layer.mlp = Limited(layer.mlp, limit)
    assert [bool(layer.feed_forward) for layer in by_parts(base).layers] == [True, True, False]


def differ(base, found):
    with torch.no_grad():
        return apart(
            read_and_continued(found.logits, PROMPTS),
            read_and_continued(own_forward(base.model), PROMPTS),
        )


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("few", [False, True], ids=["", "products of few rows"])
def test_a_step_by_parts_gives_what_the_model_gives(dtype, family, few, monkeypatch):
    if few:
        monkeypatch.setattr(few_rows, "LEAST_VALUES", 1)
    base = based(family, dtype)
    assert differ(base, by_parts(base)) < BOUND[dtype]


@pytest.mark.parametrize(
    ("family", "reason"), [("deepseek_v3", "other parts"), ("bloom", "biases by distance")]
)
def test_what_is_built_otherwise_says_why(family, reason):
    assert reason in forward_by_layers(based(family).model)


@pytest.mark.parametrize("field", ["residual_multiplier", "embedding_multiplier", "logits_scaling"])
def test_multipliers_that_no_name_of_a_part_tells_are_found(field):
    base = based("granite", **{field: 0.3})
    found = by_parts(base)
    assert {layer.residual_scale for layer in found.layers} == {base.config.residual_multiplier}
    assert differ(base, found) < BOUND[torch.float32]


def test_who_listens_to_a_module_is_asked():
    base = based("llama")
    found = by_parts(base)
    heard = []
    for module in (base.model.model.layers[0].self_attn, base.model.model.layers[1].mlp.up_proj):
        module.register_forward_hook(lambda module, given, out: heard.append(module))
    assert differ(base, found) < BOUND[torch.float32]
    assert len(heard) == 2 * 3 * 2  # of both ways, in three steps


@pytest.mark.parametrize("family", ["qwen3", "mixtral", "opt", "ministral3", "gpt2", "phi"])
def test_a_step_calls_each_hook_that_the_models_own_code_calls(family):
    base = based(family)
    found = by_parts(base)

    def heard(run, module):
        calls = []
        hook = module.register_forward_hook(lambda *_: calls.append(1))
        with torch.no_grad():
            read_and_continued(run, PROMPTS[1:2])
        hook.remove()
        return bool(calls)

    own, step = own_forward(base.model), decode_step_of(base).logits
    assert decode_step_of(base).not_by_parts is None and found.fits
    modules = dict(base.model.base_model.named_modules())
    silent = [path for path, m in modules.items() if heard(own, m) and not heard(step, m)]
    assert not silent
    for layer in found.layers:
        layer.module.register_forward_hook(lambda *_: None)
    assert differ(base, found) < BOUND[torch.float32]


@pytest.mark.parametrize("name", METHODS)
def test_what_an_adapter_does_is_done_by_parts_too(name, monkeypatch):
    monkeypatch.setattr(few_rows, "LEAST_VALUES", 1)
    base = based("llama_untied")
    found = by_parts(base)
    head = base.model.get_output_embeddings()
    move(
        attach(base.model, METHODS[name], name=name, routing=base.routing, head=head, seed=1),
        seed=1,
    )
    applied = base.routing.applied(((name, 1.0),))
    with base.routing.held(Acting.everywhere(applied)):
        assert found.fits == ("prefix" not in name)
        if found.fits:
            assert differ(base, found) < BOUND[torch.float32]
    with base.routing.held(Acting()), torch.no_grad():
        assert found.fits
        before = read_and_continued(found.logits, PROMPTS)
    fresh = based("llama_untied")
    with torch.no_grad():
        assert torch.equal(before, read_and_continued(by_parts(fresh).logits, PROMPTS))


@pytest.mark.parametrize("family", ["cohere", "glm4", "stablelm"])
def test_attention_within_an_adapter_gets_angles_in_its_own_order(family):
    base = based(family)
    found = by_parts(base)
    settings = Bottleneck(placement="houlsby", size=5)
    head = base.model.get_output_embeddings()
    move(attach(base.model, settings, name="a", routing=base.routing, head=head, seed=1), seed=1)
    with base.routing.held(Acting.everywhere(base.routing.applied((("a", 1.0),)))):
        assert differ(base, found) < BOUND[torch.float32]


def test_rows_of_several_adapters_go_by_parts_too():
    base = based("llama")
    found = by_parts(base)
    for n, targets in enumerate((["q_proj", "down_proj"], ["o_proj", "gate_proj", "k_proj"])):
        move(
            attach(
                base.model,
                LoRA(rank=3, targets=targets),
                name=f"a{n}",
                routing=base.routing,
                head=None,
                seed=n,
            ),
            seed=n,
        )
    given = [(1, base.routing.applied(((f"a{n}", 1.0),))) for n in range(2)]
    prompts = [[5, 8, 1], [6, 2, 2], [7, 9, 4]]  # one row each in every step
    with base.routing.held(in_turn([(1, ()), *given])), torch.no_grad():
        ours, theirs = (
            read_and_continued(run, prompts) for run in (found.logits, own_forward(base.model))
        )
    assert apart(ours, theirs) < BOUND[torch.float32]


def test_a_layer_is_a_handful_of_calls(monkeypatch):
    monkeypatch.setattr(few_rows, "LEAST_VALUES", 1)

    class Counted(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.made = []

        def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
            self.made.append(str(function))
            return function(*args, **(kwargs or {}))

    counts = []
    for layers in (2, 5):
        base = based("llama", torch.bfloat16, num_hidden_layers=layers)
        found = by_parts(base)
        with torch.no_grad(), Counted() as counted:
            read_and_continued(found.logits, [[5, 8, 1], [6, 2, 2]])
        counts.append([call for call in counted.made if not any(word in call for word in MEMORY)])
    assert counts[0] == counts[1]  # between views and fresh memory a layer calls nothing of torch's


KINDS = [(0.0, False), (0.0, True), (1.0, True), (0.0, True, True), (0.0, True, True, 0.5)]
"""(offset, is_wide, is_centred, size of the bias) of a norm."""


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("width", [2, 30, 64, 70, 576])
@pytest.mark.parametrize("kind", KINDS)
def test_norms_before_and_behind_a_sum_are_their_references(dtype, width, kind):
    torch.manual_seed(0)
    is_centred = len(kind) > 2
    h, delta = ((torch.randn(5, width) + 3 * is_centred).to(dtype) for _ in range(2))
    limit = max(BETWEEN[dtype], 1e-5 * is_centred)  # x - mean cancels digits
    if len(kind) > 3:
        kind = *kind[:3], torch.randn(width).mul(kind[3]).to(dtype)
    norm, after = (
        decoder_step.Norm(torch.randn(width).to(dtype), epsilon, *kind) for epsilon in (1e-5, 1e-3)
    )
    assert decoder_step.usable(h)
    cases = [(None, norm, None), (delta, norm, None), (delta, norm, after), (delta, None, after)]
    scaled = [(delta, norm, None, 0.3), (delta, None, after, 0.3)]
    for case in [*cases, *scaled, (delta, None, None)]:
        ours = decoder_step.add_norm(h, *case)
        theirs = decoder_step.add_norm_reference(h, *case)
        for own, expected in zip(ours, theirs, strict=True):
            assert apart(own.double(), expected.double()) < limit
        if case[2] is None:
            assert torch.equal(ours[0], theirs[0])


BETWEEN = {torch.float32: 1e-6, torch.bfloat16: 2**-7}
"""Largest difference of a call and its reference: of bf16 one rounding of a value near 1."""


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("width", [2, 30, 64, 70, 576])
def test_the_calls_between_products_are_their_references(dtype, width):
    torch.manual_seed(0)
    delta, angles = torch.randn(5, width).to(dtype), torch.randn(5, width)
    for angle_type in {dtype, torch.float32}:
        for beside, neighbours in ((0, False), (6, False), (6, True)):
            size = width + beside
            joined = torch.randn(5, 4 * size).to(dtype)
            copies = [x.contiguous() for x in joined.clone().split((3 * size, size), dim=1)]
            pair = angles.cos().to(angle_type), angles.sin().to(angle_type)
            rotated = joined.split((3 * size, size), dim=1)
            by_head, own = (
                [x.unflatten(1, (-1, size)) for x in heads] for heads in (rotated, copies)
            )
            decoder_step.rotate(*by_head, *pair, neighbours=neighbours)
            decoder_step.rotate_reference(*own, *pair, neighbours=neighbours)
            assert all(map(torch.equal, rotated, copies))
            one_after_the_other = joined.view(5, 2, 2, size).unbind(2)  # q and k of each head
            expected = [x.clone() for x in one_after_the_other]
            decoder_step.rotate(*one_after_the_other, *pair, neighbours=neighbours)
            decoder_step.rotate_reference(*expected, *pair, neighbours=neighbours)
            assert all(map(torch.equal, one_after_the_other, expected))
    for most in (200.0, 4.0, 0.3):
        gate = torch.linspace(-most, most / 2, 5 * width).view(5, width).to(dtype)
        for activation in (SILU, GELU_TANH, GELU_ERF, RELU, RELU_SQUARED, SIGMOID):
            ours = decoder_step.gate(gate, delta, activation)
            theirs = decoder_step.gated_reference(gate, delta, activation)
            assert apart(ours.double(), theirs.double()) < BETWEEN[dtype]
            plain = decoder_step.gate(gate, None, activation)
            assert torch.equal(plain, decoder_step.gate(gate, torch.ones_like(gate), activation))
            joined = torch.cat([gate, delta], dim=1)
            assert torch.equal(decoder_step.gate(*joined.chunk(2, dim=1), activation), ours)
            of_rows = decoder_step.gate(gate[:, :1], delta, activation)
            all_values = gate[:, :1].expand_as(delta).contiguous()
            assert torch.equal(of_rows, decoder_step.gate(all_values, delta, activation))
        for rules in ((1.0, 30.0), (0.25, None), (0.5, 0.1)):
            ours = decoder_step.cap(gate.clone(), *rules)
            theirs = decoder_step.cap_reference(gate, *rules)
            assert apart(ours.double(), theirs.double()) < BETWEEN[dtype]


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("shape", [(1, 3), (5, 1300), (2, 9000)], ids=str)
def test_factors_of_columns_are_their_reference_to_the_bit(shape, dtype):
    """Threads share runs of 4,096 values, which begin and end within rows."""
    draw = torch.Generator().manual_seed(0)
    x, factors = (torch.randn(size, generator=draw).to(dtype) for size in (shape, shape[1]))
    for scale in (1.0, 0.3):
        expected = decoder_step.cap_reference(x, scale, factors_V=factors)
        assert torch.equal(decoder_step.cap(x.clone(), scale, factors_V=factors), expected)


def test_values_of_several_types_take_the_plain_way():
    h, delta = torch.randn(3, 8), torch.randn(3, 8).bfloat16()
    norm = decoder_step.Norm(torch.ones(8), 1e-5)
    ours = decoder_step.add_norm(h, delta, norm)
    theirs = decoder_step.add_norm_reference(h, delta, norm)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert torch.equal(decoder_step.gate(h, delta), torch.nn.functional.silu(h) * delta)
    double = torch.randn(3, 8, dtype=torch.float64)
    expected = decoder_step.cap_reference(double, 2.0, 3.0)
    assert torch.equal(decoder_step.cap(double.clone(), 2.0, 3.0), expected)
    wide = decoder_step.cap(h.clone(), 2.0, factors_V=delta[0])
    assert torch.equal(wide, decoder_step.cap_reference(h, 2.0, factors_V=delta[0]))
    q, k = torch.randn(3, 2, 8), torch.randn(3, 1, 8)
    angles = torch.randn(3, 8)
    turned, expected = [q.clone(), k.clone()], [q.clone(), k.clone()]
    with observe_calls(lambda name, given: pytest.fail(f"{name} is called")):
        decoder_step.rotate(*turned, angles.cos().bfloat16(), angles.sin().bfloat16())
    decoder_step.rotate_reference(*expected, angles.cos().bfloat16(), angles.sin().bfloat16())
    for before, rotated, reference in zip((q, k), turned, expected, strict=True):
        assert torch.equal(rotated, reference) and not torch.equal(rotated, before)


def test_a_model_is_tried_once_and_kept_by_nobody():
    base = based("llama")
    first, again = decode_step_of(base), decode_step_of(base)
    assert first is again and first.not_by_parts is None
    model = weakref.ref(base.model)
    del base
    gc.collect()
    assert model() is None
