"""Bottleneck layers: where they stand in every family, what they compute, and their files."""

import json

import pytest
import torch
from torch.nn import functional as F

from tests.support.tiny import FAMILIES, tiny_base, tiny_model
from veneer.adapters.attach import attach
from veneer.adapters.config import Bottleneck, LoRA
from veneer.adapters.methods.bottleneck import AdaptedBlock
from veneer.adapters.placement.routing import Routing
from veneer.errors import AdapterMismatchError, ConfigError, CorruptFileError
from veneer.formats.adapter import manifest_for, read_adapter, write_adapter
from veneer.formats.loading import load_adapter

IDS = torch.tensor([[5, 9, 30, 7, 5, 61, 2, 8, 44, 10, 11, 12]])
REFUSED = {
    "opt": "OPTDecoderLayer has no feed-forward block",
    "bloom": "BloomMLP adds the residual itself",
}


def put(model, name="a", routing=None, **settings):
    routing = routing or Routing()
    attachment = attach(
        model,
        Bottleneck(**settings),
        name=name,
        routing=routing,
        head=model.get_output_embeddings(),
    )
    generator = torch.Generator().manual_seed(3)
    for parameter in attachment.parameters().values():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    routing.active = ((name, 1.0),)
    return attachment, routing


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_are_found_in_every_family_or_refused_by_name(family):
    model = tiny_model(family)
    before = logits(model)
    if family in REFUSED:
        with pytest.raises(ConfigError, match="do not fit the model") as caught:
            put(model, placement="houlsby")
        assert any(fault.startswith(REFUSED[family]) for fault in caught.value.faults)
        assert torch.equal(logits(model), before)
        return
    attachment, routing = put(model, placement="houlsby")
    assert len(attachment.layers) == attachment.adaptable == 4
    assert not torch.allclose(logits(model), before, rtol=1e-2)
    routing.active = ()
    assert torch.equal(logits(model), before)
    one, _ = put(model, "b", placement="pfeiffer", layers=[1])
    assert [path.split(".")[-2] for path in one.layers] == ["1"] and one.adaptable == 2


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    ("placement", "activation", "scaling"),
    [
        ("houlsby", "relu", 1.0),
        ("pfeiffer", "gelu", 1.0),
        ("parallel", "tanh", 4.0),
        ("parallel", "swish", 4.0),
    ],
)
def test_a_block_gives_the_formula(placement, activation, scaling, norm):
    model = tiny_model("llama_untied")
    seen = {}
    attachment, _ = put(model, placement=placement, activation=activation, norm=norm, size=5)
    path = f"model.layers.0.{'self_attn' if placement == 'houlsby' else 'mlp'}"
    wrapper = model.get_submodule(path)
    assert isinstance(wrapper, AdaptedBlock)

    def keep(key):
        def hook(_module, given, named, out):
            x = given[0] if given else named["hidden_states"]
            seen[key] = (x, out[0] if isinstance(out, tuple) else out)

        return hook

    wrapper.register_forward_hook(keep("adapted"), with_kwargs=True)
    wrapper.base.register_forward_hook(keep("base"), with_kwargs=True)
    logits(model)
    (x, y), (_, found) = seen["base"], seen["adapted"]
    part = attachment.layers[path].stored()
    z = x if placement == "parallel" else y
    if norm:
        z = F.layer_norm(z, (32,), part["norm_weight"], part["norm_bias"])
    act = {"relu": F.relu, "gelu": F.gelu, "tanh": torch.tanh, "swish": F.silu}[activation]
    expected = y + scaling * (
        act(z @ part["down"].T + part["down_bias"]) @ part["up"].T + part["up_bias"]
    )
    torch.testing.assert_close(found, expected)


def test_gradients_are_those_of_finite_differences():
    layer = attach(
        tiny_model("llama"),
        Bottleneck(size=3, norm=True, activation="tanh"),
        name="a",
        routing=Routing(),
        head=tiny_model("llama").lm_head,
    ).layers["model.layers.0.mlp"]
    generator = torch.Generator().manual_seed(0)
    names = list(layer.parts())
    values = [
        torch.randn(p.shape, generator=generator, dtype=torch.float64).requires_grad_(True)
        for p in layer.parts().values()
    ]
    x = torch.randn(4, 32, generator=generator, dtype=torch.float64).requires_grad_(True)

    def function(x, *parts):
        layer._parts = dict(zip(names, parts, strict=True))
        return layer.update(x, None)

    assert torch.autograd.gradcheck(function, (x, *values))


def test_beside_lora_and_another_bottleneck_updates_add_up_on_the_blocks_own_output():
    model, routing = tiny_model("llama"), Routing()
    put(model, "a", routing, size=4)
    put(model, "b", routing, placement="pfeiffer", size=3, layers=[1])
    head = model.get_output_embeddings()
    lora = attach(model, LoRA(rank=2, targets=["down_proj"]), name="c", routing=routing, head=head)
    assert set(lora.layers) == {"model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"}
    block = model.model.layers[1].mlp
    x = torch.randn(1, 6, 32)
    with torch.no_grad():
        routing.active = ()
        y = block(x)
        routing.active = (("a", 0.5),)
        only_a = block(x)
        routing.active = (("b", -2.0),)
        only_b = block(x)
        routing.active = (("a", 0.5), ("b", -2.0), ("c", 1.0))
        torch.testing.assert_close(block(x), only_a + only_b - y)


def stored(tmp_path, **settings):
    base = tiny_base("llama_untied")
    attachment, _ = put(base.model, size=5, **settings)
    write_adapter(
        tmp_path / "a", attachment, manifest_for(base, method="bottleneck"), model=base.model
    )
    return tmp_path / "a"


def test_its_file_is_the_documented_one(tmp_path):
    folder = stored(tmp_path, placement="houlsby", norm=True, layers=[1])
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config == {
        "activation": "relu",
        "base_model_name_or_path": "tiny-llama_untied",
        "dropout": 0.0,
        "layers": [1],
        "norm": True,
        "peft_type": "VENEER_BOTTLENECK",
        "placement": "houlsby",
        "revision": None,
        "scaling": 1.0,
        "size": 5,
        "task_type": "CAUSAL_LM",
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in read_adapter(folder).tensors.items()}
    assert shapes == {
        f"model.layers.1.{block}.bottleneck_{name}": shape
        for block in ("self_attn", "mlp")
        for name, shape in {
            "down.weight": (5, 32),
            "down.bias": (5,),
            "up.weight": (32, 5),
            "up.bias": (32,),
            "norm.weight": (32,),
            "norm.bias": (32,),
        }.items()
    }


def test_a_file_that_does_not_fit_or_makes_no_sense_is_refused(tmp_path):
    folder = stored(tmp_path)
    with pytest.raises(AdapterMismatchError, match=r"bottleneck_down\.weight"):
        load_adapter(tiny_base("llama_untied", hidden_size=64), folder, name="x", force_base=True)
    with pytest.raises(AdapterMismatchError, match="has no feed-forward block"):
        load_adapter(tiny_base("opt"), folder, name="x", force_base=True)
    (folder / "veneer.json").unlink()
    path = folder / "adapter_config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({**fields, "activation": "maxout", "gate": True}))
    with pytest.raises(CorruptFileError) as caught:
        read_adapter(folder)
    assert len(caught.value.faults) == 2


@pytest.mark.parametrize(
    ("settings", "says"),
    [({"layers": [0, 7]}, "layer 7 does not exist"), ({"size": 3, "reduction": 4}, "give one")],
    ids=str,
)
def test_settings_that_do_not_fit_are_told(settings, says):
    with pytest.raises((ConfigError, ValueError), match=says):
        put(tiny_model("llama"), **settings)
