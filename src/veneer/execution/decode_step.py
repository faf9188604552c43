"""Computes a step through the layers of a model with few calls a layer, if this is proven to give
what the model gives.

    residual and norm, q k v, rotary, attention over blocks, o, residual and norm, gate and up,
        activation, down

The model's own modules are called, found in their places at every step; between them one call does
what several did (kernels/decoding/decoder_step.py). A module with an adapter is called as it is.
The proof: a small copy, then the model itself, give the same values this way as by their own
forward.
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
from veneer.execution.decoder_layer import find_layers
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
from veneer.execution.part_facts import find_norm
from veneer.execution.proofs.model import in_front, some_ids, structure
from veneer.execution.proofs.same_values import remember_by_values
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

Replay = Callable[[Sequence[int], PagedStep], Tensor | None]
"""(N) ids, a step -> the logits of all its rows, (N, V); None: nothing was computed."""


class LayersForward:
    """Computes steps through the layers of a model; `forward_by_layers` proves that they give what
    the model gives. The caller chooses the adapters that act."""

    def __init__(
        self, model: PreTrainedModel, inner: nn.Module, layers: Sequence[DecoderLayer], norm: Norm
    ) -> None:
        self._model, self.layers, self.norm = ref(model), layers, norm
        self.inner: Any = inner
        self.steps = RecordedSteps()

    @property
    def model(self) -> PreTrainedModel:
        model = self._model()
        assert model is not None, "the caller of a step holds the base"
        return model

    @property
    def fits(self) -> bool:
        """Whether all parts are in their places and no prefix acts, which only the model's own
        forward reads."""
        in_place = all(a is b.module for a, b in zip(self.inner.layers, self.layers, strict=True))
        return in_place and in_front(self.model) == 0

    @property
    def has_dense_head(self) -> bool:
        head: Any = self.model.get_output_embeddings()
        return type(unwrapped(head)) in DENSE

    def logits(self, rows: Tensor, paged_step: PagedStep, kept: Tensor | None) -> Tensor:
        """Returns the logits (kept, V); kept None: of all rows. rows (2, N): ids and positions."""
        h_1ND = self.inner.embed_tokens(rows[:1])
        cos_1NE, sin_1NE = self.inner.rotary_emb(h_1ND, position_ids=rows[1:])
        inputs, head = (h_1ND[0], cos_1NE[0], sin_1NE[0]), self.model.get_output_embeddings()
        with self.steps.leased() as free:
            if free:
                beside = _keys_around(self.inner.embed_tokens) | _keys_around(head)
                states = self.steps.compute(
                    inputs, paged_step, self._layers, self._called, beside, self._ends
                )
            else:
                states = self._layers(inputs, paged_step)
            return _product(states if kept is None else states[kept], head)

    def replay(self, ids: Sequence[int], paged_step: PagedStep) -> Tensor | None:
        """Returns the logits (N, V) of all rows by replaying a recorded step. Returns None if no
        recording fits: `logits` computes them."""
        with self.steps.leased() as free:
            return self.steps.logits(ids, paged_step) if free else None

    def _ends(self) -> RecordedEnds | None:
        """Returns the embedding and the head; None if an adapter or a hook acts on them, or if they
        cannot be recorded."""
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
        modules = [*embedding.modules(), *head.modules(), *rotary.modules()]
        beside = frozenset(_keys_around(embedding) | _keys_around(head))
        return RecordedEnds(ends, Snapshot(modules, [self.model]), beside)

    def _layers(self, inputs: Inputs, paged_step: PagedStep) -> Tensor:
        h, cos, sin = inputs
        angles, delta = (cos[None], sin[None]), None
        for layer in self.layers:
            h, delta = _layer(layer, h, delta, angles, paged_step)
        return _add_norm(h, delta, self.inner.norm, self.norm)[1]

    def _called(self) -> list[nn.Module]:
        """Returns all modules that `_layers` may call."""
        return [self.inner, *self.inner.layers.modules(), *self.inner.norm.modules()]


class DecodeStep:
    """Computes a model's forwards over blocks: by its parts (LayersForward) if this is proven and
    nothing prevents it, else by its own code.

    Create it while no adapter acts. not_by_parts: why its own code is used; None: its parts are.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        forward, self._model = forward_by_layers(model), ref(model)
        self._parts = None if isinstance(forward, str) else forward
        self.not_by_parts = forward if isinstance(forward, str) else None

    def logits(self, rows: Tensor, paged_step: PagedStep, kept: Tensor | None) -> Tensor:
        """Returns the logits (kept, V); kept None: of all rows. rows (2, N): ids and positions."""
        if self._parts is not None and self._parts.fits:
            return self._parts.logits(rows, paged_step, kept)
        model = self._model()
        assert model is not None
        return own_forward(model)(rows, paged_step, kept)

    def replay(self, ids: Sequence[int], paged_step: PagedStep) -> Tensor | None:
        """Returns the logits (N, V) of all rows, replayed; None if nothing was computed."""
        return None if self._parts is None else self._parts.replay(ids, paged_step)

    @property
    def is_recorded(self) -> bool:
        """Whether compiled functions compute whole steps, from one row on. Then no bit of a row
        depends on other rows."""
        parts = self._parts
        return parts is not None and parts.steps.have_any_rows and parts.has_dense_head

    def drop_references(self) -> None:
        """Drops references to adapters of earlier steps."""
        if self._parts is not None:
            self._parts.steps.drop_references()


def _layer(
    layer: DecoderLayer,
    h: Tensor,
    delta: Tensor | None,
    angles: tuple[Tensor, Tensor],
    paged_step: PagedStep,
) -> tuple[Tensor, Tensor | None]:
    """Returns (h, delta); their sum is the layer's output."""
    if layer.unlike_llama is not None:
        whole: Any = layer.module
        return whole(
            (h if delta is None else h + delta)[None], **_arguments_of(angles, paged_step)
        )[0], None
    parts = children_of(layer.module)
    first, second = layer.norms.before_attention, layer.norms.before_feed_forward
    attention, feed = parts[ATTENTION], parts[FEED_FORWARD]
    assert first is not None and second is not None and layer.attention is not None
    assert attention is not None and feed is not None
    h, x = _add_norm(h, delta, parts[first.name], first)
    if _bare(attention) is layer.attention.module:
        delta = _attention(layer.attention, x, angles, paged_step)
    else:
        delta = attention(hidden_states=x[None], **_arguments_of(angles, paged_step))[0][0]
    h, x = _add_norm(h, delta, parts[second.name], second)
    gated = layer.feed_forward
    if gated is None or gated.gate is not silu_gate or _bare(feed) is not gated.module:
        return h, feed(x[None])[0]
    gate, up, down = (children_of(gated.module)[name] for name in GATED)
    return h, _product(decoder_step.gate(*_products(x, [gate, up])), down)


def _arguments_of(angles: tuple[Tensor, Tensor], paged_step: PagedStep) -> dict[str, Any]:
    """Returns the arguments of a layer's own code, without its rows."""
    mask = unused_mask(angles[0].device)
    return {"position_embeddings": angles, "attention_mask": mask, "veneer_layout": paged_step}


def _attention(
    facts: Attention, x: Tensor, angles: tuple[Tensor, Tensor], paged_step: PagedStep
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
    return _product(paged_step.attend(*heads, (), facts.rules).flatten(1), places[O])


def _bare(module: nn.Module | None) -> nn.Module | None:
    """Returns the base's own module; None if an adapter acts on it or it has hooks."""
    while isinstance(module, AdaptedModule):
        if not module.idle() or has_hooks(module):
            return None
        module = module.base
    return None if module is None or has_hooks(module) else module


def _dense(x: Tensor, place: nn.Module | None) -> tuple[Tensor, Tensor | None] | None:
    """Returns weight and bias of a linear layer; None if few_rows does not compute its product
    with x."""
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
    """Returns the product of x with each layer, contiguous and in a tensor of its own."""
    parts = [part for place in places if (part := _part(x, place)) is not None]
    if (
        len(parts) == len(places)
        and sum(len(updates or ()) for *_, updates in parts) <= few_rows.MOST_UPDATES
    ):
        if all(updates is None for *_, updates in parts):
            return few_rows.products(x, [(weight, bias) for weight, bias, _ in parts])
        return few_rows.updated(x, parts)
    return [_product(x, place).contiguous() for place in places]


def _part(x: Tensor, place: nn.Module | None) -> few_rows.UpdatedWeight | None:
    """Returns weight, bias and updates of a layer, for a call that computes several layers of the
    same x; None if few_rows does not compute it. The updates of an adapted layer are listed even if
    there are none now."""
    if isinstance(place, AdaptedLinear) and (operand := place.step_operand(x)) is not None:
        return operand
    dense = _dense(x, place)
    return None if dense is None else (*dense, None)


def _keys_around(module: nn.Module) -> set[str]:
    """Returns the keys of the wrappers around a module."""
    keys = set()
    while isinstance(module, AdaptedModule):
        keys.add(module.key)
        module = module.base
    return keys


def _by_heads(x: Tensor, size: int, place: nn.Module | None, facts: Norm) -> Tensor:
    """Computes the norm of each head of x."""
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
    """Returns a forward by the layers of a model that decodes over blocks (decoding/proof.py), or
    why there is none. To be called while no adapter acts on the model."""
    if (reason := structure(model).packed) is not None:
        return reason
    if not decoder_step.usable(next(model.parameters())):
        return "its numbers are of a type or on a device for which no kernels are compiled"
    reason = structure_proof(
        "parts", type(model), model.config, str | None, lambda: _prove_on_copy(model)
    )
    if reason is not None:
        return reason
    forward = _take_apart(model)
    if isinstance(forward, str):
        return forward
    ids = some_ids(model, 23, 4).tolist()
    texts, by_layers = [ids[:14], ids[14:]], forward.logits

    def compare() -> str | None:
        expected = read_and_continued(own_forward(model), texts)
        return disagreement(
            model,
            "its parts called one by one",
            lambda: difference(read_and_continued(by_layers, texts), expected),
            MODEL.limits[expected.dtype],
        )

    reason = remember_by_values("by_parts", model, str | None, compare)
    return forward if reason is None else reason


def _prove_on_copy(model: PreTrainedModel) -> str | None:
    try:
        copy = small_copy(type(model), model.config)
    except NoCopyError as fault:
        return str(fault).splitlines()[0]
    copy.set_attn_implementation(NAME)
    texts, forward = sample_texts(copy), _take_apart(copy)
    if isinstance(forward, str):
        return forward

    def measure() -> float:
        logits = read_and_continued(forward.logits, texts)
        return difference(logits, read_and_continued(own_forward(copy), texts))

    return disagreement(copy, "its parts called one by one", measure, LIMIT)


def own_forward(model: PreTrainedModel) -> Run:
    """Returns the model's own forward over blocks."""

    def run(rows: Tensor, paged_step: Any, kept: Tensor | None) -> Tensor:
        call: Any = model
        out = call(
            input_ids=rows[:1],
            logits_to_keep=0 if kept is None else kept,
            **packed_arguments(rows[1:], paged_step),
        )
        logits: Tensor = out.logits[0]
        return logits

    return run


def _take_apart(model: PreTrainedModel) -> LayersForward | str:
    """Returns a forward by the layers of a model, not yet proven, or why there is none. Layers that
    are not understood are called whole."""
    name, inner = type(model).__name__, decoder(model)
    places: Any = None if inner is None else unwrapped(inner)
    names = ("embed_tokens", "rotary_emb", "layers", "norm")
    missing = [part for part in names if getattr(places, part, None) is None]
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
