"""Which modules a method's settings name: the matching rules of PEFT, and an error where it is
silent.

A list entry t matches a path p if p == t or p ends with "." + t. A string is one regular expression
that matches the whole path. `all-linear` is every linear layer but the output head, fused experts
included. A router that multiplies by its weight itself is adapted where it is named, and so is a
layer where PEFT refuses LoRA. A rank or alpha pattern matches at the end of a path, from a dot on;
the first that matches wins.
"""

import difflib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from veneer.adapters.config import LowRank
from veneer.adapters.methods.experts import expert_parameters
from veneer.adapters.placement.idle import in_any_layer
from veneer.errors import ConfigError
from veneer.linear import PackedModule, frozen_linear, is_plain_embedding, matrix_shape
from veneer.patterns import pattern


@dataclass(frozen=True)
class Targets:
    """Paths in the base model: linear layers, embeddings, 3-D expert parameters, routers, fully
    trained modules, biases."""

    linears: list[str]
    embeddings: list[str]
    experts: list[str]
    routers: list[str]
    trained: list[str]
    biases: list[str]
    adaptable: int
    """How many linear layers and expert parameters the model has, the head only where it is
    adapted."""


def ends_with(path: str, entry: str) -> bool:
    return path == entry or path.endswith("." + entry)


def layer_number(path: str) -> int | None:
    """The first number among a path's segments: which layer the module belongs to."""
    return next((int(segment) for segment in path.split(".") if segment.isdigit()), None)


def near(name: str, names: Sequence[str]) -> str:
    """What exists and resembles a name that does not: by last segments, so a message stays
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
    """Resolve the settings on a base's own modules (wrapping.plain_modules); head: its own output
    head.

    read_past: weights that the model takes past their modules (placement/reads.py). idle: places
    that no gradient reaches (placement/idle.py). refused: modules where PEFT refuses LoRA
    (placement/reads.py). all-linear leaves all three out. An entry that names a module of `refused`
    gets it; one that matches idle places and others gets the others: q_proj is the language
    model's, not its tower's.

    Raises ConfigError with every entry that names nothing, or only places where an update would not
    act or not train.
    """
    places = _places(modules, head=head, read_past=read_past, idle=idle, refused=refused)
    faults: list[str] = []
    trained = _trained(modules, config, faults)
    chosen = _left(places, config, _named(places, config, faults), trained, faults)
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
    taken = set(chosen)
    return Targets(
        linears=[p for p in places.linears if p in taken],
        embeddings=[p for p in places.embeddings if p in taken],
        experts=[p for p in places.experts if p in taken],
        routers=[p for p in places.routers if p in taken],
        trained=trained,
        biases=[p for p in _biases(modules, config, chosen, read_past) if not _within(p, trained)],
        adaptable=places.adaptable(chosen),
    )


# what the model has


@dataclass(frozen=True)
class _CandidateModules:
    """Where a low-rank update could stand, by kind, and where it would not act or not train.

    head     the output head's path
    past     of all of them, those whose weight the model takes past its module
    still    those that no gradient reaches
    refused  those where PEFT refuses LoRA
    """

    linears: list[str]
    embeddings: list[str]
    experts: list[str]
    routers: list[str]
    head: str | None
    past: frozenset[str] = frozenset()
    still: frozenset[str] = frozenset()
    refused: frozenset[str] = frozenset()

    @property
    def everything(self) -> list[str]:
        return [*self.linears, *self.embeddings, *self.experts, *self.routers]

    @property
    def all_linear(self) -> list[str]:
        """Linear layers but the head, and fused experts; nothing that would not train or that PEFT
        refuses."""
        unfit = {self.head, *self.past, *self.still, *self.refused}
        return [p for p in (*self.linears, *self.experts) if p not in unfit]

    def adaptable(self, chosen: Sequence[str]) -> int:
        """How many could be: the head, and a linear layer that is unfit, only where they are
        chosen."""
        return len({*self.all_linear, *self.experts, *chosen})


def _places(
    modules: Mapping[str, nn.Module],
    *,
    head: nn.Module | None,
    read_past: Collection[str],
    idle: Collection[str],
    refused: Collection[str],
) -> _CandidateModules:
    """What the model has."""
    found = _CandidateModules(
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
        found,
        past=frozenset(p for p in found.everything if _weight(p, modules) in read_past),
        still=frozenset(p for p in found.everything if _is_idle(p, modules, idle)),
        refused=frozenset(refused),
    )


# what the settings name


def _trained(modules: Mapping[str, nn.Module], config: LowRank, faults: list[str]) -> list[str]:
    """Modules that the settings train in full."""
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
    """What `targets` names, before anything is left out."""
    if config.targets == "all-linear":
        return places.all_linear
    if not isinstance(config.targets, str):
        return _by_entries(config.targets, "targets", places.everything, faults, places.still)
    chosen = [path for path in places.everything if pattern(config.targets).full(path)]
    chosen = [path for path in chosen if path not in places.still] or chosen
    if not chosen:
        faults.append(
            f"targets {config.targets!r} is a regular expression and matches no whole path; for"
            f" instance '.*{places.linears[-1].rsplit('.', 1)[-1]}' would;"
            f" {near(config.targets, places.everything)}"
        )
    return chosen


def _by_entries(
    entries: Sequence[str],
    what: str,
    among: Sequence[str],
    faults: list[str],
    still: Collection[str] = (),
) -> list[str]:
    """Paths that entries name, exactly or by their ending, those of `still` where an entry names no
    others; `what`: the setting that lists them."""
    found: set[str] = set()
    by_ending: dict[
        str, list[str]
    ] = {}  # an adapter from a file lists every module: no loop in a loop
    for path in among if entries else ():
        for start in (0, *(i + 1 for i, c in enumerate(path) if c == ".")):
            by_ending.setdefault(path[start:], []).append(path)
    for entry in entries:
        hits = by_ending.get(entry, [])
        if not hits:
            faults.append(f"{what} {entry!r} matches no module; {near(entry, among)}")
        found.update([path for path in hits if path not in still] or hits)
    return [path for path in among if path in found]


# what is left out, and why


def _left(
    places: _CandidateModules,
    config: LowRank,
    named: Sequence[str],
    trained: Sequence[str],
    faults: list[str],
) -> list[str]:
    """What stays of it: not what `exclude` names, nor what trains in full, nor another layer than
    `layers` has."""
    excluded: set[str] = set()
    for entry in config.exclude:
        hits = _names(entry, places.everything)
        if not hits:
            faults.append(f"exclude {entry!r} matches no module; {near(entry, places.everything)}")
        excluded.update(hits)
    left = [path for path in named if path not in excluded and not _within(path, trained)]
    if not config.layers:
        return left
    fit = (path for path in places.everything if path not in places.still)
    numbers = {number for path in fit if (number := layer_number(path)) is not None}
    if unknown := sorted(set(config.layers) - numbers):
        faults.append(
            f"layers {unknown} do not exist; the model has layers 0-{max(numbers, default=-1)}"
        )
    return [path for path in left if layer_number(path) in config.layers]


def _pattern_faults(chosen: Sequence[str], config: LowRank) -> list[str]:
    """Ranks and alphas of places that are not adapted."""
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
    """Modules whose biases the settings train."""
    meant = {"none": [], "lora_only": [p for p in chosen if p in modules], "all": list(modules)}[
        config.bias
    ]
    return [
        path
        for path in meant
        if "bias" in dict(modules[path].named_parameters(recurse=False))
        and f"{path}.bias" not in read_past
    ]


def _within(path: str, modules: Sequence[str]) -> bool:
    """Whether a path is one of the modules, or lies in one."""
    return any(path == module or path.startswith(module + ".") for module in modules)


def _names(entry: str, paths: list[str]) -> list[str]:
    """Paths that an exclude entry names: exactly, by ending, or as a regular expression of the
    whole path."""
    return [p for p in paths if ends_with(p, entry) or pattern(entry).full(p)]


def _weight(path: str, modules: Mapping[str, nn.Module]) -> str:
    """The parameter that a place's update belongs to: experts' places are parameters already."""
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
    """What is named and would not act or not train, places of one name as one."""
    held = [f"{path}.{name}" for path in trained for name, _ in modules[path].named_parameters()]
    named = [
        weight for weight in [*(_weight(p, modules) for p in chosen), *held] if weight in read_past
    ]
    past = (
        "the model takes this weight itself, past the module, so what stands beside the module"
        " would not act"
    )
    still = (
        "no gradient of what the model predicts comes back here (an index picks by number), so it"
        " would not train"
    )
    without = [path for path in [*chosen, *trained] if _is_idle(path, modules, idle)]
    return [*_by_kind(named, past), *_by_kind(without, still)]


def _by_kind(paths: Sequence[str], fault: str) -> list[str]:
    kinds = Counter(".".join(path.split(".")[-2:]) for path in paths)
    return [
        f"{kind}, {count} {'place' if count == 1 else 'places'}: {fault}; leave it out (exclude)"
        for kind, count in kinds.items()
    ]
