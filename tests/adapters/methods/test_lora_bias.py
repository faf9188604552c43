"""lora_bias, a trained vector beside B: what it computes, where it merges, and what refuses it.
PEFT: tests/parity."""

import pytest
import torch
from torch import nn

from tests.support.helpers import fill, merge_in_memory
from tests.support.tiny import tiny_base, tiny_model
from veneer.adapters.attach import attach
from veneer.adapters.config import LoRA
from veneer.adapters.methods.lora import LoRALayer, low_rank_product
from veneer.adapters.placement.routing import Routing
from veneer.adapters.placement.wrapping import plain_modules
from veneer.errors import ConfigError, RefusedError
from veneer.formats.adapter import manifest_for, read_adapter, write_adapter
from veneer.kernels.dense.frozen import DenseLinear
from veneer.merge.combine.low_rank_adapters import place

IDS = torch.tensor([[5, 9, 30, 7, 5, 61, 2, 8, 44, 10, 11, 12]])


def put(model, routing, name="a", seed=0, **settings):
    config = LoRA(**{"rank": 3, "alpha": 5.0, "lora_bias": True, **settings})
    return attach(
        model, config, name=name, routing=routing, head=model.get_output_embeddings(), seed=seed
    )


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("llama", torch.float32), ("qwen2", torch.bfloat16), ("gpt2", torch.float32)],
    ids=str,
)
def test_a_fresh_one_changes_no_bit_and_a_trained_one_adds_its_vector_times_the_scaling(
    family, dtype
):
    model, routing = tiny_model(family, dtype), Routing()
    before = logits(model)
    attachment = put(model, routing)
    routing.active = (("a", 1.0),)
    assert torch.equal(logits(model), before)
    assert {name.rpartition(".")[2] for name in attachment.parameters()} == {"A", "B", "offset"}
    path, layer = next(iter(attachment.layers.items()))
    wrapper = model.get_submodule(path)
    x = torch.randn(4, plain_modules(model)[path].weight.shape[0 if family == "gpt2" else 1]).to(
        dtype
    )
    plain = wrapper.base(x)
    fill([layer.offset])
    expected = plain.float() + layer.scaling * layer.offset
    tolerance = (1e-6 if dtype == torch.float32 else 2**-7) * expected.abs().max()
    assert (wrapper(x).float() - expected).abs().max() <= tolerance
    (grad,) = torch.autograd.grad(wrapper(x).float().sum(), [layer.offset])
    torch.testing.assert_close(grad, torch.full_like(grad, 4 * layer.scaling))


def test_several_act_together_and_merge_where_the_layer_has_a_bias():
    base = tiny_base("gpt2")
    attachments = [put(base.model, base.routing, name, targets=["c_attn", "c_fc"]) for name in "ab"]
    for seed, attachment in enumerate(attachments):
        fill(attachment.parameters().values(), seed=seed, scale=0.2)
    base.routing.active = (("a", 1.0), ("b", -0.5))
    together = logits(base.model)
    base.routing.active = ()
    plain = logits(base.model)
    merged = merge_in_memory(base.model, list(zip(attachments, (1.0, -0.5), strict=True)))
    torch.testing.assert_close(logits(base.model), together, rtol=1e-4, atol=1e-4)
    merged.restore()
    assert torch.equal(logits(base.model), plain)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_several_add_up_as_precisely_as_the_base_computes(dtype):
    torch.manual_seed(0)
    base, x = DenseLinear(nn.Linear(24, 20).to(dtype)), torch.randn(7, 24, dtype=dtype)
    acting: list[tuple[LoRALayer, float, None]] = []
    for number, weight in enumerate((1 / 3, -0.7, 1.1)):
        layer = LoRALayer("linear", torch.randn(3, 24), torch.randn(20, 3), alpha=5.0, rslora=False)
        layer.offset = nn.Parameter(torch.randn(20)) if number else None
        acting.append((layer, weight, None))
    expected = base.module(x).double()
    for layer, weight, _ in acting:
        change = x.double() @ layer.A.double().T @ layer.B.double().T
        change = change if layer.offset is None else change + layer.offset.double()
        expected = expected + weight * layer.scaling * change
    total = low_rank_product(x, base.own_bias(), base, acting)
    assert total.dtype is dtype
    assert (total - expected).abs().max() <= 8 * torch.finfo(dtype).eps * expected.abs().max()


def test_it_is_refused_by_name_where_it_has_no_place(tmp_path):
    for family, targets in (
        ("llama", ["embed_tokens"]),
        ("mixtral", ["gate_up_proj"]),
        ("mixtral", ["mlp.gate"]),
    ):
        with pytest.raises(ConfigError, match="lora_bias takes linear layers"):
            put(tiny_model(family), Routing(), targets=targets)
    base = tiny_base("llama")
    base.fingerprint()
    attachment = put(base.model, base.routing, targets=["q_proj"])
    with pytest.raises(RefusedError, match="lora_bias has no place in these layers"):
        merge_in_memory(base.model, [(attachment, 1.0)])
    write_adapter(tmp_path / "a", attachment, manifest_for(base, method="lora"), model=base.model)
    with pytest.raises(
        RefusedError, match="no product of two factors"
    ):  # combining, and files for others
        place(read_adapter(tmp_path / "a"), tiny_model("llama"))
