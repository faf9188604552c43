"""Matches settings and slots by PEFT's rules, in both directions.

A list entry matches a path that equals it or ends with it after a dot; a string is one regular
expression of the whole path; exclusions and fully trained modules are removed first. A rank or
alpha pattern matches at the end of a path, from a dot on, and the first in the file's order wins.
PEFT sorts patterns when it saves, which can change the meaning, so patterns written here never
overlap. Not known here: files, tensors. Facts: PEFT 0.21.2, peft/tuners/tuners_utils.py,
peft/utils/other.py.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from torch import nn

from veneer.adapters.config import LowRank
from veneer.adapters.methods.lora import LowRankLayer
from veneer.adapters.placement.attachment import Attachment
from veneer.adapters.placement.wrapping import plain_modules
from veneer.formats.peft.config import PeftLoRA, variant_of
from veneer.formats.peft.tensors import Modules, Slot, slot_of, written_slots
from veneer.linear import frozen_linear, is_transposed_linear
from veneer.patterns import FirstMatch, compiled, pattern


def peft_config(
    attachment: Attachment, model: nn.Module, *, name_or_path: str | None, revision: str | None
) -> PeftLoRA:
    """Returns PEFT's settings with every name resolved: exact targets, exclusive and anchored
    patterns."""
    modules = plain_modules(model)
    config = attachment.config
    assert isinstance(config, LowRank)
    slots = written_slots(attachment, modules)
    by_module = [slot.owner for slot in slots if slot.parameter is None]
    by_parameter = [slot.key for slot in slots if slot.parameter is not None]
    layers = {path: cast(LowRankLayer, layer) for path, layer in attachment.layers.items()}
    rank, alpha = config.stored_strength(config.rank, config.alpha)
    strength_by_path = {
        path: config.stored_strength(layer.rank, layer.alpha) for path, layer in layers.items()
    }
    use_dora, lora_bias = variant_of(config)
    peft_settings = PeftLoRA(
        r=rank,
        lora_alpha=alpha,
        use_rslora=config.rslora,
        use_dora=use_dora,
        lora_bias=lora_bias,
        rank_pattern={
            f"^{re.escape(slot.key)}": strength_by_path[slot.path][0]
            for slot in slots
            if strength_by_path[slot.path][0] != rank
        },
        alpha_pattern={
            f"^{re.escape(slot.key)}": strength_by_path[slot.path][1]
            for slot in slots
            if strength_by_path[slot.path][1] != alpha
        },
        target_modules=compact(by_module, modules),
        target_parameters=compact(by_parameter, _parameter_paths(modules), longest=2)
        if by_parameter
        else None,
        # PEFT has no dropout for inputs of parameters and refuses a file with it
        lora_dropout=0.0 if by_parameter else config.dropout,
        bias=config.bias,
        modules_to_save=sorted(attachment.trained) or None,
        alora_invocation_tokens=list(attachment.invocation) or None,
        fan_in_fan_out=any(is_transposed_linear(modules[path]) for path in by_module),
        base_model_name_or_path=name_or_path,
        revision=revision,
    )
    assert [slot.key for slot in matched_slots(peft_settings, modules, head=None)] == [
        s.key for s in _in_order(slots, modules)
    ]
    return peft_settings


def compact(paths: Sequence[str], universe: Iterable[str], *, longest: int = 1) -> list[str]:
    """Returns sorted names that match exactly `paths` among `universe`.

    They are endings of up to `longest` segments if these match nothing else, else full paths.
    """
    in_all = Counter(ending for path in universe for ending in _endings(path, longest))
    in_paths = Counter(ending for path in paths for ending in _endings(path, longest))
    return sorted(
        {next((e for e in _endings(p, longest) if in_all[e] == in_paths[e]), p) for p in paths}
    )


def _endings(path: str, longest: int) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[-count:]) for count in range(1, min(longest, len(parts)) + 1)]


def _parameter_paths(modules: Modules) -> list[str]:
    return [
        f"{path}.{name}"
        for path, module in modules.items()
        for name, _ in module.named_parameters(recurse=False)
    ]


def _in_order(slots: Sequence[Slot], modules: Modules) -> list[Slot]:
    order = {path: number for number, path in enumerate(modules)}
    return sorted(slots, key=lambda slot: (order[slot.owner], slot.path))


def matched_slots(config: PeftLoRA, modules: Modules, *, head: str | None) -> list[Slot]:
    """Returns the slots that the settings name on this model by PEFT's rules, in the model's order.

    target_modules null (PEFT's default for the architecture) matches nothing here: the caller knows
    the file's tensors. head: the output head's path, which all-linear leaves out
    """
    saved, excluded, listed = map(
        _name_matcher, (config.modules_to_save, config.exclude_modules, config.target_modules)
    )
    parameters = _name_matcher(config.target_parameters)
    slots = []
    for path in modules:
        if not path or excluded(path) or any(saved(parent) for parent in _self_and_parents(path)):
            continue
        if (
            _is_target(config, path, listed, modules, head)
            and (slot := slot_of(path, modules)) is not None
        ):
            slots.append(slot)
    for path in filter(parameters, _parameter_paths(modules)):
        owner, _, name = path.rpartition(".")
        parameter_slot = slot_of(owner, modules, as_parameter=True) if name == "weight" else None
        if (parameter_slot := parameter_slot or slot_of(path, modules)) is not None:
            slots.append(parameter_slot)
    return _in_order(slots, modules)


def _name_matcher(entries: list[str] | str | None) -> Callable[[str], bool]:
    """Returns a function that matches paths. A list holds names and endings, a string one regular
    expression."""
    if isinstance(entries, str):
        return pattern(entries).full
    if not entries:
        return lambda path: False
    known = frozenset(entries)
    return lambda path: any(ending in known for ending in _endings(path, path.count(".") + 1))


def _self_and_parents(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


def _is_target(
    config: PeftLoRA, path: str, listed: Callable[[str], bool], modules: Modules, head: str | None
) -> bool:
    targets, layer_filter = config.target_modules, config.layers_to_transform
    if isinstance(targets, str) and targets.lower() == "all-linear":
        return path != head and frozen_linear(modules[path]) is not None
    if not listed(path):
        return False
    if (
        layer_filter is None
        or layer_filter == []
        or isinstance(targets, str)
        or path in (targets or [])
    ):
        return True
    number = _layer_number(config, path)
    return number is not None and number in (
        [layer_filter] if isinstance(layer_filter, int) else layer_filter
    )


def _layer_number(config: PeftLoRA, path: str) -> int | None:
    """Returns a layer's number as PEFT reads it.

    It is the first numbered segment after at least two others, or the one after the layer pattern.
    """
    patterns = config.layers_pattern or []
    patterns = [patterns] if isinstance(patterns, str) else patterns
    searches = [rf"(?:^|.*?\.){layer_pattern}\.(?P<number>\d+)\." for layer_pattern in patterns]
    for search in searches or [r".*?\.[^.]*\.(?P<number>\d+)\."]:
        if (match := compiled(search).match(path)) is not None:
            return int(match["number"])
    return None


@dataclass(frozen=True)
class Strength:
    """Rank and alpha of one update."""

    rank: int
    alpha: float

    def scaling(self, *, rslora: bool) -> float:
        return self.alpha / math.sqrt(self.rank) if rslora else self.alpha / self.rank


def strengths(config: PeftLoRA, slots: Sequence[Slot]) -> dict[str, Strength]:
    """Returns rank and alpha by path. Patterns match at the end of a slot's key; the first one
    wins."""
    ranks, alphas = FirstMatch(config.rank_pattern or {}), FirstMatch(config.alpha_pattern or {})
    return {
        slot.path: Strength(ranks.of(slot.key, config.r), alphas.of(slot.key, config.lora_alpha))
        for slot in slots
    }


def exact_settings(
    config: PeftLoRA, strength_by_path: Mapping[str, Strength], trained: Sequence[str]
) -> LowRank:
    """Returns settings that attach exactly these paths, with the file's ranks and alphas."""
    ranks: dict[int, list[str]] = {}
    alphas: dict[float, list[str]] = {}
    for path, strength in strength_by_path.items():
        ranks.setdefault(strength.rank, []).append(path)
        alphas.setdefault(strength.alpha, []).append(path)
    settings = config.method(
        rank=config.r,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
        rslora=config.use_rslora,
        targets=list(strength_by_path),
        rank_pattern={_any_of(paths): rank for rank, paths in ranks.items() if rank != config.r},
        alpha_pattern={
            _any_of(paths): alpha for alpha, paths in alphas.items() if alpha != config.lora_alpha
        },
        bias=config.bias,
        train_modules=list(trained),
    )
    return config.with_lora_fields(settings)


def _any_of(paths: Sequence[str]) -> str:
    return f"^({'|'.join(map(re.escape, paths))})"
