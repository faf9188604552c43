"""Shows the contents of an adapter (`veneer adapters show`) and compares two (`diff`)."""

from __future__ import annotations

import math
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from veneer.cli.bases import add_dtype, load_plain_base
from veneer.cli.common import make_console, print_json
from veneer.cli.flags import add_value
from veneer.cli.library.adapters_ls import age, table
from veneer.training.output.loggers import flat
from veneer.wording import (
    folded,
    interval_of_95,
    millions,
    number,
    shown,
    shown_line,
    size,
    wrapped,
)

if TYPE_CHECKING:
    from veneer.formats.adapter import StoredAdapter
    from veneer.formats.manifest import HeldOut
    from veneer.formats.norms import LowRankUpdate
    from veneer.library.entry import Entry
    from veneer.library.library import Library
    from veneer.library.records import ObjectFacts

_BARS = "▁▂▃▄▅▆▇█"
MAX_CELLS = 48  # layers on one line; in deeper models, neighbours share a cell


def add_show(action: Callable[..., ArgumentParser]) -> None:
    show = action(
        "show", _show, "show one adapter: modules, ranks, size of the update by layer, lineage"
    )
    add_value(show, "adapter", "NAME[@V]", "adapter, or a folder")
    add_value(show, "--base", "B", "compare the update with this base's weights")
    add_dtype(show)


def add_diff(action: Callable[..., ArgumentParser]) -> None:
    diff = action(
        "diff", _diff, "compare two adapters: settings, and the angle between the updates"
    )
    add_value(diff, "one", "A", "NAME[@V] or a folder")
    add_value(diff, "other", "B")


def _show(args: Namespace, library: Library) -> int:
    from veneer.formats.adapter import read_adapter
    from veneer.formats.norms import base_norms, updates
    from veneer.library.examination import facts_of

    folder = library.locate(args.adapter)
    stored = read_adapter(folder)
    entry = library.get(args.adapter) if folder.parent == library.objects else None
    update_by_path, other_tensors = updates(stored)
    base = load_plain_base(args)
    base_norms_by_path = {} if base is None else base_norms(base, update_by_path)
    norms = {path: update.norm() for path, update in update_by_path.items()}
    modules: dict[str, dict[str, float | None]] = {
        path: {
            "rank": update.rank,
            "scaling": update.scaling,
            "norm": norms[path],
            "base_norm": base_norms_by_path.get(path),
        }
        for path, update in update_by_path.items()
    }
    facts = facts_of(stored)
    manifest = stored.manifest
    prompts = [] if entry is None else library.prompts(entry)
    if args.json:
        print_json(
            {
                **(
                    {"folder": str(folder), **facts.model_dump(mode="json")}
                    if entry is None
                    else entry.to_dict()
                ),
                "modules": modules,
                "other_tensors": {
                    name: list(tensor.shape) for name, tensor in other_tensors.items()
                },
                "recipe": None if manifest is None else manifest.recipe,
                "lineage": lineage(library, facts.parent),
                "notes": stored.notes,
                "prompts": prompts,
            }
        )
        return 0
    console = make_console()
    lines = _head(args.adapter, entry, stored, facts, update_by_path, len(other_tensors))
    sizes = {path: norm / (base_norms_by_path.get(path) or 1.0) for path, norm in norms.items()}
    lines += _picture(sizes, relative=bool(base_norms_by_path))
    if facts.metrics:
        lines.append(
            "  metrics   "
            + " · ".join(f"{shown_line(k)} {number(v)}" for k, v in sorted(facts.metrics.items()))
        )
    if manifest is not None and manifest.held_out is not None:
        lines.append("  held out  " + _held_out(manifest.held_out))
    if manifest is not None and manifest.recipe:
        lines.append("  recipe    " + " · ".join(_settings_texts(manifest.recipe)))
    if prompts:
        lines.append(f"  prompts   {len(prompts)} training prompts, kept in this library only")
    lines += [f"  from      {ancestor}" for ancestor in lineage(library, facts.parent)]
    lines += [f"  note      {note}" for note in stored.notes]
    for line in lines:
        console.print(folded(shown(line), max(console.width, 40)))
    return 0


def _held_out(losses: HeldOut) -> str:
    """Formats the loss before and after, with its interval."""
    before = "" if losses.before is None else f"{number(losses.before.value)} → "
    line = (
        f"loss {before}{number(losses.loss.value)}"
        f" ({interval_of_95(losses.loss.low, losses.loss.high)})"
    )
    if losses.change is not None:
        line += (
            f", change {number(losses.change.value)}"
            f" ({interval_of_95(losses.change.low, losses.change.high)})"
        )
    return f"{line} over {losses.rows:,} rows"


def _weights(stored: StoredAdapter) -> str:
    """Formats the type of the base's weights in training: bfloat16, bfloat16+nf4, ..."""
    fingerprint = None if stored.manifest is None else stored.manifest.base.fingerprint
    return f" · {fingerprint['dtype']}" if fingerprint else ""


def _head(
    title: str,
    entry: Entry | None,
    stored: StoredAdapter,
    facts: ObjectFacts,
    update_by_path: Mapping[str, LowRankUpdate],
    num_other_tensors: int,
) -> list[str]:
    title = title if entry is None else entry.reference
    size_line = (
        f"{title} · {facts.method} · {millions(facts.parameters)} parameters · {size(facts.bytes)}"
    )
    lines = [size_line]
    if entry is not None:
        tags = f" · {', '.join(entry.version.tags)}" if entry.version.tags else ""
        lines.append(f"  added     {age(entry.version.added)} ago{tags}")
        if entry.version.note:
            lines.append(f"  says      {entry.version.note}")
    digest = f" · {facts.base_digest[:12]}…" if facts.base_digest else ""
    proof = {
        "fingerprint": "by fingerprint",
        "stated": "as stated when it was added",
        "unverified": "unverified: only the name is known",
    }[facts.base_proof]
    lines.append(f"  base      {shown_line(facts.base or '?')}{_weights(stored)} · {proof}{digest}")
    lines.append(
        f"  content   {facts.content_hash[:12]}… · data {(facts.data_fingerprint or '?')[:12]}"
    )
    updates = list(update_by_path.values())
    parts = [f"{len(updates)} modules"] if updates else []
    for name, values in (
        ("rank", [update.rank for update in updates]),
        ("scaling", [update.scaling for update in updates]),
    ):
        if values:
            low, high = min(values), max(values)
            parts.append(f"{name} {low:.4g}" + (f" to {high:.4g}" if high > low else ""))
    if num_other_tensors:
        parts.append(f"{num_other_tensors} other tensor{'s' if num_other_tensors > 1 else ''}")
    lines.append(f"  changes   {' · '.join(parts)}")
    if stored.file.invocation:
        ids = ", ".join(map(str, stored.file.invocation))
        lines.append(f"  acts      from the last {ids} of the prompt on (token ids)")
    return lines


def _picture(norms: Mapping[str, float], *, relative: bool) -> list[str]:
    """Draws a line for each kind of module with a cell for each layer, taller for larger
    updates."""
    from veneer.formats.norms import by_kind

    kinds, outside_layers = by_kind(norms)
    if not norms:
        return []
    highest, deepest = max(norms.values()), max((max(row) for row in kinds.values()), default=0)
    share = math.ceil((deepest + 1) / MAX_CELLS)
    quantity = "‖ΔW‖ / ‖W‖" if relative else "‖ΔW‖"
    lines = [f"  {quantity} by layer, 0 to {deepest}"] if kinds else [f"  {quantity}"]
    width = max(len(name) for name in [*kinds, *outside_layers])
    for kind, row in kinds.items():
        cells = [_cell(row, start, share, highest) for start in range(0, deepest + 1, share)]
        low, high = number(min(row.values())), number(max(row.values()))
        lines.append(
            f"    {kind:<{width}}  {''.join(cells)}  {low if low == high else f'{low} to {high}'}"
        )
    return lines + [f"    {path:<{width}}  {number(norm)}" for path, norm in outside_layers.items()]


def _cell(row: Mapping[int, float], start: int, share: int, highest: float) -> str:
    values = [row[layer] for layer in range(start, start + share) if layer in row]
    if not values:
        return " "
    return (
        _BARS[min(int(len(_BARS) * max(values) / highest), len(_BARS) - 1)] if highest else _BARS[0]
    )


def lineage(library: Library, parent: str | None) -> list[str]:
    """Lists the adapters that it was continued from, nearest first, with their names in the
    library."""
    from veneer.library.lineage import ancestors

    return [
        f"{content[:12]}…" + (f" ({e.reference})" if e else " (not in the library)")
        for content, e in ancestors(library, parent)
    ]


def _settings_texts(values: Mapping[str, Any]) -> list[str]:
    """Formats settings as `name value`, without those that are null or empty."""
    return [
        f"{name} {number(value) if isinstance(value, float) else value}"
        for name, value in flat(values).items()
        if value not in (None, "", [], {})
    ]


def _diff(args: Namespace, library: Library) -> int:
    from veneer.formats.adapter import read_adapter
    from veneer.formats.norms import angle, updates

    first, second = (read_adapter(library.locate(name)) for name in (args.one, args.other))
    settings = _differences(_settings(first), _settings(second))
    angles = angle(updates(first)[0], updates(second)[0])
    if args.json:
        print_json(
            {
                "settings": {name: list(pair) for name, pair in settings.items()},
                "cosine": angles.total,
                "cosine_by_layer": angles.by_layer,
                "modules_in_both": angles.in_both,
                "only_one": angles.only_one,
                "only_other": angles.only_other,
            }
        )
        return 0
    console = make_console()
    leaves = _differences(
        *(_leaves({name: pair[side] for name, pair in settings.items()}) for side in (0, 1))
    )
    rows = [(name, _brief(a), _brief(b)) for name, (a, b) in leaves.items()]
    lines = ["the settings are equal"]
    if rows:
        lines = _settings_table(args.one, args.other, rows, console.width)
    lines += ["", _angle_line(angles.total)]
    width = max((len(name) for name in angles.by_layer), default=0)
    lines += [f"  {name:<{width}}  {_arrow(value)}" for name, value in angles.by_layer.items()]
    for name, modules in ((args.one, angles.only_one), (args.other, angles.only_other)):
        if modules:
            lines.append(f"  only in {name}: {len(modules)} modules, for instance {modules[0]}")
    for line in lines:
        console.print(shown(line))
    return 0


def _settings_table(
    first: str, second: str, rows: Sequence[tuple[str, str, str]], width: int
) -> list[str]:
    """Makes a table; on a narrow screen, the two values of a setting stand below each other."""
    lines = table(("", first, second), rows, None)
    if max(map(len, lines)) <= width:
        return lines
    blocks = [("", first, second), *rows]
    return [
        line
        for name, a, b in blocks
        for line in (name, wrapped(f"  A  {a}", width), wrapped(f"  B  {b}", width))
        if line
    ]


def _leaves(values: Mapping[str, Any]) -> dict[str, Any]:
    """Flattens settings, those in lists by number: `recipe data.train.1.path`."""
    numbered = {}
    for name, value in flat(values).items():
        if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
            value = _leaves({str(number): item for number, item in enumerate(value, 1)})
        numbered[name] = value
    return flat(numbered)


def _settings(stored: StoredAdapter) -> dict[str, Any]:
    from veneer.bases.identity.fingerprint import Fingerprint

    fields: dict[str, Any] = stored.config.model_dump(mode="json")
    if stored.manifest is not None:
        fields |= {f"metric {k}": v for k, v in stored.manifest.metrics.items()}
        fields |= {f"recipe {k}": v for k, v in (stored.manifest.recipe or {}).items()}
        fields["data"] = stored.manifest.data_fingerprint
        fields["content"] = stored.manifest.content_hash
        fields["base fingerprint"] = Fingerprint.from_dict(stored.manifest.base.fingerprint).digest
    return fields


def _differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    pairs = {name: (first.get(name), second.get(name)) for name in {**first, **second}}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _brief(value: Any) -> str:
    if isinstance(value, float):
        return number(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(str, value))
    return (
        "–"
        if value is None
        else f"{value[:12]}…"
        if isinstance(value, str) and len(value) == 64
        else str(value)
    )


def _angle_line(cosine: float | None) -> str:
    if cosine is None:
        return "no angle: one of them changes nothing that the other changes"
    return (
        f"cosine between the updates {cosine:+.3f} ({math.degrees(math.acos(cosine)):.0f}°), by"
        " layer:"
    )


def _arrow(cosine: float | None) -> str:
    """Draws a cosine on a scale from -1 to 1."""
    if cosine is None:
        return "–"
    bar = ["·"] * 21
    bar[10] = "|"
    bar[round(10 + 10 * cosine)] = "●"
    return f"{''.join(bar)} {cosine:+.3f}"
