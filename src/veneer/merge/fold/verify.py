"""Compares the logits of a merged model with those of the adapter on its base, on the same rows.

    difference   |merged - adapter on base|          effect   |adapter on base - base|
    KL           sum p log(p / q), nats a token, p the adapter's distribution, q the merged model's

Both models run in float32, so that only the merge differs and not the arithmetic of bf16. Each
module's weights are widened for its own forward and restored after it, so a model in bf16 is never
in memory in float32 as a whole. A merge that loses the adapter differs by as much as the adapter
moves the logits; the bound is a share of that.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from veneer.adapters.placement.wrapping import AdaptedModule, unwrapped
from veneer.bases.tokenizer import load_tokenizer
from veneer.data.config import DataConfig
from veneer.data.encoder import RowRules
from veneer.data.load import load_data
from veneer.models.capacity import capacity_of, configured_capacity
from veneer.models.frozen_base import FrozenBase
from veneer.private.torch import parameters_of

TEXTS = (
    "The capital of France is Paris, and the river through it is the Seine.",
    "Portal is a puzzle game in which the player solves rooms with a device that links two places.",
    '{"name": "The Phoenix", "customer rating": "high", "area": "riverside"}',
)
"""Texts for the check, if no data is given."""
MAX_TOKENS = 512
"""Most tokens compared, over all rows: their logits stay in memory until the comparison."""
NEW_TOKENS = 32
"""Most new tokens of an adapter that are compared."""
MAX_SHARE = 0.5
"""Largest mean difference, as a share of the adapter's mean effect; 1 would lose the adapter."""
HALF = (torch.bfloat16, torch.float16)
NOISE = 1e-4
"""Mean difference that float32's order of summation causes, whatever the adapter's effect."""


@dataclass(frozen=True)
class LogitCheck:
    """Compares logits over `tokens` positions and the whole vocabulary. kl: nats a token."""

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
    """Holds the logits of the adapter on its base, for the comparison with the merged model."""

    rows: list[list[int]]
    logits: list[Tensor]
    max_effect: float = 0.0
    mean_effect: float = 0.0
    tokens: int = field(init=False)

    def __post_init__(self) -> None:
        self.tokens = sum(map(len, self.rows))


def text_rows(base: FrozenBase) -> list[list[int]]:
    """Encodes the built-in texts, cut to the base's positions."""
    positions = capacity_of(base).positions
    rows = [list(base.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in TEXTS]
    return limited([row[:positions] for row in rows])


def data_rows(base: str, data: str) -> list[list[int]]:
    """Reads rows and encodes them as the base does. Loads no weights."""
    tokenizer, config = load_tokenizer(base)
    rows = load_data(
        DataConfig.of({"train": data, "validation_share": 0.0}),
        RowRules(2048, configured_capacity(config)),
        tokenizer,
        purpose="used for the check",
    )
    return [example.ids.tolist() for example in rows.train]


def limited(rows: Sequence[list[int]]) -> list[list[int]]:
    """Returns the first rows, cut, with at most MAX_TOKENS tokens together."""
    kept_rows: list[list[int]] = []
    tokens_left = MAX_TOKENS
    for row in rows:
        if tokens_left and row:
            kept_rows.append(row[:tokens_left])
            tokens_left -= len(kept_rows[-1])
    return kept_rows


def reference(
    base: FrozenBase, names: Sequence[tuple[str, float]], rows: list[list[int]]
) -> ReferenceLogits:
    """Computes the logits with the adapters, and their effect; includes the adapters' new
    tokens.
    """
    active_before = base.routing.active
    new_tokens = [
        adapter.tokens.ids
        for adapter in (base.attachments[name] for name, _ in names)
        if adapter.tokens is not None
    ]
    rows = rows + [list(ids[:NEW_TOKENS]) for ids in new_tokens]
    adapted, effects, largest = [], 0.0, 0.0
    base_rows = rows[: len(rows) - len(new_tokens)]
    for number, row in enumerate(rows):
        base.routing.active = tuple(names)
        adapted.append(logits(base, row))
        if number >= len(base_rows):
            continue  # the base has no such tokens
        base.routing.active = ()
        base_logits = logits(base, row)
        effect = (adapted[-1][:, : base_logits.shape[-1]] - base_logits).abs()
        effects, largest = (
            effects + float(effect.mean()) * len(row),
            max(largest, float(effect.max())),
        )
    base.routing.active = active_before
    result = ReferenceLogits(rows, adapted, max_effect=largest)
    result.mean_effect = effects / sum(map(len, base_rows))
    return result


def compare(merged: FrozenBase, with_adapter: ReferenceLogits) -> LogitCheck:
    """Compares the merged model's logits with the reference."""
    largest = difference = kl = same_top = 0.0
    for row, expected in zip(with_adapter.rows, with_adapter.logits, strict=True):
        merged_logits = logits(merged, row)
        distance = (merged_logits - expected).abs()
        largest, difference = (
            max(largest, float(distance.max())),
            difference + float(distance.mean()) * len(row),
        )
        p, q = expected.log_softmax(-1), merged_logits.log_softmax(-1)
        kl += float((p.exp() * (p - q)).sum())
        same_top += float((merged_logits.argmax(-1) == expected.argmax(-1)).sum())
    tokens = with_adapter.tokens
    return LogitCheck(
        tokens,
        largest,
        difference / tokens,
        with_adapter.max_effect,
        with_adapter.mean_effect,
        max(kl / tokens, 0.0),
        same_top / tokens,
    )


@torch.no_grad()
def logits(base: FrozenBase, row: list[int]) -> Tensor:
    """Returns (T, V) float32 logits, on the CPU."""
    ids = torch.tensor([row], device=base.device)
    with in_float32(base.model):
        out: Tensor = base.model(input_ids=ids, use_cache=False).logits[0]
    return out.float().cpu()


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Makes every module widen its half-precision parameters before its forward and restore them
    after it.

    A wrapper reads its base module's parameters itself, so the outermost wrapper widens those;
    values of adapters are widened for the whole block.
    """
    wrappers = [module for module in model.modules() if isinstance(module, AdaptedModule)]
    owners: dict[nn.Module, nn.Module] = {module: module for module in model.modules()}
    for wrapper in wrappers:
        owners.pop(wrapper.base)
    owners.update({outer: unwrapped(outer) for outer in wrappers if outer in owners})
    adapters = {id(a): a for wrapper in wrappers for a in wrapper.routing.attached.values()}
    values = [(adapter, adapter.replaced) for adapter in adapters.values()]
    narrow_parameters: dict[nn.Module, dict[str, nn.Parameter]] = {}

    def widen(module: nn.Module, *_: object) -> None:
        owner = owners[module]
        narrow_parameters[owner] = {
            n: p for n, p in parameters_of(owner).items() if p is not None and p.dtype in HALF
        }
        parameters_of(owner).update(
            {name: _widened(p) for name, p in narrow_parameters[owner].items()}
        )

    def narrow(module: nn.Module, *_: object) -> None:
        parameters_of(owners[module]).update(narrow_parameters.pop(owners[module], {}))

    handles = [module.register_forward_pre_hook(widen) for module in owners]
    handles += [module.register_forward_hook(narrow) for module in owners]
    for adapter, replaced in values:
        adapter.replaced = {
            key: {name: _widened(p) for name, p in parameters_of_module.items()}
            for key, parameters_of_module in replaced.items()
        }
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for owner, parameters in narrow_parameters.items():
            parameters_of(owner).update(parameters)
        for adapter, replaced in values:
            adapter.replaced = replaced


def _widened(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.detach().float(), requires_grad=False)
