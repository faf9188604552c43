"""The table of combinations (adapters/combinations.py) holds for every way: each pair of contents
gives base + sum of weight * change, or is refused by the same error."""

from dataclasses import dataclass, field
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import veneer
from tests.adapters.test_methods import move
from tests.support.helpers import ROOT, merge_in_memory
from tests.support.tiny import save_tiny, tiny_base
from veneer.adapters.activation import activation_start
from veneer.adapters.attach import attach
from veneer.adapters.combinations import (
    ACTIVATION,
    BIASES,
    BOTTLENECKS,
    CONTENTS,
    HEAD,
    MAGNITUDES,
    MODULES,
    OFFSETS,
    PREFIX,
    TOKENS,
    UPDATE,
    Content,
)
from veneer.adapters.config import Bottleneck, DoRA, LoRA, Prefix
from veneer.adapters.labels import HeadSettings
from veneer.adapters.placement.acting import Acting, BatchPart, invocation_of
from veneer.adapters.placement.wrapping import plain_modules
from veneer.decoding.engine import Engine
from veneer.decoding.sampling.sampling import Sampling
from veneer.decoding.schedule.adapters import FixedAdapters
from veneer.decoding.schedule.sequence import Request
from veneer.errors import ConfigError, RefusedError, VeneerError
from veneer.formats.adapter import manifest_for, write_adapter
from veneer.formats.loading import load_adapter
from veneer.library.library import Library
from veneer.library.residents.residents import Residents
from veneer.merge.combine.combine import Recipe
from veneer.merge.combine.combine_run import combine_adapters
from veneer.merge.fold.fold import stored_tensors, weight_changes
from veneer.models.frozen_base import FrozenBase
from veneer.models.load import load_base
from veneer.models.own_head import fresh_head

MADE = {
    UPDATE: LoRA(rank=2, alpha=3.0, targets=["q_proj", "down_proj", "lm_head"]),
    MODULES: LoRA(
        rank=2, targets=["v_proj"], train_modules=["norm", "input_layernorm", "o_proj", "lm_head"]
    ),
    BIASES: LoRA(rank=2, targets=["k_proj"], bias="all"),
    OFFSETS: LoRA(rank=3, alpha=5.0, targets=["q_proj"], lora_bias=True),
    MAGNITUDES: DoRA(rank=2, alpha=5.0, targets=["o_proj", "embed_tokens"]),
    BOTTLENECKS: Bottleneck(placement="houlsby", size=5),
    PREFIX: Prefix(tokens=3, start="random"),
    TOKENS: LoRA(rank=2, targets=["up_proj"]),
    HEAD: LoRA(rank=2, targets=["gate_proj"]),
    ACTIVATION: LoRA(rank=2, targets=["k_proj", "up_proj"], activation=[17, 99]),
}
IDS = torch.tensor([[5, 200, 17, 99, 3, 64, 230, 9]])
CLOSE = 1e-4
"""Relative to the largest logit, in float32."""
Cell = tuple[tuple[Content, int, float], ...]
"""Content, which of its two adapters, and the weight."""


def cells() -> list[Cell]:
    """Each content with a weight, and each pair, with weights where the table allows them."""

    def weight(content: Content, asked: float) -> float:
        return asked if content.adds_up else 1.0

    pairs = [
        ((one, 0, weight(one, 0.5)), (other, 1, weight(other, -1.5)))
        for one, other in combinations_with_replacement(CONTENTS, 2)
    ]
    return [*(((content, 0, 0.5),) for content in CONTENTS), *pairs]


def name_of(content: Content, number: int) -> str:
    return f"{content.name.split()[-1].replace('_', '-').lower()}-{number}"


def said(cell: Cell) -> str:
    return " and ".join(f"{weight:g} {content.name}" for content, _, weight in cell)


@dataclass
class World:
    """base: with every adapter attached. plain: the same base, for references. folders: of the
    adapters, by name."""

    folder: Path
    base: veneer.Base
    plain: veneer.Base
    residents: Residents

    def path(self, content: Content, number: int) -> Path:
        return self.folder / name_of(content, number)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("combinations")
    source = str(save_tiny(folder / "base", "qwen2", tie_word_embeddings=False))
    base, plain, library = veneer.load(source), veneer.load(source), Library(folder / "library")
    for number in range(2):
        order = (
            CONTENTS if number else tuple(reversed(CONTENTS))
        )  # wrappers stand around each other either way
        for place, content in enumerate(order):
            name, config = name_of(content, number), MADE[content]
            texts = [f"<{number}>"] if content is TOKENS else []
            made = base.attach(config, name=name, seed=number, new_tokens=texts)
            if content is HEAD:
                made.score = fresh_head(base, HeadSettings("label", ("a", "b", "c")))
            move(made, seed=10 * number + place)
            write_adapter(
                folder / name, made, manifest_for(base, method=config.name), model=base.model
            )
            library.add(folder / name, name=name)
    served = veneer.load(source)
    return World(folder, base, plain, Residents(served, library, budget_bytes=2**24))


def logits(base: FrozenBase) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = base.model(IDS, use_cache=False).logits
    return found


def expected(world: World, cell: Cell) -> torch.Tensor:
    """Dense weights with the weighted sum of changes; contents that do not merge act beside them,
    alone."""
    plain, base = world.plain, world.base
    stored = stored_tensors(plain.model)
    before = {name: tensor.read().clone() for name, tensor in stored.items()}
    summed: dict[str, torch.Tensor] = {}
    beside: list[tuple[str, float]] = []
    for content, number, weight in cell:
        name = name_of(content, number)
        if not content.merges or content is TOKENS:
            load_adapter(plain, world.path(content, number), name=name)
            beside.append((name, weight))
            continue
        for path, change in weight_changes(base.model, [(base.attachments[name], 1.0)]).items():
            delta = weight * (change(before[path].clone()) - before[path])
            summed[path] = summed.get(path, before[path].clone()) + delta
    try:
        for path, value in summed.items():
            stored[path].read().copy_(value)
        return _by_hooks(plain, beside)
    finally:
        plain.routing.active = ()
        for name, _ in beside:
            plain.detach(name)
        for path, value in before.items():
            stored[path].read().copy_(value)


def _by_hooks(plain: veneer.Base, beside: list[tuple[str, float]]) -> torch.Tensor:
    """Bottlenecks added by hooks to what each block gives; the others act."""
    blocks = {
        name: weight
        for name, weight in beside
        if plain.attachments[name].contents == (BOTTLENECKS,)
    }
    plain.routing.active = tuple((name, weight) for name, weight in beside if name not in blocks)
    layers: dict[str, list[tuple[Any, float]]] = {}
    for name, weight in blocks.items():
        for path, layer in plain.attachments[name].layers.items():
            layers.setdefault(path, []).append((layer, weight))

    def hook_of(added: list[tuple[Any, float]]) -> Any:
        def hook(module: Any, args: Any, out: Any) -> Any:
            own = out[0] if isinstance(out, tuple) else out
            y = own + sum(
                layer.scaling * weight * layer.update(own, None) for layer, weight in added
            )
            return (y, *out[1:]) if isinstance(out, tuple) else y

        return hook

    places = plain_modules(plain.model)
    handles = [places[path].register_forward_hook(hook_of(added)) for path, added in layers.items()]
    try:
        return logits(plain)
    finally:
        for handle in handles:
            handle.remove()


def close(found: torch.Tensor, reference: torch.Tensor) -> bool:
    return bool((found - reference).abs().max() <= CLOSE * reference.abs().max())


def headline(run) -> str | None:
    """Of the error that `run` raises; None: it runs."""
    try:
        run()
    except VeneerError as fault:
        return fault.headline
    return None


@pytest.mark.parametrize("cell", cells(), ids=said)
def test_a_cell_of_the_table_is_the_dense_sum_on_every_way_or_refused_on_every_way(
    world: World, cell: Cell, tmp_path: Path
) -> None:
    base = world.base
    names, weights = [name_of(c, n) for c, n, _ in cell], [weight for *_, weight in cell]
    contents = [content for content, *_ in cell]
    identity = tuple(zip(names, weights, strict=True))
    served = tuple(
        pair for name, weight in identity for pair in world.residents.resolve(name, weight)
    )
    refused = [
        headline(lambda: base.use(names, weights)),
        headline(
            lambda: BatchPart(None, tuple((base.attachments[name], w) for name, w in identity))
        ),
        headline(
            lambda: FixedAdapters(
                {identity: tuple((base.attachments[name], w) for name, w in identity)}
            )
        ),
        headline(lambda: world.residents.prefix_length(served)),
    ]
    base.use(None)
    alone = [content for content in contents if not content.adds_up]
    allowed = all(contents.count(c) == 1 for c in alone) and all(
        w == 1 for c, _, w in cell if not c.adds_up
    )
    if ACTIVATION in contents and len(cell) > 1:
        assert refused == ["an adapter with an activation acts alone"] * 4
        return
    if not allowed:
        assert refused == [f"one adapter with {alone[0].name} may act, and with weight 1"] * 4
        if alone[0].merges:
            with pytest.raises(ConfigError, match=refused[0]):
                base.merge(names, weights)
        return
    if HEAD in contents:  # it acts beside others, but nothing answers with it
        assert refused == [None] * 3 + ["these adapters write no answers"]
        with base.using(names, weights), pytest.raises(RefusedError, match="write no answers"):
            base.generate("a", max_new_tokens=1)
        return
    assert refused == [None] * 4
    reference = expected(world, cell)
    with base.using(names, weights):
        acting = base.routing.acting.whole
        assert close(logits(base), reference)
    if not {PREFIX, ACTIVATION} & {*contents}:  # a row of the batch is a text of its own
        with torch.no_grad(), base.routing.held(Acting((BatchPart(8, ()), BatchPart(8, acting)))):
            both = base.model(torch.cat([IDS, IDS]), use_cache=False).logits
        assert close(both[1:], reference) and close(both[:1, :, :272], logits(base))
    engine = Engine(base, budget_bytes=2**20, adapters=FixedAdapters({identity: acting}))
    (answer,) = engine.add(
        Request(
            prompt=tuple(IDS[0].tolist()),
            max_new_tokens=1,
            adapter=identity,
            activation=activation_start(IDS[0].tolist(), invocation_of(acting)),
            sampling=Sampling(logprobs=5),
        )
    )
    engine.run()
    chances = reference[0, -1].log_softmax(-1)
    assert all(abs(p - chances[token]) < 1e-2 for token, p in answer.logprobs[0].alternatives)
    _check_merging(world, cell, reference)
    _check_combining(world, cell, reference, tmp_path)


def _check_merging(world: World, cell: Cell, reference: torch.Tensor) -> None:
    base, contents = world.base, [content for content, *_ in cell]
    names, weights = [name_of(c, n) for c, n, _ in cell], [weight for *_, weight in cell]
    if not all(content.merges for content in contents):
        with pytest.raises(RefusedError, match="cannot be merged into the base's weights"):
            base.merge(names, weights)
    elif TOKENS in contents:
        with pytest.raises(RefusedError, match="tables would grow"):
            base.merge(names, weights)
    else:
        base.merge(names, weights)
        try:
            assert close(logits(base), reference)
        finally:
            base.unmerge()


def _check_combining(world: World, cell: Cell, reference: torch.Tensor, out: Path) -> None:
    adapters = [(world.path(content, number), weight) for content, number, weight in cell]
    recipe = Recipe("cat" if len(cell) > 1 else "linear")
    if not all(
        held.combines for content, *_ in cell for held in (content, *MADE[content].contents)
    ):
        with pytest.raises(RefusedError, match="cannot be combined into one adapter"):
            combine_adapters(adapters, recipe, base=world.plain.source, out=out / "combined")
        return
    combine_adapters(adapters, recipe, base=world.plain.source, out=out / "combined")
    load_adapter(world.plain, out / "combined", name="combined")
    try:
        world.plain.routing.active = (("combined", 1.0),)
        assert close(logits(world.plain), reference)
    finally:
        world.plain.routing.active = ()
        world.plain.detach("combined")


FAMILIES = {
    "gpt2": [
        LoRA(rank=2, targets=["c_attn"], bias="all", train_modules=["wte", "ln_f"]),
        DoRA(rank=2, targets=["c_attn", "c_proj", "wte"]),
        LoRA(rank=2, targets=["c_fc"], train_modules=["c_proj", "ln_1"]),
    ],
    "gemma3": [  # scales its embeddings, which are its head
        LoRA(rank=2, targets=["q_proj"], train_modules=["embed_tokens", "q_norm"]),
        LoRA(rank=2, targets=["embed_tokens"]),
        DoRA(rank=2, targets=["embed_tokens", "q_proj"]),
    ],
    "mixtral": [
        LoRA(rank=2, targets=["gate_up_proj", "down_proj", "gate"]),
        LoRA(rank=2, targets=["q_proj"], train_modules=["gate", "norm"]),
        LoRA(rank=2, targets=["gate"]),
    ],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_acting_together_is_merging_together_in_other_families(family: str) -> None:
    base = tiny_base(family)
    names = [str(number) for number in range(3)]
    for seed, config in enumerate(FAMILIES[family]):
        head = base.model.get_output_embeddings()
        move(
            attach(
                base.model, config, name=names[seed], routing=base.routing, head=head, seed=seed
            ),
            seed=seed,
        )
    for weights in ((0.5, -0.7, 0.3), (1.0, 1.0, 1.0)):
        base.routing.active = tuple(zip(names, weights, strict=True))
        acting = logits(base)
        base.routing.active = ()
        merged = merge_in_memory(
            base.model, [(base.attachments[n], w) for n, w in zip(names, weights, strict=True)]
        )
        assert close(acting, logits(base))
        merged.restore()


@dataclass(frozen=True)
class InFull:
    """A module trained in full, beside an update of `targets`. fields: of the base's config."""

    family: str
    module: str
    fields: dict[str, Any] = field(default_factory=dict)
    targets: tuple[str, ...] = ("q_proj",)
    other: tuple[str, ...] = ()
    """What a second adapter updates at that place."""


IN_FULL = {
    "a head": InFull("qwen2", "lm_head", {"tie_word_embeddings": False}, other=("lm_head",)),
    "a tied head": InFull("llama", "lm_head", {"tie_word_embeddings": True}),
    "an embedding": InFull(
        "qwen2", "embed_tokens", {"tie_word_embeddings": False}, other=("embed_tokens",)
    ),
    "a scaled and tied embedding": InFull("gemma3", "embed_tokens"),
    "a projection with a bias": InFull("qwen2", "q_proj", targets=("down_proj",)),
    "a transposed projection": InFull("gpt2", "c_fc", targets=("c_attn",)),
    "experts": InFull("gpt_oss", "experts", other=("gate_up_proj",)),
}
UNTIED = {name: case for name, case in IN_FULL.items() if "tied" not in name}


class Allocations(TorchDispatchMode):
    """Counts the results of these shapes that have memory of their own."""

    def __init__(self, shapes: set[torch.Size]) -> None:
        super().__init__()
        self.shapes, self.count = shapes, 0

    def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = call(*args, **(kwargs or {}))
        memory = {
            t.untyped_storage().data_ptr()
            for t in tree_leaves((args, kwargs))
            if isinstance(t, torch.Tensor)
        }
        self.count += sum(
            t.shape in self.shapes and t.untyped_storage().data_ptr() not in memory
            for t in tree_leaves(result)
            if isinstance(t, torch.Tensor)
        )
        return result


def in_full(
    case: InFull, weights: tuple[float, ...]
) -> tuple[FrozenBase, dict[str, torch.nn.Parameter]]:
    """Returns the base with adapters that train the module in full, and at weights[2:] one with an
    update there, all of which act; and the tables, projections and stacks of the first adapter."""
    base = tiny_base(case.family, **case.fields)
    whole = LoRA(rank=2, targets=list(case.targets), train_modules=[case.module])
    configs = [whole, whole, LoRA(rank=2, targets=list(case.other or case.targets))][: len(weights)]
    for seed, config in enumerate(configs):
        head = base.model.get_output_embeddings()
        move(
            attach(base.model, config, name=str(seed), routing=base.routing, head=head, seed=seed),
            seed=seed,
        )
    base.routing.active = tuple((str(number), weight) for number, weight in enumerate(weights))
    return base, {
        name: value for name, value in base.attachments["0"].values.items() if value.numel() > 1000
    }


@pytest.mark.parametrize("weights", [(0.5,), (0.5, -0.7), (1.0, 1.0, 0.3)])
@pytest.mark.parametrize("case", IN_FULL.values(), ids=IN_FULL)
def test_a_weighted_module_is_the_dense_sum_without_a_second_matrix(
    case: InFull, weights: tuple[float, ...]
) -> None:
    base, values = in_full(case, weights)
    with Allocations(
        {shape for value in values.values() for shape in (value.shape, value.mT.shape)}
    ) as allocations:
        acting = logits(base)
    assert values and allocations.count == 0
    with (
        torch.no_grad(),
        base.routing.held(
            Acting((BatchPart(8, ()), BatchPart(8, base.routing.acting.whole or ())))
        ),
    ):
        both = base.model(torch.cat([IDS, IDS]), use_cache=False).logits
    assert close(both[1:], acting)
    merged = [(base.attachments[name], weight) for name, weight in base.routing.active]
    base.routing.active = ()
    merge_in_memory(base.model, merged)
    assert close(acting, logits(base))


@pytest.mark.parametrize("case", UNTIED.values(), ids=UNTIED)
def test_values_of_a_weighted_sum_train_as_those_of_the_dense_sum(case: InFull) -> None:
    base, values = in_full(case, (0.5, -0.7, 0.3))
    generator = torch.Generator().manual_seed(0)

    def loss() -> torch.Tensor:
        found: torch.Tensor = base.model(IDS, use_cache=False).logits
        return (found * torch.randn(found.shape, generator=generator.manual_seed(0))).sum()

    loss().backward()
    merged = [(base.attachments[name], weight) for name, weight in base.routing.active]
    base.routing.active = ()
    merge_in_memory(base.model, merged)
    dense = {name: plain_modules(base.model)[name.rpartition(".")[0]] for name in values}
    for name, module in dense.items():
        module.get_parameter(name.rpartition(".")[2]).requires_grad_()
    loss().backward()
    for name, value in values.items():
        expected_grad = dense[name].get_parameter(name.rpartition(".")[2]).grad
        assert close(value.grad, 0.5 * expected_grad)


def test_the_docs_show_the_table() -> None:
    def shown(content: Content) -> str:
        cells = (content.adds_up, content.merges, content.combines)
        return f"| {content.name} | " + " | ".join("yes" if cell else "no" for cell in cells) + " |"

    page = (ROOT / "docs" / "serve.md").read_text()
    assert "\n".join(map(shown, CONTENTS)) in page


def test_settings_say_their_contents() -> None:
    for content, config in MADE.items():
        assert content in (TOKENS, HEAD, *config.contents)
        assert config.folds == all(content.merges for content in config.contents)
    assert all(content.combines is False or content.adds_up for content in CONTENTS)


def test_a_sum_over_another_base_is_not_combined(world: World, tmp_path: Path) -> None:
    other = save_tiny(tmp_path / "base", "qwen2", seed=4, tie_word_embeddings=False)
    adapters = [(world.path(MODULES, 0), 0.5), (world.path(MODULES, 1), 0.5)]
    with pytest.raises(RefusedError, match="is another base than theirs"):
        combine_adapters(adapters, Recipe("cat"), base=str(other), out=tmp_path / "o")
    assert load_base(str(other)).model is not None
