"""Experts with LoRA in bf16 train as one node in every layer, and learn what they learn expert by
expert."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from tests.support.helpers import fill
from tests.support.models.packed import packed_and_dense
from tests.support.tiny import save_tiny, tiny_model
from veneer.adapters.attach import attach
from veneer.adapters.config import LoRA
from veneer.adapters.methods import experts as experts_module
from veneer.adapters.methods.expert_stack import activation_of, frozen_experts
from veneer.adapters.methods.experts import AdaptedExperts
from veneer.adapters.placement.acting import TokenKeys, in_turn
from veneer.adapters.placement.routing import Routing
from veneer.kernels.bindings.library import has_bf16
from veneer.kernels.bindings.row_calls import GELU_ERF, GELU_TANH, SILU
from veneer.models.load import load_base

WIDTHS = {
    "mixtral": {"intermediate_size": 48},
    "qwen3_moe": {"moe_intermediate_size": 48},
    "olmoe": {"intermediate_size": 48},
    "gpt_oss": {"intermediate_size": 48},
}
TARGETS = ["gate_up_proj", "down_proj"]
BF16_ERROR = 0.2
"""Of a gradient's length. Both paths round to 8 bits in each layer, and a rounding can choose
another expert for a token: either path is up to 0.2 from float32."""
IDS = torch.arange(60).view(1, -1) * 7 % 250


def nodes_of(loss: torch.Tensor) -> int:
    """Counts the nodes of experts in the graph."""
    nodes, waiting = set[Any](), [loss.grad_fn]
    while waiting:
        if (node := waiting.pop()) is not None and node not in nodes:
            nodes.add(node)
            waiting += [above for above, _ in node.next_functions]
    return sum(node.name() == "_ExpertsBackward" for node in nodes)


def step(model: PreTrainedModel, values: list[nn.Parameter]) -> tuple[int, list[torch.Tensor]]:
    """Returns the number of nodes, and the loss and the gradients."""
    logits = model(IDS, use_cache=False).logits[0].float()
    loss = F.cross_entropy(logits[:-1], IDS[0, 1:])
    return nodes_of(loss), [loss.detach(), *torch.autograd.grad(loss, values)]


@pytest.mark.skipif(not has_bf16(), reason="the node needs products of bf16 pairs")
@pytest.mark.parametrize("family", WIDTHS)
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_every_layer_trains_as_one_node_and_learns_as_expert_by_expert(
    family, quantize, monkeypatch, tmp_path
):
    save_tiny(tmp_path, family, torch.bfloat16, **WIDTHS[family])
    model = load_base(str(tmp_path), dtype="bfloat16", device="cpu", quantize=quantize).model
    routing = Routing()
    settings = LoRA(targets=TARGETS, rank=3, alpha=5.0)
    head = model.get_output_embeddings()
    attachment = attach(model, settings, name="a", routing=routing, head=head)
    values = list(attachment.parameters().values())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        for value in values:
            nn.init.normal_(value, std=0.2)
    routing.active = (("a", 1.0),)
    count, own = step(model, values)
    stacks = sum(isinstance(module, AdaptedExperts) for module in model.modules())
    assert count == stacks == model.config.num_hidden_layers
    monkeypatch.setattr(experts_module, "usable", lambda *operands: False)
    plain_count, plain = step(model, values)
    assert plain_count == 0
    for value, expected in zip(own, plain, strict=True):
        assert (value - expected).norm() <= BF16_ERROR * expected.norm()


@pytest.mark.skipif(not has_bf16(), reason="the node needs products of bf16 pairs")
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_a_packed_stack_trains_with_the_bits_of_its_decoded_matrices(family, tmp_path):
    base, dense = packed_and_dense(save_tiny(tmp_path, family, torch.bfloat16, **WIDTHS[family]))
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(90, base.model.config.hidden_size, generator=draw).bfloat16()
    index = torch.stack([torch.randperm(4, generator=draw)[:2] for _ in range(90)])
    weights = torch.rand(90, 2, generator=draw).bfloat16()
    found = []
    for model in (base.model, dense):
        routing = Routing()
        settings = LoRA(targets=TARGETS, rank=3, alpha=5.0)
        attachment = attach(model, settings, name="a", routing=routing, head=None)
        fill(attachment.parameters().values(), scale=0.2)
        routing.active = (("a", 1.0),)
        stack = next(module for module in model.modules() if isinstance(module, AdaptedExperts))
        layer = [own for name, own in attachment.parameters().items() if "layers.0." in name]
        x = hidden.clone().requires_grad_()
        y = stack(x, index, weights)
        assert nodes_of(y) == 1
        grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
        found.append([y.detach(), *torch.autograd.grad(y, [x, *layer], grad)])
    for own, expected in zip(*found, strict=True):
        assert torch.equal(own, expected)


def two_jobs(dtype: torch.dtype) -> tuple[Routing, AdaptedExperts, list[torch.Tensor]]:
    """Returns a stack with adapter `dropped`, which has dropout, and `plain`, and rows for it:
    their values, experts and weights."""
    model, routing = tiny_model("mixtral", dtype, **WIDTHS["mixtral"]), Routing()
    for seed, (name, dropout) in enumerate((("dropped", 0.3), ("plain", 0.0))):
        settings = LoRA(targets=TARGETS, rank=3 + seed, alpha=5.0, dropout=dropout)
        attachment = attach(model, settings, name=name, routing=routing, head=None, seed=seed)
        for number, value in enumerate(attachment.parameters().values()):
            draw = torch.Generator().manual_seed(number + 10 * seed)
            value.data.copy_(torch.randn(value.shape, generator=draw) * 0.2)
    draw = torch.Generator().manual_seed(0)
    width = model.config.hidden_size
    hidden = torch.randn(90, width, generator=draw).to(dtype)
    index = torch.stack([torch.randperm(4, generator=draw)[:2] for _ in range(90)])
    stack = next(module for module in model.modules() if isinstance(module, AdaptedExperts))
    return routing, stack, [hidden, index, torch.rand(90, 2, generator=draw).to(dtype)]


@pytest.mark.skipif(not has_bf16(), reason="the node needs products of bf16 pairs")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_job_with_dropout_leaves_the_bits_of_its_neighbours(dtype):
    """Rows of both jobs come by turns; each job gets the bits and the gradients of its own run."""
    routing, stack, rows = two_jobs(dtype)
    counts = [(20, "dropped"), (40, "plain"), (30, "dropped")]
    keys = TokenKeys(torch.arange(90) * 7919, step=3)
    grad = torch.randn(90, rows[0].shape[1], generator=torch.Generator().manual_seed(5)).to(dtype)

    def computed(chosen: torch.Tensor, parts: list[tuple[int, str]]) -> list[torch.Tensor]:
        acting = in_turn([(count, routing.applied(((name, 1.0),))) for count, name in parts])
        names = sorted({name for _, name in parts})
        values = [v for name in names for v in routing.attached[name].parameters().values()]
        hidden = rows[0][chosen].requires_grad_()
        with routing.held(acting.drawing(keys.of(chosen))):
            y = stack(hidden, rows[1][chosen], rows[2][chosen])
        used = [value for value in values if value.requires_grad]
        grads = torch.autograd.grad(y, [hidden, *used], grad[chosen], allow_unused=True)
        return [y.detach(), *(g for g in grads if g is not None)]

    number = torch.arange(90)
    in_plain = (number >= 20) & (number < 60)
    both = computed(number, counts)
    plain = computed(number[in_plain], [(40, "plain")])
    dropped = computed(number[~in_plain], [(50, "dropped")])
    for place in (0, 1):
        assert torch.equal(both[place][in_plain], plain[place])
        assert torch.equal(both[place][~in_plain], dropped[place])
    for own, alone in zip(both[2:], [*dropped[2:], *plain[2:]], strict=True):
        assert torch.equal(own, alone)


@pytest.mark.skipif(not has_bf16(), reason="the node needs products of bf16 pairs")
def test_an_evaluation_computes_the_bits_of_a_training_step():
    routing, stack, rows = two_jobs(torch.bfloat16)
    with routing.held(in_turn([(90, routing.applied((("plain", 1.0),)))])):
        trained = stack(*rows)
        with torch.no_grad():
            evaluated = stack(*rows)
    assert nodes_of(trained) == 1
    assert torch.equal(trained, evaluated)


def gate(activation: Any) -> Any:
    def gated(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return activation(first) * second

    return gated


@pytest.mark.parametrize(
    ("function", "activation"),
    [
        (gate(F.silu), SILU),
        (gate(F.gelu), GELU_ERF),
        (gate(lambda x: F.gelu(x, approximate="tanh")), GELU_TANH),
        (gate(lambda x: F.silu(x.clamp(max=100.0))), None),
        (gate(F.relu), None),
        (lambda x: F.silu(x[..., ::2]) * x[..., 1::2], None),
        (lambda x: F.silu(x.chunk(2, dim=-1)[1]) * x.chunk(2, dim=-1)[0], None),
    ],
    ids=["silu", "gelu", "tanh", "bounded", "relu", "pairs", "up first"],
)
def test_the_activation_of_a_gate_is_known_by_its_values(function, activation):
    assert activation_of(function) == activation


def test_a_stack_with_another_activation_is_tried_anew():
    stack = tiny_model("mixtral").model.layers[0].mlp.experts
    assert frozen_experts(stack).activation == SILU
    stack.act_fn = nn.GELU()
    assert frozen_experts(stack).activation == GELU_ERF
