"""What a trained adapter starts from: nothing, an existing adapter, or the sum of several.

An adapter continues with its own settings, PEFT's too, but for the ratio of its learning rates. A
larger rank keeps its update and adds directions to it. Existing values are copied bit for bit: a
run of no steps would write the same tensors.
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer.adapters.combinations import refuse_combining
from veneer.adapters.config import AdapterConfig
from veneer.adapters.labels import HeadSettings
from veneer.adapters.placement.attachment import Attachment
from veneer.adapters.placement.score_head import ScoreHead
from veneer.adapters.placement.token_rows import AddedTokens
from veneer.adapters.preamble import NONE, shared
from veneer.data.examples import Example
from veneer.errors import AdapterMismatchError, ConfigError, hide_path
from veneer.formats.adapter import StoredAdapter, read_adapter
from veneer.formats.loading import load_adapter
from veneer.library.library import Library
from veneer.merge.combine.combine import Recipe
from veneer.merge.combine.combine_run import combine_adapters
from veneer.models.frozen_base import FrozenBase
from veneer.models.starts.initial_values import FreshAdapter, begin
from veneer.objectives.config import Classify
from veneer.training.config import RunConfig, StartFrom

ADAPTER_NAME = "trained"
_PARENT = "started from"


def begin_adapter(
    base: FrozenBase,
    config: RunConfig,
    examples: Sequence[Example],
    *,
    name: str = ADAPTER_NAME,
    tokens: AddedTokens | None = None,
    resumes: bool,
) -> tuple[RunConfig, FreshAdapter]:
    """Attaches and activates the adapter that trains; returns the run with all settings resolved.

    name: of the attachment. tokens: new tokens of the adapter. resumes: its values come from a
    checkpoint. Raises the errors of reading and fitting the parents.
    """
    assert isinstance(config.method, AdapterConfig)
    score = config.objective.head
    if not config.from_adapter or resumes:
        started = begin(
            base,
            config.method.for_learning_rate(config.learning_rate),
            name=name,
            seed=config.seed,
            examples=examples,
            tokens=tokens,
            score=score,
        )
    else:
        config, started = _from_parents(base, config, examples, name, tokens, score)
    base.routing.active = ((name, 1.0),)
    return config.model_copy(update={"method": started.attachment.config}), started


def with_tokens(config: RunConfig) -> RunConfig:
    """Returns the run with its parent's new tokens before its own.

    Raises ConfigError if the run learns from the base, which does not know them.
    """
    if len(config.from_adapter) != 1:
        return config
    manifest = read_adapter(Library().locate(config.from_adapter[0].adapter)).manifest
    parent_tokens = [] if manifest is None else manifest.new_tokens
    if parent_tokens and (config.objective.has_teacher or config.replay.rows is not None):
        learner = "replay" if config.replay.rows is not None else config.objective.name
        raise ConfigError(
            f"{learner} learns from a base that does not know the new tokens of"
            f" {config.from_adapter[0].adapter}",
            next_step="Start from another adapter, or from none.",
        )
    return config.model_copy(
        update={
            "new_tokens": [
                *parent_tokens,
                *(token for token in config.new_tokens if token not in parent_tokens),
            ]
        }
    )


def with_parent_settings(config: RunConfig) -> RunConfig:
    """Returns the run with the settings and tokens of its parents, without loading a base.

    Raises the errors of reading the parents, and ConfigError if the settings do not fit.
    """
    if not config.from_adapter:
        return config
    stored = [read_adapter(Library().locate(parent.adapter)) for parent in config.from_adapter]
    settings, ranks, set_by_user = (
        stored[0].config,
        [parent.config.update_rank for parent in stored],
        _settings_set(config),
    )
    if [parent.weight for parent in config.from_adapter] != [
        1.0
    ]:  # as _combine_parents adds them up
        for parent in stored:
            refuse_combining([(str(parent.folder), parent.contents)])
        settings = settings.of_rank(set_by_user.get("rank") or sum(rank or 0 for rank in ranks))
    merged = _merge_settings(settings, set_by_user).for_learning_rate(config.learning_rate)
    return with_tokens(config).model_copy(update={"method": merged})


def _from_parents(
    base: FrozenBase,
    config: RunConfig,
    examples: Sequence[Example],
    name: str,
    tokens: AddedTokens | None,
    score: HeadSettings | None,
) -> tuple[RunConfig, FreshAdapter]:
    folders = [Library().locate(parent.adapter) for parent in config.from_adapter]
    stored = [read_adapter(folder) for folder in folders]
    resolved_parents = [
        StartFrom(
            adapter=str(folder.absolute()), weight=parent.weight, content=adapter.content_hash
        )
        for parent, folder, adapter in zip(config.from_adapter, folders, stored, strict=True)
    ]
    _refuse_missing_variables(config, stored)
    set_by_user = _settings_set(config)
    with tempfile.TemporaryDirectory(prefix="veneer-") as scratch:
        source = _combine_parents(config, stored, set_by_user, Path(scratch) / "sum")
        with hide_path(_PARENT, " + ".join(parent.adapter for parent in config.from_adapter)):
            old = load_adapter(base, source, name=_PARENT)
        try:
            assert isinstance(old.config, AdapterConfig)
            settings = _merge_settings(old.config, set_by_user)
            settings = settings.for_learning_rate(config.learning_rate)
            if settings.keeps_values and config.weight_decay:
                raise ConfigError(
                    "weight_decay changes the adapter's frozen tokens, too",
                    next_step="Leave weight_decay 0.",
                )
            started = begin(
                base,
                settings,
                name=name,
                seed=config.seed,
                examples=examples,
                tokens=tokens,
                score=score,
            )
            _take_over(old, started.attachment)
            config = _keep_thresholds(config, old.score, started.attachment.score)
        finally:
            base.detach(_PARENT)
    sum_text = " + ".join(
        f"{parent.weight:g} * {parent.adapter}" if parent.weight != 1 else parent.adapter
        for parent in resolved_parents
    )
    line = f"continues {sum_text} ({', '.join(adapter.content_hash[:12] for adapter in stored)})"
    return config.model_copy(update={"from_adapter": resolved_parents}), FreshAdapter(
        started.attachment, None, [line, *started.lines]
    )


def _refuse_missing_variables(config: RunConfig, stored: Sequence[StoredAdapter]) -> None:
    """Raises ConfigError if the adapter was trained with template variables and this run sets
    none.
    """
    variables = shared(
        NONE if adapter.manifest is None else adapter.manifest.preamble for adapter in stored
    ).variables
    if variables and not config.template.variables:
        variables_text = ", ".join(
            f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in variables.items()
        )
        raise ConfigError(
            "the adapter was trained with template variables, and this run has none:"
            f" {variables_text}",
            next_step=(
                f"Set them again, template: {{variables: {{{variables_text}}}}}, with null for each"
                " that is to be left out."
            ),
        )


def _combine_parents(
    config: RunConfig, stored: Sequence[StoredAdapter], set_by_user: Mapping[str, Any], out: Path
) -> StoredAdapter:
    """Returns the parent, or the weighted sum of several as one adapter."""
    weights = [parent.weight for parent in config.from_adapter]
    if weights == [1.0]:
        return stored[0]
    rank = set_by_user.get("rank")
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


def _settings_set(config: RunConfig) -> dict[str, Any]:
    """Returns the method's settings that the user set."""
    return {name: getattr(config.method, name) for name in config.method.model_fields_set}


def _merge_settings(settings: AdapterConfig, set_by_user: Mapping[str, Any]) -> AdapterConfig:
    """Returns the adapter's settings with those that the user set. ConfigError if they do not
    fit.
    """
    faults = []
    if set_by_user.get("name", settings.name) != settings.name:
        faults.append(f"it is of method {settings.name}, and {set_by_user['name']} is asked for")
    if set_by_user.get("init", "default") != "default":
        faults.append(f"init {set_by_user['init']} says where a fresh one starts")
    rank, old_rank = set_by_user.get("rank"), settings.update_rank
    if rank is not None and old_rank is not None and rank < old_rank:
        faults.append(
            f"it has rank {old_rank}, and {rank} is asked for: a smaller one keeps its best"
            " directions alone"
        )
    if faults:
        step = (
            "Leave the method out to go on as it is. Smaller: veneer adapters combine --how svd"
            " --rank R."
        )
        raise ConfigError("the adapter cannot go on with these settings", faults, step)
    resized = (
        settings if rank is None or "alpha" in set_by_user else settings.of_rank(rank)
    )  # its update keeps its strength
    values = {
        **resized.model_dump(exclude={"lr_ratio"}),  # goes with the learning rate of this run
        **{
            n: v for n, v in set_by_user.items() if n in type(settings).model_fields and n != "init"
        },
    }
    if "alpha" not in set_by_user and rank is not None:
        values["alpha"] = resized.model_dump().get("alpha")
    if "init" in values:
        values["init"] = "default"
    return type(settings).model_validate(values)


@torch.no_grad()
def _take_over(old: Attachment, new: Attachment) -> None:
    """Copies the old adapter's values. AdapterMismatchError if the new one lacks some of its
    parts.
    """
    faults = [
        f"{path}: not trained with these settings" for path in old.layers.keys() - new.layers.keys()
    ]
    faults += [
        f"{path}: not trained with these settings" for path in old.values.keys() - new.values.keys()
    ]
    for path in old.layers.keys() & new.layers.keys():
        old_layer, new_layer = old.layers[path], new.layers[path]
        strength = old_layer.scaling / new_layer.scaling
        for part, value in old_layer.parts().items():
            target = new_layer.parts().get(part)
            if target is None or not _has_room(value, target):
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
    if old.score is not None:
        _take_over_head(old.score, new.score)
    if old.tokens is not None and new.tokens is not None:
        for path, old_rows in old.tokens.places.items():
            new.tokens.places[path].rows[: len(old_rows.ids)].copy_(old_rows.rows)


def _keep_thresholds(config: RunConfig, old: ScoreHead | None, new: ScoreHead | None) -> RunConfig:
    """Gives the new head the old one's thresholds; those that the run sets come first."""
    objective = config.objective
    if old is None or new is None or not isinstance(objective, Classify):
        return config
    thresholds = dict(old.settings.thresholds) | objective.thresholds
    new.settings = replace(new.settings, thresholds=tuple(sorted(thresholds.items())))
    kept = objective.model_copy(update={"thresholds": thresholds})
    return config.model_copy(update={"objective": kept})


def _take_over_head(old: ScoreHead, new: ScoreHead | None) -> None:
    """Copies a head's weights by label; labels that the old head does not have start at zero.

    Raises AdapterMismatchError if the new adapter has no head, or the outputs mean something else.
    """
    if new is None or new.settings.kind != old.settings.kind:
        kind = "none" if new is None else new.settings.kind
        raise AdapterMismatchError(
            "the adapter has a score head, and this run does not go on with it",
            [f"kind {old.settings.kind} there, {kind} with these settings"],
            f"Train it with objective: {{name: classify, kind: {old.settings.kind}}}.",
        )
    names = {name: number for number, name in enumerate(new.settings.output_names)}
    missing = [name for name in old.settings.output_names if name not in names]
    if missing:
        raise AdapterMismatchError(
            "the adapter's score head has labels that this run does not have",
            missing,
            "List all labels, the old ones too: objective.labels.",
        )
    for number, name in enumerate(old.settings.output_names):
        new.weight[names[name]].copy_(old.weight[number])


def _has_room(value: Tensor, target: Tensor) -> bool:
    return value.dim() == target.dim() and all(
        a <= b for a, b in zip(value.shape, target.shape, strict=True)
    )
