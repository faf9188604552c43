"""Says in words which method to take under which constraint. Every sentence follows from figures.

"As good as the best" means that the 95% interval of the difference holds zero: the rows and seeds
at hand cannot tell the two apart. That is not proof that they are equal, and the text says so.
"""

from collections.abc import Callable, Sequence
from typing import Any

from veneer.wording import clock, millions, size

Figures = dict[str, Any]
Method = dict[str, Any]
NO_INTERVAL = "no interval"


def conclude(figures: Figures) -> list[str]:
    """Returns the sentences of the conclusion, in reading order."""
    methods = [m for m in figures["methods"] if m["quality"]]
    sentences = [_failed(m) for m in figures["methods"] if m["failure"]]
    if not methods:
        return [*sentences, "No method finished, so there is nothing to choose from."]
    primary, unit = figures["primary"], figures["units"][figures["primary"]]
    best = next(m for m in methods if m["name"] == figures["best"])
    equal = [m for m in methods if m is best or _holds_zero(m["to_best"][primary]["interval"])]
    behind = [m for m in methods if m not in equal]
    if len({m["quality"][primary]["value"] for m in methods}) == 1 < len(methods):
        sentences.append(
            f"On {figures['test_rows']:,} test rows all methods have the same {measure(primary)}:"
            " this measure cannot rank them here. A longer budget or another measure may."
        )
    best_value = quantity(best["quality"][primary]["value"], unit)
    ends = best["quality"][primary]["interval"]
    within = f"95% interval {ends_text(ends, unit)}" if ends else NO_INTERVAL
    sentences.append(
        f"On {figures['test_rows']:,} test rows {best['name']} has the best {measure(primary)}:"
        f" {best_value} ({within}); the base without training has"
        f" {quantity(figures['untuned'][primary]['value'], unit)}."
    )
    as_good = [m for m in equal if m is not best]
    if as_good:
        sentences.append(
            f"{_names(as_good)} cannot be told apart from it: {_undecided(as_good, primary)}. "
            "More test rows or seeds could still separate them."
        )
    for m in behind:
        gap, (a, b) = m["to_best"][primary]["difference"], m["to_best"][primary]["interval"]
        sentences.append(
            f"{m['name']} is behind by {quantity(abs(gap), unit)} "
            f"({quantity(min(abs(a), abs(b)), unit)} to {quantity(max(abs(a), abs(b)), unit)})."
        )
    if figures["full"] not in (None, figures["best"]):
        sentences += _compare_with_full(
            [m for m in methods if m["name"] != figures["full"]], figures["full"], primary, unit
        )
    sentences += _rates_at_an_end(methods)
    sentences += _constraints(methods, equal)
    sentences += _forgetting(methods)
    if figures["seeds"] == 1:
        sentences.append(
            "With one seed, it is unknown how much another seed would change these figures."
        )
    return sentences


def _compare_with_full(methods: Sequence[Method], full: str, primary: str, unit: str) -> list[str]:
    """States the differences to full fine-tuning if that is not the best."""
    differences = []
    for m in methods:
        to_full = m["to_full"][primary]
        differences.append(
            f"{m['name']} {signed(to_full['difference'], unit)}"
            f" ({ends_text(to_full['interval'], unit, signed)})"
        )
    return [f"Against {full}, with the 95% interval of the difference: {', '.join(differences)}."]


def _rates_at_an_end(methods: Sequence[Method]) -> list[str]:
    """Names methods whose best learning rate is the lowest or highest tried: a better one may lie
    beyond it."""
    sentences = []
    for word, end in (("highest", max), ("lowest", min)):
        at_end = [
            m
            for m in methods
            if len(m["search"]) > 1
            and m["learning_rate"] == end(trial["learning_rate"] for trial in m["search"])
        ]
        if at_end:
            sentences.append(
                f"{_names(at_end)} did best at the {word} learning rate tried: one beyond it may be"
                " better; a larger --extend tries it."
            )
    return sentences


def _constraints(methods: Sequence[Method], equal: Sequence[Method]) -> list[str]:
    """Says which method to take if memory, the file or time must be small, or if it is merged."""
    only_choice = (
        "Nothing that is as good as the best needs less."
        if len(equal) > 1
        else "Nothing else is as good."
    )
    folding = [m for m in equal if m["folds"]]
    fixed = [m["name"] for m in methods if not m["folds"]]
    sentences = []
    if folding:
        cheapest = min(folding, key=lambda m: m["adapter_bytes"])
        not_merged = f"; {_list_words(fixed)} cannot be merged" if fixed else ""
        sentences.append(
            f"If you want one merged model, take {cheapest['name']}, {_as(cheapest, equal)}"
            f"{not_merged}."
        )
    else:
        sentences.append(
            f"If you want one merged model, none of the best will do: {_list_words(fixed)} cannot"
            f" be merged. {_best_folding(methods)}"
        )
    rules: list[tuple[str, str, Callable[[float], str], str]] = [
        ("memory is short", "peak_memory_bytes", size, "at its peak"),
        ("the file must be small", "adapter_bytes", size, "on disk"),
        ("training must be quick", "seconds", clock, "of steps"),
    ]
    chosen: dict[str, list[tuple[str, str]]] = {}
    worse_but_less: dict[str, list[str]] = {}
    for condition, field, write, unit in rules:
        if any(field not in m for m in methods):  # not measured
            continue
        least, most, least_of_all = (
            min(equal, key=lambda m: (m[field], m["adapter_bytes"])),
            max(methods, key=lambda m: m[field]),
            min(methods, key=lambda m: m[field]),
        )
        contrast = f" ({most['name']} {write(most[field])})" if most is not least else ""
        figure = f"{write(least[field])} {unit}{contrast}"
        chosen.setdefault(least["name"], []).append((condition, figure))
        if least_of_all[field] < 0.95 * least[field]:
            worse_but_less.setdefault(least_of_all["name"], []).append(
                f"{write(least_of_all[field])} {unit}"
            )
    for name, reasons in chosen.items():
        conditions, figures = zip(*reasons, strict=True)
        sentences.append(
            f"If {_list_words(conditions, ' or ')}, take {name}: {', '.join(figures)}."
        )
    sentences[-1] += f" {only_choice}"
    if worse_but_less:
        costs = [f"{name} ({', '.join(figures)})" for name, figures in worse_but_less.items()]
        sentences.append(f"With less quality, these need less: {_list_words(costs)}.")
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
        f"Take {_list_words([m['name'] for m in folding])} and accept the difference."
        if folding
        else ""
    )


def _forgetting(methods: Sequence[Method]) -> list[str]:
    measured = [m for m in methods if m.get("forgetting")]
    if not measured:
        return []
    least = min(measured, key=lambda m: m["forgetting"]["value"])
    most = max(measured, key=lambda m: m["forgetting"]["value"])
    if most["forgetting"]["value"] <= 0:
        return ["On general text no method became worse than the base."]
    if most is least:
        return [
            f"On general text {most['name']} forgot {most['forgetting']['value']:+.3f} nats per"
            " token."
        ]
    a, b = least["forgetting"]["interval"], most["forgetting"]["interval"]
    doubt = "" if a and b and a[1] < b[0] else ", which these documents cannot tell apart"
    return [
        f"On general text {least['name']} forgot least ({least['forgetting']['value']:+.3f} nats"
        f" per token) and {most['name']} most ({most['forgetting']['value']:+.3f}){doubt}."
    ]


def _failed(method: Method) -> str:
    return (
        f"{method['name']} is not in the comparison: {method['failure']} at every learning rate"
        " that was tried."
    )


def _holds_zero(ends: Sequence[float] | None) -> bool:
    """Returns whether an interval holds zero; True without an interval, as such rows tell no two
    methods apart."""
    return ends is None or ends[0] <= 0 <= ends[1]


def _undecided(methods: Sequence[Method], primary: str) -> str:
    if all(m["to_best"][primary]["interval"] for m in methods):
        return "the interval of the difference holds zero"
    return (
        "these rows do not determine an interval (there is one row, or the difference is the same"
        " in every row)"
    )


def _names(methods: Sequence[Method]) -> str:
    return _list_words([m["name"] for m in methods])


def _list_words(names: Sequence[str], last: str = " and ") -> str:
    return (
        names[0] if len(names) == 1 else ", ".join(names[:-1]) + last + names[-1] if names else ""
    )


def measure(name: str) -> str:
    """Returns the name of a metric in a sentence."""
    names = {
        "loss": "loss on the test rows",
        "likelier": "share of rows whose preferred answer is likelier",
        "field_f1": "field F1",
        "bleu": "BLEU",
        "chrf": "chrF",
    }
    return names.get(name, name.replace("_", " "))


def quantity(value: float, unit: str) -> str:
    """Formats a figure with its unit: 91.3%, 45.2, 0.512."""
    if unit == "share":
        return f"{100 * value:.1f}%"
    return f"{value:.1f}" if unit == "points" else f"{value:.3f}"


def signed(value: float, unit: str) -> str:
    """Formats a difference with its sign and unit."""
    return ("+" if value > 0 else "") + quantity(value, unit)


def ends_text(
    ends: Sequence[float] | None, unit: str, written: Callable[[float, str], str] = quantity
) -> str:
    """Formats an interval with its unit, or says that there is none."""
    return f"{written(ends[0], unit)} to {written(ends[1], unit)}" if ends else NO_INTERVAL


def facts(method: Method, figures: Figures) -> list[str]:
    """Returns the cells of a method's row in the table of HEAD."""
    if method["failure"]:
        return [method["name"], method["failure"], "", "", "", "", "", "", ""]
    primary = figures["primary"]
    unit, quality = figures["units"][primary], method["quality"][primary]
    forgetting = method.get("forgetting")
    return [
        method["name"],
        quantity(quality["value"], unit),
        ends_text(quality["interval"], unit),
        f"{method['learning_rate']:g}",
        millions(method["trainable_parameters"]),
        size(method["peak_memory_bytes"]),
        clock(method["seconds"]),
        size(method["adapter_bytes"]),
        f"{forgetting['value']:+.2f}" if forgetting else "–",
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
