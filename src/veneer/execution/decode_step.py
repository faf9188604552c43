"""A step through the parts of a model, few calls a layer, where that gives what the model's own
forward gives.

    residual and norm, q k v, rotary, attention over blocks, o, residual and norm, gate and up,
        activation, down

A model's own forward makes some hundred small calls a layer, more than the time of a step on a CPU.
Here the same modules are called, found in their places at every step, and between them one call
does what several did (kernels/decoding/decoder_step.py). What an adapter stands beside is called as
the module that it is, so is a feed-forward block of another kind.

What a model computes is found by running it: a small copy in float32
(execution/proofs/small_copy.py), then the model itself, by its own forward and by this one. What
does not agree keeps its own forward, and the reason says why. Shapes: N rows of the step, D width,
E head size, V ids.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from veneer.adapters.methods.adapted_linear import AdaptedLinear
from veneer.adapters.placement.wrapping import AdaptedModule, unwrapped
from veneer.execution.agreement import MODEL, difference, disagreement
from veneer.execution.attention import NAME, decoder, packed_arguments, unused_mask
from veneer.execution.ends import Ends
from veneer.execution.paged import PagedKeys, PagedStep
from veneer.execution.proofs.model import in_front, some_ids, structure
from veneer.execution.proofs.same_values import same_values
from veneer.execution.proofs.small_copy import NoCopyError, small_copy
from veneer.execution.proofs.structure import LIMIT, sample_texts, structure_proof
from veneer.execution.recorded import Around, Inputs, Standing, Steps
from veneer.execution.train_step import is_plain_gate
from veneer.kernels.attention.groups import Pair
from veneer.kernels.attention.paged import SpanRows
from veneer.kernels.decoding import decoder_step
from veneer.kernels.dense import few_rows
from veneer.kernels.dense.fused import silu_gate
from veneer.kernels.rules import AttentionRules
from veneer.linear import FewRowsLinear
from veneer.model_record import record_of
from veneer.shards import in_shards

SLOTS = 16
LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
PROJECTIONS = ("q_proj", "k_proj", "v_proj")
ATTENTION = {*PROJECTIONS, "o_proj"}
HEAD_NORMS = {"q_norm", "k_norm"}
GATED = {"gate_proj", "up_proj", "down_proj", "act_fn"}

Run = Callable[[Tensor, Any, Tensor | None], Tensor]
"""(2, N) ids and positions, a step (execution/attention.py: BatchAttention), the rows that are kept
or all -> their logits."""

Again = Callable[[Sequence[int], PagedStep], Tensor | None]
"""(N) ids, a step that goes on from the one before -> (N, V); None: nothing was computed."""


@dataclass(frozen=True)
class _Layer:
    """The base's own modules of a layer, and how its attention weighs. gated: its feed-forward is
    silu's."""

    place: nn.Module
    attention: nn.Module
    feed: nn.Module
    gated: bool
    rules: AttentionRules


class DirectForward:
    """Of `direct`. Which adapters act is the caller's to hold."""

    def __init__(self, model: PreTrainedModel, inner: nn.Module, layers: Sequence[_Layer]) -> None:
        self._model, self.layers = ref(model), layers
        self.inner: Any = inner
        self.steps = Steps()

    @property
    def model(self) -> PreTrainedModel:
        model = self._model()
        assert model is not None, "whoever computes a step holds the base"
        return model

    @property
    def fits(self) -> bool:
        """Whether what acts now leaves the parts where they are: a prefix comes in through the
        model's own forward."""
        in_place = all(a is b.place for a, b in zip(self.inner.layers, self.layers, strict=True))
        return in_place and in_front(self.model) == 0

    def logits(self, rows: Tensor, laid: PagedStep, kept: Tensor | None) -> Tensor:
        """rows (2, N): ids and positions -> (kept, V); None: all rows."""
        h_1ND = self.inner.embed_tokens(rows[:1])
        cos_1NE, sin_1NE = self.inner.rotary_emb(h_1ND, position_ids=rows[1:])
        inputs, head = (h_1ND[0], cos_1NE[0], sin_1NE[0]), self.model.get_output_embeddings()
        with self.steps.taken() as free:
            if free:
                beside = _keys_around(self.inner.embed_tokens) | _keys_around(head)
                states = self.steps.computed(
                    inputs, laid, self._layers, self._called, beside, self._around
                )
            else:
                states = self._layers(inputs, laid)
            return _product(states if kept is None else states[kept], head)

    def again(self, ids: Sequence[int], laid: PagedStep) -> Tensor | None:
        """(N, V) of single tokens, by what was recorded; None: it is to be computed by `logits`."""
        with self.steps.taken() as free:
            return self.steps.whole(ids, laid) if free else None

    def _around(self) -> Around | None:
        """What stands around the layers, where nothing else acts there and that can be recorded."""
        embedding, rotary, head = (
            self.inner.embed_tokens,
            self.inner.rotary_emb,
            self.model.get_output_embeddings(),
        )
        bare: Any = _bare(embedding)
        if bare is None or head is None or not isinstance(embedding, nn.Module):
            return None
        ends = Ends.of(bare, _dense(bare.weight[:1], head), rotary)
        if ends is None:
            return None
        modules = [each for own in (embedding, head, rotary) for each in own.modules()]
        beside = frozenset(_keys_around(embedding) | _keys_around(head))
        return Around(ends, Standing(modules, [self.model]), beside)

    def _layers(self, inputs: Inputs, laid: PagedStep) -> Tensor:
        h, cos, sin = inputs
        angles, delta = (cos[None], sin[None]), None
        for layer in self.layers:
            h, delta = _layer(layer, h, delta, angles, laid)
        return _add_norm(h, delta, self.inner.norm)[1]

    def _called(self) -> list[nn.Module]:
        """All modules that `_layers` may call."""
        within = (self.inner.layers, self.inner.norm)
        return [self.inner, *(module for each in within for module in each.modules())]


class Way:
    """A model's forwards over blocks: by its parts where that is proven and nothing is in the way,
    else its own.

    Made while nothing acts. not_by_parts: why its own; None: by its parts.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        found, self._model = direct(model), ref(model)
        self._parts = None if isinstance(found, str) else found
        self.not_by_parts = found if isinstance(found, str) else None

    def logits(self, rows: Tensor, laid: PagedStep, kept: Tensor | None) -> Tensor:
        """rows (2, N): ids and positions -> (kept, V); None: all rows."""
        if self._parts is not None and self._parts.fits:
            return self._parts.logits(rows, laid, kept)
        model = self._model()
        assert model is not None
        return own_forward(model)(rows, laid, kept)

    def again(self, ids: Sequence[int], laid: PagedStep) -> Tensor | None:
        """(N, V) of single tokens, one further than in the step before; None: as if nothing had
        been asked."""
        return None if self._parts is None else self._parts.again(ids, laid)

    def let_go(self) -> None:
        """No adapter is held that acted in a step before."""
        if self._parts is not None:
            self._parts.steps.let_go()


def _layer(
    layer: _Layer, h: Tensor, delta: Tensor | None, angles: tuple[Tensor, Tensor], laid: PagedStep
) -> tuple[Tensor, Tensor]:
    """(h, delta) whose sum the layer gives."""
    places = layer.place._modules
    h, x = _add_norm(h, delta, places["input_layernorm"])
    attention: Any = places["self_attn"]
    if _bare(attention) is layer.attention:
        attention = layer.attention
        q, k, v = _products(x, [attention._modules[name] for name in PROJECTIONS])
        rows, size = angles[0].shape[1:]
        if "q_norm" in attention._modules:
            q, k = (
                _by_heads(q, size, attention._modules["q_norm"]),
                _by_heads(k, size, attention._modules["k_norm"]),
            )
        decoder_step.rotate(q, k, angles[0][0], angles[1][0])
        key = k.view(rows, -1, size)
        found = laid.attend(
            q.view(rows, -1, size), key, v.view(rows, key.shape[1], -1), (), layer.rules
        )
        o = attention._modules["o_proj"]
        delta = _product(found.flatten(1), o)
    else:
        mask = unused_mask(x.device)
        delta = attention(
            hidden_states=x[None],
            position_embeddings=angles,
            attention_mask=mask,
            veneer_layout=laid,
        )[0][0]
    h, x = _add_norm(h, delta, places["post_attention_layernorm"])
    feed: Any = places["mlp"]
    if layer.gated and _bare(feed) is layer.feed:
        feed = layer.feed
        gate, up = _products(x, [feed._modules["gate_proj"], feed._modules["up_proj"]])
        down = feed._modules["down_proj"]
        return h, _product(decoder_step.gate(gate, up), down)
    return h, feed(x[None])[0]


def _bare(module: nn.Module | None) -> nn.Module | None:
    """The base's own module where nothing acts beside it and nobody listens, else None."""
    while isinstance(module, AdaptedModule):
        if not module.idle() or module._forward_hooks or module._forward_pre_hooks:
            return None
        module = module.base
    return None if module is None or module._forward_hooks or module._forward_pre_hooks else module


def _dense(x: Tensor, place: nn.Module | None) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of a linear layer whose product with x few_rows computes."""
    bare: Any = _bare(place)
    if type(bare) not in (nn.Linear, FewRowsLinear) or not few_rows.usable(
        x, bare.weight, bare.bias
    ):
        return None
    return bare.weight, bare.bias


def _product(x: Tensor, place: Any) -> Tensor:
    part = _part(x, place)
    if part is not None:
        return (
            few_rows.updated(x, [part])[0]
            if part[2] is not None
            else few_rows.product(x, *part[:2])
        )
    out: Tensor = place(x[None])[0]
    return out


def _products(x: Tensor, places: Sequence[nn.Module | None]) -> list[Tensor]:
    """Of each, contiguous and nobody else's."""
    parts = [part for place in places if (part := _part(x, place)) is not None]
    if (
        len(parts) == len(places)
        and sum(len(few or ()) for *_, few in parts) <= few_rows.MOST_UPDATES
    ):
        if all(few is None for *_, few in parts):
            return few_rows.products(x, [(weight, bias) for weight, bias, _ in parts])
        return few_rows.updated(x, parts)
    return [_product(x, place).contiguous() for place in places]


def _part(x: Tensor, place: nn.Module | None) -> few_rows.UpdatedWeight | None:
    """What one call computes beside others of the same x. What adapters may add is listed, be it
    nothing today."""
    if isinstance(place, AdaptedLinear) and (own := place.step_operand(x)) is not None:
        return own
    dense = _dense(x, place)
    return None if dense is None else (*dense, None)


def _keys_around(module: nn.Module) -> set[str]:
    """Of the wrappers that stand there."""
    found = set()
    while isinstance(module, AdaptedModule):
        found.add(module.key)
        module = module.base
    return found


def _by_heads(x: Tensor, size: int, place: nn.Module | None) -> Tensor:
    """Each head normalised by itself."""
    norm: Any = _bare(place)
    if norm is None:
        trained: Any = place
        return trained(x.view(1, len(x), -1, size))[0].flatten(1)
    return decoder_step.add_norm(x.view(-1, size), None, norm.weight, _epsilon(norm))[1].view(
        x.shape
    )


def _epsilon(norm: Any) -> float:
    return float(norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps)


def _add_norm(h: Tensor, delta: Tensor | None, place: nn.Module | None) -> tuple[Tensor, Tensor]:
    norm: Any = _bare(place)
    if norm is None:
        h = h if delta is None else h + delta
        trained: Any = place
        return h, trained(h[None])[0]
    return decoder_step.add_norm(h, delta, norm.weight, _epsilon(norm))


@dataclass
class _Noting:
    """A step that notes how each layer weighs."""

    step: PagedStep
    rules: list[AttentionRules] = field(default_factory=list)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        prefix: Sequence[tuple[slice, Pair | None]],
        rules: AttentionRules,
    ) -> Tensor:
        self.rules.append(rules)
        return self.step.attend(q, k, v, prefix, rules)


@dataclass(frozen=True)
class PartsTrial:
    """How a model's layers weigh, and why it is not computed by its parts; None: it is."""

    rules: tuple[AttentionRules, ...] = ()
    reason: str | None = None


@torch.no_grad()
def direct(model: PreTrainedModel) -> DirectForward | str:
    """The way through the parts of a model that decodes over blocks (decoding/proof.py); or why
    there is none. A model is tried once, while nothing acts on it."""
    trial = record_of(model).part(PartsTrial, lambda: _on_itself(model))
    return _taken_apart(model, trial.rules) if trial.reason is None else trial.reason


def _on_itself(model: PreTrainedModel) -> PartsTrial:
    if (reason := structure(model).packed) is not None:
        return PartsTrial(reason=reason)
    if not decoder_step.usable(next(model.parameters())):
        reason = "its numbers are of a type or on a device for which no kernels are compiled"
        return PartsTrial(reason=reason)
    reason = structure_proof(
        "parts", type(model), model.config, str | None, lambda: _on_a_copy(model)
    )
    if reason is not None:
        return PartsTrial(reason=reason)
    ids = some_ids(model, 23, 4).tolist()
    texts, rules, name = [ids[:14], ids[14:]], _rules(model), type(model).__name__
    found = _taken_apart(model, rules)
    if isinstance(found, str):
        return PartsTrial(reason=found)
    by_parts = found.logits

    def differs() -> str | None:
        theirs = read_and_continued(own_forward(model), texts)
        return disagreement(
            name,
            "its parts called one by one",
            lambda: difference(read_and_continued(by_parts, texts), theirs),
            MODEL.limits[theirs.dtype],
        )

    reason = same_values("by_parts", model, str | None, differs)
    return PartsTrial(rules, reason)


def _on_a_copy(model: PreTrainedModel) -> str | None:
    try:
        copy = small_copy(type(model), model.config)
    except NoCopyError as fault:
        return str(fault).splitlines()[0]
    copy.set_attn_implementation(NAME)
    texts, found = sample_texts(copy), _taken_apart(copy, _rules(copy))
    if isinstance(found, str):
        return found

    def run() -> float:
        assert not isinstance(found, str)
        return difference(
            read_and_continued(found.logits, texts), read_and_continued(own_forward(copy), texts)
        )

    return disagreement(type(copy).__name__, "its parts called one by one", run, LIMIT)


def own_forward(model: PreTrainedModel) -> Run:
    """The model's own, over blocks."""

    def run(rows: Tensor, laid: Any, kept: Tensor | None) -> Tensor:
        call: Any = model
        out = call(
            input_ids=rows[:1],
            logits_to_keep=0 if kept is None else kept,
            **packed_arguments(rows[1:], laid),
        )
        logits: Tensor = out.logits[0]
        return logits

    return run


def read_and_continued(run: Run, texts: Sequence[Sequence[int]]) -> Tensor:
    """(tokens, V): all of the texts but their last two tokens in one step, then these one by
    one."""
    blocks = [-(-len(text) // SLOTS) for text in texts]
    tables = [list(range(sum(blocks[:n]), sum(blocks[: n + 1]))) for n in range(len(texts))]
    keys, found = PagedKeys(sum(blocks), SLOTS), []
    for step in range(3):
        cuts = [
            (0, len(t) - 2) if step == 0 else (len(t) - 3 + step, len(t) - 2 + step) for t in texts
        ]
        ids = [i for text, (start, stop) in zip(texts, cuts, strict=True) for i in text[start:stop]]
        positions = [place for start, stop in cuts for place in range(start, stop)]
        laid = PagedStep(
            keys, [SpanRows(*cut, table) for cut, table in zip(cuts, tables, strict=True)]
        )
        found.append(run(torch.tensor([ids, positions]), laid, torch.arange(len(ids))))
    return torch.cat(found)


def _rules(model: PreTrainedModel) -> tuple[AttentionRules, ...]:
    """How its layers weigh, by one forward of its own."""
    noting = _Noting(PagedStep(PagedKeys(1, SLOTS), [SpanRows(0, 2, [0])]))
    own_forward(model)(torch.tensor([[5, 6], [0, 1]]), noting, None)
    return tuple(noting.rules)


def _taken_apart(model: PreTrainedModel, rules: Sequence[AttentionRules]) -> DirectForward | str:
    """As far as names say it."""
    name, inner = type(model).__name__, decoder(model)
    places: Any = None if inner is None else unwrapped(inner)
    wanted = ("embed_tokens", "rotary_emb", "layers", "norm")
    if places is None or any(getattr(places, each, None) is None for each in wanted):
        return (
            f"{name} has no"
            f" {', '.join(each for each in wanted if getattr(places, each, None) is None)}"
        )
    if len(rules) != len(places.layers):
        return f"{name} attends {len(rules)} times in {len(places.layers)} layers"
    found = []
    for wrapped, own_rules in zip(places.layers, rules, strict=True):
        layer = unwrapped(wrapped)
        if in_shards(layer):
            return f"the layers of {name} lie in shards: they are called whole"
        parts = dict(layer.named_children())
        attention, feed = (
            unwrapped(parts.get("self_attn", layer)),
            unwrapped(parts.get("mlp", layer)),
        )
        own = {each for each, _ in attention.named_children()}
        if set(parts) != LAYER or own not in (ATTENTION, ATTENTION | HEAD_NORMS):
            others = sorted({*parts, *own} ^ (LAYER | ATTENTION))
            return f"a layer of {name} is not of the usual parts: {', '.join(others)}"
        norms = [parts[each] for each in parts if each.endswith("norm")]
        norms += [getattr(attention, each) for each in HEAD_NORMS & own]
        if not all(_is_norm(unwrapped(each)) for each in norms):
            return f"the norms of {name} are no plain RMS norms"
        found.append(_Layer(layer, attention, feed, _is_gated(feed), own_rules))
    if not _is_norm(unwrapped(places.norm)):
        return f"the last norm of {name} is no plain RMS norm"
    return DirectForward(model, places, found)


def _is_norm(module: nn.Module) -> bool:
    names = [name for name, _ in module.named_parameters(recurse=False)]
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return (
        names == ["weight"]
        and isinstance(epsilon, float)
        and type(module).__name__.endswith("RMSNorm")
    )


def _is_gated(module: nn.Module) -> bool:
    activation = getattr(module, "act_fn", None)
    if {name for name, _ in module.named_children()} - GATED or not isinstance(
        activation, nn.Module
    ):
        return False
    x = torch.linspace(-4, 4, 64)
    if not hasattr(module, "down_proj") or bool((activation(x) - F.silu(x)).abs().max() >= 1e-6):
        return False
    return is_plain_gate(module, silu_gate, torch.float32)
