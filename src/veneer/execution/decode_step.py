"""Computes a step through the layers of a model with few calls a layer, if this is proven to give
what the model gives.

    h = scale * embedding(ids), each layer (layer_step.py), last norm, head, soft cap of the logits

The proof: a small copy, then the model itself, give the same values this way as by their own
forward.
Shapes: N rows of the step, D width, E head size, V ids.
"""

from collections.abc import Callable, Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from veneer.adapters.placement.wrapping import AdaptedModule, unwrapped
from veneer.execution.agreement import MODEL, difference, disagreement
from veneer.execution.attention import decoder, packed_arguments, take_packed
from veneer.execution.ends import Ends
from veneer.execution.facts.decoder_layer import find_layers
from veneer.execution.facts.layer_facts import DecoderLayer, Norm
from veneer.execution.facts.model_start import ModelStart, embedding_scale, find_start, part_names
from veneer.execution.facts.part_facts import find_norm
from veneer.execution.facts.small_modules import beside_linears
from veneer.execution.layer_step import LayerAngles, compute_layer
from veneer.execution.paged import PagedStep
from veneer.execution.proofs.model import acting_prefix_length, some_ids, structure
from veneer.execution.proofs.same_values import remember_by_values
from veneer.execution.proofs.small_copy import NoCopyError, small_copy
from veneer.execution.proofs.steps import Run, read_and_continued
from veneer.execution.proofs.structure import LIMIT, sample_texts, structure_proof
from veneer.execution.recorded import Inputs, RecordedEnds, RecordedSteps, Snapshot
from veneer.execution.states import (
    StateLayers,
    StepStates,
    cache_argument,
    has_states,
    state_layers,
)
from veneer.execution.step_products import DENSE, Branch, add_norm, bare, dense_operands, product
from veneer.execution.switches import forget_lengths
from veneer.kernels.decoding import decoder_step
from veneer.kernels.dense.loss import Head
from veneer.private.transformers import calls_hooks
from veneer.sharded import is_sharded

LogitRules = tuple[float, float | None]
"""Scale and soft cap of the logits (kernels/dense/loss.py: Head)."""
Replay = Callable[[Sequence[int], PagedStep], Tensor | None]
"""(N) ids, a step -> the logits of all its rows, (N, V); None: nothing was computed."""


class LayersForward:
    """Computes steps through the layers of a model; `forward_by_layers` proves that they give what
    the model gives. The caller chooses the adapters that act."""

    def __init__(
        self,
        model: PreTrainedModel,
        inner: nn.Module,
        layers: Sequence[DecoderLayer],
        norm: Norm,
        start: ModelStart,
        logit_rules: LogitRules,
    ) -> None:
        self._model, self.layers, self.norm, self._start = ref(model), layers, norm, start
        self.inner: Any = inner
        self._logit_rules = logit_rules
        others = [child for name, child in inner.named_children() if name not in start.names]
        self._not_called = [inner, *(part for child in others for part in child.modules())]
        limits = [heads.position_limit for layer in layers if (heads := layer.attention)]
        self._position_limit = min((own for own in limits if own is not None), default=None)
        self.steps = RecordedSteps()
        self._hooked: list[bool] = []
        self._last_hook_id = -1

    @property
    def model(self) -> PreTrainedModel:
        model = self._model()
        assert model is not None, "the caller of a step holds the base"
        return model

    @property
    def fits(self) -> bool:
        """Whether all parts are in their places, none acts on a table of positions that is read
        past its module, and neither a prefix acts nor a hook that only the model's own forward
        calls: one of the decoder or of a dropout beside its layers, or of a layer where some pass
        states on."""
        if any(map(calls_hooks, self._not_called)):
            return False
        if self._start.first_row and bare(self._positions) is None:
            return False
        if any(layer.mixer for layer in self.layers) and any(self._layers_with_hooks()):
            return False
        in_place = all(a is b.module for a, b in zip(self._places, self.layers, strict=True))
        return in_place and acting_prefix_length(self.model) == 0

    def _holds_for(self, paged_step: PagedStep) -> bool:
        """Whether the facts of attention hold for all positions of a step."""
        if self._position_limit is None:
            return True
        is_near = isinstance(paged_step, PagedStep)  # other steps know their positions on a device
        return is_near and paged_step.spans.farthest < self._position_limit

    @property
    def _embedding(self) -> Any:
        return getattr(self.inner, self._start.names.embedding)

    @property
    def _places(self) -> Any:
        return getattr(self.inner, self._start.names.layers)

    @property
    def _positions(self) -> Any:
        return self._start.positions_module(self.inner)

    @property
    def _last_norm(self) -> Any:
        return getattr(self.inner, self._start.names.norm)

    @property
    def has_dense_head(self) -> bool:
        return type(unwrapped(self.model.get_output_embeddings())) in DENSE

    def logits(self, rows: Tensor, paged_step: PagedStep, kept: Tensor | None) -> Tensor:
        """Returns the logits (kept, V); kept None: of all rows. rows (2, N): ids and positions."""
        if not self._holds_for(paged_step):
            return own_forward(self.model)(rows, paged_step, kept)
        embedding = self._embedding
        h_1ND = embedding(rows[:1])
        if self._start.scale != 1.0:
            h_1ND = h_1ND * self._start.scale
        of_positions = self._start.of_positions(self.inner, h_1ND, rows[1:])
        inputs = [h_1ND[0], *(values[0] for values in of_positions)]
        head = self.model.get_output_embeddings()
        with self.steps.leased() as free:
            if free and _passes_single_tokens(paged_step):
                outside = embedding, head, self._positions
                beside = set().union(*map(_keys_around, outside))
                states = self.steps.compute(
                    inputs, paged_step, self._layers, self._called, beside, self._ends
                )
            else:
                states = self._layers(inputs, paged_step)
            if paged_step.states is not None:
                paged_step.states.store()
            if paged_step.take_states is not None:
                paged_step.take_states(states)
            logits = product(states if kept is None else states[kept], head)
            return decoder_step.cap(logits, *self._logit_rules)

    def replay(self, ids: Sequence[int], paged_step: PagedStep) -> Tensor | None:
        """Returns the logits (N, V) of all rows by replaying a recorded step. Returns None if no
        recording fits: `logits` computes them."""
        if not self._holds_for(paged_step) or not _passes_single_tokens(paged_step):
            return None
        with self.steps.leased() as free:
            return self.steps.logits(ids, paged_step) if free else None

    def _ends(self) -> RecordedEnds | None:
        """Returns the embedding and the head; None if an adapter or a hook acts on them, or if they
        cannot be recorded."""
        embedding, head = self._embedding, self.model.get_output_embeddings()
        table: Any = bare(embedding)
        scale = embedding_scale(table)
        if scale is None or bare(self._positions) is None:
            return None
        operands = dense_operands(first_row(table), head)
        # Two scales are two roundings.
        if operands is None or 1.0 not in (scale, self._start.scale):
            return None
        head_operands = Head(*operands, *self._logit_rules)
        ends = Ends.of(table, scale * self._start.scale, head_operands, self.inner, self._start)
        if ends is None:
            return None
        modules = [*embedding.modules(), *head.modules(), *self._positions.modules()]
        keys = frozenset[str]().union(*map(_keys_around, (embedding, head, self._positions)))
        return RecordedEnds(ends, Snapshot(modules, [self.model]), keys)

    def _layers(self, inputs: Inputs, paged_step: PagedStep) -> Tensor:
        h, *of_positions = inputs
        branch = Branch(of_positions[0], 1.0, None, None) if self._start.has_table else None
        pairs = list(zip(of_positions[::2], of_positions[1::2], strict=False))
        of_layers = zip(self.layers, self._start.of_layer, self._layers_with_hooks(), strict=True)
        for layer, numbers, hooked in of_layers:
            angles = None if numbers is None else LayerAngles(*(pairs[n] for n in numbers))
            h, branch = compute_layer(layer, h, branch, angles, paged_step, has_hooks=hooked)
        return add_norm(h, branch, self._last_norm, self.norm)[1]

    def _layers_with_hooks(self) -> list[bool]:
        """Returns for each layer whether it or a part of it has hooks. Linear layers call theirs.
        Without any it looks again only after torch has numbered a new hook anywhere."""
        last_id = RemovableHandle.next_id
        if self._last_hook_id != last_id:
            self._hooked = [
                any(map(calls_hooks, beside_linears(layer.module))) for layer in self.layers
            ]
            self._last_hook_id = -1 if any(self._hooked) else last_id
        return self._hooked

    def _called(self) -> list[nn.Module]:
        """Returns all modules that `_layers` may call."""
        return [self.inner, *self._places.modules(), *self._last_norm.modules()]


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
        if self._parts is not None:
            self._parts.steps.check_next()  # a prompt is read: hooks may be new
            if self._parts.fits:
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


def _passes_single_tokens(paged_step: PagedStep) -> bool:
    """Whether kernels may pass all states of a step on: of each text by one token."""
    return paged_step.states is None or paged_step.spans.rows == paged_step.texts


def first_row(embedding: nn.Embedding) -> Tensor:
    """Returns what an embedding gives for the first id, (1, D)."""
    return embedding(torch.zeros(1, dtype=torch.int64, device=embedding.weight.device))


def _keys_around(module: nn.Module) -> set[str]:
    """Returns the keys of the wrappers around a module."""
    keys = set()
    while isinstance(module, AdaptedModule):
        keys.add(module.key)
        module = module.base
    return keys


@torch.no_grad()
def forward_by_layers(model: PreTrainedModel) -> LayersForward | str:
    """Returns a forward by the layers of a model that decodes over blocks (decoding/proof.py), or
    why there is none. To be called while no adapter acts on the model."""
    known = structure(model)
    if known.packed is not None and not has_states(model):
        return known.packed
    logit_rules = known.scale, known.softcap
    if not decoder_step.usable(next(model.parameters())):
        return "its numbers are of a type or on a device for which no kernels are compiled"
    reason = structure_proof(
        "parts", type(model), model.config, str | None, lambda: _prove_on_copy(model, logit_rules)
    )
    if reason is not None:
        return reason
    forward = _take_apart(model, logit_rules)
    if isinstance(forward, str):
        return forward
    ids = some_ids(model, 23, 4).tolist()
    texts, by_layers = [ids[:14], ids[14:]], forward.logits
    states = state_layers(model)

    def compare() -> str | None:
        expected = _logits(model, own_forward(model), texts, states)
        return disagreement(
            model,
            "its parts called one by one",
            lambda: difference(_logits(model, by_layers, texts, states), expected),
            MODEL.limits[expected.dtype],
        )

    reason = remember_by_values("by_parts", model, str | None, compare)
    return forward if reason is None else reason


def _logits(
    model: PreTrainedModel, run: Run, texts: Sequence[Sequence[int]], states: StateLayers
) -> Tensor:
    """Returns the logits of a run that no text before has given other rotary frequencies."""
    forget_lengths(model)
    return read_and_continued(run, texts, states)


def _prove_on_copy(model: PreTrainedModel, logit_rules: LogitRules) -> str | None:
    try:
        copy = small_copy(type(model), model.config)
    except NoCopyError as fault:
        return str(fault).splitlines()[0]
    take_packed(copy)
    states = state_layers(copy)
    texts, forward = sample_texts(copy), _take_apart(copy, logit_rules)
    if isinstance(forward, str):
        return forward

    def measure() -> float:
        logits = _logits(copy, forward.logits, texts, states)
        return difference(logits, _logits(copy, own_forward(copy), texts, states))

    return disagreement(copy, "its parts called one by one", measure, LIMIT)


def own_forward(model: PreTrainedModel) -> Run:
    """Returns the model's own forward over blocks."""

    def run(rows: Tensor, paged_step: Any, kept: Tensor | None) -> Tensor:
        call: Any = model
        take_states, states = paged_step.take_states, paged_step.states
        ids, positions = rows.view(2, paged_step.texts, -1)
        others: dict[str, Any] = {} if take_states is None else {"output_hidden_states": True}
        if states is not None:
            others[cache_argument(model)] = states.cache
        out = call(
            input_ids=ids,
            logits_to_keep=_last_of_each(kept, states),
            **packed_arguments(positions, paged_step),
            **others,
        )
        if states is not None:
            states.store()
        if take_states is not None:
            take_states(out.hidden_states[-1].flatten(0, 1))
        return out.logits.flatten(0, 1)

    return run


def _last_of_each(kept: Tensor | None, states: StepStates | None) -> Tensor | int:
    """Returns what a model's own forward takes as the rows to keep: with states, the number of the
    last rows of each text; 0: all."""
    if kept is None:
        return 0
    return kept if states is None else len(kept) // states.texts


def _take_apart(model: PreTrainedModel, logit_rules: LogitRules) -> LayersForward | str:
    """Returns a forward by the layers of a model, not yet proven, or why there is none. Layers that
    are not understood are called whole."""
    name, inner = type(model).__name__, decoder(model)
    places: Any = None if inner is None else unwrapped(inner)
    names = None if places is None else part_names(places)
    if names is None:
        return f"{name} has no embedding, positions, layers or last norm of a usual name"
    layers = find_layers(model)
    if [layer.module for layer in layers] != [
        unwrapped(place) for place in getattr(places, names.layers)
    ]:
        return f"{name} has other layers than those of its decoder"
    if any(is_sharded(weight) for layer in layers for weight in layer.module.parameters()):
        return f"the layers of {name} are sharded: they are called whole"
    reasons = [layer.unknown for layer in layers]
    if None not in reasons:
        return f"no layer of {name} is taken apart: {reasons[0]}"
    embedding: Any = unwrapped(getattr(places, names.embedding))
    row = first_row(embedding)[0]
    if (norm := find_norm(unwrapped(getattr(places, names.norm)), row=row)) is None:
        return f"the last norm of {name} is of no known kind"
    if (start := find_start(places)) is None:
        return f"{name} changes its embeddings or its angles in a way that is not known here"
    attention = [layer.attention for layer in layers]
    rotations = [None if facts is None else facts.rotation for facts in attention]
    return LayersForward(model, places, layers, norm, start.rotating(rotations), logit_rules)
