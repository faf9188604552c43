"""Mixtures of experts in decoding: the facts of their blocks, recorded steps with adapters on
experts, and stacks of experts outside of an engine."""

import copy

import pytest
import torch
from torch import nn

from tests.adapters.test_methods import move
from tests.support.models.packed import packed_and_dense
from tests.support.tiny import save_tiny, tiny_base, tiny_model
from veneer.adapters.attach import attach
from veneer.adapters.config import LoRA
from veneer.adapters.methods.lora import delta_weight
from veneer.decoding.engine import Engine
from veneer.decoding.sampling.sampling import Sampling
from veneer.decoding.schedule.adapters import FixedAdapters
from veneer.decoding.schedule.sequence import Request
from veneer.execution.attention import packed_states
from veneer.execution.facts.decoder_layer import find_layers
from veneer.execution.facts.layer_facts import FeedForward, Mixture
from veneer.execution.facts.mixture_facts import find_mixture
from veneer.execution.mixture import PREFIX, take_experts
from veneer.execution.train_step import FusedLayer, fused, replacements
from veneer.kernels.bindings import library as native
from veneer.kernels.bindings.arguments import observe_calls
from veneer.kernels.bindings.library import has_bf16
from veneer.kernels.dense import few_rows
from veneer.kernels.layout import BatchLayout
from veneer.models.load import load_base

pytestmark = pytest.mark.skipif(native.level() < 2, reason="steps of no compiled kernels here")
NEW, BF16 = 12, torch.bfloat16


@pytest.mark.parametrize(
    ("family", "overrides", "expected"),
    [
        ("mixtral", {}, (2, True, True)),
        ("qwen3_moe", {"norm_topk_prob": True}, (2, True, False)),
        ("qwen3_moe", {"norm_topk_prob": False, "num_experts_per_tok": 3}, (3, False, False)),
        ("olmoe", {}, (2, False, False)),
        ("granitemoehybrid", {}, (2, True, False)),
        ("qwen2_moe", {}, (2, False, False)),  # and a shared expert
        ("llama", {}, None),
    ],
)
def test_the_facts_of_a_mixture_are_those_of_its_family(family, overrides, expected):
    for layer in find_layers(tiny_model(family, **overrides)):
        mixtures = [block.facts for block in layer.blocks if isinstance(block.facts, Mixture)]
        (facts,) = mixtures or [None]
        found = None if facts is None else (facts.chosen, facts.is_normal, facts.is_wide)
        assert found == expected


def test_the_outputs_of_experts_and_of_a_block_beside_them_are_added():
    base = tiny_base("granitemoehybrid")
    _ = base.paths
    for layer in find_layers(base.model):
        kinds = {block.name: type(block.facts) for block in layer.blocks}
        assert kinds == {"shared_mlp": FeedForward, "block_sparse_moe": Mixture}
        assert layer.unknown is None and layer.residual_scale == 0.22
        assert layer.feed_forward is None  # neither alone is what the layer adds


def test_a_node_of_attention_ends_before_blocks_whose_outputs_are_added():
    fields = {"layer_types": ["full_attention"] * 2, "position_embedding_type": "rope"}
    sizes = {"hidden_size": 128, "residual_multiplier": 1.0}
    base = tiny_base("granitemoehybrid", BF16, **fields, **sizes)
    _ = base.paths
    head = base.model.get_output_embeddings()
    made = attach(base.model, LoRA(rank=4), name="a", routing=base.routing, head=head)
    move(made, seed=0)
    base.routing.active = (("a", 1.0),)
    parameters, layout = [*made.parameters().values()], BatchLayout.of(4, [76], torch.device("cpu"))
    ids, positions = torch.arange(3, 83)[None], torch.arange(80)[None]

    def states_and_gradients():
        states, _ = packed_states(base.model, ids, positions, layout)
        weights = torch.randn(states.shape, generator=torch.Generator().manual_seed(0))
        gradients = torch.autograd.grad((states * weights).sum(), parameters, allow_unused=True)
        return [states.detach(), *(own for own in gradients if own is not None)]

    plain, stand_ins = states_and_gradients(), replacements(base.model)
    nodes = [own for own in stand_ins.values() if isinstance(own, FusedLayer)]
    assert len(nodes) == 2 * has_bf16()
    with fused(base.model, stand_ins):
        ours = states_and_gradients()
    assert len(ours) == len(plain) > 1
    for own, expected in zip(ours, plain, strict=True):
        assert float((own - expected).norm()) <= 0.04 * float(expected.norm())


def test_a_layer_that_joins_two_blocks_in_another_way_is_called_whole():
    base = tiny_base("granitemoehybrid", num_local_experts=0)
    _ = base.paths
    layer = base.model.model.layers[0]
    layer.block_sparse_moe = copy.deepcopy(layer.shared_mlp)  # has_experts: it is never called
    first, second = find_layers(base.model)
    assert "another way" in first.unknown and second.unknown is None


def test_a_router_or_a_block_that_computes_something_else_is_no_mixture():
    block = tiny_model("mixtral").model.layers[0].mlp

    class Doubled(type(block)):
        def forward(self, x):
            return 2 * super().forward(x)

    class Smallest(type(block.gate)):
        def forward(self, x):
            logits, weights, index = super().forward(-x)
            return -logits, weights, index

    of_shared = tiny_model("qwen2_moe").model.layers[0].mlp

    class Added(type(of_shared)):
        def forward(self, x):
            return super().forward(x) + self.shared_expert(x)

    assert find_mixture(block).shared is None
    facts = find_mixture(of_shared)
    assert (facts.shared.name, facts.shared_gate) == ("shared_expert", "shared_expert_gate")
    of_shared.__class__ = Added
    assert find_mixture(of_shared) is None
    other = copy.deepcopy(block)
    other.__class__ = Doubled
    assert find_mixture(other) is None
    with_values = copy.deepcopy(block)
    with_values.register_parameter("scale", torch.nn.Parameter(torch.ones(8)))
    assert find_mixture(with_values) is None
    block.gate.__class__ = Smallest
    assert find_mixture(block) is None


def test_a_router_whose_bias_is_left_out_is_understood():
    block = tiny_model("mixtral").model.layers[0].mlp

    class MayHaveBias(type(block.gate)):
        def forward(self, x):
            assert self.bias is None
            return super().forward(x)

    block.gate.register_parameter("bias", None)
    block.gate.__class__ = MayHaveBias
    assert find_mixture(block) is not None


def adapted(base):
    """Gives a base three adapters of other ranks on linear layers and on experts, one on attention
    alone, one on some layers' experts, and one on all linear layers."""
    _ = base.paths
    block = "block_sparse_moe" if "granite" in base.model.config.model_type else "mlp"
    attention = ["q_proj", "v_proj", "o_proj"]
    experts = ["gate_up_proj", "down_proj"]
    settings = {
        "a": LoRA(rank=3, alpha=5.0, targets=[*attention, *experts]),
        "b": LoRA(rank=4, alpha=4.0, targets=[*experts]),
        "c": LoRA(rank=16, alpha=5.0, rslora=True, targets=["k_proj", "down_proj"]),
        "d": LoRA(rank=2, targets=attention),
        "e": LoRA(rank=2, targets=[f"layers.1.{block}.experts.gate_up_proj"]),
        "f": LoRA(rank=5, targets="all-linear"),
    }
    for number, (name, own) in enumerate(settings.items()):
        made = attach(base.model, own, name=name, routing=base.routing, head=None, seed=number)
        move(made, seed=number)


def answers(base, identities, prompts):
    applied = {own: base.routing.applied(own) for own in identities if own}
    engine = Engine(base, budget_bytes=2**24, adapters=FixedAdapters(applied))
    told = Sampling(logprobs=3)
    made = [
        engine.add(
            Request(prompt=tuple(ids), max_new_tokens=NEW, adapter=own or (), sampling=told)
        )[0]
        for own, ids in zip(identities, prompts, strict=True)
    ]
    engine.run()
    return engine, made


def merged(plain, base, own):
    """Returns transformers' model `plain` with the updates added to its weights, which is what PEFT
    computes."""
    model = copy.deepcopy(plain).eval()
    for name, weight in own:
        for path, layer in base.attachments[name].layers.items():
            for target in (path, f"{path}.weight"):
                owner, _, last = target.rpartition(".")
                try:
                    parameter = getattr(model.get_submodule(owner), last)
                except AttributeError:
                    continue
                if isinstance(parameter, nn.Parameter):
                    parameter.data += weight * delta_weight(layer)
    return model


FAMILIES = ["mixtral", "qwen3_moe", "olmoe", "granitemoehybrid", "qwen2_moe"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("quantize", "rows"), [(None, 8), ("nf4", 8), ("nf4", 4)])
def test_recorded_steps_with_adapters_on_experts_give_what_transformers_gives(
    family, quantize, rows, monkeypatch, tmp_path
):
    """Rows of other adapters, of two at once and of none, in one step; tokens choose their experts
    anew in every step."""
    monkeypatch.setattr(few_rows, "LEAST_VALUES", 1)
    save_tiny(tmp_path, family)
    base, plain = packed_and_dense(tmp_path, dtype="float32", quantize=quantize)
    adapted(base)
    identities = [
        None,
        (("a", 0.5), ("b", 1.0)),
        (("c", 1.0),),
        (("e", 1.0), ("a", 1.0)),
        (("a", 1.0),),
        (("b", 0.7),),
        (("f", 1.0),),
        (("d", 1.0),),
    ][:rows]
    draw = torch.Generator().manual_seed(3)
    prompts = [torch.randint(4, 200, (5 + n,), generator=draw).tolist() for n in range(rows)]
    engine, made = answers(base, identities, prompts)
    step = engine.decode_step
    assert step._parts.steps._steps if quantize else step.is_recorded
    for own, ids, answer in zip(identities, prompts, made, strict=True):
        model = merged(plain, base, own or ())
        with torch.no_grad():
            logits = model(torch.tensor([[*ids, *answer.new]])).logits[0]
        chances = logits.log_softmax(-1)[len(ids) - 1 : -1]
        for step, (told, expected) in enumerate(zip(answer.logprobs, chances, strict=True)):
            assert answer.new[step] == told.token
            assert told.logprob == pytest.approx(float(expected[told.token]), abs=2e-4)


def test_a_replayed_step_computes_other_experts_than_the_recorded_one(monkeypatch):
    """All calls of a replayed step are in C: no call is observed, and no expert is baked in."""
    monkeypatch.setattr(few_rows, "LEAST_VALUES", 1)
    adapted(base := tiny_base("mixtral", torch.bfloat16))
    prompts = [[5, 9, 30], [61, 2, 8, 44], [7, 7]]
    identities = [(("a", 1.0),), None, (("b", 1.0),)]
    _, first = answers(base, identities, prompts)
    calls = []
    with observe_calls(lambda name, arguments: calls.append(name)):
        _, second = answers(base, identities, prompts)
    assert [one.new for one in first] == [one.new for one in second]
    assert calls and not any("expert" in name for name in calls if name != "veneer_replay")


def test_stacks_of_a_loaded_model_take_few_rows_by_few_calls(tmp_path):
    save_tiny(tmp_path, "qwen2_moe")
    base = load_base(str(tmp_path), dtype="float32", device="cpu")
    _ = base.paths
    model, plain = base.model, tiny_model("qwen2_moe")
    name = model.config._experts_implementation
    assert name.startswith(PREFIX)
    take_experts(model)  # twice changes nothing
    assert model.config._experts_implementation == name
    plain.load_state_dict(model.state_dict())
    ids = torch.tensor([[5, 9, 139, 73, 5, 61, 2, 8, 44, 10, 11, 12]])
    calls: list[str] = []
    with torch.no_grad(), observe_calls(lambda name, arguments: calls.append(name)):
        ours, many = model(ids).logits, model(ids.repeat(1, 8)).logits
    assert calls.count("veneer_expert_product") == 2 * len(model.model.layers)
    with torch.no_grad():
        torch.testing.assert_close(ours, plain(ids).logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(many, plain(ids.repeat(1, 8)).logits, rtol=1e-4, atol=1e-4)
