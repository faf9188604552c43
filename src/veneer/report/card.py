"""README.md of an adapter or a merged model: a model card as the hub reads it.

Text from users, models or files is written as code, inline or fenced, and in dumped YAML, so it is
neither markup nor a field. Knows nothing of where the card goes (library/remote/transfer.py,
cli/library/export.py).
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from veneer.bases.names.named import HUB_ID, NAMED
from veneer.bases.names.sources import gguf_file
from veneer.errors import CorruptFileError, SourceError, VeneerError
from veneer.files.strict_json import MAX_YAML_BYTES, parse_yaml, read_json
from veneer.formats.adapter import read_adapter
from veneer.formats.manifest import CARD_NAME, MANIFEST_NAME, Manifest, SetHeldOut, read_manifest
from veneer.report.page import recipe_rows
from veneer.training.output.records import read_records
from veneer.wording import between, cut, number, shown

WHOLE = "gguf"
MOST_CHARACTERS = 2000
"""Most characters of a sample's text."""
_PLAIN = re.compile(r"[a-zA-Z() -]+")
"""Text that needs no code around it."""
_NOT_FIGURES = ("perplexity", "tokens", "rows", "cut_answers")


def model_card(
    manifest: Manifest,
    *,
    name: str,
    commands: Sequence[str],
    library_name: str = "peft",
    figures: Mapping[str, Any] | None = None,
    sample: Mapping[str, Any] | None = None,
    licence: str | None = None,
) -> str:
    """Returns the file's text.

    commands      to serve it
    library_name  that reads the files: peft, veneer, or gguf, of a model with the base in it
    figures       of `veneer evaluate --json`, beside those of training in the manifest
    sample        a held-out row: prompt, expected, before, answer
    licence       of the base; None: not known
    """
    kind = "A model with an adapter merged in" if library_name == WHOLE else "An adapter"
    base = manifest.base.name + (f"@{manifest.base.revision}" if manifest.base.revision else "")
    parts = [
        f"---\n{_front_matter(manifest, library_name, licence)}---\n",
        f"# {_code(name)}\n",
        (
            f"{kind}: {_code(manifest.method)} over {_code(base)}, made with Veneer"
            f" {_code(manifest.veneer_version)}.\n"
        ),
        "## Run it\n\n" + _block("\n".join(commands), "bash"),
        _figures(manifest, figures),
        _before_after(sample),
        _recipe(manifest),
        "## Where it comes from\n\n" + _table(("what", "value"), _identity(manifest)),
        "## Licence\n\n" + _licence(licence, base),
    ]
    return "\n".join(part for part in parts if part)


def _front_matter(manifest: Manifest, library_name: str, licence: str | None) -> str:
    base = manifest.base.name
    fields: dict[str, Any] = {"library_name": library_name}
    if base in NAMED or (manifest.base.revision and HUB_ID.fullmatch(base)):
        fields["base_model"] = NAMED[base].hub_id if base in NAMED else base.partition("@")[0]
        fields["base_model_relation"] = "finetune" if library_name == WHOLE else "adapter"
    fields["pipeline_tag"] = "text-generation"
    if licence:
        fields["license"] = licence
    fields["tags"] = ["veneer", manifest.method]
    return yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)


def _figures(manifest: Manifest, figures: Mapping[str, Any] | None) -> str:
    parts = [_evaluated(figures), _held_out(manifest)]
    return "\n".join(["## Figures\n", *filter(None, parts)]) if any(parts) else ""


def _held_out(manifest: Manifest) -> str:
    """Shows the figures that training measured."""
    held_out = manifest.held_out
    if held_out is None:
        loss = manifest.metrics.get("validation_loss")
        text = (
            f"Held-out loss {number(loss)} nats a token, as training measured it; no interval was"
            " computed.\n"
        )
        return "" if loss is None else text
    rows = _change_rows("held-out loss", held_out)
    for name, set_figures in held_out.sets.items():
        rows += _change_rows(f"held-out loss of {name}", set_figures)
    return (
        _table(("figure", "value", "95% interval"), rows)
        + f"\nNats per token over {held_out.rows:,} rows, {held_out.tokens:,} tokens, that were"
        " held out of training, which kept the step with the lowest such loss."
        " The change is on the same rows.\n"
    )


def _change_rows(label: str, figures: SetHeldOut) -> list[tuple[str, str, str]]:
    named = (
        (f"{label} before", figures.before),
        (f"{label} after", figures.loss),
        (f"{label} change", figures.change),
    )
    return [
        (name, number(figure.value), between(figure.low, figure.high))
        for name, figure in named
        if figure is not None
    ]


def _evaluated(figures: Mapping[str, Any] | None) -> str:
    if figures is None:
        return ""
    try:
        intervals, rows = figures.get("intervals") or {}, []
        for name, value in figures.items():
            if isinstance(value, int | float) and name not in _NOT_FIGURES:
                ends = intervals.get(name)
                rows.append((name, number(value), "–" if not ends else between(*ends)))
        over = (
            f"\nOver {figures['rows']:,} rows of {_code(figures.get('data', '?'))}.\n"
            if "rows" in figures
            else ""
        )
    except (AttributeError, TypeError, ValueError, OverflowError):
        raise CorruptFileError(
            "these are not figures of veneer evaluate --json", next_step="Write them again."
        ) from None
    return _table(("figure", "value", "95% interval"), rows) + over


def _before_after(sample: Mapping[str, Any] | None) -> str:
    if sample is None:
        return ""
    texts = [(title, sample.get(key)) for title, key in _SAMPLE if sample.get(key) is not None]
    texts_block = "\n".join(
        f"{title}:\n\n{_block(cut(str(text), MOST_CHARACTERS))}" for title, text in texts
    )
    return "## A held-out row, before and after\n\n" + texts_block


_SAMPLE = (("Asked", "prompt"), ("Expected", "expected"), ("Before", "before"), ("After", "answer"))


def _recipe(manifest: Manifest) -> str:
    if manifest.recipe is None:
        return ""
    changed, same = recipe_rows(manifest.recipe)
    defaults_line = (
        f"\n{len(same)} settings at their defaults; {MANIFEST_NAME} holds all of them.\n"
    )
    return (
        "## Recipe\n\n" + _table(("setting", "value"), [row[:2] for row in changed]) + defaults_line
    )


def _identity(manifest: Manifest) -> list[tuple[str, str]]:
    base = manifest.base.fingerprint
    values = {
        "adapter (content hash)": manifest.content_hash,
        "data (fingerprint)": manifest.data_fingerprint,
        "base (weights hash)": base.get("values_hash") or base.get("weights_hash"),
        "chat template (hash)": manifest.template_hash,
        "system turn of its rows": manifest.system,
        "continued from": manifest.parent,
    }
    return [(name, cut(str(value), 200)) for name, value in values.items() if value]


def _licence(licence: str | None, base: str) -> str:
    text = (
        f"The base's: {_code(licence)}."
        if licence
        else f"That of the base, {_code(base)}, holds too; look there."
    )
    return text + "\n"


def card_for(
    folder: Path,
    *,
    name: str,
    commands: Sequence[str],
    base: str,
    whole_model: bool = False,
    figures: Mapping[str, Any] | None = None,
    sample: bool = False,
) -> str | None:
    """Returns the card of an adapter's folder, None without a manifest. base: our name of it.

    sample: include a held-out row that its run showed; readers of the card then see it.
    """
    stored = read_adapter(folder)
    if stored.manifest is None:
        return None
    return model_card(
        stored.manifest,
        name=name,
        commands=commands,
        library_name=WHOLE if whole_model else "peft" if stored.layout.peft_reads else "veneer",
        figures=figures,
        sample=sample_of(folder, stored.manifest) if sample else None,
        licence=licence_of(base),
    )


def sample_of(folder: Path, manifest: Manifest) -> dict[str, Any] | None:
    """Returns the adapter's answer to a held-out row, from the run that made it, if the run still
    exists; without a summary of the run its last answer.
    """
    out = (manifest.recipe or {}).get("out")
    for run in [folder.parent, *([Path(out)] if isinstance(out, str) else [])]:
        try:
            manifest_file = run / "adapter" / MANIFEST_NAME
            if (
                manifest_file.is_file()
                and read_manifest(manifest_file).content_hash == manifest.content_hash
            ):
                records = read_records(run / "metrics.jsonl")
                sampled = [r for r in reversed(records) if isinstance(r.get("sample"), dict)]
                summary = run / "summary.json"
                best_step = read_json(summary).get("best_step") if summary.is_file() else None
                kept = [record for record in sampled if record.get("step") == best_step]
                return next((record["sample"] for record in kept + sampled), None)
        except (VeneerError, OSError):
            continue
    return None


def licence_of(base: str) -> str | None:
    """Returns the licence in the base's files: a .gguf file's metadata, or the model card's head.

    For a named default, returns the licence of the model it was made from.
    """
    licence: Any = None
    if base in NAMED:
        return NAMED[base].licence
    if not base:
        return None
    if (file := gguf_file(base)) is not None:
        from veneer.bases.gguf.convert import read_header

        licence = read_header(file).licence
    else:
        licence = _head(Path(base) / CARD_NAME).get("license")
    return licence if isinstance(licence, str) and re.fullmatch(r"[\w.+-]{1,60}", licence) else None


def _head(card: Path) -> dict[str, Any]:
    """Parses the YAML at the head of a model card; returns {} if there is none."""
    try:
        if not card.is_file():
            return {}
        with card.open("rb") as file:
            lines = file.read(MAX_YAML_BYTES).split(b"\n")
        if lines[0].rstrip() != b"---":
            return {}
        end = next(
            (number for number, line in enumerate(lines[1:], 1) if line.startswith(b"---")),
            len(lines),
        )
        return parse_yaml(b"\n".join(lines[1:end]), card)
    except (OSError, ValueError, SourceError):  # a name that is none, too
        return {}


def _code(text: object) -> str:
    """Formats text as inline code on one line."""
    line = " ".join(shown(text).split()) or " "
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    space = " " if "`" in line else ""
    return f"{fence}{space}{line}{space}{fence}"


def _block(text: str, language: str = "") -> str:
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{shown(text)}\n{fence}\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [
        " | ".join([row[0] if _PLAIN.fullmatch(row[0]) else _cell(row[0]), *map(_cell, row[1:])])
        for row in rows
    ]
    return "\n".join([" | ".join(head), " | ".join("---" for _ in head), *lines]) + "\n"


def _cell(text: str) -> str:
    return _code(text).replace("|", "\\|")


def figures_in(file: Path | None) -> dict[str, Any] | None:
    """Reads the output of `veneer evaluate --json`, None without a file."""
    return None if file is None else read_json(file)
