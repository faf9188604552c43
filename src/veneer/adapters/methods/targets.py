"""Resolves which modules a method's settings name, by PEFT's matching rules, with errors where PEFT
is silent.

A list entry t matches a path p if p == t or p ends with "." + t. A string is a regular expression
for the whole path. `all-linear` is every linear layer but the output head, fused experts included.
A router that multiplies by its weight itself is adapted only if it is named; so is a layer where
PEFT refuses LoRA. A rank or alpha pattern matches the end of a path, from a dot on; the first match
wins.
"""

import difflib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from veneer.adapters.config import LowRank
from veneer.adapters.methods.expert_stack import expert_parameters
from veneer.adapters.placement.idle import in_any_layer
from veneer.errors import ConfigError
from veneer.linear import PackedModule, frozen_linear, is_plain_embedding, matrix_shape
from veneer.patterns import pattern


@dataclass(frozen=True)
class Targets:
    """Paths in the base model, by kind. experts: 3-D parameters; trained: modules trained in
    full; biases: modules whose bias trains."""

    linears: list[str]
    embeddings: list[str]
    experts: list[str]
    routers: list[str]
    trained: list[str]
    biases: list[str]
    adaptable: int
    """Number of linear layers and expert parameters; the head counts only if it is adapted."""


def ends_with(path: str, entry: str) -> bool:
    return path == entry or path.endswith("." + entry)


def layer_number(path: str) -> int | None:
    """Returns the layer of a module: the first number among the segments of its path."""
    return next((int(segment) for segment in path.split(".") if segment.isdigit()), None)


def near(name: str, names: Sequence[str]) -> str:
    """Suggests existing names for an unknown one. Compares last segments, so messages stay
    short."""
    endings = sorted({n.rsplit(".", 1)[-1] for n in names})
    close = difflib.get_close_matches(name.rsplit(".", 1)[-1], endings, n=3, cutoff=0.5)
    return f"nearest: {', '.join(close)}" if close else f"the model has: {', '.join(endings)}"


def find_targets(
    modules: Mapping[str, nn.Module],
    config: LowRank,
    *,
    head: nn.Module | None,
    read_past: Collection[str],
    idle: Collection[str] = (),
    refused: Collection[str] = (),
) -> Targets:
    """Resolves the settings on a base's modules (wrapping.plain_modules).

    head       the output head
    read_past  weights that the model reads without calling their module (placement/reads.py)
    idle       modules that no gradient reaches (placement/idle.py)
    refused    modules where PEFT refuses LoRA (placement/reads.py)

    all-linear leaves all of these out. An entry may name a refused module. An entry that matches
    idle modules and others means the others: q_proj is the language model's, not the vision
    tower's. Raises ConfigError with every entry that matches nothing, or only modules where an
    update would not act or not train.
    """
    candidates = _find_candidates(
        modules, head=head, read_past=read_past, idle=idle, refused=refused
    )
    faults: list[str] = []
    trained = _trained(modules, config, faults)
    chosen = _drop_excluded(candidates, config, _named(candidates, config, faults), trained, faults)
    faults += _pattern_faults(chosen, config)
    faults += _unfit_faults(chosen, trained, modules, read_past=read_past, idle=idle)
    if not chosen and not faults:
        faults.append("after exclude and layers nothing is left to adapt")
    if faults:
        raise ConfigError(
            "the adapter's settings do not fit the model",
            faults,
            "Correct the names and start again.",
        )
    adapted = set(chosen)
    return Targets(
        linears=[p for p in candidates.linears if p in adapted],
        embeddings=[p for p in candidates.embeddings if p in adapted],
        experts=[p for p in candidates.experts if p in adapted],
        routers=[p for p in candidates.routers if p in adapted],
        trained=trained,
        biases=[p for p in _biases(modules, config, chosen, read_past) if not _within(p, trained)],
        adaptable=candidates.adaptable(chosen),
    )


# what the model has


@dataclass(frozen=True)
class _CandidateModules:
    """Modules that could get a low-rank update, by kind, and those where it would not work.

    head       path of the output head
    read_past  candidates whose weight the model reads without calling the module
    idle       candidates that no gradient reaches
    refused    modules where PEFT refuses LoRA
    """

    linears: list[str]
    embeddings: list[str]
    experts: list[str]
    routers: list[str]
    head: str | None
    read_past: frozenset[str] = frozenset()
    idle: frozenset[str] = frozenset()
    refused: frozenset[str] = frozenset()

    @property
    def everything(self) -> list[str]:
        return [*self.linears, *self.embeddings, *self.experts, *self.routers]

    @property
    def all_linear(self) -> list[str]:
        """Linear layers and fused experts, without the head and without those that do not work."""
        unfit = {self.head, *self.read_past, *self.idle, *self.refused}
        return [p for p in (*self.linears, *self.experts) if p not in unfit]

    def adaptable(self, chosen: Sequence[str]) -> int:
        """Returns the number of adaptable modules. The head and unfit linear layers count only if
        chosen."""
        return len({*self.all_linear, *self.experts, *chosen})


def _find_candidates(
    modules: Mapping[str, nn.Module],
    *,
    head: nn.Module | None,
    read_past: Collection[str],
    idle: Collection[str],
    refused: Collection[str],
) -> _CandidateModules:
    """Lists the candidates of a model."""
    candidates = _CandidateModules(
        linears=[path for path, module in modules.items() if frozen_linear(module) is not None],
        embeddings=[path for path, module in modules.items() if is_plain_embedding(module)],
        experts=[
            f"{path}.{name}"
            for path, module in modules.items()
            for name in expert_parameters(module)
        ],
        routers=[path for path, module in modules.items() if matrix_shape(module) is not None],
        head=next((path for path, module in modules.items() if module is head), None),
    )
    return replace(
        candidates,
        read_past=frozenset(p for p in candidates.everything if _weight(p, modules) in read_past),
        idle=frozenset(p for p in candidates.everything if _is_idle(p, modules, idle)),
        refused=frozenset(refused),
    )


# what the settings name


def _trained(modules: Mapping[str, nn.Module], config: LowRank, faults: list[str]) -> list[str]:
    """Returns the paths of modules that the settings train in full."""
    trained = _by_entries(
        config.train_modules, "train_modules", [path for path in modules if path], faults
    )
    for path in trained:
        if any(modules[path].children()):
            faults.append(
                f"train_modules: {path} holds other modules; name those (a head, a norm, an"
                " embedding)"
            )
        if isinstance(modules[path], PackedModule):
            faults.append(
                f"train_modules: the weight of {path} is held packed (quantize) and cannot train"
            )
    return trained


def _named(places: _CandidateModules, config: LowRank, faults: list[str]) -> list[str]:
    """Returns the paths that `targets` names, before any are left out."""
    if config.targets == "all-linear":
        return places.all_linear
    if not isinstance(config.targets, str):
        return _by_entries(config.targets, "targets", places.everything, faults, places.idle)
    chosen = [path for path in places.everything if pattern(config.targets).full(path)]
    chosen = [path for path in chosen if path not in places.idle] or chosen
    if not chosen:
        faults.append(
            f"targets {config.targets!r} is a regular expression and matches no whole path; for"
            f" instance '.*{places.linears[-1].rsplit('.', 1)[-1]}' would;"
            f" {near(config.targets, places.everything)}"
        )
    return chosen


def _by_entries(
    entries: Sequence[str],
    setting: str,
    paths: Sequence[str],
    faults: list[str],
    idle: Collection[str] = (),
) -> list[str]:
    """Returns the paths that entries name, exactly or by their ending. Paths of `idle` count only
    if an entry matches no others. setting: the name of the setting, for errors."""
    matched: set[str] = set()
    # Indexed by ending, because an adapter from a file lists every module.
    by_ending: dict[str, list[str]] = {}
    for path in paths if entries else ():
        for start in (0, *(i + 1 for i, c in enumerate(path) if c == ".")):
            by_ending.setdefault(path[start:], []).append(path)
    for entry in entries:
        hits = by_ending.get(entry, [])
        if not hits:
            faults.append(f"{setting} {entry!r} matches no module; {near(entry, paths)}")
        matched.update([path for path in hits if path not in idle] or hits)
    return [path for path in paths if path in matched]


# what is left out, and why


def _drop_excluded(
    places: _CandidateModules,
    config: LowRank,
    named: Sequence[str],
    trained: Sequence[str],
    faults: list[str],
) -> list[str]:
    """Drops paths that `exclude` names, that train in full, or that are not in `layers`."""
    excluded: set[str] = set()
    for entry in config.exclude:
        hits = _names(entry, places.everything)
        if not hits:
            faults.append(f"exclude {entry!r} matches no module; {near(entry, places.everything)}")
        excluded.update(hits)
    left = [path for path in named if path not in excluded and not _within(path, trained)]
    if not config.layers:
        return left
    fit = (path for path in places.everything if path not in places.idle)
    numbers = {number for path in fit if (number := layer_number(path)) is not None}
    if unknown := sorted(set(config.layers) - numbers):
        faults.append(
            f"layers {unknown} do not exist; the model has layers 0-{max(numbers, default=-1)}"
        )
    return [path for path in left if layer_number(path) in config.layers]


def _pattern_faults(chosen: Sequence[str], config: LowRank) -> list[str]:
    """Returns the faults of rank and alpha patterns that match no adapted module."""
    return [
        f"{field} {source!r} matches no targeted module; {near(source, chosen)}"
        for field, patterns in (
            ("rank_pattern", config.rank_pattern),
            ("alpha_pattern", config.alpha_pattern),
        )
        for source in patterns
        if chosen and not any(pattern(source).ends(path) for path in chosen)
    ]


def _biases(
    modules: Mapping[str, nn.Module],
    config: LowRank,
    chosen: Sequence[str],
    read_past: Collection[str],
) -> list[str]:
    """Returns the paths of modules whose biases the settings train."""
    paths = {"none": [], "lora_only": [p for p in chosen if p in modules], "all": list(modules)}[
        config.bias
    ]
    return [
        path
        for path in paths
        if "bias" in dict(modules[path].named_parameters(recurse=False))
        and f"{path}.bias" not in read_past
    ]


def _within(path: str, modules: Sequence[str]) -> bool:
    """Whether a path is one of the modules or inside one."""
    return any(path == module or path.startswith(module + ".") for module in modules)


def _names(entry: str, paths: list[str]) -> list[str]:
    """Returns the paths that an exclude entry names: exactly, by ending, or as a regular expression
    for the whole path."""
    return [p for p in paths if ends_with(p, entry) or pattern(entry).full(p)]


def _weight(path: str, modules: Mapping[str, nn.Module]) -> str:
    """Returns the weight that a target's update changes. A target in experts is a parameter
    already."""
    return f"{path}.weight" if path in modules else path


def _is_idle(path: str, modules: Mapping[str, nn.Module], idle: Collection[str]) -> bool:
    return in_any_layer(path if path in modules else path.rpartition(".")[0]) in idle


def _unfit_faults(
    chosen: Sequence[str],
    trained: Sequence[str],
    modules: Mapping[str, nn.Module],
    *,
    read_past: Collection[str],
    idle: Collection[str],
) -> list[str]:
    """Returns the faults of named modules where an update would not act or not train, one per
    name."""
    parameters = [
        f"{path}.{name}" for path in trained for name, _ in modules[path].named_parameters()
    ]
    weights_past = [
        weight
        for weight in [*(_weight(p, modules) for p in chosen), *parameters]
        if weight in read_past
    ]
    past_fault = (
        "the model reads this weight without calling its module, so an adapter here would not act"
    )
    idle_fault = (
        "no gradient of the model's predictions reaches this module, so an adapter here would not"
        " train"
    )
    idle_paths = [path for path in [*chosen, *trained] if _is_idle(path, modules, idle)]
    return [*_by_kind(weights_past, past_fault), *_by_kind(idle_paths, idle_fault)]


def _by_kind(paths: Sequence[str], fault: str) -> list[str]:
    kinds = Counter(".".join(path.split(".")[-2:]) for path in paths)
    return [
        f"{kind}, {count} {'place' if count == 1 else 'places'}: {fault}; leave it out (exclude)"
        for kind, count in kinds.items()
    ]
