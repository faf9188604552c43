"""One-pass norms, gates and entropies against their plain meaning, and models that compute with
them."""

import copy
import functools

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3nForCausalLM, Gemma3nTextConfig, OlmoConfig

from tests.support.helpers import Limited, fill, make_examples
from tests.support.models.routed import Routed, batch_loss
from tests.support.tiny import save_tiny, tiny_model
from veneer.adapters.attach import attach
from veneer.adapters.config import DoRA, LoRA
from veneer.adapters.placement.acting import Acting, BatchPart
from veneer.adapters.placement.routing import Routing
from veneer.adapters.placement.wrapping import plain_modules
from veneer.bases.loading.from_config import build
from veneer.data.batching import make_batch
from veneer.execution.proofs.small_copy import drawn, small_copy
from veneer.execution.stand_in import put_aside
from veneer.execution.train_parts import FusedAttention, FusedGate, FusedNorm
from veneer.execution.train_step import fused, replacements
from veneer.kernels.bindings.row_calls import GELU_ERF, GELU_TANH, RELU, RELU_SQUARED, SILU
from veneer.kernels.dense import fused as kernels
from veneer.kernels.dense.loss import Head, frozen_head_loss, head_loss_reference, head_nats
from veneer.models.checkpointing import checkpointed
from veneer.models.load import load_base
from veneer.models.step import prepare

BF16 = 2**-7  # half a unit of a bf16 value is 2**-9 of it; three roundings, and sums of them


def near(ours, theirs, tolerance):
    scale = theirs.abs().max().clamp_min(1e-3)
    assert ((ours.to(theirs.dtype) - theirs).abs().max() / scale) <= tolerance


def near_with_gradients(ours, theirs, inputs, wide, grad):
    """Values and gradients of inputs are those of `wide`, their float64 twins."""
    tolerance = {torch.bfloat16: BF16, torch.float32: 1e-5, torch.float64: 1e-12}[ours.dtype]
    near(ours, theirs, tolerance)
    pairs = zip(
        torch.autograd.grad(ours, inputs, grad),
        torch.autograd.grad(theirs, wide, grad.double()),
        strict=True,
    )
    for a, b in pairs:
        near(a, b, tolerance * 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 16), (2, 3, 40), (5, 7)], ids=str)
@pytest.mark.parametrize("kind", [{}, {"is_wide": True}, {"is_wide": True, "offset": 1.0}], ids=str)
def test_the_norm_is_its_reference(dtype, shape, kind):
    torch.manual_seed(0)
    x = (torch.randn(shape) * 2).to(dtype).requires_grad_()
    weight = (torch.randn(shape[-1]) + 1).to(dtype).requires_grad_()
    grad = torch.randn(shape).to(dtype)
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    ours = kernels.rms_norm(x, weight, 1e-5, **kind)
    theirs = kernels.rms_norm_reference(*wide, 1e-5, **kind)
    near_with_gradients(ours, theirs, (x, weight), wide, grad)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(3, 7), (4, 48)], ids=str)
@pytest.mark.parametrize("kind", [SILU, GELU_TANH, GELU_ERF, RELU, RELU_SQUARED])
def test_the_gate_is_its_reference(kind, dtype, shape):
    torch.manual_seed(1)
    gate, up = ((torch.randn(shape) * 4).to(dtype).requires_grad_() for _ in range(2))
    with torch.no_grad():
        gate.view(-1)[:2] = torch.tensor([-200.0, 200.0])
        gate.view(-1)[2:4] = torch.tensor([-1e15, 1e15])  # their cubes are beyond float32
        if kind in (RELU, RELU_SQUARED):
            gate.view(-1)[4] = -float("inf")
    grad = torch.randn(shape).to(dtype)
    wide = [t.detach().double().requires_grad_() for t in (gate, up)]
    ours, theirs = kernels.gated(gate, up, kind), kernels.gated_reference(*wide, kind)
    near_with_gradients(ours, theirs, (gate, up), wide, grad)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(3, 7), (4, 48)], ids=str)
@pytest.mark.parametrize("activation", [SILU, GELU_TANH, GELU_ERF, RELU, RELU_SQUARED])
def test_an_activation_without_a_gate_is_that_of_torch(activation, dtype, shape):
    torch.manual_seed(1)
    x = (torch.randn(shape) * 4).to(dtype)
    x.view(-1)[:2] = torch.tensor([-1e15, 1e15])
    x.requires_grad_()
    grad, wide = torch.randn(shape).to(dtype), x.detach().double().requires_grad_()
    ours, theirs = (
        kernels.gated(x, None, activation),
        kernels.gated_reference(wide, None, activation),
    )
    near_with_gradients(ours, theirs, (x,), [wide], grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gate_of_gelu_has_the_bits_of_plain_torch_where_it_is_not_compiled(dtype):
    torch.manual_seed(4)
    inputs = [torch.randn(5, 47).to(dtype).requires_grad_() for _ in range(2)]
    grad, found = torch.randn(5, 47).to(dtype), []
    for gate in (kernels.gated, kernels.gated_reference):
        out = gate(*inputs, GELU_TANH)
        found.append([out, *torch.autograd.grad(out, inputs, grad)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("size", "turned"),
    [(6, 6), (32, 32), (128, 128), (6, 2), (64, 16), (80, 32), (128, 64), (48, 6)],
)
@pytest.mark.parametrize("neighbours", [False, True])
@pytest.mark.parametrize("angles", [None, torch.float32], ids=["", "angles in float32"])
def test_the_rotation_is_its_reference_to_the_bit(dtype, size, turned, neighbours, angles):
    torch.manual_seed(3)
    q, k = (
        torch.randn(21, 3, size).to(dtype).requires_grad_(),
        torch.randn(21, 1, size).to(dtype).requires_grad_(),
    )
    if dtype is torch.float64 and angles is not None:
        pytest.skip("angles are of float64 or narrower values alone")
    cos, sin = (torch.randn(21, turned).to(angles or dtype) for _ in range(2))
    grads = [torch.randn(21, heads, size).to(dtype) for heads in (3, 1)]
    ours, theirs = (
        rotary(q, k, cos, sin, neighbours=neighbours)
        for rotary in (kernels.rotary, kernels.rotary_reference)
    )
    pairs = zip(
        torch.autograd.grad(ours, (q, k), grads),
        torch.autograd.grad(theirs, (q, k), grads),
        strict=True,
    )
    for a, b in [*zip(ours, theirs, strict=True), *pairs]:
        assert torch.equal(a, b)


@pytest.mark.parametrize("vocabulary", [5, 49, 1000])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 2**-5), (torch.float32, 1e-5)])
def test_the_entropy_of_logits_is_its_reference(vocabulary, softcap, dtype, most):
    torch.manual_seed(2)
    h = torch.randn(37, 24).to(dtype).requires_grad_()
    head = Head((torch.randn(vocabulary, 24) * 0.5).to(dtype), None, 1.5, softcap)
    targets = torch.randint(0, vocabulary, (37,))
    ours = frozen_head_loss(h, targets, head, 11.0)
    (ours_h,) = torch.autograd.grad(ours, h)
    wide = h.detach().clone().requires_grad_()
    theirs = head_loss_reference(wide, targets, head, 11.0)
    (theirs_h,) = torch.autograd.grad(theirs, wide)
    near(ours, theirs, 1e-5)
    each = torch.nn.functional.cross_entropy(head.logits(wide).float(), targets, reduction="none")
    near(head_nats(h, targets, head), each, 1e-5)
    near(ours_h, theirs_h.float(), most)


@pytest.mark.parametrize("target", [-1, 40, 2**40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_target_beyond_the_vocabulary_is_an_error_and_no_memory_of_others(target, dtype):
    head = Head(torch.randn(40, 24).to(dtype))
    h = torch.randn(3, 24).to(dtype)
    with pytest.raises(IndexError, match=str(target)):
        frozen_head_loss(h, torch.tensor([1, target, 2]), head, 3.0)
    with pytest.raises(IndexError, match=str(target)):
        head_nats(h, torch.tensor([1, target, 2]), head)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_operands_of_unlike_shapes_are_an_error(dtype):
    wide, narrow = torch.randn(4, 32).to(dtype), torch.randn(2, 16).to(dtype)
    with pytest.raises(RuntimeError):
        kernels.gated(wide, narrow, SILU)
    with pytest.raises(RuntimeError):
        kernels.rms_norm(wide, narrow[0], 1e-6)


@pytest.mark.parametrize(
    ("family", "norms", "gates"),
    [
        ("llama", 5, 2),
        ("qwen3", 9, 2),
        ("mistral", 5, 2),
        ("gemma2", 9, 2),
        ("gpt2", 4, 2),
        ("olmo2", 9, 2),
        ("mixtral", 5, 0),
    ],
)
def test_what_agrees_is_exchanged_and_comes_back(family, norms, gates):
    model = tiny_model(family)
    own = dict(model.named_modules())
    found = replacements(model)
    with fused(model, found):
        modules = list(model.modules())
        assert sum(isinstance(m, FusedNorm) for m in modules) == norms
        assert sum(isinstance(m, FusedGate) for m in modules) == gates
        assert len(found) == norms + gates
        with put_aside(model):
            assert dict(model.named_modules()) == own
        assert list(model.modules()) == modules
    assert dict(model.named_modules()) == own


@pytest.mark.parametrize(
    ("family", "blocks", "window"),
    [
        ("llama", 2, None),
        ("qwen2", 2, None),
        ("mistral", 2, 8),
        ("mixtral", 2, None),
        ("qwen3", 2, None),
        ("gpt2", 2, None),
    ],
)
def test_attention_blocks_that_agree_are_exchanged_with_the_rules_of_theirs(family, blocks, window):
    model = tiny_model(family)
    assert not any(isinstance(made, FusedAttention) for made in replacements(model).values())
    prepare(model)
    found = [made for made in replacements(model).values() if isinstance(made, FusedAttention)]
    assert len(found) == blocks
    assert all(made.facts.rules.window == window for made in found)
    with torch.device("meta"):
        planned = copy.deepcopy(model).to("meta")
    assert {path: type(made) for path, made in replacements(planned).items()} == {
        path: type(made) for path, made in replacements(model).items()
    }


def test_an_attention_block_that_turns_otherwise_stays(monkeypatch):
    model = tiny_model("llama")
    prepare(model)
    block = type(model.model.layers[0].self_attn)
    own = block.forward

    def scaled(self, hidden_states, position_embeddings=None, attention_mask=None, **others):
        cos, sin = position_embeddings
        return own(self, hidden_states, (cos * 2, sin), attention_mask, **others)

    monkeypatch.setattr(block, "forward", scaled)
    assert not any(isinstance(made, FusedAttention) for made in replacements(model).values())


def test_a_gate_with_a_limit_far_from_what_its_small_weights_give_stays(monkeypatch):
    def gates():
        model = tiny_model("llama")
        for layer in model.model.layers:
            layer.mlp.gate_proj.weight.mul_(0.01)
            layer.mlp.up_proj.weight.mul_(0.01)
        return [made for made in replacements(model).values() if isinstance(made, FusedGate)]

    def limited(self, x):
        return self.down_proj(
            self.act_fn(self.gate_proj(x).clamp(max=10.0)) * self.up_proj(x).clamp(-10.0, 10.0)
        )

    assert gates()
    monkeypatch.setattr(type(tiny_model("llama").model.layers[0].mlp), "forward", limited)
    assert not gates()


def test_layers_whose_activations_alone_differ_are_tried_one_by_one():
    """A module within a module belongs to what the module computes."""
    model = tiny_model("llama")
    own = model.model.layers[1].mlp.act_fn
    doubled = copy.deepcopy(own)
    doubled.forward = lambda x: 2 * own(x)
    model.model.layers[1].mlp.act_fn = doubled
    gates = [path for path, made in replacements(model).items() if isinstance(made, FusedGate)]
    assert gates == ["model.layers.0.mlp"]


def test_layers_whose_activations_have_other_bound_arguments_are_tried_one_by_one():
    model = tiny_model("llama", hidden_act="gelu_pytorch_tanh")
    model.model.layers[1].mlp.act_fn.act = functools.partial(
        torch.nn.functional.leaky_relu, negative_slope=0.2
    )
    gates = [path for path, made in replacements(model).items() if isinstance(made, FusedGate)]
    assert gates == ["model.layers.0.mlp"]


@pytest.mark.parametrize(("clip", "blocks"), [(None, 2), (8.0, 0), (1000.0, 0)])
def test_an_attention_block_that_clips_what_it_projects_stays(clip, blocks):
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    ids = {"vocab_size": 300, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model = AutoModelForCausalLM.from_config(
        OlmoConfig(**sizes, **ids, clip_qkv=clip), dtype=torch.float32
    ).eval()
    prepare(model.requires_grad_(False))
    assert sum(isinstance(made, FusedAttention) for made in replacements(model).values()) == blocks


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", "qwen3", "olmo2"])
def test_a_fused_model_has_the_losses_and_gradients_of_the_plain_one(family):
    model, routing = tiny_model(family), Routing()
    paths = prepare(model)
    attachment = attach(
        model,
        LoRA(rank=3, alpha=5.0),
        name="a",
        routing=routing,
        head=model.get_output_embeddings(),
    )
    fill(attachment.parameters().values(), scale=0.1)
    routing.active = (("a", 1.0),)
    batch = make_batch(make_examples(4), packed=True, share_prompt=True, device=torch.device("cpu"))
    parameters = list(attachment.parameters().values())

    def measured():
        loss = batch_loss(Routed(model, paths, routing), batch, total=float(batch.trained_tokens))
        return [loss, *torch.autograd.grad(loss, parameters)]

    plain = measured()
    with fused(model, replacements(model)):
        ours = measured()
    for a, b in zip(ours, plain, strict=True):
        near(a, b, 1e-5)


NORMS = ["norm", "input_layernorm", "post_attention_layernorm"]


@pytest.mark.parametrize(
    ("family", "trained"),
    [
        ("llama", NORMS),
        ("qwen2", ["norm"]),
        ("qwen3", [*NORMS, "q_norm", "k_norm"]),
        ("mixtral", NORMS),
        ("olmo2", ["q_norm", "post_feedforward_layernorm"]),
        ("gemma2", NORMS),
        ("gpt2", ["ln_f", "ln_1"]),
        ("llama_untied", ["lm_head", "norm"]),
        ("llama", ["lm_head", "embed_tokens", "norm"]),
        ("opt", ["embed_positions"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("method", [LoRA, DoRA])
def test_modules_trained_in_full_are_computed_with_their_trained_values(family, trained, method):
    """Fused, plain, and on a base that holds these values itself: the same losses, and the same
    gradients of them."""
    model, routing = tiny_model(family), Routing()
    paths, head = prepare(model), model.get_output_embeddings()
    linear = {"gpt2": "c_attn"}.get(family, "q_proj")
    settings = method(rank=3, alpha=5.0, targets=[linear], train_modules=trained)
    attachment = attach(model, settings, name="a", routing=routing, head=head)
    fill(attachment.parameters().values(), scale=0.2)
    routing.active = (("a", 1.0),)
    batch = make_batch(
        make_examples(4), packed=paths.packed, share_prompt=paths.packed, device=torch.device("cpu")
    )
    parameters = attachment.parameters()

    def measured(*given):
        loss = batch_loss(Routed(model, paths, routing), batch, total=float(batch.trained_tokens))
        return [loss, *torch.autograd.grad(loss, given)]

    plain = measured(*parameters.values())
    with fused(model, replacements(model)), checkpointed(model, routing, on=True):
        ours = measured(*parameters.values())
    assert set(attachment.values) and all(gradient.abs().max() > 0 for gradient in ours[1:])
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-6)
    for path, value in attachment.values.items():
        owner, _, name = path.rpartition(".")
        plain_modules(model)[owner]._parameters[name] = value
    attachment.replaced.clear()
    own = measured(*attachment.values.values())
    for a, b in zip(own, [ours[0], *ours[-len(attachment.values) :]], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_weight_of_a_fused_norm_is_the_one_that_acts_on_all_rows():
    """Trained or the base's own; where rows differ there is none, and the module computes them
    itself."""
    model, routing = tiny_model("llama"), Routing()
    settings = LoRA(rank=2, targets=["q_proj"], train_modules=["norm"])
    attachment = attach(
        model, settings, name="a", routing=routing, head=model.get_output_embeddings()
    )
    (norm,) = (made for path, made in replacements(model).items() if path == "model.norm")
    acting = ((attachment, 1.0),)
    with routing.held(Acting.everywhere(acting)):
        assert norm.values_acting()["weight"] is attachment.values["model.norm.weight"]
    with routing.held(Acting()):
        assert norm.values_acting()["weight"] is plain_modules(model)["model.norm"].weight
    with routing.held(Acting((BatchPart(2, ()), BatchPart(3, acting)))):
        assert norm.values_acting() is None


@pytest.mark.parametrize("quantize", ["nf4", "fp4"])
def test_packed_projections_are_fused_as_dense_ones_are(quantize, tmp_path):
    """Or a run over packed weights would round otherwise than one over the same weights
    unpacked."""
    base = load_base(str(save_tiny(tmp_path / "base", "llama", torch.bfloat16)), quantize=quantize)
    gates = [made for made in replacements(base.model).values() if isinstance(made, FusedGate)]
    assert len(gates) == 2


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_layers_of_one_class_that_differ_in_a_limit_are_tried_one_by_one(device):
    model = tiny_model("llama", num_hidden_layers=4)
    for layer, limit in zip(model.model.layers, (0, 0, 0, 0.5), strict=True):
        layer.mlp = Limited(layer.mlp, limit)
    found = replacements(model.to(device))
    gates = [path for path, made in found.items() if isinstance(made, FusedGate)]
    assert gates == [f"model.layers.{number}.mlp" for number in range(3)]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_layers_whose_norms_differ_in_the_epsilon_keep_their_own(device):
    model = tiny_model("llama", num_hidden_layers=3)
    for layer, epsilon in zip(model.model.layers, (1e-6, 1e-2, 0.5), strict=True):
        layer.input_layernorm.variance_epsilon = epsilon
    found = replacements(model.to(device))
    assert [found[f"model.layers.{n}.input_layernorm"].facts.epsilon for n in range(3)] == [
        1e-6,
        1e-2,
        0.5,
    ]


def test_a_model_whose_last_layers_alone_are_sparse_has_its_own_logits():
    """Gemma 3n's feed-forward blocks, which a number in the block makes sparse."""
    kind = Gemma3nForCausalLM
    config = small_copy(kind, Gemma3nTextConfig(num_kv_shared_layers=0)).config
    config.activation_sparsity_pattern = sorted(config.activation_sparsity_pattern)
    assert config.activation_sparsity_pattern == [0.0, 0.0, 0.95, 0.95]
    model = drawn(kind, config)
    ids = torch.arange(30)[None] % 100
    with fused(model, replacements(model)):
        found = model(input_ids=ids, use_cache=False).logits
    near(found, model(input_ids=ids, use_cache=False).logits, 1e-5)


def test_without_values_another_activation_of_the_same_class_is_another_question():
    def gates(activation):
        config = copy.deepcopy(tiny_model("llama").config)
        config.hidden_act = activation
        found = replacements(build(config, torch.float32)).values()
        return sum(isinstance(made, FusedGate) for made in found)

    assert [gates("silu") > 0, gates("mish"), gates("silu") > 0] == [True, 0, True]
