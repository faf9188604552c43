"""Makes comparison.html from the figures of comparison.json, in the style of a run's report."""

from collections.abc import Sequence
from html import escape

from veneer.comparison.conclusion import (
    HEAD,
    NO_INTERVAL,
    Figures,
    Method,
    ends_text,
    facts,
    measure,
    quantity,
)
from veneer.report.html import html_page, section, table
from veneer.report.plots import Series, bars, line_chart, spans
from veneer.report.scatter import ScatterMark, scatter_chart
from veneer.wording import clock, millions, percent, size

COLOURS = ("#2456d6", "#c2580a", "#1f8a4c", "#8a3fc2", "#b3261e", "#0e7f93", "#8a6d00", "#5f6470")
DARK = ("#7aa2ff", "#f0a052", "#5fd08a", "#c99af5", "#ff8a80", "#5fc9dc", "#dcc050", "#a8adb8")
FORGETTING_SHOWN = 0.1
"""Least width of the scale of forgetting, nats per token."""


def _method_style() -> str:
    """Returns rules for the colours of the methods, light and dark."""
    light = "".join(f"--m{i}: {colour}; " for i, colour in enumerate(COLOURS))
    dark = "".join(f"--m{i}: {colour}; " for i, colour in enumerate(DARK))
    rules = [
        f".key.m{i}::before {{ background: var(--m{i}); }} .line.m{i} {{ stroke: var(--m{i}); }} "
        f"circle.m{i} {{ fill: var(--m{i}); }} .bars i.m{i} {{ background: var(--m{i}); }} "
        f".mark.m{i} line {{ stroke: var(--m{i}); }}"
        for i in range(len(COLOURS))
    ]
    return (
        f":root {{ {light} }} @media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }} "
        + " ".join(rules)
        + " .mark line { stroke-width: 2; opacity: .55; } .keys { display: flex; flex-wrap: wrap;"
        " gap: 4px 20px; margin-bottom: 20px; font-size: 14px; color: var(--soft); } .plots {"
        " display: grid; grid-template-columns: 1fr 1fr; gap: 32px; } .scroll { overflow-x: auto;"
        " } .wide-table td, .wide-table th { white-space: nowrap; width: auto; padding-right:"
        " 16px; } .wide-table td:first-child { width: auto; color: var(--ink); font-weight: 600;"
        " } .wide-table td:nth-child(3) { color: var(--ink); } .words p { margin: 0 0 10px;"
        " max-width: 68ch; } main { max-width: 1000px; } @media (max-width: 640px) { .plots {"
        " grid-template-columns: 1fr; } .wide-table tr:first-child { display: none; }"
        " .wide-table, .wide-table tbody, .wide-table tr { display: block; } .wide-table tr {"
        " padding: 10px 0; border-bottom: 1px solid var(--rule); } .wide-table td { display:"
        " flex; justify-content: space-between; gap: 16px; border: 0; padding: 2px 0;"
        " white-space: normal; } .wide-table td::before { content: attr(data-of); color:"
        " var(--soft); font-weight: 400; } .wide-table td:empty { display: none; } }"
    )


def make_page(figures: Figures) -> str:
    """Returns the HTML text."""
    methods = figures["methods"]
    good = [(place, m) for place, m in enumerate(methods) if m["quality"]]
    sections = [
        _head(figures),
        section("In words", "".join(f"<p>{escape(s)}</p>" for s in figures["conclusion"]), "words"),
        section("At a glance", table(HEAD, [facts(m, figures) for m in methods], "wide-table")),
        section(_upper(f"{measure(figures['primary'])} against cost"), _scatters(figures, good)),
        section("Every measure", _measures(figures, good)),
        section("Learning curves", _curves(good)),
        section(
            "Files",
            _bars([(p, m["name"], m["adapter_bytes"], size(m["adapter_bytes"])) for p, m in good]),
        ),
        section("Forgetting", _forgetting(figures, good)),
        section("Where they disagree", _disagreements(figures)),
        section("Learning rates tried", _search(methods)),
        section("How this was measured", _method_text(figures)),
    ]
    return html_page(_title(figures), "".join(sections), _method_style())


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]


def _title(figures: Figures) -> str:
    return " · ".join(m["name"] for m in figures["methods"])


def _head(figures: Figures) -> str:
    budget = figures["budget"]
    effort = (
        f"{budget['steps']:,} steps"
        if budget["steps"]
        else f"{clock(budget['seconds'])} of training"
    )
    seeds = f"{figures['seeds']} seed" + ("s" if figures["seeds"] > 1 else "")
    facts_line = [
        f"on {figures['base']}",
        f"{effort} each",
        seeds,
        f"{figures['test_rows']:,} test rows",
    ]
    return (
        f"<header><h1>{len(figures['methods'])} methods compared</h1>"
        f"<p>{escape(_title(figures))}</p><p>{escape(' · '.join(facts_line))}</p></header>"
    )


def _colour(place: int) -> str:
    return f"m{place % len(COLOURS)}"


def _keys(good: Sequence[tuple[int, Method]]) -> str:
    keys = "".join(f'<span class="key {_colour(p)}">{escape(m["name"])}</span>' for p, m in good)
    return f"<div class=keys>{keys}</div>"


def _scatters(figures: Figures, good: Sequence[tuple[int, Method]]) -> str:
    if not good:
        return ""
    primary = figures["primary"]
    unit = figures["units"][primary]
    scale = 100.0 if unit == "share" else 1.0
    unit_label = {"share": "%", "points": "points", "nats": "nats, lower is better"}[unit]
    costs = (
        ("against trainable parameters", "parameters", "trainable_parameters", 1.0, millions),
        ("against peak memory", "GB, process", "peak_memory_bytes", 1e-9, size),
        ("against training time", "seconds", "seconds", 1.0, clock),
        ("against file size", "MB", "adapter_bytes", 1e-6, size),
    )
    charts = []
    for title, x_label, field, factor, write in costs:
        marks = []
        for place, m in good:
            quality = m["quality"][primary]
            low, high = quality["interval"] or (quality["value"],) * 2
            tip = f"{quantity(quality['value'], unit)}, {write(m[field])}"
            marks.append(
                ScatterMark(
                    m["name"],
                    factor * m[field],
                    scale * quality["value"],
                    scale * low,
                    scale * high,
                    _colour(place),
                    tip,
                )
            )
        charts.append(
            scatter_chart(
                marks, title=title, x_label=x_label, y_label=f"{measure(primary)}, {unit_label}"
            )
        )
    return f"{_keys(good)}<div class=plots>{''.join(charts)}</div>"


def _measures(figures: Figures, good: Sequence[tuple[int, Method]]) -> str:
    if not good:
        return ""
    units = figures["units"]
    head = ("", *(measure(name) for name in units))
    rows = [
        [
            "base, untrained",
            *(_with_interval(figures["untuned"][name], unit) for name, unit in units.items()),
        ]
    ]
    for _, m in good:
        rows.append(
            [m["name"], *(_with_interval(m["quality"][name], unit) for name, unit in units.items())]
        )
    return table(head, rows, "wide-table")


def _with_interval(figure: Figures, unit: str) -> str:
    return f"{quantity(figure['value'], unit)} ({ends_text(figure['interval'], unit)})"


def _curves(good: Sequence[tuple[int, Method]]) -> str:
    return line_chart(
        [
            Series(m["name"], [(x, y) for x, y in m["curve"]], _colour(place), marks=True)
            for place, m in good
        ],
        title="Held-out loss",
        x_label="step",
        y_label="held-out loss, nats; best rate, seed 0",
    )


def _bars(rows: Sequence[tuple[int, str, float, str]]) -> str:
    """Draws a bar for each method. rows: (place, name, length, label)."""
    return bars([(name, value, label, _colour(place)) for place, name, value, label in rows])


def _forgetting(figures: Figures, good: Sequence[tuple[int, Method]]) -> str:
    measured = [(place, m["name"], m["forgetting"]) for place, m in good if m.get("forgetting")]
    if not measured:
        return ""
    rows = []
    for place, name, f in measured:
        low, high = f["interval"] or (f["value"],) * 2
        interval = f"{low:+.3f} to {high:+.3f}" if f["interval"] else NO_INTERVAL
        rows.append(
            (name, f["value"], low, high, f"{f['value']:+.3f} ({interval})", _colour(place))
        )
    note = (
        "Loss on general text after training minus before, nats per token; 95% intervals over"
        f" documents. The base has {figures['untuned_general']:.3f}."
    )
    return f"{spans(rows, FORGETTING_SHOWN)}<p>{escape(note)}</p>"


def _disagreements(figures: Figures) -> str:
    primary, cards = figures["primary"], []
    unit = figures["units"][primary]
    places = {m["name"]: place for place, m in enumerate(figures["methods"])}
    for row in figures["disagreements"]:
        answers = row["answers"]
        if all(answer["text"] is None for answer in answers.values()):  # nothing was generated
            values = [
                (places[n], n, a["value"], quantity(a["value"], unit)) for n, a in answers.items()
            ]
            is_loss = primary == "loss"
            title = "Loss of this answer, nats per token" if is_loss else _upper(measure(primary))
            right = f"<p>{escape(row['expected'])}</p><h4>{escape(title)}</h4>"
            cards.append(
                f"<article><h3>{escape(row['prompt'])}</h3>{right}{_bars(values)}</article>"
            )
            continue
        cells = [("expected", row["expected"], "")]
        for name, answer in answers.items():
            cells.append((name, answer["text"], quantity(answer["value"], unit)))
        columns = "".join(
            f"<div><h4>{escape(name)}{f' · {escape(value)}' if value else ''}</h4>"
            f"<p>{escape(text) if text else '<i>empty</i>' if text is not None else ''}</p></div>"
            for name, text, value in cells
        )
        cards.append(
            f"<article><h3>{escape(row['prompt'])}</h3><div class=answers>{columns}</div></article>"
        )
    return "".join(cards)


def _search(methods: Sequence[Method]) -> str:
    rows = []
    for m in methods:
        for trial in m["search"]:
            loss = "–" if trial["loss"] is None else f"{trial['loss']:.4f}"
            chosen = "chosen" if trial["learning_rate"] == m.get("learning_rate") else ""
            steps = "–" if trial.get("steps") is None else f"{trial['steps']:,}"
            rate = f"{trial['learning_rate']:g}"
            rows.append([m["name"], rate, steps, trial["failure"] or loss, chosen])
    titles = ("method", "learning rate", "steps", "held-out loss", "")
    return table(titles, rows, "wide-table")


def _method_text(figures: Figures) -> str:
    shares = [
        f"{m['name']} trains {percent(m['trainable_parameters'], m['total_parameters'])} of the"
        " base's parameters"
        for m in figures["methods"]
        if m["quality"]
    ]
    paragraphs = [
        (
            "All candidates saw the same rows for the same budget. Each one's learning rate was"
            " searched with seed 0 on held-out rows that are neither trained on nor tested on;"
            " every seed then ran with the best rate. Rates with fewer steps below were stopped by"
            " halving, because others were better there."
        ),
        (
            "Intervals are 95%, over test rows and seeds. With one seed, a share of rows that are"
            " right or wrong has the exact interval of Clopper and Pearson. Other shares and"
            " differences of shares have that of Bonett and Price. Losses, points and their"
            " differences have Student's t, corrected for skewness. Differences are between the"
            " same rows and seeds."
        ),
        (
            "Memory and time are those of a run in a process of its own. Peak memory is that of the"
            " whole process on a CPU, and of the allocator on a GPU. Time is that of the optimizer"
            " steps, the first one left out."
        ),
        "; ".join(shares) + "." if shares else "",
    ]
    return "".join(f"<p>{escape(s)}</p>" for s in paragraphs if s)
