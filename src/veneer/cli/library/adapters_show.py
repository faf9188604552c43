"""Shows the contents of an adapter (`veneer adapters show`) and compares two (`diff`)."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from veneer.cli.common import add_dtype, load_plain_base, make_console, print_json
from veneer.cli.library.adapters_ls import age, table
from veneer.wording import folded, interval_of_95, millions, number, shown, size, wrapped

if TYPE_CHECKING:
    from veneer.formats.adapter import StoredAdapter
    from veneer.formats.manifest import HeldOut
    from veneer.formats.norms import LowRankUpdate
    from veneer.library.entry import Entry
    from veneer.library.library import Library

_BARS = "▁▂▃▄▅▆▇█"
MAX_CELLS = 48  # layers on one line; in deeper models, neighbours share a cell


def add_show(action: Callable[..., argparse.ArgumentParser]) -> None:
    show = action(
        "show", _show, "show one adapter: modules, ranks, size of the update by layer, lineage"
    )
    show.add_argument("adapter", metavar="NAME[@V]", help="adapter, or a folder")
    show.add_argument("--base", metavar="B", help="compare the update with this base's weights")
    add_dtype(show)


def add_diff(action: Callable[..., argparse.ArgumentParser]) -> None:
    diff = action(
        "diff", _diff, "compare two adapters: settings, and the angle between the updates"
    )
    diff.add_argument("one", metavar="A", help="NAME[@V] or a folder")
    diff.add_argument("other", metavar="B")


def _show(args: argparse.Namespace, library: Library) -> int:
    from veneer.formats.adapter import read_adapter
    from veneer.formats.norms import base_norms, updates
    from veneer.library.examination import facts_of

    folder = library.locate(args.adapter)
    stored = read_adapter(folder)
    entry = library.get(args.adapter) if folder.parent == library.objects else None
    update_by_path, other_tensors = updates(stored)
    base = load_plain_base(args)
    base_norms_by_path = {} if base is None else base_norms(base, update_by_path)
    modules: dict[str, dict[str, float | None]] = {
        path: {
            "rank": update.rank,
            "scaling": update.scaling,
            "norm": update.norm(),
            "base_norm": base_norms_by_path.get(path),
        }
        for path, update in update_by_path.items()
    }
    facts = facts_of(stored)
    manifest = stored.manifest
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
            }
        )
        return 0
    console = make_console(json=False)
    lines = _head(args.adapter, entry, stored, update_by_path, len(other_tensors))
    norms = {
        path: update.norm() / (base_norms_by_path.get(path) or 1.0)
        for path, update in update_by_path.items()
    }
    lines += _picture(norms, relative=bool(base_norms_by_path))
    if facts.metrics:
        lines.append(
            "  metrics   "
            + " · ".join(f"{k} {number(v)}" for k, v in sorted(facts.metrics.items()))
        )
    if manifest is not None and manifest.held_out is not None:
        lines.append("  held out  " + _held_out(manifest.held_out))
    if manifest is not None and manifest.recipe:
        lines.append("  recipe    " + " · ".join(_flat(manifest.recipe)))
    lines += [f"  from      {each}" for each in lineage(library, facts.parent)]
    lines += [f"  note      {each}" for each in stored.notes]
    for line in lines:
        console.print(folded(shown(line), max(console.width, 40)), soft_wrap=True)
    return 0


def _held_out(found: HeldOut) -> str:
    """Formats the loss before and after, with its interval."""
    before = "" if found.before is None else f"{number(found.before.value)} → "
    line = (
        f"loss {before}{number(found.loss.value)}"
        f" ({interval_of_95(found.loss.low, found.loss.high)})"
    )
    if found.change is not None:
        line += (
            f", change {number(found.change.value)}"
            f" ({interval_of_95(found.change.low, found.change.high)})"
        )
    return f"{line} over {found.rows:,} rows"


def _weights(stored: StoredAdapter) -> str:
    """The type of the base's weights that the adapter was trained over: bfloat16, bfloat16+nf4,
    ..."""
    known = None if stored.manifest is None else stored.manifest.base.fingerprint
    return f" · {known['dtype']}" if known else ""


def _head(
    named: str,
    entry: Entry | None,
    stored: StoredAdapter,
    found: Mapping[str, LowRankUpdate],
    others: int,
) -> list[str]:
    from veneer.library.examination import facts_of

    facts = facts_of(stored)
    title = named if entry is None else entry.reference
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
        "unverified": "unverified: a name proves nothing",
    }[facts.base_proof]
    lines.append(f"  base      {facts.base or '?'}{_weights(stored)} · {proof}{digest}")
    lines.append(
        f"  content   {facts.content_hash[:12]}… · data {(facts.data_fingerprint or '?')[:12]}"
    )
    parts = [f"{len(found)} modules"] if found else []
    for what, values in (
        ("rank", [u.rank for u in found.values()]),
        ("scaling", [u.scaling for u in found.values()]),
    ):
        if values:
            low, high = min(values), max(values)
            parts.append(f"{what} {low:.4g}" + (f" to {high:.4g}" if high > low else ""))
    parts += [f"{others} other tensor{'s' if others > 1 else ''}"] if others else []
    lines.append(f"  changes   {' · '.join(parts)}")
    return lines


def _picture(norms: Mapping[str, float], *, relative: bool) -> list[str]:
    """One line for each kind of module, one cell for each layer, taller where the update is
    larger."""
    from veneer.formats.norms import by_kind

    kinds, alone = by_kind(norms)
    if not norms:
        return []
    highest, deepest = max(norms.values()), max((max(row) for row in kinds.values()), default=0)
    share = math.ceil((deepest + 1) / MAX_CELLS)
    what = "‖ΔW‖ / ‖W‖" if relative else "‖ΔW‖"
    lines = [f"  {what} by layer, 0 to {deepest}"] if kinds else [f"  {what}"]
    width = max(len(name) for name in [*kinds, *alone])
    for kind, row in kinds.items():
        cells = [_cell(row, start, share, highest) for start in range(0, deepest + 1, share)]
        low, high = number(min(row.values())), number(max(row.values()))
        lines.append(
            f"    {kind:<{width}}  {''.join(cells)}  {low if low == high else f'{low} to {high}'}"
        )
    return lines + [f"    {path:<{width}}  {number(norm)}" for path, norm in alone.items()]


def _cell(row: Mapping[int, float], start: int, share: int, highest: float) -> str:
    values = [row[layer] for layer in range(start, start + share) if layer in row]
    if not values:
        return " "
    return (
        _BARS[min(int(len(_BARS) * max(values) / highest), len(_BARS) - 1)] if highest else _BARS[0]
    )


def lineage(library: Library, parent: str | None) -> list[str]:
    """The adapters it was continued from, nearest first: by name where the library has them."""
    from veneer.library.lineage import ancestors

    found = ancestors(library, parent)
    return [
        f"{content[:12]}…" + (f" ({e.reference})" if e else " (not in the library)")
        for content, e in found
    ]


def _flat(values: Mapping[str, Any], above: str = "") -> list[str]:
    """Settings as `name value`, one level below another with a dot; null and empty ones left
    out."""
    found: list[str] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            found += _flat(value, f"{above}{key}.")
        elif value not in (None, "", [], {}):
            found.append(f"{above}{key} {number(value) if isinstance(value, float) else value}")
    return found


def _diff(args: argparse.Namespace, library: Library) -> int:
    from veneer.formats.adapter import read_adapter
    from veneer.formats.norms import angle, updates

    one, other = (read_adapter(library.locate(named)) for named in (args.one, args.other))
    settings = _differences(_settings(one), _settings(other))
    found = angle(updates(one)[0], updates(other)[0])
    if args.json:
        print_json(
            {
                "settings": {name: list(pair) for name, pair in settings.items()},
                "cosine": found.total,
                "cosine_by_layer": found.by_layer,
                "modules_in_both": found.in_both,
                "only_one": found.only_one,
                "only_other": found.only_other,
            }
        )
        return 0
    say = make_console(json=False)
    leaves = _differences(
        *(_leaves({name: pair[side] for name, pair in settings.items()}) for side in (0, 1))
    )
    rows = [(name, _brief(a), _brief(b)) for name, (a, b) in leaves.items()]
    lines = _beside(args.one, args.other, rows, say.width) if rows else ["the settings are equal"]
    lines += ["", _angle_line(found.total)]
    width = max((len(name) for name in found.by_layer), default=0)
    lines += [f"  {name:<{width}}  {_arrow(value)}" for name, value in found.by_layer.items()]
    for named, only in ((args.one, found.only_one), (args.other, found.only_other)):
        if only:
            lines.append(f"  only in {named}: {len(only)} modules, for instance {only[0]}")
    for line in lines:
        say.print(shown(line), soft_wrap=True)
    return 0


def _beside(one: str, other: str, rows: Sequence[tuple[str, str, str]], width: int) -> list[str]:
    """A table; where it is wider than the screen, the two values of a setting below each other."""
    lines = table(("", one, other), rows, None)
    if max(map(len, lines)) <= width:
        return lines
    blocks = [("", one, other), *rows]
    return [
        line
        for name, a, b in blocks
        for line in (name, wrapped(f"  A  {a}", width), wrapped(f"  B  {b}", width))
        if line
    ]


def _leaves(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Settings one level below another, and those of lists by number, under one name: `recipe
    data.train.1.path`."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, list) and any(isinstance(each, Mapping) for each in value):
            value = {str(number): each for number, each in enumerate(value, 1)}
        found |= (
            _leaves(value, f"{above}{key}.")
            if isinstance(value, Mapping)
            else {f"{above}{key}": value}
        )
    return found


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


def _differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    names = [*one, *(name for name in other if name not in one)]
    return {n: (one.get(n), other.get(n)) for n in names if one.get(n) != other.get(n)}


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
    """A bar from -1 to 1 with its number."""
    if cosine is None:
        return "–"
    bar = ["·"] * 21
    bar[10] = "|"
    bar[round(10 + 10 * cosine)] = "●"
    return f"{''.join(bar)} {cosine:+.3f}"
