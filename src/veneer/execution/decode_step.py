"""A step through the layers of a model, few calls a layer, where that gives what the model gives.

    residual and norm, q k v, rotary, attention over blocks, o, residual and norm, gate and up,
        activation, down

The model's own modules are called, found in their places at every step; between them one call does
what several did (kernels/decoding/decoder_step.py). A module that an adapter stands beside is
called as it is. A small copy, then the model itself, must give the same by its own forward.
Shapes: N rows of the step, D width, E head size, V ids.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from veneer.adapters.methods.adapted_linear import AdaptedLinear
from veneer.adapters.placement.wrapping import AdaptedModule, unwrapped
from veneer.execution.agreement import MODEL, difference, disagreement
from veneer.execution.attention import NAME, decoder, packed_arguments, unused_mask
from veneer.execution.decoder_layer import find_layers, find_norm
from veneer.execution.ends import Ends
from veneer.execution.layer_facts import (
    ATTENTION,
    FEED_FORWARD,
    GATED,
    QKV,
    Attention,
    DecoderLayer,
    Norm,
    O,
)
from veneer.execution.paged import PagedStep
from veneer.execution.proofs.model import in_front, some_ids, structure
from veneer.execution.proofs.same_values import same_values
from veneer.execution.proofs.small_copy import NoCopyError, small_copy
from veneer.execution.proofs.steps import Run, read_and_continued
from veneer.execution.proofs.structure import LIMIT, sample_texts, structure_proof
from veneer.execution.recorded import Inputs, RecordedEnds, RecordedSteps, Snapshot
from veneer.kernels.decoding import decoder_step
from veneer.kernels.dense import few_rows
from veneer.kernels.dense.fused import silu_gate
from veneer.linear import FewRowsLinear
from veneer.private.torch import children_of, has_hooks
from veneer.sharded import is_sharded

DENSE = (nn.Linear, FewRowsLinear)
"""Modules whose products few_rows computes."""

Again = Callable[[Sequence[int], PagedStep], Tensor | None]
"""(N) ids, a step -> the logits of all its rows, (N, V); None: nothing was computed."""


class LayersForward:
    """A step through the layers of a model, proven to be the model's own (`forward_by_layers`).
    Which adapters act is the caller's to hold."""

    def __init__(
        self, model: PreTrainedModel, inner: nn.Module, layers: Sequence[DecoderLayer], norm: Norm
    ) -> None:
        self._model, self.layers, self.norm = ref(model), layers, norm
        self.inner: Any = inner
        self.steps = RecordedSteps()

    @property
    def model(self) -> PreTrainedModel:
        model = self._model()
        assert model is not None, "whoever computes a step holds the base"
        return model

    @property
    def fits(self) -> bool:
        """Whether what acts now leaves the parts where they are: a prefix comes in through the
        model's own forward."""
        in_place = all(a is b.module for a, b in zip(self.inner.layers, self.layers, strict=True))
        return in_place and in_front(self.model) == 0

    @property
    def has_dense_head(self) -> bool:
        head: Any = self.model.get_output_embeddings()
        return type(unwrapped(head)) in DENSE

    def logits(self, rows: Tensor, laid: PagedStep, kept: Tensor | None) -> Tensor:
        """rows (2, N): ids and positions -> (kept, V); None: all rows."""
        h_1ND = self.inner.embed_tokens(rows[:1])
        cos_1NE, sin_1NE = self.inner.rotary_emb(h_1ND, position_ids=rows[1:])
        inputs, head = (h_1ND[0], cos_1NE[0], sin_1NE[0]), self.model.get_output_embeddings()
        with self.steps.leased() as free:
            if free:
                beside = _keys_around(self.inner.embed_tokens) | _keys_around(head)
                states = self.steps.compute(
                    inputs, laid, self._layers, self._called, beside, self._ends
                )
            else:
                states = self._layers(inputs, laid)
            return _product(states if kept is None else states[kept], head)

    def again(self, ids: Sequence[int], laid: PagedStep) -> Tensor | None:
        """(N, V) of all rows, by what was recorded; None: it is to be computed by `logits`."""
        with self.steps.leased() as free:
            return self.steps.logits(ids, laid) if free else None

    def _ends(self) -> RecordedEnds | None:
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
        return RecordedEnds(ends, Snapshot(modules, [self.model]), beside)

    def _layers(self, inputs: Inputs, laid: PagedStep) -> Tensor:
        h, cos, sin = inputs
        angles, delta = (cos[None], sin[None]), None
        for layer in self.layers:
            h, delta = _layer(layer, h, delta, angles, laid)
        return _add_norm(h, delta, self.inner.norm, self.norm)[1]

    def _called(self) -> list[nn.Module]:
        """All modules that `_layers` may call."""
        within = (self.inner.layers, self.inner.norm)
        return [self.inner, *(module for each in within for module in each.modules())]


class DecodeStep:
    """A model's forwards over blocks: by its parts where that is proven and nothing is in the way,
    else its own.

    Made while nothing acts. not_by_parts: why its own; None: by its parts.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        found, self._model = forward_by_layers(model), ref(model)
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
        """(N, V) of all rows, replayed; None: nothing was computed."""
        return None if self._parts is None else self._parts.again(ids, laid)

    @property
    def is_recorded(self) -> bool:
        """Whether compiled functions compute whole steps of any few rows: no bit of a row depends
        on the others."""
        parts = self._parts
        return parts is not None and parts.steps.have_any_rows and parts.has_dense_head

    def let_go(self) -> None:
        """No adapter is held that acted in a step before."""
        if self._parts is not None:
            self._parts.steps.drop_references()


def _layer(
    layer: DecoderLayer,
    h: Tensor,
    delta: Tensor | None,
    angles: tuple[Tensor, Tensor],
    laid: PagedStep,
) -> tuple[Tensor, Tensor | None]:
    """(h, delta) whose sum the layer gives."""
    if layer.unlike_llama is not None:
        whole: Any = layer.module
        return whole((h if delta is None else h + delta)[None], **_given(angles, laid))[0], None
    parts = children_of(layer.module)
    first, second = layer.norms.before_attention, layer.norms.before_feed_forward
    attention, feed = parts[ATTENTION], parts[FEED_FORWARD]
    assert first is not None and second is not None and layer.attention is not None
    assert attention is not None and feed is not None
    h, x = _add_norm(h, delta, parts[first.name], first)
    if _bare(attention) is layer.attention.module:
        delta = _attention(layer.attention, x, angles, laid)
    else:
        delta = attention(hidden_states=x[None], **_given(angles, laid))[0][0]
    h, x = _add_norm(h, delta, parts[second.name], second)
    gated = layer.feed_forward
    if gated is None or gated.gate is not silu_gate or _bare(feed) is not gated.module:
        return h, feed(x[None])[0]
    gate, up, down = (children_of(gated.module)[name] for name in GATED)
    return h, _product(decoder_step.gate(*_products(x, [gate, up])), down)


def _given(angles: tuple[Tensor, Tensor], laid: PagedStep) -> dict[str, Any]:
    """What a layer's own code is given beside its rows."""
    mask = unused_mask(angles[0].device)
    return {"position_embeddings": angles, "attention_mask": mask, "veneer_layout": laid}


def _attention(
    facts: Attention, x: Tensor, angles: tuple[Tensor, Tensor], laid: PagedStep
) -> Tensor:
    places, (rows, size) = children_of(facts.module), angles[0].shape[1:]
    q, k, v = _products(x, [places[name] for name in QKV])
    if facts.norms:
        q, k = (
            _by_heads(values, size, places[norm.name], norm)
            for values, norm in zip((q, k), facts.norms, strict=True)
        )
    decoder_step.rotate(q, k, angles[0][0], angles[1][0])
    key = k.view(rows, -1, size)
    heads = q.view(rows, -1, size), key, v.view(rows, key.shape[1], -1)
    return _product(laid.attend(*heads, (), facts.rules).flatten(1), places[O])


def _bare(module: nn.Module | None) -> nn.Module | None:
    """The base's own module where nothing acts beside it and nobody listens, else None."""
    while isinstance(module, AdaptedModule):
        if not module.idle() or has_hooks(module):
            return None
        module = module.base
    return None if module is None or has_hooks(module) else module


def _dense(x: Tensor, place: nn.Module | None) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of a linear layer whose product with x few_rows computes."""
    bare: Any = _bare(place)
    if type(bare) not in DENSE or not few_rows.usable(x, bare.weight, bare.bias):
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


def _by_heads(x: Tensor, size: int, place: nn.Module | None, facts: Norm) -> Tensor:
    """Each head normalised by itself."""
    norm: Any = _bare(place)
    if norm is None:
        trained: Any = place
        return trained(x.view(1, len(x), -1, size))[0].flatten(1)
    heads = decoder_step.add_norm(x.view(-1, size), None, norm.weight, facts.epsilon)[1]
    return heads.view(x.shape)


def _add_norm(
    h: Tensor, delta: Tensor | None, place: nn.Module | None, facts: Norm
) -> tuple[Tensor, Tensor]:
    norm: Any = _bare(place)
    if norm is None:
        h = h if delta is None else h + delta
        trained: Any = place
        return h, trained(h[None])[0]
    return decoder_step.add_norm(h, delta, norm.weight, facts.epsilon)


@torch.no_grad()
def forward_by_layers(model: PreTrainedModel) -> LayersForward | str:
    """The way through the layers of a model that decodes over blocks (decoding/proof.py); or why
    there is none. Asked while nothing acts on the model."""
    if (reason := structure(model).packed) is not None:
        return reason
    if not decoder_step.usable(next(model.parameters())):
        return "its numbers are of a type or on a device for which no kernels are compiled"
    reason = structure_proof(
        "parts", type(model), model.config, str | None, lambda: _on_a_copy(model)
    )
    if reason is not None:
        return reason
    forward = _taken_apart(model)
    if isinstance(forward, str):
        return forward
    ids = some_ids(model, 23, 4).tolist()
    texts, by_layers = [ids[:14], ids[14:]], forward.logits

    def differs() -> str | None:
        theirs = read_and_continued(own_forward(model), texts)
        return disagreement(
            model,
            "its parts called one by one",
            lambda: difference(read_and_continued(by_layers, texts), theirs),
            MODEL.limits[theirs.dtype],
        )

    reason = same_values("by_parts", model, str | None, differs)
    return forward if reason is None else reason


def _on_a_copy(model: PreTrainedModel) -> str | None:
    try:
        copy = small_copy(type(model), model.config)
    except NoCopyError as fault:
        return str(fault).splitlines()[0]
    copy.set_attn_implementation(NAME)
    texts, found = sample_texts(copy), _taken_apart(copy)
    if isinstance(found, str):
        return found

    def measure() -> float:
        ours = read_and_continued(found.logits, texts)
        return difference(ours, read_and_continued(own_forward(copy), texts))

    return disagreement(copy, "its parts called one by one", measure, LIMIT)


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


def _taken_apart(model: PreTrainedModel) -> LayersForward | str:
    """As far as what is known of its layers says it. Layers that are not understood are called
    whole."""
    name, inner = type(model).__name__, decoder(model)
    places: Any = None if inner is None else unwrapped(inner)
    wanted = ("embed_tokens", "rotary_emb", "layers", "norm")
    missing = [each for each in wanted if getattr(places, each, None) is None]
    if missing:
        return f"{name} has no {', '.join(missing)}"
    layers = find_layers(model)
    if [layer.module for layer in layers] != [unwrapped(place) for place in places.layers]:
        return f"{name} has other layers than those of its decoder"
    if any(is_sharded(weight) for layer in layers for weight in layer.module.parameters()):
        return f"the layers of {name} are sharded: they are called whole"
    reasons = [layer.unlike_llama for layer in layers]
    if None not in reasons:
        return f"no layer of {name} is taken apart: {reasons[0]}"
    if (norm := find_norm(unwrapped(places.norm))) is None or not norm.is_plain:
        return f"the last norm of {name} is no plain RMS norm"
    return LayersForward(model, places, layers, norm)
