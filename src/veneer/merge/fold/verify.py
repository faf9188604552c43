"""Does a merged model answer as the adapter on its base does? The logits of both, on the same rows.

    difference   |merged - adapter on base|          effect   |adapter on base - base|
    KL           sum p log(p / q), nats a token, p the adapter's distribution, q the merged model's

Both models run in float32, so that what differs is the merge and not the arithmetic of bf16: each
module's weights are widened for its own forward and put back after it, so a model in bf16 is never
held in float32 as a whole. A merge that loses the adapter differs by as much as the adapter moves
the logits: that is what the bound is about.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from veneer.adapters.placement.wrapping import AdaptedModule, unwrapped
from veneer.models.capacity import capacity_of
from veneer.models.frozen_base import FrozenBase

TEXTS = (
    "The capital of France is Paris, and the river through it is the Seine.",
    "Portal is a puzzle game in which the player solves rooms with a device that links two places.",
    '{"name": "The Phoenix", "customer rating": "high", "area": "riverside"}',
)
"""Rows for the check where no data is named."""
MAX_TOKENS = 512
"""Tokens compared at most, over all rows: their logits are held until the merged model is there."""
NEW_TOKENS = 32
"""Tokens that an adapter brings, asked at most."""
MAX_SHARE = 0.5
"""Largest mean difference, as a share of the adapter's mean effect; 1 is a merge that lost the
adapter."""
HALF = (torch.bfloat16, torch.float16)
NOISE = 1e-4
"""Mean difference that is float32's own order of summation, whatever the adapter's effect."""


@dataclass(frozen=True)
class LogitCheck:
    """Over `tokens` positions and the whole vocabulary; logits, no unit. kl: nats a token."""

    tokens: int
    max_difference: float
    mean_difference: float
    max_effect: float
    mean_effect: float
    kl: float
    same_top: float

    @property
    def agrees(self) -> bool:
        return self.mean_difference <= max(MAX_SHARE * self.mean_effect, NOISE)


@dataclass
class ReferenceLogits:
    """What the adapter on its base says, kept until the merged model can be asked the same."""

    rows: list[list[int]]
    logits: list[Tensor]
    max_effect: float = 0.0
    mean_effect: float = 0.0
    tokens: int = field(init=False)

    def __post_init__(self) -> None:
        self.tokens = sum(map(len, self.rows))


def text_rows(base: FrozenBase) -> list[list[int]]:
    """The built-in texts as the base's ids, no longer than its positions."""
    places = capacity_of(base).positions
    rows = [list(base.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in TEXTS]
    return limited([row[:places] for row in rows])


def limited(rows: Sequence[list[int]]) -> list[list[int]]:
    """The first rows, cut, that together have at most MAX_TOKENS tokens."""
    found: list[list[int]] = []
    left = MAX_TOKENS
    for row in rows:
        if left and row:
            found.append(row[:left])
            left -= len(found[-1])
    return found


def reference(
    base: FrozenBase, names: Sequence[tuple[str, float]], rows: list[list[int]]
) -> ReferenceLogits:
    """The logits with the adapters acting, and how far they are from the base's own; the tokens
    that they bring are asked too."""
    before = base.routing.active
    brought = [
        a.tokens.ids for a in (base.attachments[name] for name, _ in names) if a.tokens is not None
    ]
    rows = rows + [list(ids[:NEW_TOKENS]) for ids in brought]
    said, effects, largest = [], 0.0, 0.0
    known = rows[: len(rows) - len(brought)]
    for number, row in enumerate(rows):
        base.routing.active = tuple(names)
        said.append(logits(base, row))
        if number >= len(known):
            continue  # the base has no such tokens
        base.routing.active = ()
        bare = logits(base, row)
        effect = (said[-1][:, : bare.shape[-1]] - bare).abs()
        effects, largest = (
            effects + float(effect.mean()) * len(row),
            max(largest, float(effect.max())),
        )
    base.routing.active = before
    found = ReferenceLogits(rows, said, max_effect=largest)
    found.mean_effect = effects / sum(map(len, known))
    return found


def compare(merged: FrozenBase, with_adapter: ReferenceLogits) -> LogitCheck:
    """The merged model's logits against the reference's."""
    largest = difference = kl = same = 0.0
    for row, expected in zip(with_adapter.rows, with_adapter.logits, strict=True):
        found = logits(merged, row)
        gap = (found - expected).abs()
        largest, difference = (
            max(largest, float(gap.max())),
            difference + float(gap.mean()) * len(row),
        )
        p, q = expected.log_softmax(-1), found.log_softmax(-1)
        kl += float((p.exp() * (p - q)).sum())
        same += float((found.argmax(-1) == expected.argmax(-1)).sum())
    tokens = with_adapter.tokens
    return LogitCheck(
        tokens,
        largest,
        difference / tokens,
        with_adapter.max_effect,
        with_adapter.mean_effect,
        max(kl / tokens, 0.0),
        same / tokens,
    )


@torch.no_grad()
def logits(base: FrozenBase, row: list[int]) -> Tensor:
    """(T, V) float32, on the CPU."""
    ids = torch.tensor([row], device=base.device)
    with in_float32(base.model):
        out: Tensor = base.model(input_ids=ids, use_cache=False).logits[0]
    return out.float().cpu()


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Every module widens its own half-precision parameters before its forward and puts them back
    after it.

    A wrapper reads its base module's parameters itself, so the outermost one widens those; what
    adapters hold is widened throughout.
    """
    wrappers = [module for module in model.modules() if isinstance(module, AdaptedModule)]
    owners: dict[nn.Module, nn.Module] = {module: module for module in model.modules()}
    for wrapper in wrappers:
        owners.pop(wrapper.base)
    owners.update({outer: unwrapped(outer) for outer in wrappers if outer in owners})
    adapters = {id(a): a for wrapper in wrappers for a in wrapper.routing.attached.values()}
    values = [(adapter, adapter.replaced) for adapter in adapters.values()]
    kept: dict[nn.Module, dict[str, nn.Parameter]] = {}

    def widen(module: nn.Module, *_: object) -> None:
        owner = owners[module]
        kept[owner] = {
            n: p for n, p in owner._parameters.items() if p is not None and p.dtype in HALF
        }
        owner._parameters.update({name: _widened(p) for name, p in kept[owner].items()})

    def narrow(module: nn.Module, *_: object) -> None:
        owners[module]._parameters.update(kept.pop(owners[module], {}))

    handles = [module.register_forward_pre_hook(widen) for module in owners]
    handles += [module.register_forward_hook(narrow) for module in owners]
    for adapter, own in values:
        adapter.replaced = {
            key: {name: _widened(p) for name, p in of.items()} for key, of in own.items()
        }
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for owner, parameters in kept.items():
            owner._parameters.update(parameters)
        for adapter, own in values:
            adapter.replaced = own


def _widened(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.detach().float(), requires_grad=False)
