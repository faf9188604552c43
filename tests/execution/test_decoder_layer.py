"""What a decoder layer computes is found for every layer, the same with and without weights, and
what is not understood of one leaves the others as they are."""

import copy

import pytest
import torch
from torch.nn.functional import rms_norm

from tests.support.helpers import fill, make_examples
from tests.support.models.routed import Routed, batch_loss
from tests.support.tiny import SCALED_FROM, tiny_base, tiny_model
from veneer.adapters.attach import attach
from veneer.adapters.config import LoRA
from veneer.adapters.placement.routing import Routing
from veneer.data.batching import make_batch
from veneer.execution.agreement import difference
from veneer.execution.attention import NAME, LayoutAttention, mask_of
from veneer.execution.decode_step import LayersForward, forward_by_layers, own_forward
from veneer.execution.facts.attention_facts import attend, find_attention
from veneer.execution.facts.decoder_layer import find_layers, unknown_layers
from veneer.execution.facts.layer_facts import Rotation
from veneer.execution.facts.part_facts import find_feed_forward
from veneer.execution.facts.small_modules import random_rows
from veneer.execution.proofs.steps import read_and_continued
from veneer.execution.proofs.structure import no_seam
from veneer.execution.train_parts import FusedAttention
from veneer.execution.train_step import FusedLayer, fused, replacements
from veneer.kernels.bindings.row_calls import GELU_ERF, GELU_TANH, RELU, RELU_SQUARED, SILU
from veneer.kernels.layout import BatchLayout
from veneer.models.step import prepare

WITH_ATTENTION = (FusedAttention, FusedLayer)
LAYOUT = BatchLayout.of(0, (6,), torch.device("cpu"))
PROMPTS = [list(range(30, 60)), [7, 90, 4], list(range(100, 117))]


def prepared(family, **overrides):
    model = tiny_model(family, **overrides)
    prepare(model)
    return model


@pytest.mark.parametrize(
    ("family", "activation", "window", "head_norms"),
    [
        ("llama", SILU, None, 0),
        ("mistral", SILU, 8, 0),
        ("qwen3", SILU, None, 2),
        ("mixtral", None, None, 0),
    ],
)
def test_the_facts_of_a_layer_are_those_of_its_family(family, activation, window, head_norms):
    model = prepared(family)
    layers = find_layers(model)
    assert [layer.module for layer in layers] == list(model.model.layers)
    for layer in layers:
        assert layer.unknown is None
        assert layer.norms.after_attention is layer.norms.after_feed_forward is None
        for norm in (layer.norms.before_attention, layer.norms.before_feed_forward):
            assert norm.epsilon == model.config.rms_norm_eps
            assert (norm.offset, norm.is_wide) == (0.0, False)
        assert layer.attention.rules.window == window
        assert len(layer.attention.norms) == head_norms
        assert layer.attention.head_dim == model.model.layers[0].self_attn.head_dim
        found = None if layer.feed_forward is None else layer.feed_forward.activation
        assert found == activation


@pytest.mark.parametrize(
    ("family", "places", "kind", "of_heads", "turned"),
    [
        ("llama", "x.x.", (0.0, False), (), [True, True]),
        ("qwen3", "x.x.", (0.0, False), (12, 12), [True, True]),
        ("gemma", "x.x.", (1.0, True), (), [True, True]),
        ("gemma3", "xxxx", (1.0, True), (12, 12), [True, True]),
        ("olmo2", ".x.x", (0.0, True), (32, 16), [True, True]),
        ("hyperclovax", "xxxx", (0.0, False), (), [True, True]),
        ("hunyuan", "x.x.", (0.0, False), (16, 16), [True, True]),
        ("nemotron", "x.x.", (1.0, True), (), [True, True]),
        ("olmo", "x.x.", (0.0, True), (), [True, True]),
        ("exaone4", ".x.x", (0.0, False), (8, 8), [True, False]),
    ],
)
def test_norms_are_found_in_their_places_and_of_their_kind(family, places, kind, of_heads, turned):
    layers = find_layers(prepared(family, dtype=torch.bfloat16))
    for layer in layers:
        assert layer.unknown is None
        assert "".join("." if norm is None else "x" for norm in layer.norms) == places
        norms = [norm for norm in layer.norms if norm is not None]
        for norm in (*norms, *layer.attention.norms):
            assert (norm.offset, norm.is_wide) == kind
            assert norm.is_centred == (family in ("nemotron", "olmo"))
            assert norm.name in dict(
                [*layer.module.named_children(), *layer.attention.module.named_children()]
            )
        assert tuple(norm.weight.numel() for norm in layer.attention.norms) == of_heads
    assert [layer.attention.rotation is not None for layer in layers] == turned
    assert all(layer.attention.takes_float32 for layer in layers) == (family in ("olmo", "olmo2"))


@pytest.mark.parametrize(
    ("family", "rotation", "heads", "gates"),
    [
        ("llama", Rotation(8), 3, 2),
        ("phi3", Rotation(8), 1, 1),
        ("glm4", Rotation(8, neighbours=True, angle_order="first half"), 3, 1),
        ("cohere", Rotation(8, neighbours=True, angle_order="neighbours", is_wide=True), 3, 2),
        ("ernie4_5", Rotation(16, neighbours=True, angle_order="first half", is_wide=True), 3, 2),
    ],
)
def test_rotations_and_joined_modules_are_found(family, rotation, heads, gates):
    layer = prepared(family, dtype=torch.bfloat16).model.layers[1]
    attention, feed_forward = find_attention(layer.self_attn), find_feed_forward(layer.mlp)
    assert attention.rotation == rotation
    assert (len(attention.inputs), len(feed_forward.inputs)) == (heads, gates)
    assert attention.widths == (4 * attention.head_dim, *[2 * attention.head_dim] * 2)
    assert feed_forward.width == 48


@pytest.mark.parametrize(
    ("activation", "gate"),
    [
        ("gelu_pytorch_tanh", GELU_TANH),
        ("gelu", GELU_ERF),
        ("relu", RELU),
        ("relu2", RELU_SQUARED),
        ("tanh", None),
    ],
)
def test_a_gate_of_gelu_is_told_from_one_of_silu(activation, gate):
    layers = find_layers(prepared("llama", hidden_act=activation))
    gates = [layer.feed_forward and layer.feed_forward.activation for layer in layers]
    assert gates == [gate, gate]


def test_heads_one_after_the_other_are_found():
    layer = prepared("gpt_neox", dtype=torch.bfloat16).gpt_neox.layers[1]
    attention = find_attention(layer.attention)
    assert attention.group == 1 and not attention.is_joined
    assert attention.widths == (32, 32, 32) and attention.output == "dense"


@pytest.mark.parametrize(
    ("family", "group", "widths", "places", "fields"),
    [
        ("falcon", 0, (32, 8, 8), "x...", {}),
        ("falcon_groups", 2, (32, 16, 16), "x.x.", {}),
        ("falcon_groups", 2, (32, 16, 16), "x...", {"num_ln_in_parallel_attn": 1}),
        ("falcon_heads", 1, (32, 32, 32), "x.x.", {}),
    ],
)
def test_heads_in_groups_and_layers_that_give_pairs_are_found(
    family, group, widths, places, fields
):
    for layer in find_layers(prepared(family, dtype=torch.bfloat16, **fields)):
        assert layer.unknown is None and layer.gives_pair
        assert layer.attention.group == group and layer.attention.is_joined == (group == 0)
        assert layer.attention.widths == widths and layer.attention.rotation == Rotation(8)
        assert "".join("." if norm is None else "x" for norm in layer.norms) == places
        assert layer.is_parallel == (family != "falcon_heads")


def batch_of(lengths):
    """One row of documents of these lengths, packed, with random rows of width 32."""
    ids = torch.cat([torch.arange(length) for length in lengths])[None]
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(1, ids.shape[1], 32, generator=draw).bfloat16()
    return x, ids, LayoutAttention(BatchLayout.of(0, lengths, ids.device))


@pytest.mark.parametrize(("longest", "is_near"), [(SCALED_FROM, True), (SCALED_FROM + 1, False)])
def test_queries_scaled_from_a_position_on_are_computed_by_facts_below_it(longest, is_near):
    model = prepared("ministral3", dtype=torch.bfloat16)
    block = model.model.layers[0].self_attn
    facts = find_attention(block)
    assert facts.position_limit == SCALED_FROM
    assert find_attention(prepared("llama").model.layers[0].self_attn).position_limit is None
    x, positions, layout = batch_of((7, longest))
    angles = model.model.rotary_emb(x, positions)
    given = {
        "position_embeddings": angles,
        "attention_mask": mask_of(layout, x.device),
        "position_ids": positions,
    }
    stand_in = FusedAttention(block, facts)
    assert stand_in.takes(x, angles, layout) == is_near
    own = block(x, **given)[0]
    assert torch.equal(stand_in(x, **given)[0], own)
    by_facts = attend(facts, block, x, angles, given["attention_mask"])[0]
    assert torch.equal(by_facts, own) == is_near


def test_a_model_that_adds_biases_by_distance_is_padded_and_says_so():
    for model in (tiny_model("falcon", alibi=True), tiny_model("bloom")):
        reason = "adds biases by distance to the scores of attention (ALiBi)"
        assert no_seam(model) == f"{type(model).__name__} {reason}"
        assert not prepare(model).packed
    assert no_seam(tiny_model("falcon")) is None


def test_attention_with_a_bias_of_positions_is_computed_by_its_own_code():
    """A mask that stands for no layout, such as ALiBi's, leads past the stand-in."""
    model = tiny_model("falcon", torch.bfloat16)
    block = prepared("falcon", dtype=torch.bfloat16).transformer.h[0].self_attention
    stand_in, x = FusedAttention(block, find_attention(block)), torch.randn(1, 6, 32).bfloat16()
    mask = mask_of(LayoutAttention(LAYOUT), x.device)
    angles = model.transformer.rotary_emb(x, torch.arange(6)[None])
    bias = torch.randn(1, 4, 6, 6).bfloat16()
    for given in (mask, bias):
        rows = {"position_embeddings": angles, "attention_mask": given}
        assert torch.equal(stand_in(x, **rows)[0], block(x, **rows)[0])


def test_a_first_layer_without_a_norm_and_joined_gates_of_other_names_are_found():
    layers = find_layers(prepared("modernbert", dtype=torch.bfloat16))
    assert [layer.unknown for layer in layers] == [None, None]
    norms = [["." if norm is None else "x" for norm in layer.norms] for layer in layers]
    assert list(map("".join, norms)) == ["..x.", "x.x."]
    for layer in layers:
        assert layer.feed_forward.is_joined and layer.feed_forward.activation == GELU_ERF
        assert layer.feed_forward.width == 48 and layer.attention.output == "Wo"


def test_norms_of_heads_before_and_after_the_rotation_are_told_apart():
    for family, is_last in (("qwen3", False), ("hunyuan", True)):
        for layer in find_layers(prepared(family, dtype=torch.bfloat16)):
            assert layer.attention.norms_last == is_last and len(layer.attention.norms) == 2


def test_norms_without_a_weight_have_one_of_ones_where_the_model_is():
    model = prepared("olmo", dtype=torch.bfloat16)
    planned = copy.deepcopy(model).to("meta")
    for own, device in ((model, "cpu"), (planned, "meta")):
        for layer in find_layers(own):
            norm = layer.norms.before_attention
            assert (norm.ones.dtype, norm.ones.device.type) == (torch.bfloat16, device)
            assert norm.weight is norm.ones and len(norm.ones) == 32 and norm.epsilon == 1e-5


class _Odd(torch.nn.Module):
    """A norm of no known kind."""

    def forward(self, x):
        return x / 2


@pytest.mark.parametrize(("family", "reason"), [("llama", "norms"), ("deepseek_v3", "kv_a_proj")])
def test_what_is_not_understood_says_why(family, reason):
    model = prepared(family)
    for layer in model.model.layers if family == "llama" else ():
        layer.input_layernorm = _Odd()
    assert all(reason in layer.unknown for layer in find_layers(model))
    (line,) = unknown_layers(model)
    assert line.startswith("2 of 2 layers by the model's own code: ") and reason in line


@pytest.mark.parametrize(
    "family", ["llama", "qwen3", "mistral", "mixtral", "gemma2", "phi3", "glm4"]
)
def test_a_model_without_weights_has_the_same_layers(family):
    model = prepared(family)
    planned = copy.deepcopy(model).to("meta")

    def facts(layer):
        parts = [(type(part), getattr(part, "rules", None)) for part in layer.parts]
        return parts, layer.unknown

    assert list(map(facts, find_layers(planned))) == list(map(facts, find_layers(model)))


def test_layers_are_found_again_where_a_module_or_the_attention_is_another():
    model = tiny_model("llama")
    assert all(layer.attention is None for layer in find_layers(model))  # not switched to ours
    prepare(model)
    first = find_layers(model)
    assert model.config._attn_implementation == NAME and first is find_layers(model)
    assert all(layer.attention is not None for layer in first)
    model.model.layers[1].mlp = torch.nn.Identity()
    assert [layer.feed_forward is None for layer in find_layers(model)] == [False, True]


def odd(own):
    """Adds up its parts otherwise."""
    return lambda x, **given: own(x, **given) * 0.5


def test_one_layer_that_is_not_understood_is_called_whole_among_others():
    base = tiny_base("llama", num_hidden_layers=3)
    layer = base.model.model.layers[1]
    layer.forward = odd(layer.forward)
    _ = base.paths
    found = forward_by_layers(base.model)
    assert isinstance(found, LayersForward), found
    assert [layer.unknown is None for layer in found.layers] == [True, False, True]
    assert unknown_layers(base.model) == [
        "1 of 3 layers by the model's own code (1): it adds up its parts in another way"
    ]
    with torch.no_grad():
        ours = read_and_continued(found.logits, PROMPTS)
        theirs = read_and_continued(own_forward(base.model), PROMPTS)
    assert difference(ours, theirs) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("trained", [[], ["q_norm", "k_norm"]], ids=["", "norms trained"])
def test_norms_of_heads_train_as_the_model_itself_does(dtype, trained):
    """To the same loss; gradients of the common input are added up in another order."""
    model, routing = tiny_model("qwen3", dtype), Routing()
    paths = prepare(model)
    settings = LoRA(targets="all-linear", rank=4, alpha=5.0, train_modules=trained)
    head = model.get_output_embeddings()
    attachment = attach(model, settings, name="a", routing=routing, head=head)
    fill(attachment.parameters().values(), scale=0.1)
    routing.active = (("a", 1.0),)
    batch = make_batch(make_examples(4), packed=True, share_prompt=True, device=torch.device("cpu"))
    parameters = list(attachment.parameters().values())

    def measured():
        loss = batch_loss(Routed(model, paths, routing), batch, total=float(batch.trained_tokens))
        return [loss, *torch.autograd.grad(loss, parameters)]

    stand_ins = replacements(model)
    with fused(model, stand_ins):
        ours = measured()
    parts = [path for path, made in stand_ins.items() if not isinstance(made, WITH_ATTENTION)]
    with fused(model, {path: stand_ins[path] for path in parts}):
        plain = measured()
    assert len(parts) == len(stand_ins) - (2 if dtype is torch.float32 else 4)
    assert torch.equal(ours[0], plain[0])
    limit = {torch.float32: 1e-5, torch.bfloat16: 2**-5}[dtype]
    assert all(difference(a, b) <= limit for a, b in zip(ours, plain, strict=True))
    assert all(gradient.abs().max() > 0 for gradient in ours[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_is_tried_on_rows_that_tell_limits_and_epsilons_apart(dtype):
    x = random_rows(64, dtype)
    assert not torch.equal(x.clamp(-1e4, 1e4), x), "no row is large enough to be clipped"
    first, second = (rms_norm(x, (64,), eps=epsilon) for epsilon in (1e-6, 1e-5))
    assert float((first - second).abs().max()) > 0.01, "no row is small enough for an epsilon"
