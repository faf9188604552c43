"""What an adapter that is trained starts from: nothing, an adapter that is there already, or the
sum of several.

An adapter goes on with its own settings, those of PEFT's too; a larger rank keeps its update and
adds directions to it. Values that it has are taken over bit for bit: a run of no steps would write
the same tensors.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer.adapters.config import AdapterConfig
from veneer.adapters.placement.attachment import Attachment
from veneer.adapters.placement.token_rows import AddedTokens
from veneer.adapters.preamble import NONE, shared
from veneer.data.examples import Example
from veneer.errors import AdapterMismatchError, ConfigError, told_as
from veneer.formats.adapter import StoredAdapter, load_adapter, read_adapter
from veneer.library.library import Library
from veneer.merge.combine.adapters import refuse_no_sum
from veneer.merge.combine.combine import Recipe
from veneer.merge.combine.combine_run import combine_adapters
from veneer.models.frozen_base import FrozenBase
from veneer.models.initial_values import FreshAdapter, begin
from veneer.training.config import RunConfig, StartFrom

ADAPTER_NAME = "trained"
_PARENT = "started from"


def begin_adapter(
    base: FrozenBase,
    config: RunConfig,
    examples: Sequence[Example],
    *,
    tokens: AddedTokens | None = None,
    resumes: bool,
) -> tuple[RunConfig, FreshAdapter]:
    """The adapter that trains, on the base and acting; the run with all settings resolved. tokens:
    those that it brings.

    resumes: its values come from a checkpoint. Raises what reading and fitting the parents raises.
    """
    assert isinstance(config.method, AdapterConfig)
    if not config.from_adapter or resumes:
        begun = begin(
            base,
            config.method,
            name=ADAPTER_NAME,
            seed=config.seed,
            examples=examples,
            tokens=tokens,
        )
    else:
        config, begun = _from_parents(base, config, examples, tokens)
    base.routing.active = ((ADAPTER_NAME, 1.0),)
    return config.model_copy(update={"method": begun.attachment.config}), begun


def with_tokens(config: RunConfig) -> RunConfig:
    """The run with the tokens that its parent brings, before those that it adds itself."""
    if len(config.from_adapter) != 1:
        return config
    manifest = read_adapter(Library().locate(config.from_adapter[0].adapter)).manifest
    theirs = [] if manifest is None else manifest.new_tokens
    return config.model_copy(
        update={"new_tokens": [*theirs, *(t for t in config.new_tokens if t not in theirs)]}
    )


def going_on(config: RunConfig) -> RunConfig:
    """The run with the settings and tokens of what it goes on from, as it would train them; no base
    is loaded.

    Raises what reading the parents raises, and ConfigError where the settings do not fit.
    """
    if not config.from_adapter:
        return config
    stored = [read_adapter(Library().locate(each.adapter)) for each in config.from_adapter]
    own, ranks, asked = (
        stored[0].config,
        [each.config.update_rank for each in stored],
        _asked(config),
    )
    if [each.weight for each in config.from_adapter] != [1.0]:  # as _one adds them up
        for each in stored:
            refuse_no_sum(each)
        own = own.of_rank(asked.get("rank") or sum(rank or 0 for rank in ranks))
    return with_tokens(config).model_copy(update={"method": _settings(own, asked)})


def _from_parents(
    base: FrozenBase, config: RunConfig, examples: Sequence[Example], tokens: AddedTokens | None
) -> tuple[RunConfig, FreshAdapter]:
    folders = [Library().locate(each.adapter) for each in config.from_adapter]
    stored = [read_adapter(folder) for folder in folders]
    known = [
        StartFrom(adapter=str(folder.absolute()), weight=each.weight, content=adapter.content_hash)
        for each, folder, adapter in zip(config.from_adapter, folders, stored, strict=True)
    ]
    _refuse_untold(config, stored)
    asked = _asked(config)
    with tempfile.TemporaryDirectory(prefix="veneer-") as scratch:
        source = _one(config, stored, asked, Path(scratch) / "sum")
        with told_as(_PARENT, " + ".join(each.adapter for each in config.from_adapter)):
            old = load_adapter(base, source, name=_PARENT)
        try:
            settings = _settings(old.config, asked)
            begun = begin(
                base,
                settings,
                name=ADAPTER_NAME,
                seed=config.seed,
                examples=examples,
                tokens=tokens,
            )
            _take_over(old, begun.attachment)
        finally:
            base.detach(_PARENT)
    said = " + ".join(f"{k.weight:g} * {k.adapter}" if k.weight != 1 else k.adapter for k in known)
    line = f"goes on from {said} ({', '.join(adapter.content_hash[:12] for adapter in stored)})"
    return config.model_copy(update={"from_adapter": known}), FreshAdapter(
        begun.attachment, None, [line, *begun.lines]
    )


def _refuse_untold(config: RunConfig, stored: Sequence[StoredAdapter]) -> None:
    """ConfigError: its template was told something when it was trained, and this run tells it
    nothing."""
    told = shared(
        NONE if each.manifest is None else each.manifest.preamble for each in stored
    ).variables
    if told and not config.template.variables:
        said = ", ".join(
            f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in told.items()
        )
        raise ConfigError(
            f"the adapter was trained with template variables, and this run has none: {said}",
            next_step=(
                f"Say them again, template: {{variables: {{{said}}}}}, or null for each that is to"
                " be left out."
            ),
        )


def _one(
    config: RunConfig, stored: Sequence[StoredAdapter], asked: Mapping[str, Any], out: Path
) -> StoredAdapter:
    """The adapter that is there, or the weighted sum of several, as they add up."""
    weights = [each.weight for each in config.from_adapter]
    if weights == [1.0]:
        return stored[0]
    rank = asked.get("rank")
    recipe = (
        Recipe("svd", rank=rank)
        if rank is not None
        else Recipe("cat" if len(stored) > 1 else "linear")
    )
    combine_adapters(
        [(a.folder, w) for a, w in zip(stored, weights, strict=True)],
        recipe,
        base=config.base,
        out=out,
    )
    return read_adapter(out)


def _asked(config: RunConfig) -> dict[str, Any]:
    """The method's settings that somebody gave."""
    return {name: getattr(config.method, name) for name in config.method.model_fields_set}


def _settings(own: AdapterConfig, asked: Mapping[str, Any]) -> AdapterConfig:
    """The adapter's own settings with those that are asked for. ConfigError: they are of something
    else."""
    faults = []
    if asked.get("name", own.name) != own.name:
        faults.append(f"it is of method {own.name}, and {asked['name']} is asked for")
    if asked.get("init", "default") != "default":
        faults.append(f"init {asked['init']} says where a fresh one starts")
    rank, before = asked.get("rank"), own.update_rank
    if rank is not None and before is not None and rank < before:
        faults.append(
            f"it has rank {before}, and {rank} is asked for: a smaller one keeps its best"
            " directions alone"
        )
    if faults:
        step = (
            "Leave the method out to go on as it is. Smaller: veneer adapters combine --how svd"
            " --rank R."
        )
        raise ConfigError("the adapter cannot go on with these settings", faults, step)
    grown = (
        own if rank is None or "alpha" in asked else own.of_rank(rank)
    )  # its update keeps its strength
    values = {
        **grown.model_dump(),
        **{n: v for n, v in asked.items() if n in type(own).model_fields and n != "init"},
    }
    if "alpha" not in asked and rank is not None:
        values["alpha"] = grown.model_dump().get("alpha")
    if "init" in values:
        values["init"] = "default"
    return type(own).model_validate(values)


@torch.no_grad()
def _take_over(old: Attachment, new: Attachment) -> None:
    """Values of the old one into the new one. AdapterMismatchError: it has places that the new one
    has not."""
    faults = [
        f"{path}: not trained with these settings" for path in old.layers.keys() - new.layers.keys()
    ]
    faults += [
        f"{path}: not trained with these settings" for path in old.values.keys() - new.values.keys()
    ]
    for path in old.layers.keys() & new.layers.keys():
        before, after = old.layers[path], new.layers[path]
        strength = before.scaling / after.scaling
        for part, value in before.parts().items():
            target = after.parts().get(part)
            if target is None or not _fits(value, target):
                shape = None if target is None else tuple(target.shape)
                faults.append(
                    f"{path}.{part}: {tuple(value.shape)} there, {shape} with these settings"
                )
                continue
            scaled = value if strength == 1 or part not in ("B", "offset") else value * strength
            target[tuple(slice(size) for size in value.shape)].copy_(scaled)
    if faults:
        raise AdapterMismatchError(
            "the adapter does not go into what these settings train",
            sorted(faults),
            "Leave targets, exclude, layers and train_modules as the adapter has them, or add to"
            " them.",
        )
    for path, value in old.values.items():
        new.values[path].copy_(value)
    if old.tokens is not None and new.tokens is not None:
        for path, mine in old.tokens.places.items():
            new.tokens.places[path].rows[: len(mine.ids)].copy_(mine.rows)


def _fits(value: Tensor, target: Tensor) -> bool:
    return value.dim() == target.dim() and all(
        a <= b for a, b in zip(value.shape, target.shape, strict=True)
    )
