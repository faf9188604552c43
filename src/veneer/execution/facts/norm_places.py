"""Finds the places of the norms in a decoder layer, and whether it adds up its parts as in
layer_facts.py, by running the layer with known functions as its parts."""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from veneer.execution.agreement import EXACT, agrees
from veneer.execution.attention import unused_mask
from veneer.execution.facts.layer_facts import (
    FEED_FORWARD,
    MIXERS,
    NO_SCALES,
    LayerNorms,
    MixingScales,
    Norm,
)
from veneer.execution.facts.small_modules import (
    WIDTH,
    first_of,
    random_rows,
    unset_arguments,
    with_children,
)
from veneer.private.torch import buffers_of, parameters_of


class _KnownPart(nn.Module):
    """Replaces a part by a known function: it rolls each row by `number` and scales it.

    called: names of the parts, in the order of their calls. keywords: the keyword arguments of the
    last call of this part. returns_pair: it gives its output in a pair, as attention blocks do.
    """

    def __init__(self, number: int, name: str, called: list[str], *, returns_pair: bool) -> None:
        super().__init__()
        self.number, self.name, self.called = number, name, called
        self.returns_pair = returns_pair
        self.keywords: dict[str, Any] = {}

    def forward(self, hidden_states: Tensor, **keywords: Any) -> Any:
        self.keywords = keywords
        self.called.append(self.name)
        out = hidden_states.roll(self.number, -1) * (1 + 2**-self.number)
        return (out, None) if self.returns_pair else out


class Sums(NamedTuple):
    """How a layer adds up its parts (layer_facts.DecoderLayer)."""

    norms: LayerNorms = LayerNorms()
    is_parallel: bool = False
    residual_scale: float = 1.0
    gives_pair: bool = False
    scales: MixingScales = NO_SCALES


MIXING_SCALES = ("attention_in_multiplier", "attn_out_multiplier", "ssm_out_multiplier")
"""Names in a layer of its MixingScales, if it has both attention and a mixer."""


def find_places(
    layer: nn.Module,
    norms: Sequence[Norm],
    mixing: Sequence[str],
    feed_forward: Sequence[Sequence[str]] = ((FEED_FORWARD,),),
) -> Sums | None:
    """Returns the places of a layer's norms, and how it adds up its parts, by running it with known
    parts. Returns None if it does not add up its parts as in layer_facts.py, or does not pass on
    the arguments they need. mixing: the names of its attention block and of its mixer.
    feed_forward: for each of its feed-forward blocks the name, or those of the block's parts in
    order."""
    own: Mapping[str, Any] = {**parameters_of(layer), **buffers_of(layer)}
    if any(value is not None for value in own.values()) or len(norms) > len(LayerNorms._fields):
        return None
    called: list[str] = []
    feed_names = [name for block in feed_forward for name in block]
    names = [*mixing, *feed_names, *(norm.name for norm in norms)]
    attention = [name for name in mixing if name not in MIXERS]
    parts = {
        name: _KnownPart(number, name, called, returns_pair=name in attention)
        for number, name in enumerate(names, 1)
    }
    own_scales = NO_SCALES
    if len(mixing) > 1:
        own_scales = MixingScales(*(float(getattr(layer, own, 1.0)) for own in MIXING_SCALES))

    def mix(x: Tensor) -> Tensor:
        of_attention, of_output, of_mixer = own_scales
        outputs = [
            first_of(parts[name](x * of_attention)) * of_output
            if name in attention
            else parts[name](x) * of_mixer
            for name in mixing
        ]
        return sum(outputs[1:], outputs[0])

    def feed(x: Tensor) -> Tensor:
        chains = [nn.Sequential(*(parts[name] for name in block)) for block in feed_forward]
        first, *others = [chain(x) for chain in chains]
        return sum(others, first)

    small = with_children(layer, parts)
    x = random_rows(WIDTH, torch.bfloat16)[None]
    angles, mask = (x, x), unused_mask(x.device)  # the mask leads to the layout too
    arguments = {"position_embeddings": angles, "attention_mask": mask}
    others = unset_arguments(layer, arguments)

    def outputs(x: Tensor) -> Any:
        return small.forward(x, **arguments, **others, veneer_layout=object())  # without hooks

    def own_code(x: Tensor) -> tuple[Any, ...]:
        y = first_of(outputs(x))
        given = [parts[name].keywords for name in attention]
        pass_on = all(own.get(name) is arguments[name] for own in given for name in arguments)
        return y, pass_on

    try:
        gives_pair = isinstance(outputs(x), tuple)
    except Exception:  # modelling code may raise any, as in agreement.disagreement
        return None
    by_name = {norm.name: norm for norm in norms}
    mixing_calls = _as_one(called, mixing, mixing[0])
    own_calls = mixing_calls and _as_one(mixing_calls, feed_names, FEED_FORWARD)
    if own_calls is None:
        return None
    if (own_norms := _parallel_norms(own_calls, by_name, mixing[0])) is not None:
        of_attention, of_feed_forward = own_norms

        def parallel(x: Tensor, order: Sequence[int]) -> tuple[Any, ...]:
            n = parts[of_attention.name](x)
            m = n if of_feed_forward is None else parts[of_feed_forward.name](x)
            terms = x, mix(n), feed(m)
            first, second, third = (terms[number] for number in order)
            return first + second + third, True

        for order in ((0, 1, 2), (1, 2, 0), (0, 2, 1)):  # roundings differ by the order of sums
            if agrees(own_code, partial(parallel, order=order), (x,), EXACT):
                places = LayerNorms(
                    before_attention=of_attention, before_feed_forward=of_feed_forward
                )
                return Sums(places, True, gives_pair=gives_pair, scales=own_scales)
    scales = [1.0, *(own for own in vars(layer).values() if type(own) is float and own != 1.0)]
    for names_of_places, scale in product(_orders(own_calls, mixing[0]), scales):
        places = LayerNorms(*(by_name.get(name) for name in names_of_places))

        def computed(
            x: Tensor, places: LayerNorms = places, scale: float = scale
        ) -> tuple[Any, ...]:
            first, second, third, fourth = (
                nn.Identity() if norm is None else parts[norm.name] for norm in places
            )
            h = x + second(mix(first(x))) * scale
            return h + fourth(feed(third(h))) * scale, True

        if agrees(own_code, computed, (x,), EXACT):
            return Sums(places, False, scale, gives_pair, own_scales)
    return None


def _as_one(called: Sequence[str], names: Sequence[str], name: str) -> tuple[str, ...] | None:
    """Returns the calls with one, of this name, in place of those of all these parts. Returns None
    if these were not called one after another."""
    first = min((number for number, own in enumerate(called) if own in names), default=0)
    behind = first + len(names)
    if sorted(called[first:behind]) != sorted(names):
        return None
    return (*called[:first], name, *called[behind:])


def _parallel_norms(
    called: Sequence[str], norms: Mapping[str, Norm], attention: str
) -> tuple[Norm, Norm | None] | None:
    """Returns the norms before attention and before the feed-forward block, the second only if it
    is another one. Returns None if this order of calls is not that of a parallel layer."""
    blocks = [name for name in called if name not in norms]
    own_norms = [norms[name] for name in called if name in norms]
    if blocks != [attention, FEED_FORWARD] or called[0] not in norms:
        return None
    if len(own_norms) != len(norms):
        return None
    if len(own_norms) == 1:
        return own_norms[0], None
    is_pair = len(own_norms) == 2 and called[-1] == FEED_FORWARD
    return (own_norms[0], own_norms[1]) if is_pair else None


def _orders(called: Sequence[str], attention: str) -> list[tuple[str, str, str, str]]:
    """Returns the possible (names of norms by their places), given the order of calls. "" is a
    place without a norm. A single norm between attention and the feed-forward block may be after
    the one or before the other."""
    if sorted(called) != sorted(set(called)) or not {attention, FEED_FORWARD} <= set(called):
        return []
    first, second = called.index(attention), called.index(FEED_FORWARD)
    before, between, after = called[:first], called[first + 1 : second], called[second + 1 :]
    if first > second or len(before) > 1 or len(between) > 2 or len(after) > 1:
        return []
    start, end = (before or [""])[0], (after or [""])[0]
    if len(between) == 1:
        return [(start, "", between[0], end), (start, between[0], "", end)]
    after_attention, before_feed_forward = between or ("", "")
    return [(start, after_attention, before_feed_forward, end)]
