"""Random mixes of adapters in one forward and backward: every row is what it is alone, every
gradient too.

A mix: adapters of random methods, ranks and targets on one base; groups of random rows, each with
its own adapters and weights, or with none; packed with or without shared prompts, or padded; with
or without dropout. Rows without an adapter are the base's to the bit.
"""

import random
from collections.abc import Sequence

import pytest
import torch

from tests.adapters.test_methods import move
from tests.soak.counts import rounds
from tests.support.helpers import make_examples
from tests.support.models.routed import Routed, acting_on, batch_loss
from tests.support.tiny import tiny_model
from veneer.adapters.attach import attach
from veneer.adapters.config import AdapterConfig, Bottleneck, DoRA, LoRA, Prefix
from veneer.adapters.placement.acting import Applied, TokenKeys
from veneer.adapters.placement.routing import Routing
from veneer.data.batching import Batch, make_groups
from veneer.errors import ConfigError
from veneer.models.step import ComputePaths, prepare, whole_logits

MIXTURES = ("mixtral", "qwen3_moe")
"""How many rows an expert gets depends on the others, and on that how its sums are rounded,
adapters or not."""
FAMILIES = (
    "llama",
    "llama_untied",
    "gpt2",
    "qwen2",
    "qwen3",
    "gemma3",
    "opt",
    "phi3",
    "mixtral",
    "qwen3_moe",
)
LOGITS = {torch.float64: 1e-6, torch.float32: 5e-5}
GRADIENTS = {torch.float64: 1e-5, torch.float32: 5e-4}
"""Largest error, relative to the largest value: norms are float32 whatever the base is, and so are
gradients, whose parts cancel as well."""
TIE = 1e-5
"""Two experts whose logits are this close, relative to the largest: rounding decides which of them
a token gets."""


def draw_method(draw: random.Random) -> AdapterConfig:
    rank, alpha = draw.randint(1, 9), draw.choice([1.0, 5.0, 16.0])
    dropout = draw.choice([0.0, 0.0, 0.4])
    some = {"rank": rank, "alpha": alpha, "dropout": dropout}
    return draw.choice(
        [
            lambda: LoRA(**some),
            lambda: LoRA(**some, rslora=True, targets=r".*\.(\w+_proj|c_attn|c_fc|fc1|fc2)"),
            lambda: LoRA(
                rank=rank,
                alpha=alpha,
                init=draw.choice(["pissa", "olora"]),
                targets=r".*\.(o_proj|c_attn|out_proj)",
            ),
            lambda: LoRA(
                **some, targets=r".*\.(q_proj|c_attn|fc1|qkv_proj|lm_head|embed_tokens|wte)"
            ),
            lambda: LoRA(rank=rank, alpha=alpha, bias="all", targets=r".*\.(o_proj|c_proj|fc2)"),
            lambda: LoRA(
                rank=rank,
                alpha=alpha,
                train_modules=[draw.choice(["lm_head", "norm", "ln_f", "final_layer_norm"])],
            ),
            lambda: LoRA(
                rank=rank, alpha=alpha, lora_bias=True, targets=r".*\.(v_proj|o_proj|c_proj|fc1)"
            ),
            lambda: DoRA(**some, targets=r".*\.(\w+_proj|c_attn|c_proj|fc1)"),
            lambda: Bottleneck(
                placement=draw.choice(["houlsby", "pfeiffer", "parallel"]),
                size=draw.randint(2, 9),
                dropout=dropout,
            ),
            lambda: Prefix(tokens=draw.randint(1, 7), start="random"),
        ]
    )()


def some_adapters(model: torch.nn.Module, routing: Routing, draw: random.Random) -> None:
    for number in range(draw.randint(2, 5)):
        try:
            made = attach(
                model,
                draw_method(draw),
                name=f"a{number}",
                routing=routing,
                head=model.get_output_embeddings(),
                seed=number,
            )
        except ConfigError:  # this family has no such places
            continue
        move(made, seed=number)
        for parameter in made.parameters().values():
            parameter.requires_grad_(True)


def for_a_group(routing: Routing, draw: random.Random) -> Applied:
    """None, one, or two with weights of their own; a prefix stands alone and whole."""
    chosen = draw.sample(
        list(routing.attached.values()), k=min(draw.choice([0, 1, 1, 2]), len(routing.attached))
    )
    if sum(isinstance(adapter.config, Prefix) for adapter in chosen) > 1:
        chosen = chosen[:1]
    return tuple(
        (adapter, 1.0 if isinstance(adapter.config, Prefix) else draw.choice([1.0, 0.5, -1.5]))
        for adapter in chosen
    )


def gradients(routing: Routing) -> dict[str, torch.Tensor]:
    found = {}
    for name, attachment in routing.attached.items():
        for path, parameter in attachment.parameters().items():
            if parameter.grad is not None:
                found[f"{name} {path}"] = parameter.grad
            parameter.grad = None
    return found


def computed(
    model,
    paths: ComputePaths,
    routing: Routing,
    batch: Batch,
    adapters: Sequence[Applied],
    *,
    drops: bool,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits of the rows that predict a trained token, and the gradient of every trained value."""
    with routing.held(acting_on(batch, adapters)):
        with torch.no_grad():
            said = whole_logits(model, batch)
        with routing.drawing(TokenKeys(batch.dropout_rows, 5) if drops else None):
            loss = batch_loss(Routed(model, paths, routing), batch, total=10.0)
            if loss.requires_grad:
                loss.backward()
    return said, {"loss": loss.detach()} | gradients(routing)


def apart(found: torch.Tensor, expected: torch.Tensor, least: float = 1e-6) -> float:
    """Relative to the largest value. least: what is smaller than this beside the others is nothing
    but rounding (the gradient of a bias of the keys, say)."""
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(least))


def closest_choices(model: torch.nn.Module) -> list[float]:
    """Returns a list that grows with every forward of a router: the least difference between the
    last expert that a token gets and the first one that it does not get, relative to the largest
    logit."""
    differences = []

    def note(router: torch.nn.Module, _: object, output: tuple[torch.Tensor, ...]) -> None:
        logits = output[0].detach()
        ordered = logits.sort(dim=-1, descending=True).values
        apart = ordered[:, router.top_k - 1] - ordered[:, router.top_k]
        differences.append(float(apart.min() / logits.abs().max()))

    for module in model.modules():
        if type(module).__name__.endswith("TopKRouter"):
            module.register_forward_hook(note)
    return differences


@pytest.mark.parametrize("number", rounds("mixes", ci=24))
def test_every_row_and_gradient_of_a_mix_is_what_it_is_alone(number):
    draw = random.Random(number)
    family = draw.choice(FAMILIES)
    # float64 says more; transformers' experts do not compute in it.
    dtype = torch.float32 if family in MIXTURES else draw.choice([torch.float32, torch.float64])
    model, routing = tiny_model(family, dtype), Routing()
    paths = prepare(model)
    choices = closest_choices(model)
    some_adapters(model, routing, draw)
    packed, share, drops = draw.random() < 0.7, draw.random() < 0.5, draw.random() < 0.4
    examples = make_examples(12, seed=number)
    groups, adapters = [], []
    for _ in range(draw.randint(2, 5)):
        groups.append([examples.pop() for _ in range(min(draw.randint(1, 3), len(examples)))])
        adapters.append(for_a_group(routing, draw))
        if not examples:
            break
    groups = [group for group in groups if group]
    adapters = adapters[: len(groups)]

    def run(groups, adapters):
        batch = make_groups(groups, packed=packed, share_prompt=share, device=torch.device("cpu"))
        return computed(model, paths, routing, batch, adapters, drops=drops)

    together, mixed = run(groups, adapters)
    assert bool(choices) == (family in MIXTURES)
    if min(choices, default=1.0) < TIE:
        pytest.skip("rounding decides which experts a token gets")
    bare, _ = run(groups, [()] * len(groups))
    summed: dict[str, torch.Tensor] = {}
    at = 0
    for group, own in zip(groups, adapters, strict=True):
        alone, parts = run([group], [own])
        rows = slice(at, at + len(alone))
        at = rows.stop
        assert apart(together[rows], alone) < LOGITS[dtype]
        if not own and family not in MIXTURES:
            assert torch.equal(together[rows], bare[rows])
        for name, value in parts.items():
            summed[name] = summed[name] + value if name in summed else value
    assert mixed.keys() == summed.keys()
    loss = summed.pop("loss")
    assert apart(mixed.pop("loss"), loss) < LOGITS[dtype]
    largest = max((float(value.abs().max()) for value in summed.values()), default=0.0)
    for name, value in summed.items():
        assert apart(mixed[name], value, 0.01 * largest) < GRADIENTS[dtype], name
