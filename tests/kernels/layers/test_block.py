"""A decoder layer with LoRA as one node: the bits of the layer's own parts, and which layers and
forwards it takes."""

from contextlib import nullcontext

import pytest
import torch
from transformers.models.falcon.modeling_falcon import FalconDecoderLayer, FalconLinear
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXLayer
from transformers.models.phi.modeling_phi import PhiDecoderLayer

from tests.kernels.test_tiles import vectors
from tests.support.helpers import fill, make_examples
from tests.support.models.routed import batch_loss
from tests.support.tiny import tiny_model
from veneer.adapters.attach import attach
from veneer.adapters.config import DoRA, LoRA
from veneer.adapters.placement.acting import TokenKeys, in_turn
from veneer.adapters.placement.routing import Routing
from veneer.data.batching import make_batch, make_groups
from veneer.data.joint_batch import join_batches
from veneer.execution.train_step import FusedLayer, fused, replacements
from veneer.kernels.bindings import library as native
from veneer.kernels.layers import block
from veneer.models.checkpointing import checkpointed
from veneer.models.step import BatchShare, batch_losses, prepare
from veneer.objectives.objective import ObjectiveLoss
from veneer.quant.layers import HeldLinear
from veneer.quant.nf4 import quantize
from veneer.training.optimizer.buffer import FlatParameters

pytestmark = pytest.mark.skipif(
    not native.has_bf16(), reason="this processor multiplies no bf16 pairs"
)
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 224,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
PARTLY_ROTATED = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
FAMILIES = [
    *("llama", "qwen2", "mistral", "qwen3", "gemma", "gemma2", "gemma3", "olmo2", "exaone4"),
    *("phi3", "glm4", "cohere", "stablelm", "starcoder2", "phi", "granite"),
    *("gpt_neox", "gpt2", "opt", "falcon", "falcon_groups", "falcon_heads"),
    *("ernie4_5", "hyperclovax", "ministral3", "nemotron", "olmo", "hunyuan", "modernbert"),
]
"""Norms of heads, of all heads, before and behind the parts, in float32; gates of GELU; layers
without rotation, or with angles in float32; transposed weights; q, k and v by group."""


MIXTURES = ["mixtral", "qwen3_moe"]
"""Families whose attention is one node, and whose experts are another."""
OWN_SIZES = {
    "modernbert": {"num_key_value_heads": None, "head_dim": None},
    "gpt_neox": {"rope_parameters": PARTLY_ROTATED},
    "gpt2": {"n_inner": 96},
    "falcon": {"ffn_hidden_size": 96, "head_dim": None},
    "falcon_heads": {"ffn_hidden_size": 96, "head_dim": None},
    "falcon_groups": {"ffn_hidden_size": 96, "num_attention_heads": 8, "head_dim": None},
    "opt": {
        "num_attention_heads": 8,
        "word_embed_proj_dim": 128,
        "ffn_dim": 96,
    },  # heads of 16, whose scale is exact
}
"""Fields of a family's config beside SIZES; None: it takes no such field."""
OWN_NAMES = {
    "starcoder2": {"gate_proj": "c_fc", "up_proj": "c_fc", "down_proj": "c_proj"},
    "phi": {"gate_proj": "fc1", "up_proj": "fc1", "down_proj": "fc2", "o_proj": "dense"},
    "phi3": {**dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj")},
    "glm4": {},
    "nemotron": {"gate_proj": "up_proj"},
    "modernbert": {
        **dict.fromkeys(("gate_proj", "up_proj"), "Wi"),
        **dict.fromkeys(("o_proj", "down_proj"), "Wo"),
    },
    "gpt_neox": {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "query_key_value"),
        **dict.fromkeys(("gate_proj", "up_proj"), "dense_h_to_4h"),
        "o_proj": "dense",
        "down_proj": "dense_4h_to_h",
    },
}
OWN_NAMES["opt"] = {"gate_proj": "fc1", "up_proj": "fc1", "down_proj": "fc2", "o_proj": "out_proj"}
OWN_NAMES["gpt2"] = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "c_attn"),
    **dict.fromkeys(("gate_proj", "up_proj"), "c_fc"),
    **dict.fromkeys(("o_proj", "down_proj"), "c_proj"),
}
OWN_NAMES |= dict.fromkeys(("falcon", "falcon_groups", "falcon_heads"), OWN_NAMES["gpt_neox"])
for names in (OWN_NAMES["phi3"], OWN_NAMES["glm4"]):
    names |= dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj")
"""Families with other names of modules: {name elsewhere: their name}."""
IN_ANOTHER_ORDER = {"phi3", "glm4", "cohere", "phi", "gpt2", "falcon", "modernbert"}
"""Families that add up gradients in another order than their parts: those of a factor that layers
share, or of an input that both blocks read."""


def named(family, settings):
    """Settings with a family's own names of modules."""
    names = OWN_NAMES.get(family, {})
    if isinstance(settings.get("targets"), list):
        targets = [names.get(name, name) for name in settings["targets"]]
        settings = {**settings, "targets": list(dict.fromkeys(targets))}
    if "rank_pattern" in settings:
        ranks = {names.get(name, name): rank for name, rank in settings["rank_pattern"].items()}
        settings = {**settings, "rank_pattern": ranks}
    return settings


def pack(model):
    """Packs the linear layers of a model, without its head, in NF4."""
    for module in list(model.base_model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is torch.nn.Linear:
                weight = quantize(child.weight.data)
                setattr(module, name, HeldLinear(weight, child.bias, dtype=torch.bfloat16))


class Trained:
    """A tiny model in bf16 with an adapter on all linear layers, and one batch."""

    def __init__(
        self, family="llama", method=LoRA, rank=16, prompt=5, layers=2, in_nf4=False, **settings
    ):
        sizes = {**SIZES, "head_dim": 32, "num_hidden_layers": layers, **OWN_SIZES.get(family, {})}
        sizes = {name: size for name, size in sizes.items() if size is not None}
        self.model, self.routing = tiny_model(family, torch.bfloat16, **sizes), Routing()
        if in_nf4:
            pack(self.model)
        self.paths = prepare(self.model)
        settings = {"targets": "all-linear", "rank": rank, "alpha": 5.0, **named(family, settings)}
        head = self.model.get_output_embeddings()
        attachment = attach(
            self.model, method(**settings), name="a", routing=self.routing, head=head
        )
        fill(attachment.parameters().values(), scale=0.1)
        self.parameters = list(attachment.parameters().values())
        self.routing.active = (("a", 1.0),)
        examples = make_examples(9, prompt=prompt)
        self.batch = make_batch(
            examples, packed=True, share_prompt=True, device=torch.device("cpu")
        )

    def drawing(self):
        """Within it dropout draws."""
        keys = torch.arange(self.batch.ids.numel()) * 7919 % 2**32
        return self.routing.held(self.routing.acting.drawing(TokenKeys(keys, 3)))

    def measured(self):
        loss = batch_loss(self, self.batch, total=float(self.batch.trained_tokens))
        return [loss, *torch.autograd.grad(loss, self.parameters)]

    def layers(self):
        return [made for made in replacements(self.model).values() if isinstance(made, FusedLayer)]


@pytest.fixture
def taken(monkeypatch):
    """How many forwards of a layer were one node."""
    counts, own = [], FusedLayer._block

    def block(self, *args, **kwargs):
        found = own(self, *args, **kwargs)
        counts.append(found is not None)
        return found

    monkeypatch.setattr(FusedLayer, "_block", block)
    return counts


def _x_first(layer, hidden_states, **given):
    n = layer.input_layernorm(hidden_states)
    return hidden_states + layer.self_attn(hidden_states=n, **given)[0] + layer.mlp(n)


def _neox_x_first(layer, hidden_states, **given):
    attended = layer.attention(layer.input_layernorm(hidden_states), **given)[0]
    return hidden_states + attended + layer.mlp(layer.post_attention_layernorm(hidden_states))


def _falcon_x_first(layer, hidden_states, **given):
    has_two = hasattr(layer, "ln_mlp")
    n = (layer.ln_attn if has_two else layer.input_layernorm)(hidden_states)
    m = layer.ln_mlp(hidden_states) if has_two else n
    return hidden_states + layer.self_attention(n, **given)[0] + layer.mlp(m), None


ROUND_OTHERWISE = {
    **dict.fromkeys(("falcon", "falcon_groups"), (FalconDecoderLayer, "forward", _falcon_x_first)),
    "falcon_heads": (FalconLinear, "forward", torch.nn.Linear.forward),
    "phi": (PhiDecoderLayer, "forward", _x_first),
    "gpt_neox": (GPTNeoXLayer, "forward", _neox_x_first),
}
"""Families that add x last, or a bias to a rounded product, and what rounds as the kernels do."""


def both(trained, monkeypatch):
    """What is measured, then the same with its layers computed part by part."""
    found = replacements(trained.model)
    with trained.drawing(), fused(trained.model, found):
        ours = trained.measured()
        with monkeypatch.context() as patch:
            patch.setattr(FusedLayer, "_block", lambda *_, **__: None)
            return ours, trained.measured()


def assert_same_bits(family, ours, plain):
    """Losses and gradients are equal; gradients of some families are added in another order."""
    assert torch.equal(ours[0], plain[0])
    for a, b in zip(ours[1:], plain[1:], strict=True):
        if family in IN_ANOTHER_ORDER:
            assert (a - b).abs().max() <= 2**-5 * b.abs().max()
        else:
            assert torch.equal(a, b)


SETTINGS = [
    {},
    {"dropout": 0.5, "rank_pattern": {"k_proj": 4, "down_proj": 24}},
    {"targets": ["q_proj", "k_proj", "gate_proj"]},
]
MORE_SETTINGS = [
    {"rank": 8},
    {"rank": 48},
    {"rank_pattern": {"k_proj": 4, "down_proj": 24}},
    {"rank_pattern": {"k_proj": 32, "up_proj": 64}},
    {"prompt": 0},
    {"dropout": 0.1},
    {"targets": ["k_proj", "v_proj", "up_proj", "down_proj"], "dropout": 0.3},
]
OF_EACH_KIND = ("qwen2", "gpt_neox", "phi3", "gpt2")
"""q, k and v apart, of one module by head, of one module side by side, and transposed."""


@pytest.mark.parametrize(
    ("family", "settings"),
    [(family, settings) for family in FAMILIES for settings in SETTINGS]
    + [(family, settings) for family in OF_EACH_KIND for settings in MORE_SETTINGS],
    ids=str,
)
def test_one_node_gives_the_bits_of_its_parts(family, settings, taken, monkeypatch):
    if family in ROUND_OTHERWISE:
        monkeypatch.setattr(*ROUND_OTHERWISE[family])
    trained = Trained(family, **settings)
    ours, plain = both(trained, monkeypatch)
    assert taken == [True, True]
    assert_same_bits(family, ours, plain)
    assert all(gradient.abs().max() > 0 for gradient in ours[1:])


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt_neox"])
def test_large_ranks_of_one_input_are_computed_layer_by_layer(family, taken, monkeypatch):
    """Together q, k and v have more ranks than one product takes."""
    if family in ROUND_OTHERWISE:
        monkeypatch.setattr(*ROUND_OTHERWISE[family])
    ours, plain = both(Trained(family, rank=256), monkeypatch)
    assert taken == [True, True]
    assert_same_bits(family, ours, plain)


@pytest.mark.parametrize("family", ["llama", "phi3", "glm4", "phi", "gpt_neox"])
def test_bases_in_nf4_are_one_node_too(family, taken, monkeypatch):
    """A module that joins layers is multiplied by rows of its packed weight, elsewhere whole."""
    if family in ROUND_OTHERWISE:
        monkeypatch.setattr(*ROUND_OTHERWISE[family])
    ours, plain = both(Trained(family, in_nf4=True), monkeypatch)
    assert taken == [True, True]
    assert abs(ours[0] - plain[0]) <= 2**-10 * plain[0]
    for a, b in zip(ours[1:], plain[1:], strict=True):
        assert (a - b).abs().max() <= 2**-5 * b.abs().max()


def kept_bytes(family):
    """Bytes that forward keeps for backward."""
    trained, kept = Trained(family), []

    def hold(x):
        kept.append(x)
        return x

    with (
        fused(trained.model, replacements(trained.model)),
        torch.autograd.graph.saved_tensors_hooks(hold, lambda x: x),
    ):
        trained.measured()
    return sum(x.nbytes for x in kept)


# modernbert has a key head for each query head
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "modernbert"])
def test_no_family_keeps_more_than_llama_by_a_tenth(family, taken):
    assert kept_bytes(family) <= 1.1 * kept_bytes("llama")
    assert taken == [True] * 4


@pytest.mark.parametrize("family", [*FAMILIES, *MIXTURES])
def test_one_node_is_as_near_to_float64_as_the_models_own_code(family, taken):
    """Gradients of all factors as one vector: rounding to bf16 turns it by a little."""
    trained = Trained(family)
    with fused(trained.model, replacements(trained.model)):
        ours = trained.measured()
    own = trained.measured()
    for parameter in trained.parameters:
        parameter.data = parameter.data.double()
    trained.model.double()
    exact = trained.measured()
    assert taken == [True, True]
    errors = []
    for measured in (ours, own):
        gradients, expected = (
            torch.cat([part.double().flatten() for part in parts[1:]])
            for parts in (measured, exact)
        )
        errors.append(float((gradients - expected).norm() / expected.norm()))
        assert abs(measured[0].item() - exact[0].item()) <= 2**-6 * exact[0].item()
    assert errors[0] <= max(1.25 * errors[1], 2**-8)


@pytest.mark.parametrize(
    "settings", [{}, {"rank": 8, "dropout": 0.3, "targets": ["k_proj", "o_proj"]}], ids=str
)
@pytest.mark.parametrize("family", MIXTURES)
def test_attention_before_a_mixture_is_one_node(family, settings, taken, monkeypatch):
    ours, plain = both(Trained(family, **settings), monkeypatch)
    assert taken == [True, True]
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))
    assert all(gradient.abs().max() > 0 for gradient in ours[1:])


def test_a_mixture_whose_experts_alone_are_adapted_stays(taken):
    trained = Trained("mixtral", targets=["gate_up_proj", "down_proj"])
    assert not trained.layers()


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_attention_that_rotates_otherwise_is_the_models_own(share, monkeypatch):
    rope = PARTLY_ROTATED | {"partial_rotary_factor": share}
    monkeypatch.setitem(OWN_SIZES, "gpt_neox", {"rope_parameters": rope})
    trained = Trained("gpt_neox")
    with fused(trained.model, replacements(trained.model)):
        ours = trained.measured()
    own = trained.measured()
    assert abs(ours[0] - own[0]) <= 2**-10 * own[0]
    for a, b in zip(ours[1:], own[1:], strict=True):
        assert (a - b).norm() <= 2**-4 * b.norm()


def test_so_it_does_without_tiles_and_checkpointed(taken, monkeypatch):
    trained = Trained(dropout=0.1)
    with checkpointed(trained.model, trained.routing, on=True):
        ours, _ = both(trained, monkeypatch)
    assert taken == [True] * 4
    _, plain = both(trained, monkeypatch)
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))
    if not native.has_amx():
        return
    with vectors():
        ours, plain = both(trained, monkeypatch)
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


@pytest.mark.parametrize(
    ("settings", "heard"),
    [
        ({}, False),
        ({}, True),
        ({"rank": 8}, False),
        ({"dropout": 0.3, "targets": ["k_proj", "v_proj", "down_proj"]}, False),
    ],
    ids=str,
)
def test_gradients_are_added_where_they_lie_to_the_same_bits_and_told_to_who_waits(
    settings, heard, taken
):
    trained, told = Trained(**settings), []
    found = replacements(trained.model)
    with trained.drawing(), fused(trained.model, found):
        expected = trained.measured()[1:]
        for parameter in trained.parameters:
            parameter.grad = torch.ones_like(parameter)
        if heard:
            trained.parameters[3].register_post_accumulate_grad_hook(told.append)
        total = float(trained.batch.trained_tokens)
        with block.adding_gradients_in_place():
            batch_loss(trained, trained.batch, total=total).backward()
    assert len(told) == heard and all(taken)
    for each, gradient in zip(trained.parameters, expected, strict=True):
        assert torch.equal(each.grad, 1 + gradient)


def test_an_evaluation_has_the_bits_of_its_parts_too(taken, monkeypatch):
    trained = Trained()

    def loss():
        with torch.no_grad(), fused(trained.model, replacements(trained.model)):
            return batch_loss(trained, trained.batch, total=1.0)

    ours = loss()
    assert taken == [True, True]
    monkeypatch.setattr(FusedLayer, "_block", lambda *_, **__: None)
    assert torch.equal(ours, loss())


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize(
    "targets", [["q_proj", "v_proj"], ["o_proj"], ["down_proj", "k_proj"], ["gate_proj"]], ids=str
)
def test_it_does_so_where_some_linear_layers_are_adapted(targets, dropout, taken, monkeypatch):
    """Layers of one input of which none is adapted are nodes of their own in the parts: the same
    but for the order in which gradients of that input are added up."""
    trained = Trained(targets=targets, dropout=dropout)
    ours, plain = both(trained, monkeypatch)
    assert taken == [True, True]
    assert torch.equal(ours[0], plain[0])
    assert all(
        (a - b).abs().max() <= 2**-6 * b.abs().max()
        for a, b in zip(ours[1:], plain[1:], strict=True)
    )


def test_layers_without_any_adapter_stay():
    trained = Trained(targets=r".*\.1\..*_proj")
    (layer,) = trained.layers()
    assert layer.base is trained.model.model.layers[1]


@pytest.mark.parametrize(
    "settings", [{"method": DoRA}, {"train_modules": ["input_layernorm"]}], ids=str
)
def test_what_the_node_does_not_compute_goes_through_the_layer(settings, taken, monkeypatch):
    ours, plain = both(Trained(**settings), monkeypatch)
    assert not any(taken)
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


def test_trained_norms_of_another_adapter_are_not_taken_for_frozen_ones(taken):
    """Their gradient would be lost: the node has none for norms."""
    trained = Trained(train_modules=["post_attention_layernorm"])
    norms = [place for place, parameter in enumerate(trained.parameters) if parameter.dim() == 1]
    assert len(norms) == 2
    with fused(trained.model, replacements(trained.model)):
        gradients = trained.measured()[1:]
    assert not any(taken)
    assert all(gradients[place].abs().max() > 0 for place in norms)


def test_rows_of_several_groups_go_through_the_layer_itself(taken, monkeypatch):
    """The node reads the layout of one group: that of the first would attend over the others'
    rows."""
    trained = Trained()
    batch = trained.batch
    examples = [make_examples(4, prompt=prompt) for prompt in (5, 9)]
    trained.batch = make_groups(examples, packed=True, share_prompt=True, device=batch.ids.device)
    assert len(trained.batch.layout.groups) == 2
    ours, plain = both(trained, monkeypatch)
    assert not any(taken)
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


def test_a_layer_that_is_one_node_calls_its_hooks(taken):
    """FSDP2 gathers a sharded layer in them."""
    trained, called = Trained(), []
    layer = trained.model.model.layers[1]
    layer.register_forward_pre_hook(lambda *_: called.append("before"))
    layer.register_forward_hook(lambda *_: called.append("after"))
    with fused(trained.model, replacements(trained.model)):
        trained.measured()
    assert taken == [True, True] and called == ["before", "after"]
    assert "forward" not in vars(layer)


@pytest.mark.filterwarnings("ignore:For backward hooks", "ignore:Full backward hook")
@pytest.mark.parametrize("register", ["register_forward_hook", "register_full_backward_hook"])
@pytest.mark.parametrize("family", ["qwen3", "mixtral", "opt"])
def test_each_hook_that_the_models_own_code_calls_is_called(family, register):
    trained = Trained(family, layers=1, targets=["q_proj"])
    head = trained.model.get_output_embeddings()  # wraps layers, and does not act
    attach(trained.model, LoRA(rank=4), name="b", routing=trained.routing, head=head)
    stand_ins = replacements(trained.model)

    def is_heard(module, context):
        calls = []
        hook = getattr(module, register)(lambda *_: calls.append(1))
        with context():
            batch_loss(trained, trained.batch, total=1.0).backward()
        hook.remove()
        return bool(calls)

    modules = dict(trained.model.named_modules())
    expected = {path for path, module in modules.items() if is_heard(module, nullcontext)}
    found = {p for p in expected if is_heard(modules[p], lambda: fused(trained.model, stand_ins))}
    assert found == expected and any(path.endswith(".base") for path in expected)


def _scaled(own):
    return lambda self, x, **given: own(self, x, **given) * 0.5


def _clipped(own):
    return lambda self, x, **given: own(self, x, **given).clamp(-1000.0, 1000.0)


def _straight(own):
    def forward(self, hidden_states, **given):
        n = self.input_layernorm(hidden_states)
        return hidden_states + self.self_attn(hidden_states=n, **given)[0] + self.mlp(n)

    return forward


def _without_mask(own):
    return lambda self, x, attention_mask, **given: own(self, x, attention_mask=None, **given)


@pytest.mark.parametrize("change", [_scaled, _clipped, _straight, _without_mask])
def test_a_layer_that_adds_up_otherwise_stays(change, monkeypatch):
    trained = Trained()
    assert len(trained.layers()) == 2
    kind = type(trained.model.model.layers[0])
    monkeypatch.setattr(kind, "forward", change(kind.forward))
    assert not Trained().layers()


@pytest.mark.parametrize(
    "add",
    [
        lambda layer: layer.register_module("another", torch.nn.Tanh()),
        lambda layer: layer.register_parameter("another", torch.nn.Parameter(torch.ones(1))),
        lambda layer: layer.register_buffer("another", torch.ones(1)),
    ],
    ids=["module", "parameter", "buffer"],
)
def test_a_layer_that_holds_more_than_its_parts_stays(add):
    trained = Trained()
    add(trained.model.model.layers[0])
    assert len(trained.layers()) == 1


def test_layers_of_other_parts_stay():
    model = tiny_model("bloom", torch.bfloat16)
    prepare(model)
    attach(
        model,
        LoRA(rank=16, targets="all-linear"),
        name="a",
        routing=Routing(),
        head=model.get_output_embeddings(),
    )
    assert not any(isinstance(made, FusedLayer) for made in replacements(model).values())


def test_layers_in_float32_and_bases_alone_stay():
    trained = tiny_model("llama", torch.float32)
    prepare(trained)
    attach(trained, LoRA(rank=16, targets="all-linear"), name="a", routing=Routing(), head=None)
    for model in (trained, tiny_model("llama", torch.bfloat16)):
        assert not any(isinstance(made, FusedLayer) for made in replacements(model).values())


@pytest.mark.parametrize(
    ("family", "adding"),
    [
        *(("llama", False), ("llama", True), ("qwen3", True), ("gemma", False)),
        *(("phi3", False), ("glm4", True), ("cohere", True)),
    ],
)
def test_rows_of_several_adapters_get_the_bits_of_each_alone(family, adding, taken):
    """The base's products are computed over all rows, everything else adapter by adapter."""
    trained = Trained(family, layers=4)
    settings = [
        {"targets": "all-linear", "rank": 8, "alpha": 3.0, "dropout": 0.3},
        {"targets": ["q_proj", "down_proj"], "rank": 32, "alpha": 5.0, "dropout": 0.1},
        {"targets": "all-linear", "rank": 24, "rank_pattern": {"k_proj": 4}},
    ]
    head, flats = trained.model.get_output_embeddings(), []
    for number, own in enumerate(settings):
        config = LoRA(**named(family, own))
        adapter = attach(
            trained.model, config, name=str(number), routing=trained.routing, head=head
        )
        fill(adapter.parameters().values(), scale=0.1, seed=number)
        flats.append((adapter, FlatParameters(adapter.parameters())))
    batches = [
        make_batch(
            make_examples(4 + 3 * number, prompt=5 * number, seed=number),
            packed=True,
            share_prompt=True,
            device=torch.device("cpu"),
        )
        for number in range(len(settings))
    ]

    def gradients(numbers):
        chosen = [batches[number] for number in numbers]
        joined, rows = join_batches(chosen)
        shares = [
            BatchShare(
                ((flats[n][0], 1.0),),
                batches[n].trained_tokens,
                lambda predictions, n=n: ObjectiveLoss(predictions.cross_entropy(7.0 + n)),
            )
            for n in numbers
        ]
        acting = in_turn([(n, share.adapters) for n, share in zip(rows, shares, strict=True)])
        keys = [(count, 3 + n, n) for count, n in zip(rows, numbers, strict=True)]
        for number in numbers:
            flats[number][1].gradient.zero_()
        with trained.routing.held(acting.drawing(TokenKeys.of_runs(joined.dropout_rows, keys))):
            found = [share.loss for share in batch_losses(trained, joined, shares)]
            with block.adding_gradients_in_place() if adding else nullcontext():
                sum(found[1:], start=found[0]).backward()
        return [
            (loss.item(), flats[n][1].gradient.clone())
            for loss, n in zip(found, numbers, strict=True)
        ]

    with fused(trained.model, replacements(trained.model)):
        joint = gradients([0, 1, 2])
        alone = [gradients([number])[0] for number in range(3)]
    assert all(taken) and len(taken) == 4 * 4
    for (loss, gradient), (loss_alone, gradient_alone) in zip(joint, alone, strict=True):
        assert loss == loss_alone
        assert torch.equal(gradient, gradient_alone) and gradient.any()
