"""Lets layers that pass a state from token to token read packed rows, text by text.

A short convolution, a state space or linear attention reads a text from its first token on. Within
such a layer the texts of a packed batch are therefore rows of a rectangle, each behind its prompt,
which is repeated if texts share one. The places behind a text repeat its last token, and nothing
reads them. Linear layers inside still see the packed rows: they multiply a shared prompt once, and
adapters act on the rows on which they act in every other layer. Without a gradient, many places are
computed text by text.

Such a layer is known by its convolution over tokens; whether it then gives the right results is
proven with the model (execution/proofs/structure.py). Shapes: N packed rows, B texts, L places of
each.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapters.placement.acting import invocation_of
from veneer.adapters.placement.wrapping import AdaptedModule, unwrapped
from veneer.kernels.layout import BatchLayout
from veneer.linear import frozen_linear

LAYOUT = "veneer_layout"
MOST_PLACES = 2**15
"""Places that a layer computes at once without a gradient. Many short answers behind one prompt,
such as labels that are scored, repeat it often."""


class TextRows:
    """The rectangle of a batch's texts.

    row_of    (B * L), the packed row of each place
    place_of  (N), the first place of each packed row; that of filler is 0
    """

    def __init__(self, layout: BatchLayout, rows: int, device: torch.device) -> None:
        texts = [
            (span.start, group.prompt, span.start + group.prompt + start, length)
            for span, group in zip(layout.spans, layout.groups, strict=True)
            for start, length in zip(group.starts[:-1].tolist(), group.lengths, strict=True)
        ]
        self.texts = len(texts)
        self.places = max(prompt + length for _, prompt, _, length in texts)
        within = torch.arange(self.places)
        row_of = torch.empty(self.texts, self.places, dtype=torch.int64)
        place_of = torch.zeros(rows, dtype=torch.int64)
        for number, (first, prompt, own, length) in reversed([*enumerate(texts)]):
            row_of[number, :prompt] = first + within[:prompt]
            row_of[number, prompt:] = own + within[: self.places - prompt].clamp(max=length - 1)
            read = within[: prompt + length]
            place_of[row_of[number, : len(read)]] = number * self.places + read
        self.row_of, self.place_of = row_of.flatten().to(device), place_of.to(device)

    @classmethod
    def of(cls, layout: BatchLayout, x: Tensor) -> "TextRows":
        """Returns that of a layout, made once for all layers. x: (1, N, ...)."""
        key = "texts", x.shape[1], x.device
        if key not in layout.derived:
            layout.derived[key] = cls(layout, x.shape[1], x.device)
        made: TextRows = layout.derived[key]
        return made

    def spread(self, x: Tensor, texts: slice = slice(None)) -> Tensor:
        """Returns x (1, N, ...) as (B, L, ...), or some of its texts."""
        row_of = self.row_of.view(self.texts, self.places)[texts]
        return x[0].index_select(0, row_of.flatten()).unflatten(0, row_of.shape)

    def packed(self, x: Tensor) -> Tensor:
        """Returns x (B, L, ...) as (1, N, ...)."""
        return x.flatten(0, 1).index_select(0, self.place_of)[None]


def state_modules(decoder: nn.Module) -> list[nn.Module]:
    """Returns the modules of a decoder's layers that hold a convolution over tokens. Convolutions
    beside the layers read other inputs, such as audio."""
    lists: list[nn.Module] = [
        child for child in decoder.children() if isinstance(child, nn.ModuleList)
    ]
    return [
        module
        for part in lists or [decoder]
        for module in part.modules()
        if any(isinstance(unwrapped(child), nn.Conv1d) for child in module.children())
    ]


def read_by_text(decoder: nn.Module) -> None:
    """Makes the layers that pass states read packed rows text by text. Where a forward has no
    layout, they compute as before."""
    for module in state_modules(decoder):
        own: Any = module.forward
        if getattr(own, "func", None) is not _forward:
            vars(module)["forward"] = partial(_forward, module, own)


def _forward(module: nn.Module, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    attention = kwargs.get(LAYOUT)
    layout = getattr(attention, "layout", None)
    if not isinstance(layout, BatchLayout):
        return own(*args, **kwargs)
    del kwargs[LAYOUT]
    states = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
    texts = TextRows.of(layout, states)

    def compute(some: slice) -> tuple[Any, ...]:
        def spread(value: Any) -> Any:
            of_rows = isinstance(value, Tensor) and value.shape[:2] == states.shape[:2]
            return texts.spread(value, some) if of_rows else value

        out = own(*map(spread, args), **{name: spread(value) for name, value in kwargs.items()})
        return out if isinstance(out, tuple) else (out,)

    few = max(1, MOST_PLACES // texts.places)
    if few < texts.texts and not torch.is_grad_enabled() and _is_uniform(module):
        outputs = [compute(slice(at, at + few)) for at in range(0, texts.texts, few)]
    else:
        with _linears_packed(module, texts):
            outputs = [compute(slice(None))]
    assert attention is not None
    attention.calls += 1
    first, *rest = outputs[0]
    packed = texts.packed(first if len(outputs) == 1 else torch.cat([out for out, *_ in outputs]))
    return (packed, *rest) if rest else packed


def _is_uniform(module: nn.Module) -> bool:
    """Whether the same adapters act on all rows."""
    adapted = (m for m in module.modules() if isinstance(m, AdaptedModule))
    return all(
        len(parts := m.routing.acting.parts) == 1 and not invocation_of(parts[0].adapters)
        for m in adapted
    )


@contextmanager
def _linears_packed(module: nn.Module, texts: TextRows) -> Iterator[None]:
    """Within the block the linear layers of a module see the packed rows."""
    linears = [*_linears(module)]
    before = [vars(linear).get("forward") for linear in linears]
    for linear in linears:
        vars(linear)["forward"] = partial(_linear, linear.forward, texts)
    try:
        yield
    finally:
        for linear, own in zip(linears, before, strict=True):
            if own is None:
                del vars(linear)["forward"]
            else:
                vars(linear)["forward"] = own


def _linears(module: nn.Module) -> Iterator[nn.Module]:
    """Yields the linear layers of a module, each with its wrappers."""
    for child in module.children():
        if frozen_linear(unwrapped(child)) is None:
            yield from _linears(child)
        else:
            yield child


def _linear(own: Callable[..., Tensor], texts: TextRows, x: Tensor) -> Tensor:
    if x.shape[:2] != (texts.texts, texts.places):
        return own(x)
    return texts.spread(own(texts.packed(x)))
