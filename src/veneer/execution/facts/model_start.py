"""What a model does before its first layer, as data: the scale of its embeddings, and which cosines
and sines each layer gets, or which row of a table of positions is added to an embedding.

It is found by running the decoder's own code without its layers: recording modules take the places
of its embedding, its rotary module or table of positions, its layers and its last norm. Nothing is
assumed of a family. Shapes: N rows, D width, E head size, P positions.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from veneer.adapters.placement.wrapping import unwrapped
from veneer.execution.attention import packed_arguments
from veneer.execution.facts.layer_facts import Rotation
from veneer.execution.facts.small_modules import ROWS, with_children
from veneer.linear import WidenedEmbedding, embedding_type
from veneer.private.torch import replace_parameters

EMBEDDINGS = ("embed_tokens", "embed_in", "wte", "word_embeddings")
LAST_NORMS = ("norm", "final_layernorm", "final_layer_norm", "ln_f", "layer_norm", "embedding_norm")
LAYERS = ("layers", "h")
POSITIONS = ("rotary_emb", "wpe", "embed_positions")
"""Names of the module that computes angles, and of the table of positions of models without it."""


class PartNames(NamedTuple):
    """Names of the parts of a decoder. positions: its rotary module or its table of positions; "":
    it has neither."""

    embedding: str
    norm: str
    layers: str
    positions: str


def part_names(inner: nn.Module) -> PartNames | None:
    """Returns the names in a decoder. Returns None if one of these parts has no usual name."""
    children = {name for name, child in inner.named_children() if child is not None}
    names = [
        next((name for name in usual if name in children), "")
        for usual in (EMBEDDINGS, LAST_NORMS, LAYERS, POSITIONS)
    ]
    return PartNames(*names) if all(names[:-1]) else None


class AngleKind(NamedTuple):
    """A kind of cosines and sines.

    arguments, keywords  what the rotary module gets besides rows and positions
    rotation             puts the angles into the order of the kernels; None: they already have it
    """

    arguments: tuple[Any, ...]
    keywords: tuple[tuple[str, Any], ...]
    rotation: Rotation | None = None

    def angles(self, rotary: Any, h_1ND: Tensor, positions_1N: Tensor) -> list[Tensor]:
        """Returns cosines and sines (1, N, R)."""
        pair = rotary(h_1ND, positions_1N, *self.arguments, **dict(self.keywords))
        if self.rotation is None:
            return [*pair]
        return [self.rotation.in_halves(angles) for angles in pair]


@dataclass(frozen=True)
class ModelStart:
    """The input of the first layer is scale * embed_tokens(ids), rounded once, and then plus the
    row of its position, if there is a table of positions.

    names     of the decoder's parts
    kinds     arguments of the rotary module, for each kind of angles
    of_layer  numbers of the kinds that each layer gets: for the kernels, and for its own code; None
              if it gets no angles
    first_row the row of position 0 in the table of positions
    """

    names: PartNames
    scale: float
    kinds: tuple[AngleKind, ...]
    of_layer: tuple[tuple[int, int] | None, ...]
    first_row: int = 0

    @property
    def has_table(self) -> bool:
        """Whether rows of a table of positions are added to the embeddings. Else layers get
        angles, or nothing of positions."""
        return bool(self.names.positions) and not self.kinds

    def positions_module(self, inner: nn.Module) -> nn.Module:
        """Returns the rotary module or the table of positions; without one, a module that passes
        values on."""
        return getattr(inner, self.names.positions) if self.names.positions else nn.Identity()

    def of_positions(self, inner: nn.Module, h_1ND: Tensor, positions_1N: Tensor) -> list[Tensor]:
        """Returns cosines and sines (1, N, R) of each kind, in order, or the rows (1, N, D) of the
        table of positions."""
        module: Any = self.positions_module(inner)
        if self.has_table and self.first_row:  # the module takes other arguments
            return [F.embedding(positions_1N, self.table(inner))]
        if self.has_table:
            return [module(positions_1N)]
        pairs = [kind.angles(module, h_1ND, positions_1N) for kind in self.kinds]
        return [angles for pair in pairs for angles in pair]

    def table(self, inner: nn.Module) -> Tensor:
        """Returns the table of positions from position 0 on, (P, D)."""
        module = unwrapped(self.positions_module(inner))
        return module.get_parameter("weight")[self.first_row :]

    def rotating(self, rotations: Sequence[Rotation | None]) -> ModelStart:
        """Returns the same start with angles for each layer in the order of the kernels too.

        rotations: of each layer; None: it takes the angles as they are
        """
        if not self.kinds:
            return self
        kinds, of_layer = [*self.kinds], list[tuple[int, int] | None]()
        for numbers, rotation in zip(self.of_layer, rotations, strict=True):
            if numbers is None:
                of_layer.append(None)
                continue
            own = numbers[1]
            order = None if rotation is None or rotation.takes_halves else rotation
            kind = self.kinds[own]._replace(rotation=order)
            kinds += [] if kind in kinds else [kind]
            of_layer.append((kinds.index(kind), own))
        return replace(self, kinds=tuple(kinds), of_layer=tuple(of_layer))


class _KnownRows(nn.Module):
    """Replaces an embedding or a table of positions: gives known rows (1, N, D), whatever the ids
    are."""

    def __init__(self, rows_1ND: Tensor) -> None:
        super().__init__()
        self.rows = rows_1ND

    def forward(self, *ids: Any, **others: Any) -> Tensor:
        return self.rows


class _RecordingRotary(nn.Module):
    """Replaces a rotary module: calls it, and records the kinds of angles that it gave."""

    def __init__(self, rotary: Any) -> None:
        super().__init__()
        self.rotary = rotary
        self.kinds: list[AngleKind] = []
        self.angles: list[Any] = []

    def forward(self, x: Tensor, position_ids: Tensor, *arguments: Any, **keywords: Any) -> Any:
        angles = self.rotary(x, position_ids, *arguments, **keywords)
        self.kinds.append(AngleKind(arguments, tuple(sorted(keywords.items()))))
        self.angles.append(angles)
        return angles


class _RecordingLayer(nn.Module):
    """Replaces a decoder layer: records its input and its angles, and gives its input, or a pair
    with it."""

    def __init__(self, *, gives_pair: bool) -> None:
        super().__init__()
        self.gives_pair = gives_pair

    def forward(
        self, hidden_states: Tensor, *beside: Any, position_embeddings: Any = None, **others: Any
    ) -> Any:
        self.input, self.angles = hidden_states, position_embeddings
        return (hidden_states, None) if self.gives_pair else hidden_states


@torch.no_grad()
def find_start(inner: nn.Module) -> ModelStart | None:
    """Returns what a decoder does before its layers. Returns None if it does something else, or
    anything behind its layers but its last norm."""
    names = part_names(inner)
    starts = () if names is None else (_start(inner, names, pair) for pair in (False, True))
    return next((start for start in starts if start is not None), None)


def _start(inner: nn.Module, names: PartNames, gives_pair: bool) -> ModelStart | None:
    """Returns the start of a decoder whose layers give a tensor, or a pair with it."""
    embedding = inner.get_submodule(names.embedding)
    table, dtype = embedding.get_parameter("weight"), embedding_type(embedding)
    device = table.device
    draw = torch.Generator().manual_seed(0)
    random_rows, added_rows = (
        torch.randn(1, ROWS, table.shape[1], generator=draw).to(dtype).to(device) for _ in range(2)
    )
    positions = unwrapped(getattr(inner, names.positions)) if names.positions else None
    has_table = isinstance(positions, nn.Embedding)
    added = added_rows if has_table else None
    try:
        ones = torch.ones(1, ROWS, 4, device=device)
        zeros = torch.zeros_like(ones) if has_table else None
        of_ones = _run(inner, names, gives_pair, ones, zeros)
        scale = float(of_ones[0].input.flatten()[0])
        layers = _run(inner, names, gives_pair, random_rows, added)
    except Exception:  # modelling code may raise any, as in agreement.disagreement
        return None
    kinds, of_layer = list[AngleKind](), list[tuple[int, int] | None]()
    for layer in layers:
        if has_table or not layer.has_angles:
            of_layer.append(None)
            continue
        if layer.kind is None:
            return None
        kinds += [] if layer.kind in kinds else [layer.kind]
        number = kinds.index(layer.kind)
        of_layer.append((number, number))
    scaled = random_rows if scale == 1.0 else random_rows * scale
    expected = scaled if added is None else scaled + added
    if not layers or not torch.equal(layers[0].input, expected):
        return None
    first_row = getattr(positions, "offset", 0) if has_table else 0
    return ModelStart(names, scale, tuple(kinds), tuple(of_layer), first_row)


@dataclass(frozen=True)
class _LayerInput:
    """kind: of its angles; None if it has none, or others than the rotary module gives."""

    input: Tensor
    kind: AngleKind | None
    has_angles: bool


def _run(
    inner: nn.Module, names: PartNames, gives_pair: bool, rows_1ND: Tensor, added_1ND: Tensor | None
) -> Sequence[_LayerInput]:
    """Runs a decoder's own code without its layers on these embeddings. added_1ND: rows of its
    table of positions."""
    rotary = _RecordingRotary(getattr(inner, names.positions, None))
    layers = nn.ModuleList(
        [_RecordingLayer(gives_pair=gives_pair) for _ in getattr(inner, names.layers)]
    )
    places: dict[str, nn.Module] = {
        names.embedding: _KnownRows(rows_1ND),
        names.layers: layers,
        names.norm: nn.Identity(),
    }
    if names.positions:
        places[names.positions] = rotary if added_1ND is None else _KnownRows(added_1ND)
    small = with_children(inner, places)
    count = rows_1ND.shape[1]
    positions = torch.arange(count, device=rows_1ND.device)[None]
    out = small.forward(
        input_ids=torch.zeros_like(positions), **packed_arguments(positions, _NoAttention())
    )
    recorded: list[Any] = list(layers)
    if not torch.equal(out.last_hidden_state, recorded[0].input):
        raise ValueError("the decoder changes what its layers give")
    inputs = []
    for layer in recorded:
        numbers = [n for n, angles in enumerate(rotary.angles) if angles is layer.angles]
        kind = rotary.kinds[numbers[0]] if numbers else None
        inputs.append(_LayerInput(layer.input, kind, layer.angles is not None))
    return inputs


class _NoAttention:
    """A layout (attention.BatchAttention) that no layer reaches."""

    def attend(self, *_: Any) -> Tensor:
        raise AssertionError("a layer attends where none is run")


@torch.no_grad()
def embedding_scale(embedding: nn.Module) -> float | None:
    """Returns s of a table whose rows are multiplied by s and rounded once. Returns None for any
    other module, for instance one that limits the lengths of its rows."""
    if not isinstance(embedding, nn.Embedding) or embedding.max_norm is not None:
        return None
    weight, dtype = embedding.weight, embedding_type(embedding)
    is_widened = type(embedding) is WidenedEmbedding and not hasattr(embedding, "embed_scale")
    is_plain = type(embedding) is nn.Embedding or is_widened
    if is_plain or weight.is_meta:
        return 1.0 if is_plain else None
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(ROWS, weight.shape[1], generator=draw).to(weight.device)
    try:
        wide = float(_looked_up(embedding, torch.ones_like(values)).flatten()[0])
        own = values.to(dtype)
        rounded = float(torch.tensor(wide).to(dtype))
        for scale in (wide, rounded):
            if torch.equal(_looked_up(embedding, own), own * scale):
                return scale
    except Exception:  # as in find_start
        return None
    return None


def _looked_up(embedding: nn.Embedding, table: Tensor) -> Tensor:
    """Returns what an embedding with this table gives for each of its rows."""
    small = copy.copy(embedding)
    small.padding_idx = None  # it may lie beyond this table, and changes gradients alone
    replace_parameters(small, {"weight": nn.Parameter(table, requires_grad=False)})
    return small.forward(torch.arange(len(table), device=table.device))
