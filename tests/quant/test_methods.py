"""Every method over every weight format: nothing changes before training, only the adapter learns,
and it learns what it would learn over the decoded weights."""

import hashlib

import pytest
import torch

from tests.support.helpers import fill, make_examples
from tests.support.models.packed import packed_and_dense, packed_modules
from tests.support.models.routed import Routed, batch_loss
from tests.support.tiny import save_tiny
from veneer.adapters.attach import attach, detach
from veneer.adapters.config import LoRA
from veneer.adapters.placement.acting import TokenKeys
from veneer.adapters.placement.routing import Routing
from veneer.data.batching import make_batch
from veneer.errors import ConfigError
from veneer.models.checkpointing import checkpointed
from veneer.models.load import load_base
from veneer.models.step import prepare

IDS = torch.tensor([[5, 80, 99, 7, 250, 31, 31, 80, 12, 0, 77, 140]])
FAMILIES = ("llama", "qwen2", "gpt2", "mixtral", "qwen3_moe")
METHODS = {
    "lora": LoRA(rank=3, alpha=5.0),
    "lora with dropout": LoRA(rank=3, alpha=5.0, dropout=0.3),
    "rslora and biases": LoRA(rank=2, alpha=3.0, rslora=True, bias="all"),
}


def put(model, routing, config=METHODS["lora"], name="a"):
    made = attach(model, config, name=name, routing=routing, head=model.get_output_embeddings())
    routing.active = ((name, 1.0),)
    return made


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def digest(model):
    hashed = hashlib.sha256()
    for tensor in model.state_dict().values():
        hashed.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("quantize", "dtype"), [("nf4", "float32"), ("nf4", "bfloat16"), ("fp4", "float32")]
)
def test_a_fresh_adapter_changes_no_bit_and_detaching_restores_everything(
    family, quantize, dtype, tmp_path
):
    base = load_base(str(save_tiny(tmp_path, family)), dtype=dtype, quantize=quantize)
    model, routing = base.model, Routing()
    before, state, modules = logits(model), digest(model), packed_modules(model)
    made = put(model, routing)
    assert torch.equal(logits(model), before)
    fill(made.parameters().values())
    assert not torch.allclose(logits(model), before, rtol=1e-2)
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    assert len(names) == len({name.replace(".base.", ".") for name in names})
    routing.active = ()
    assert torch.equal(logits(model), before)
    detach(model, "a", routing=routing)
    assert packed_modules(model) == modules
    assert digest(model) == state


def step(model, routing, config, examples, *, packed, checkpoint=False):
    made = put(model, routing, config)
    fill(made.parameters().values(), scale=0.1)
    for parameter in made.parameters().values():
        parameter.requires_grad_(True)
    batch = make_batch(examples, packed=packed, share_prompt=True, device=torch.device("cpu"))
    paths = prepare_without(model, routing)
    with (
        checkpointed(model, routing, on=checkpoint),
        routing.drawing(TokenKeys(batch.dropout_rows, 3)),
    ):
        loss = batch_loss(Routed(model, paths, routing), batch, total=10.0)
        loss.backward()
    return loss.item(), {name: p.grad for name, p in made.parameters().items()}


def prepare_without(model, routing):
    """prepare proves its paths on the base alone."""
    active, routing.active = routing.active, ()
    paths = prepare(model)
    routing.active = active
    return paths


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("checkpoint", [False, True], ids=["kept", "checkpointed"])
def test_losses_and_gradients_are_those_over_the_decoded_weights(
    family, method, checkpoint, tmp_path
):
    base, dense = packed_and_dense(save_tiny(tmp_path, family))
    examples = make_examples(4)
    frozen = digest(base.model)
    routing = Routing()
    ours, gradients = step(
        base.model, routing, METHODS[method], examples, packed=True, checkpoint=checkpoint
    )
    theirs, expected = step(dense, Routing(), METHODS[method], examples, packed=True)
    assert ours == pytest.approx(theirs, rel=1e-4)
    for name, gradient in gradients.items():
        assert gradient is not None, name
        torch.testing.assert_close(gradient, expected[name], rtol=5e-3, atol=2e-4)
    assert all(p.grad is None for p in base.model.parameters())
    detach(base.model, "a", routing=routing)
    assert digest(base.model) == frozen


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_transformers_own_code_trains_through_a_packed_base_without_an_adapter(family, tmp_path):
    base, dense = packed_and_dense(save_tiny(tmp_path, family))
    found = []
    for model in (base.model, dense):
        x = torch.randn(1, 9, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
        model(inputs_embeds=x).logits.square().mean().backward()
        found.append(x.grad)
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)


def test_evaluation_in_between_changes_no_gradient(tmp_path):
    """Train, evaluate, train: bitsandbytes repacks its weight in evaluation and then gives no
    gradient."""
    model = load_base(str(save_tiny(tmp_path, "llama")), quantize="nf4").model
    found = []
    for _ in range(2):
        x = torch.randn(1, 9, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
        model(inputs_embeds=x).logits.square().mean().backward()
        found.append(x.grad)
        logits(model)
    assert torch.equal(*found)


def test_a_step_over_packed_weights_keeps_neither_inputs_nor_decoded_weights(tmp_path):
    layer = next(
        iter(
            packed_modules(
                load_base(str(save_tiny(tmp_path, "llama")), quantize="nf4").model
            ).values()
        )
    )
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(torch.randn(20, layer.in_features, requires_grad=True)).sum().backward()
    assert not saved


def test_two_adapters_on_packed_experts_add_up(tmp_path):
    base, dense = packed_and_dense(save_tiny(tmp_path, "mixtral"))
    found = []
    for model in (base.model, dense):
        routing = Routing()
        for seed, name in enumerate("ab"):
            fill(put(model, routing, name=name).parameters().values(), seed=seed, scale=0.1)
        routing.active = (("a", 0.5), ("b", -2.0))
        found.append(logits(model))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


def test_a_packed_weight_cannot_be_trained_in_full(tmp_path):
    model = load_base(str(save_tiny(tmp_path, "llama")), quantize="nf4").model
    with pytest.raises(ConfigError, match="do not fit the model") as caught:
        put(model, Routing(), LoRA(train_modules=["layers.0.mlp.up_proj"]))
    assert "held packed" in str(caught.value)
