"""Adapters beside a base: they change nothing until they act, and leave no trace when they go."""

import pytest
import torch

from tests.support.helpers import fill
from tests.support.tiny import FAMILIES, tiny_model
from veneer.adapters.attach import attach, detach
from veneer.adapters.config import LoRA
from veneer.adapters.methods import experts as experts_module
from veneer.adapters.methods.adapted_linear import AdaptedLinear
from veneer.adapters.methods.lora import delta_weight
from veneer.adapters.placement.routing import Routing
from veneer.adapters.placement.wrapping import SwappedModule, plain_modules
from veneer.errors import ConfigError

IDS = torch.tensor([[5, 9, 30, 7, 5, 61, 2, 8, 44, 10, 11, 12]])
ODD_NAMES = ("lora", "weight", "lora_A", "q_proj", "a.b.c", "base", "ünïcode ✓", "")


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def put(model, routing, name="a", seed=0, **settings):
    config = LoRA(**{"rank": 3, "alpha": 5.0, **settings})
    return attach(
        model, config, name=name, routing=routing, head=model.get_output_embeddings(), seed=seed
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_fresh_adapter_changes_no_bit_and_detaching_restores_everything(family, dtype):
    model = tiny_model(family, dtype)
    names, state = (
        list(dict(model.named_parameters())),
        {k: v.clone() for k, v in model.state_dict().items()},
    )
    before, routing = logits(model), Routing()
    attachment = put(model, routing)
    assert torch.equal(logits(model), before)
    routing.active = (("a", 1.0),)
    fresh = logits(model)
    if family not in ("mixtral", "qwen3_moe"):
        assert torch.equal(fresh, before)
    elif (
        dtype == torch.float32
    ):  # expert by expert instead of grouped: the same sums in another order
        torch.testing.assert_close(fresh, before, rtol=1e-4, atol=1e-4)
    fill(attachment.parameters().values())
    assert not torch.allclose(logits(model), before, rtol=1e-2)
    routing.active = ()
    assert torch.equal(logits(model), before)
    detach(model, "a", routing=routing)
    assert list(dict(model.named_parameters())) == names
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("bloom", "falcon")])
def test_all_linear_reaches_every_linear_layer_but_the_head(family):
    model = tiny_model(family)
    attachment = put(model, Routing())
    assert len(attachment.layers) == attachment.adaptable
    head = next(n for n, m in plain_modules(model).items() if m is model.get_output_embeddings())
    assert head not in attachment.layers


def test_two_adapters_on_one_base_act_alone_and_together():
    model, routing = tiny_model("llama"), Routing()
    base = logits(model)
    first, second = (
        put(model, routing, "a", seed=1),
        put(model, routing, "b", seed=2, rank=2, targets=["q_proj"]),
    )
    fill(first.parameters().values(), seed=1, scale=0.1)
    fill(second.parameters().values(), seed=2, scale=0.1)
    routing.active = (("a", 1.0),)
    only_a = logits(model)
    detach(model, "b", routing=routing)
    assert torch.equal(logits(model), only_a)
    second = put(model, routing, "b", seed=2, rank=2, targets=["q_proj"])
    fill(second.parameters().values(), seed=2, scale=0.1)
    routing.active = (("a", 0.5), ("b", -2.0))
    both = logits(model)
    routing.active = ()
    for attachment, weight in ((first, 0.5), (second, -2.0)):
        for path, layer in attachment.layers.items():
            plain_modules(model)[path].weight.data += weight * delta_weight(layer)
    torch.testing.assert_close(logits(model), both, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(both, base, rtol=1e-2)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_adapted_experts_are_the_experts_with_the_update_added_to_their_weights(
    family, monkeypatch
):
    model, routing = tiny_model(family), Routing()
    attachment = put(
        model, routing, targets=["gate_up_proj", "down_proj"], rank_pattern={"down_proj": 2}
    )
    fill(attachment.parameters().values())
    routing.active = (("a", 1.0),)
    by_expert = logits(model)
    monkeypatch.setattr(experts_module, "is_gated_stack", lambda module: False)
    torch.testing.assert_close(logits(model), by_expert, rtol=1e-4, atol=1e-4)
    routing.active = ()
    for path, layer in attachment.layers.items():
        owner, _, name = path.rpartition(".")
        plain_modules(model)[owner].get_parameter(name).data += delta_weight(layer)
    torch.testing.assert_close(logits(model), by_expert, rtol=1e-4, atol=1e-4)


def test_the_update_is_alpha_over_the_rank_times_the_product_of_the_factors_in_any_layer():
    for rslora, scaling in ((False, 5 / 3), (True, 5 / 3**0.5)):
        model = tiny_model("mixtral")
        attachment = put(
            model, Routing(), rslora=rslora, targets=["q_proj", "gate_up_proj", "embed_tokens"]
        )
        fill(attachment.parameters().values())
        assert {layer.kind for layer in attachment.layers.values()} == {
            "linear",
            "experts",
            "embedding",
        }
        for layer in attachment.layers.values():
            product = layer.B.detach() @ layer.A.detach()
            expected = scaling * (product.mT if layer.kind == "embedding" else product)
            weight = torch.zeros_like(expected)
            torch.testing.assert_close(layer.folded(weight), expected, rtol=1e-5, atol=1e-6)


def test_a_trained_head_leaves_the_tied_embedding_alone():
    model, routing = tiny_model("llama"), Routing()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    attachment = put(model, routing, train_modules=["lm_head"])
    table = model.model.embed_tokens.weight.clone()
    hidden = model.model(input_ids=IDS, use_cache=False).last_hidden_state
    routing.active = (("a", 1.0),)
    fill([attachment.values["lm_head.weight"]])
    assert torch.equal(model.model.embed_tokens.weight, table)
    torch.testing.assert_close(logits(model), hidden @ attachment.values["lm_head.weight"].T)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_take_the_place_of_the_bases(bias):
    model, routing = tiny_model("gpt2"), Routing()
    attachment = put(model, routing, bias=bias, targets=["c_attn"])
    named = {n for n, _ in model.named_parameters() if n.endswith(".bias")}
    assert len(attachment.values) == (len(named) if bias == "all" else 2)
    before = logits(model)
    routing.active = (("a", 1.0),)
    assert torch.equal(logits(model), before)
    for value in attachment.values.values():
        value.data += 0.5
    changed = logits(model)
    routing.active = ()
    modules = plain_modules(model)
    for path, value in attachment.values.items():
        owner, _, _ = path.rpartition(".")
        modules[owner].bias.data.copy_(value)
    torch.testing.assert_close(logits(model), changed)


def test_detaching_what_trained_modules_in_full_gives_every_place_back_to_the_base():
    model, routing = tiny_model("llama_untied"), Routing()
    before = {path: type(module) for path, module in model.named_modules()}
    put(model, routing, "a", targets=["q_proj"], train_modules=["norm", "lm_head"])
    put(model, routing, "b", targets=["v_proj"], train_modules=["norm"])
    detach(model, "a", routing=routing)
    assert {type(m) for m in model.modules()} - set(before.values()) == {
        AdaptedLinear,
        SwappedModule,
    }
    detach(model, "b", routing=routing)
    assert {path: type(module) for path, module in model.named_modules()} == before


def test_ranks_alphas_layers_and_excludes_are_those_asked_for():
    model = tiny_model("llama")
    attachment = put(
        model,
        Routing(),
        targets=["q_proj", "v_proj", "down_proj"],
        exclude=["layers.1.mlp.down_proj"],
        rank_pattern={"q_proj": 7, "layers.0.self_attn.q_proj": 5},
        alpha_pattern={r"layers\.0\..*v_proj": 9.0},
        rslora=True,
    )
    layers = attachment.layers
    assert set(layers) == {
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.v_proj",
        "model.layers.0.mlp.down_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.v_proj",
    }
    assert (
        layers["model.layers.0.self_attn.q_proj"].rank == 7
    )  # the first pattern that matches wins
    assert layers["model.layers.0.self_attn.v_proj"].scaling == pytest.approx(9 / 3**0.5)
    assert layers["model.layers.1.self_attn.v_proj"].scaling == pytest.approx(5 / 3**0.5)
    only = put(tiny_model("llama"), Routing(), targets=r".*\.(k_proj|o_proj)", layers=[1])
    assert set(only.layers) == {
        "model.layers.1.self_attn.k_proj",
        "model.layers.1.self_attn.o_proj",
    }


EXISTING = "the model has: down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
HOLDS = (
    "train_modules: model.layers.{}.self_attn holds other modules; name those (a head, a norm, an"
    " embedding)"
)
NAMED_WRONGLY = [
    (
        {"targets": ["q_prj", "v_proj"]},
        ["targets 'q_prj' matches no module; nearest: q_proj, v_proj, o_proj"],
    ),
    (
        {"targets": "q_proj"},
        [
            "targets 'q_proj' is a regular expression and matches no whole path; for instance"
            " '.*lm_head' would; nearest: q_proj, v_proj, o_proj"
        ],
    ),
    (
        {"exclude": ["o_projj"]},
        ["exclude 'o_projj' matches no module; nearest: o_proj, v_proj, q_proj"],
    ),
    ({"layers": [0, 9, 7]}, ["layers [7, 9] do not exist; the model has layers 0-1"]),
    (
        {"rank_pattern": {"self_attn": 4}},
        [f"rank_pattern 'self_attn' matches no targeted module; {EXISTING}"],
    ),
    ({"alpha_pattern": {"x": 1.0}}, [f"alpha_pattern 'x' matches no targeted module; {EXISTING}"]),
    (
        {"train_modules": ["lm_haed"]},
        ["train_modules 'lm_haed' matches no module; nearest: lm_head"],
    ),
    ({"train_modules": ["self_attn"]}, [HOLDS.format(0), HOLDS.format(1)]),
    (
        {"targets": ["q_proj"], "exclude": ["q_proj"]},
        ["after exclude and layers nothing is left to adapt"],
    ),
    (
        {"targets": ["q_proj"], "train_modules": ["q_proj"]},
        ["after exclude and layers nothing is left to adapt"],
    ),
]


@pytest.mark.parametrize(("settings", "faults"), NAMED_WRONGLY, ids=str)
def test_settings_that_match_nothing_are_an_error_that_lists_what_exists(settings, faults):
    with pytest.raises(ConfigError, match="do not fit the model") as caught:
        put(tiny_model("llama"), Routing(), **settings)
    assert caught.value.faults == faults


def test_all_faults_are_told_at_once_and_a_taken_name_is_refused():
    with pytest.raises(ConfigError) as caught:
        put(
            tiny_model("llama"),
            Routing(),
            targets=["nope"],
            exclude=["neither"],
            train_modules=["nor"],
        )
    assert len(caught.value.faults) == 3
    model, routing = tiny_model("mixtral"), Routing()
    put(model, routing, targets=["gate_up_proj"])
    with pytest.raises(ConfigError, match="attached already"):
        put(model, routing, targets=["q_proj"])


@pytest.mark.parametrize("name", ODD_NAMES)
def test_an_adapter_may_have_any_name(name):
    model, routing = tiny_model("llama"), Routing()
    before = logits(model)
    attachment = put(model, routing, name)
    fill(attachment.parameters().values())
    routing.active = ((name, 1.0),)
    assert not torch.allclose(logits(model), before)
    detach(model, name, routing=routing)
    assert torch.equal(logits(model), before)


def test_nothing_of_the_base_gets_a_gradient_and_every_trained_tensor_does():
    model, routing = tiny_model("llama"), Routing()
    attachment = put(
        model,
        routing,
        targets=["q_proj", "embed_tokens", "gate_proj"],
        train_modules=["lm_head", "norm"],
    )
    fill(attachment.parameters().values())
    routing.active = (("a", 1.0),)
    model(input_ids=IDS, use_cache=False).logits.square().mean().backward()
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0 for p in attachment.parameters().values()
    )
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
