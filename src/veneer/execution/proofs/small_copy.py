"""Makes a small model with the structure of a large one, to find out what the model's code does.

The copy has every kind of layer and every choice of the config. It has fewer layers, heads and
experts, and smaller widths; windows, chunks and rotary switches are shorter than a short text. So
what the real model does after 4096 tokens the copy does after ten, in float32, in milliseconds
(execution/proofs/structure.py). There is no list of families: fields are recognised by words in
their names, and a copy is used only if it has every kind of module of the original. NoCopyError
says what cannot be copied.
"""

import copy
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from veneer.bases.quiet_transformers import quiet
from veneer.errors import VeneerError
from veneer.execution.switches import switches
from veneer.private.transformers import constructor_of, forget_attention

WINDOW = 6
"""Tokens of every window and chunk in the copy."""
SWITCH = 24
"""Positions at which rotary frequencies change in the copy, if they depend on the length of a
text."""
LIMIT = 0.5
"""Largest value in the copy where the model cuts off values."""
VOCABULARY = 128
EXPERTS = 16  # a square, and a multiple of the groups
MAX_PARAMETERS = 200_000_000
"""0.8 GB in float32. A structure that cannot be made smaller is not proven."""


class NoCopyError(VeneerError):
    """The structure cannot be made small; the message says why."""


_SPAN = re.compile(r"window|chunk|block_size|local_attention|floor|index_topk|budget|compress_rat")
_NOT_SPAN = re.compile(r"layer|pattern|feed_forward|lm_head|num_|_seconds|inference|length")
_STACK = re.compile(r"^(num_)?((en|de)coder_)?layers$|^num_blocks$")
_GROUPS = re.compile(r"(^|_)n?groups$")
_PLACES = re.compile(
    r"^(n_positions|n_ctx|context_length|max_seq_len|max_(position_embeddings|\w+_positions))$"
)
_HEADS = re.compile(r"(^|_)(n_head|heads|heads_per_layer|query_groups)$")
_WIDTH = re.compile(
    r"hidden_size|n_embd|d_model|embed_proj|embedding_size|lru_width|emb_dim|dim_model|d_ssm"
    r"|^embedding_dim$"
)
_INNER = re.compile(r"intermediate|ffn|dff|dim_ff|feed_forward_size|n_inner|d_inner")
_EXPERTS = re.compile(r"(num|n)(_\w+)?_experts$|expert_num$")
_CHOSEN = re.compile(r"experts_per_tok|^moe_topk$|^moe_k$|^top_k$")
_LIMIT = re.compile(r"clip_qkv|swiglu_limit")
"""Fields that cut off values."""
_BY_PART = re.compile(r"multipliers$")  # one for each part of a block, not for each layer
_DEPTH = re.compile(
    r"first_k_dense|num_dense_layers|max_window_layers|num_kv_shared_layers|moe_layer_(start|end)"
)


def small_copy(
    kind: type[PreTrainedModel],
    config: PreTrainedConfig,
    *,
    window: int = WINDOW,
    switch: int = SWITCH,
) -> PreTrainedModel:
    """Returns a small float32 model of this class and config, on the CPU, in eval mode, with wide
    random weights. NoCopyError says why there is none.

    window: tokens of every window and chunk. switch: positions at which rotary frequencies change.
    """
    faults = []
    with quiet():
        for narrow, thin in _SIZES:
            try:
                whole = _on_meta(kind, _plain(config))
                return _try_size(kind, config, whole, _Target(window, switch, narrow, thin))
            except Exception as refusal:  # modelling code may refuse a size with anything
                faults.append(f"{type(refusal).__name__}: {str(refusal).strip()[:80]}")
    raise NoCopyError(f"no small copy of its structure could be made ({faults[0]})")


@dataclass(frozen=True)
class _Target:
    """The size of a copy. window, switch: as of small_copy. narrow: the fewest heads (1), the next
    number that divides (2, ...), or all (0). thin: small feed-forward blocks."""

    window: int
    switch: int
    narrow: int
    thin: bool


_SIZES = ((1, True), (1, False), (2, True), (3, True), (4, True), (0, True), (0, False))
"""(narrow, thin), tried in this order: modelling code may refuse one size and take another."""


def _try_size(
    kind: type[PreTrainedModel], config: PreTrainedConfig, whole: nn.Module, target: _Target
) -> PreTrainedModel:
    """Makes the copy with the fewest layers that have every kind of module of `whole`, the
    model on the meta device."""
    numbers = _numbers_of_modules(whole)
    kinds = _kinds(whole, numbers)
    missing, fault = kinds, None
    for layers in _choices_of_layers(config):
        small = _plain(config)
        _shrink(small, layers, target)
        try:
            model = _on_meta(kind, small)
        except Exception as refusal:  # too few layers for a model that ties or shares them
            missing, fault = kinds, refusal
            continue
        missing, fault = kinds - _kinds(model, numbers), None
        if missing:
            continue
        if sum(p.numel() for p in model.parameters()) > MAX_PARAMETERS:
            raise ValueError("even few layers of it are too large")
        model = drawn(kind, small)
        _run(model)
        return model
    if fault is not None:
        raise fault
    raise ValueError(f"no few layers hold every kind of its modules ({_words(missing)})")


@torch.no_grad()
def _run(model: PreTrainedModel) -> None:
    ids = torch.arange(2 * SWITCH)[None] % VOCABULARY
    logits = model(input_ids=ids, use_cache=False).logits
    if not bool(logits.isfinite().all()):
        raise ValueError("its logits are not finite")


def _plain(config: PreTrainedConfig) -> PreTrainedConfig:
    """Returns a copy of the config without quantisation and without a choice of attention."""
    plain = copy.deepcopy(config)
    if hasattr(plain, "quantization_config"):
        del plain.quantization_config
    forget_attention(plain)
    return plain


def _on_meta(kind: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return _built(kind, copy.deepcopy(config))


def _built(kind: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """Builds a model as AutoModelForCausalLM.from_config does."""
    return constructor_of(kind)(config, dtype=torch.float32)


def _choices(module: nn.Module) -> Iterator[tuple[str, bool | str | float | None]]:
    """Yields the plain values of a module by name."""
    for name, value in vars(module).items():
        if not name.startswith("_") and (
            value is None or isinstance(value, bool | str | int | float)
        ):
            yield name, value


def _numbers_of_modules(model: nn.Module) -> set[tuple[type, str]]:
    """Returns the class and name of values that only number the modules, as layer_idx does: no two
    modules of the class share one."""
    found: dict[tuple[type, str], list[object]] = {}
    for module in model.modules():
        for name, value in _choices(module):
            found.setdefault((type(module), name), []).append(value)
    return {
        key
        for key, values in found.items()
        if len(values) > 1
        and all(type(value) is int for value in values)
        and len(set(values)) == len(values)
    }


def _kinds(model: nn.Module, numbers: set[tuple[type, str]]) -> set[tuple[object, ...]]:
    """Returns the kinds of modules: the class, and every choice of the module (a flag, a word,
    whether a value is present, whether a number is zero: many models write a flag as 0 or 1).

    numbers: of _numbers_of_modules, which are no choices."""
    kinds = set()
    for module in model.modules():
        choices = [
            (name, value if value is None or isinstance(value, str) else bool(value))
            for name, value in _choices(module)
            if (type(module), name) not in numbers
        ]
        kinds.add((type(module), *sorted(choices, key=str)))
    return kinds


def _words(kinds: set[tuple[object, ...]]) -> str:
    return ", ".join(sorted({getattr(kind[0], "__name__", "?") for kind in kinds})[:3])


def _parts(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from _parts(value)


def _value(config: PreTrainedConfig, name: str) -> Any:
    """Returns a field that may have another name in this config; None if it is missing."""
    return vars(config).get(config.attribute_map.get(name, name))


def _depth(config: PreTrainedConfig) -> int:
    depth = _value(config, "num_hidden_layers")
    if not isinstance(depth, int):  # some configs compute it from a list
        depth = getattr(config, "num_hidden_layers", None)
    return depth if isinstance(depth, int) else 0


def _settings_by_layer(config: PreTrainedConfig) -> dict[int, dict[str, Any]]:
    """Returns the settings of single layers that differ from the config's, by layer (transformers'
    per_layer_config)."""
    spec = vars(config).get("_heterogeneity_spec")
    return {} if spec is None else dict(spec.per_layer_overrides)


def _choices_of_layers(config: PreTrainedConfig) -> Iterator[list[int]]:
    """Yields choices of layers that may stand for all, fewest first: one layer of each kind
    according to the lists by layer, then the first few layers, then all."""
    text = config.get_text_config()
    depth = _depth(text)
    if layers := _one_of_each_kind(text, depth):
        yield layers
    seen = set()
    for count in (2, 3, 4, 6, 8, 12, 24, depth):
        if 0 < count <= depth and count <= 48 and count not in seen:
            seen.add(count)
            yield list(range(count))


def _one_of_each_kind(config: PreTrainedConfig, depth: int) -> list[int]:
    """Returns a layer of each kind according to the lists by layer, two at least; none if there is
    no such list, or if it makes every layer another kind."""
    lists: list[Any] = []
    for name, value in vars(config).items():
        if _numbers_layers(name, value, depth):
            lists.append([layer in value for layer in range(depth)])
        elif isinstance(value, list | tuple) and len(value) == depth:
            lists.append(value)
    if layer_settings := _settings_by_layer(config):
        lists.append([layer_settings.get(layer) for layer in range(depth)])
    first: dict[str, int] = {}
    for layer in range(depth):
        first.setdefault(repr([values[layer] for values in lists]), layer)
    layers = sorted(first.values())
    if not lists or len(layers) == depth:
        return []
    return layers if len(layers) > 1 else [layers[0], layers[0] + 1]


@dataclass(frozen=True)
class _Sizes:
    """Sizes of a shrunk config. depth: its layers. heads, key_heads: (before, after). factor:
    divides heads and widths."""

    depth: int
    heads: tuple[int, int] = (0, 0)
    key_heads: tuple[int, int] = (0, 0)
    factor: int = 1
    target: _Target = field(kw_only=True)


def _shrink(config: PreTrainedConfig, layers: Sequence[int], target: _Target) -> None:
    """Shrinks a config and the configs in it, in place. layers: those that stay."""
    for part in _parts(config):
        depth = _depth(part)
        is_text = part is config.get_text_config() or part is config
        part_layers = (
            layers if is_text else _one_of_each_kind(part, depth) or list(range(min(2, depth)))
        )
        depth_left = len(part_layers)
        sizes = _sizes(part, depth_left, target)
        count = part.attribute_map.get("num_hidden_layers", "num_hidden_layers")
        follows_length = switches(part).dynamic_from is not None
        layer_settings = _settings_by_layer(part)
        for name, value in list(vars(part).items()):
            if name.startswith("_") or isinstance(value, bool) or name in ("id2label", "label2id"):
                continue
            if depth and name == count:
                setattr(part, name, depth_left)
            elif depth and isinstance(value, int) and _STACK.search(name):
                setattr(part, name, max(1, value * depth_left // depth))
            elif isinstance(value, int | float) and _LIMIT.search(name):
                setattr(part, name, min(value, LIMIT))
            elif isinstance(value, int):
                setattr(part, name, _shrink_number(name, value, sizes))
            elif isinstance(value, list | tuple | dict):
                setattr(part, name, _shrink_list(name, value, part_layers, depth, sizes))
        if follows_length:
            part.max_position_embeddings = target.switch
        if layer_settings:
            renumbered = _renumbered(layer_settings, part_layers)
            part.per_layer_config = _shrink_value("", renumbered, range(depth_left), 0, sizes)


def _sizes(config: PreTrainedConfig, depth: int, target: _Target) -> _Sizes:
    """Chooses few heads, and two key heads if there were more; the size of a head stays."""
    if not target.narrow:
        return _Sizes(depth, target=target)
    heads = _value(config, "num_attention_heads") or _value(config, "num_heads")
    hidden = _value(config, "hidden_size")
    if not isinstance(hidden, int):
        return _Sizes(depth, target=target)
    if not isinstance(heads, int):
        return _Sizes(depth, factor=max(1, hidden // (64 * target.narrow)), target=target)
    kv = _value(config, "num_key_value_heads")
    kv = kv if isinstance(kv, int) and 0 < kv <= heads else heads
    few_kv = 2 if kv % 2 == 0 else kv
    skipped = 1
    for few in range(4 if 1 < kv < heads else 2, heads):
        factor, rest = divmod(heads, few)
        new_kv = few if kv == heads else few_kv
        fits = rest == 0 and hidden % factor == 0 and few % new_kv == 0 and hidden // factor >= 32
        if fits and skipped < target.narrow:
            skipped += 1
        elif fits:
            return _Sizes(depth, (heads, few), (kv, new_kv), factor, target=target)
    return _Sizes(depth, target=target)


def _shrink_number(name: str, value: int, sizes: _Sizes) -> int:
    """Returns the copy's value of a field with this name."""
    if value <= 0:
        return value
    if name.endswith("token_id"):
        return min(value, VOCABULARY - 1)
    if "vocab" in name and name.endswith(("vocab_size", "per_layer_input")):
        return min(value, VOCABULARY)
    if name == "original_max_position_embeddings":
        return sizes.target.switch
    if _PLACES.search(name):
        return max(value, 4 * SWITCH)
    if _is_span(name):
        return min(value, sizes.target.window)
    if _DEPTH.search(name):
        return min(value, max(sizes.depth - 1, 1))
    if _CHOSEN.search(name) or name in ("n_group", "num_expert_group", "topk_group"):
        return min(value, 2)
    if _EXPERTS.search(name) and "shared" not in name:
        return min(value, EXPERTS)
    if _GROUPS.search(name):
        return math.gcd(value, sizes.heads[1]) if sizes.heads[1] else value
    # Few heads that choose keys would all score zero at once, and ties are broken by the length of
    # the text.
    if (_HEADS.search(name) or "num_key_value" in name) and "index" not in name:
        for before, after in (sizes.heads, sizes.key_heads):
            if value == before:
                return after
        return _divided(value, sizes.factor)
    if _INNER.search(name):
        small = _divided(value, sizes.factor)
        return min(small, 64) if sizes.target.thin else small
    return _divided(value, sizes.factor) if _WIDTH.search(name) else value


def _divided(value: int, factor: int) -> int:
    return value // factor if value % factor == 0 else value


def _is_span(name: str) -> bool:
    return bool(_SPAN.search(name)) and not _NOT_SPAN.search(name)


def _shrink_list(name: str, value: Any, layers: Sequence[int], depth: int, sizes: _Sizes) -> Any:
    """Removes the entries of removed layers from lists by layer, and renumbers lists of layers."""
    if isinstance(value, dict):
        if value and all(str(key).isdigit() for key in value):
            return {
                k: _shrink_value(name, v, layers, depth, sizes)
                for k, v in _renumbered(value, layers).items()
            }
        inside = name if _is_span(name) else ""
        return {
            key: _shrink_value(str(key) + inside, entry, layers, depth, sizes)
            for key, entry in value.items()
        }
    if _numbers_layers(name, value, depth):
        return type(value)(new for new, old in enumerate(layers) if old in value)
    if depth and len(value) == depth and not _BY_PART.search(name):
        return type(value)(_shrink_value(name, value[old], layers, depth, sizes) for old in layers)
    return value


def _numbers_layers(name: str, value: Any, depth: int) -> bool:
    """Whether a field lists layers by number, each once; as long as the model is deep it lists all
    of them. Other lists of that length hold a value for each layer."""
    return bool(
        isinstance(value, list | tuple)
        and value
        and re.search(r"layer|idx|ids|index", name)
        and all(type(entry) is int and 0 <= entry < depth for entry in value)
        and len(set(value)) == len(value)
    )


def _renumbered(value: dict[Any, Any], layers: Sequence[int]) -> dict[Any, Any]:
    """Renumbers a dict by layer; some configs write the numbers with zeros in front."""
    new = {}
    for key, entry in value.items():
        if int(key) in layers:
            place = layers.index(int(key))
            new[str(place).zfill(len(key)) if isinstance(key, str) else place] = entry
    return new


def _shrink_value(name: str, value: Any, layers: Sequence[int], depth: int, sizes: _Sizes) -> Any:
    if isinstance(value, dict):
        return _shrink_list(name, value, layers, depth, sizes)
    if type(value) in (int, float) and _LIMIT.search(name):
        return min(value, LIMIT)
    return _shrink_number(name, value, sizes) if type(value) is int else value


def drawn(kind: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """Builds a model with random weights so wide that tokens differ strongly, and a wrong mask,
    position or scale shows."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(0)  # the CPU's alone: only that is restored
        model = _built(kind, config)
        tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        for module in model.modules():
            for parameter in module.parameters(recurse=False):
                if id(parameter) in tables:
                    parameter.data.normal_(0.0, 0.3)
                elif parameter.dim() == 1:
                    parameter.data.add_(torch.randn(parameter.shape) * 0.1)
                elif parameter.dim() == 2 and not isinstance(module, nn.Conv1d):
                    parameter.data.normal_(0.0, 1.5 * max(parameter.shape[-1], 1) ** -0.5)
                elif parameter.dim() == 3 and not isinstance(module, nn.Conv1d):
                    parameter.data.normal_(0.0, 1.5 * min(parameter.shape[1:]) ** -0.5)
    return model.eval().requires_grad_(False)
