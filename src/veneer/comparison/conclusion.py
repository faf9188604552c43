"""What a comparison says, in words: which method to take under which constraint. Every sentence
follows from figures.

"As good as the best" means that the 95% interval of the difference holds zero: the rows and seeds
at hand cannot tell the two apart. That is not proof that they are equal, and the text says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from veneer.wording import clock, millions, size

Method = dict[str, Any]
NO_INTERVAL = "no interval"


def conclude(figures: dict[str, Any]) -> list[str]:
    """Sentences, in the order in which they are to be read."""
    methods = [m for m in figures["methods"] if m["quality"]]
    sentences = [_failed(m) for m in figures["methods"] if m["failure"]]
    if not methods:
        return [*sentences, "No method came to an end, so there is nothing to choose from."]
    primary, unit = figures["primary"], figures["units"][figures["primary"]]
    best = next(m for m in methods if m["name"] == figures["best"])
    equal = [m for m in methods if m is best or _holds_zero(m["to_best"][primary]["interval"])]
    behind = [m for m in methods if m not in equal]
    if len({m["quality"][primary]["value"] for m in methods}) == 1 < len(methods):
        sentences.append(
            f"On {figures['test_rows']:,} test rows all methods have the same {measure(primary)}:"
            " this measure tells nothing about which is better here. A longer budget or another"
            " measure may."
        )
    said = quantity(best["quality"][primary]["value"], unit)
    ends = best["quality"][primary]["interval"]
    within = f"95% interval {ends_text(ends, unit)}" if ends else NO_INTERVAL
    sentences.append(
        f"On {figures['test_rows']:,} test rows {best['name']} has the best {measure(primary)}:"
        f" {said} ({within}); the base without training has"
        f" {quantity(figures['untuned'][primary]['value'], unit)}."
    )
    others = [m for m in equal if m is not best]
    if others:
        sentences.append(
            f"{_names(others)} cannot be told apart from it: {_undecided(others, primary)}. "
            "More test rows or seeds could still separate them."
        )
    for m in behind:
        gap, (a, b) = m["to_best"][primary]["difference"], m["to_best"][primary]["interval"]
        sentences.append(
            f"{m['name']} is behind by {quantity(abs(gap), unit)} "
            f"({quantity(min(abs(a), abs(b)), unit)} to {quantity(max(abs(a), abs(b)), unit)})."
        )
    if figures["full"] not in (None, figures["best"]):
        sentences += _beside_full(
            [m for m in methods if m["name"] != figures["full"]], figures["full"], primary, unit
        )
    sentences += _at_an_end(methods)
    sentences += _constraints(methods, equal)
    sentences += _forgetting(methods)
    if figures["seeds"] == 1:
        sentences.append(
            "With one seed, how much another seed would change these figures is not known."
        )
    return sentences


def _beside_full(methods: Sequence[Method], full: str, primary: str, unit: str) -> list[str]:
    """Differences to full fine-tuning, where those to the best do not tell them."""
    told = []
    for m in methods:
        found = m["to_full"][primary]
        told.append(
            f"{m['name']} {signed(found['difference'], unit)}"
            f" ({ends_text(found['interval'], unit, signed)})"
        )
    return [f"Against {full}, with the 95% interval of the difference: {', '.join(told)}."]


def _at_an_end(methods: Sequence[Method]) -> list[str]:
    """Methods whose best learning rate is the last one that was tried may have a better one beyond
    it."""
    sentences = []
    for word, end in (("highest", max), ("lowest", min)):
        there = [
            m
            for m in methods
            if len(m["search"]) > 1
            and m["learning_rate"] == end(each["learning_rate"] for each in m["search"])
        ]
        if there:
            sentences.append(
                f"{_names(there)} did best at the {word} learning rate that was tried: one beyond"
                " it may be better still; a larger --extend looks for it."
            )
    return sentences


def _constraints(methods: Sequence[Method], equal: Sequence[Method]) -> list[str]:
    among = (
        "Nothing that is as good as the best needs less."
        if len(equal) > 1
        else "Nothing else is as good."
    )
    folding = [m for m in equal if m["folds"]]
    fixed = [m["name"] for m in methods if not m["folds"]]
    sentences = []
    if folding:
        cheapest = min(folding, key=lambda m: m["adapter_bytes"])
        kept = f"; {_joined(fixed)} cannot be merged" if fixed else ""
        sentences.append(
            f"If one merged model is wanted, take {cheapest['name']}, {_as(cheapest, equal)}{kept}."
        )
    else:
        sentences.append(
            f"If one merged model is wanted, none of the best will do: {_joined(fixed)} cannot be"
            f" merged. {_best_folding(methods)}"
        )
    rules: list[tuple[str, str, Callable[[float], str], str]] = [
        ("memory is short", "peak_memory_bytes", size, "at its peak"),
        ("the file must be small", "adapter_bytes", size, "on disk"),
        ("training must be quick", "seconds", clock, "of steps"),
    ]
    chosen: dict[str, list[tuple[str, str]]] = {}
    dearer: dict[str, list[str]] = {}
    for start, field, told, what in rules:
        if any(field not in m for m in methods):  # it was not measured
            continue
        least, most, least_of_all = (
            min(equal, key=lambda m: (m[field], m["adapter_bytes"])),
            max(methods, key=lambda m: m[field]),
            min(methods, key=lambda m: m[field]),
        )
        beside = f" ({most['name']} {told(most[field])})" if most is not least else ""
        chosen.setdefault(least["name"], []).append((start, f"{told(least[field])} {what}{beside}"))
        if least_of_all[field] < 0.95 * least[field]:
            dearer.setdefault(least_of_all["name"], []).append(
                f"{told(least_of_all[field])} {what}"
            )
    for name, reasons in chosen.items():
        starts, figures = zip(*reasons, strict=True)
        sentences.append(f"If {_joined(starts, ' or ')}, take {name}: {', '.join(figures)}.")
    sentences[-1] += f" {among}"
    if dearer:
        named = [f"{name} ({', '.join(figures)})" for name, figures in dearer.items()]
        sentences.append(f"At the price of quality there would be {_joined(named)}.")
    return sentences


def _as(method: Method, equal: Sequence[Method]) -> str:
    return (
        "the best"
        if len(equal) == 1
        else f"with the smallest file of the good ones ({size(method['adapter_bytes'])})"
    )


def _best_folding(methods: Sequence[Method]) -> str:
    folding = [m for m in methods if m["folds"]]
    return (
        f"Take {_joined([m['name'] for m in folding])} and accept the difference."
        if folding
        else ""
    )


def _forgetting(methods: Sequence[Method]) -> list[str]:
    known = [m for m in methods if m.get("forgetting")]
    if not known:
        return []
    least = min(known, key=lambda m: m["forgetting"]["value"])
    most = max(known, key=lambda m: m["forgetting"]["value"])
    if most["forgetting"]["value"] <= 0:
        return ["On general text no method became worse than the base."]
    if most is least:
        return [
            f"On general text {most['name']} forgot {most['forgetting']['value']:+.3f} nats per"
            " token."
        ]
    a, b = least["forgetting"]["interval"], most["forgetting"]["interval"]
    apart = "" if a and b and a[1] < b[0] else ", which these documents cannot tell apart"
    return [
        f"On general text {least['name']} forgot least ({least['forgetting']['value']:+.3f} nats"
        f" per token) and {most['name']} most ({most['forgetting']['value']:+.3f}){apart}."
    ]


def _failed(method: Method) -> str:
    return (
        f"{method['name']} is not in the comparison: {method['failure']} at every learning rate"
        " that was tried."
    )


def _holds_zero(ends: Sequence[float] | None) -> bool:
    """True too where there is no interval: such rows tell no two methods apart."""
    return ends is None or ends[0] <= 0 <= ends[1]


def _undecided(methods: Sequence[Method], primary: str) -> str:
    known = all(m["to_best"][primary]["interval"] for m in methods)
    if known:
        return "the interval of the difference holds zero"
    return (
        "these rows do not determine an interval (there is one row, or the difference is the same"
        " in every row)"
    )


def _names(methods: Sequence[Method]) -> str:
    return _joined([m["name"] for m in methods])


def _joined(names: Sequence[str], last: str = " and ") -> str:
    return (
        names[0] if len(names) == 1 else ", ".join(names[:-1]) + last + names[-1] if names else ""
    )


def measure(name: str) -> str:
    """A metric's name, as a sentence says it."""
    known = {
        "loss": "loss on the test rows",
        "field_f1": "field F1",
        "bleu": "BLEU",
        "chrf": "chrF",
    }
    return known.get(name, name.replace("_", " "))


def quantity(value: float, unit: str) -> str:
    """A figure with its unit: 91.3%, 45.2, 0.512."""
    if unit == "share":
        return f"{100 * value:.1f}%"
    return f"{value:.1f}" if unit == "points" else f"{value:.3f}"


def signed(value: float, unit: str) -> str:
    """A difference with its sign and unit."""
    return ("+" if value > 0 else "") + quantity(value, unit)


def ends_text(
    ends: Sequence[float] | None, unit: str, written: Callable[[float, str], str] = quantity
) -> str:
    """The two ends of an interval with their unit, or that there is none."""
    return f"{written(ends[0], unit)} to {written(ends[1], unit)}" if ends else NO_INTERVAL


def facts(method: Method, figures: dict[str, Any]) -> list[str]:
    """The cells of a method's line in a table: see HEAD."""
    if method["failure"]:
        return [method["name"], method["failure"], "", "", "", "", "", "", ""]
    primary = figures["primary"]
    unit, quality = figures["units"][primary], method["quality"][primary]
    forgot = method.get("forgetting")
    return [
        method["name"],
        quantity(quality["value"], unit),
        ends_text(quality["interval"], unit),
        f"{method['learning_rate']:g}",
        millions(method["trainable_parameters"]),
        size(method["peak_memory_bytes"]),
        clock(method["seconds"]),
        size(method["adapter_bytes"]),
        f"{forgot['value']:+.2f}" if forgot else "–",
    ]


HEAD = (
    "method",
    "quality",
    "95% interval",
    "learning rate",
    "trained",
    "peak memory",
    "time",
    "file",
    "forgot",
)
