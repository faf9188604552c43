"""Experts with LoRA in bf16 train as one node in every layer, and learn what they learn expert by
expert."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from tests.support.tiny import tiny_model
from veneer.adapters.attach import attach
from veneer.adapters.config import LoRA
from veneer.adapters.methods import experts as experts_module
from veneer.adapters.methods.expert_stack import activation_of
from veneer.adapters.methods.experts import AdaptedExperts
from veneer.adapters.placement.routing import Routing
from veneer.kernels.bindings.library import has_bf16
from veneer.kernels.bindings.row_calls import GELU_ERF, GELU_TANH, SILU

WIDTHS = {
    "mixtral": {"intermediate_size": 48},
    "qwen3_moe": {"moe_intermediate_size": 48},
    "olmoe": {"intermediate_size": 48},
    "gpt_oss": {"intermediate_size": 48},
}
BF16_ERROR = 0.05
"""Of a gradient's length: both paths round to 8 bits in each layer."""
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
def test_every_layer_trains_as_one_node_and_learns_as_expert_by_expert(family, monkeypatch):
    model, routing = tiny_model(family, torch.bfloat16, **WIDTHS[family]), Routing()
    settings = LoRA(targets=["gate_up_proj", "down_proj"], rank=3, alpha=5.0)
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
