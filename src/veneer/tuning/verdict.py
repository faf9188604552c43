"""Says in five lines what `veneer tune` did, how sure it is, and what to do next."""

from collections.abc import Mapping, Sequence
from typing import Any

from veneer.wording import clock, number

LEAST_GROUPS = 0.9
"""Groups of similar prompts for each prompt to judge with, from which on prompts count as
independent."""

Result = Mapping[str, Any]
"""The content of tune.json."""


def verdict(result: Result) -> list[str]:
    """Returns the lines, in reading order."""
    return [
        _done(result),
        *_judged(result),
        _certainty(result),
        *_forgetting(result),
        _next(result),
    ]


def _done(result: Result) -> str:
    search, run = result["search"], result["run"]
    tried = f"{len(search['candidates'])} settings in {clock(search['seconds'])}"
    if result["interrupted"] and run["loss"] is None:
        return (
            "Interrupted before the first comparison: the adapter is that of"
            f" {result['chosen']['text']}, after {_steps(run['steps'])}."
        )
    if result["interrupted"]:
        head = f"Interrupted. Of {len(search['candidates'])} settings the best so far is"
        return f"{head} {result['chosen']['text']}, after {_steps(run['steps'])}."
    return (
        f"Tried {tried}, and trained the best, {result['chosen']['text']}, for"
        f" {_steps(run['steps'])} in all ({run['epochs']:.1f} passes over {result['rows']['train']}"
        " rows)."
    )


def _steps(count: int) -> str:
    return f"{count:,} step{'' if count == 1 else 's'}"


def _judged(result: Result) -> list[str]:
    judging = result["judging"]
    if judging is None:
        return ["Not judged: the rows to judge with have not been used."]
    rows, against = judging["base"]["rows"], judging["adapter"]["against"]
    parts = [_change(name, judging, against[name]) for name in judging["measures"]]
    return [f"On {rows} rows that nothing had seen: {'; '.join(parts)}."]


def _change(name: str, judging: Mapping[str, Any], difference: Mapping[str, Any]) -> str:
    """Describes a figure of base and adapter, and the interval of the difference."""
    share = judging["adapter"]["units"].get(name) == "share"
    before, after = difference["other"], judging["adapter"][name]
    return (
        f"{title(name)} {figure_text(before, share)} → {figure_text(after, share)} (difference"
        f" {_signed(difference['difference'], share)}, {_ends(difference['interval'], share)})"
    )


def title(name: str) -> str:
    """Returns the name of a measure in a sentence."""
    titles = {"field_f1": "field F1", "likelier": "preferred answer likelier in"}
    return titles.get(name, name.replace("_", " "))


def figure_text(value: float, share: bool) -> str:
    """Formats a figure: as a percentage if it is a share."""
    return f"{100 * value:.1f}%" if share else number(value)


def _signed(value: float, share: bool) -> str:
    return f"{100 * value:+.1f}%" if share else f"{value:+.3f}"


def _ends(ends: Sequence[float] | None, share: bool) -> str:
    if ends is None:
        return "no interval"
    return f"95% interval {_signed(ends[0], share)} to {_signed(ends[1], share)}"


def is_better(result: Result) -> bool | None:
    """Returns whether the first measure of the judging rows is better for sure, a loss if it fell;
    None if it was not judged, if the interval holds zero, or if it is too narrow."""
    if result["judging"] is None or _is_too_narrow(result):
        return None
    ends = _interval(result)
    if ends is None or ends[0] <= 0 <= ends[1]:
        return None
    return bool((ends[1] < 0) == (result["judging"]["measures"][0] == "loss"))


def _interval(result: Result) -> Sequence[float] | None:
    """Returns the interval of the first measure's difference; None if the rows determine none."""
    judging = result["judging"]
    ends: Sequence[float] | None = judging["adapter"]["against"][judging["measures"][0]]["interval"]
    return ends


def _side(ends: Sequence[float]) -> str:
    return f"the interval is {'below' if ends[1] < 0 else 'above'} zero"


def _is_too_narrow(result: Result) -> bool:
    """Returns whether many prompts of the judging rows are similar: an interval takes different
    prompts as independent."""
    rows = result["rows"]
    return bool(rows["judge_groups"] < LEAST_GROUPS * rows["judge_prompts"])


def _certainty(result: Result) -> str:
    better, search = is_better(result), result["search"]
    if result["judging"] is None:
        sentence = "Not sure: only the rows to search with say that it is better."
    elif _is_too_narrow(result):
        rows = result["rows"]
        sentence = (
            f"Not sure: the {rows['judge_prompts']} prompts are only {rows['judge_groups']} groups"
            " of similar ones, so the interval is too narrow."
        )
    elif not result["rows"]["by_likeness"]:
        sentence = (
            "Not sure: many prompts are alike, so rows to judge with may be like rows to train on."
        )
    elif (ends := _interval(result)) is None:
        sentence = "Not sure: these rows are too few or too alike for an interval."
    elif better is None:
        sentence = "Not sure: the interval holds zero, so these rows cannot tell the two apart."
    else:
        kind = "better" if better else "worse"
        sentence = f"Sure that it is {kind} than the base on such rows: {_side(ends)}."
    if search["runner_up"] is None:
        return sentence
    runner_up = search["runner_up"]
    gap, noise = runner_up["gap"], runner_up["noise"]
    sure = "Fairly" if noise is not None and gap > noise else "Less"
    return (
        f"{sentence} {sure} sure of the setting: when {runner_up['text']} stopped, its loss was"
        f" {number(gap)} higher."
    )


def _forgetting(result: Result) -> list[str]:
    if result["judging"] is None:
        return []
    general = result["judging"]["adapter"]["general"]
    change, ends = general["forgetting"], general["forgetting_interval"]
    if ends is None or ends[0] <= 0 <= ends[1]:
        sentence = "forgetting cannot be told from chance"
    elif change > 0:
        sentence = "it forgot some general text"
    else:
        sentence = "it forgot nothing there"
    return [
        f"General text: loss {number(general['before'])} → {number(general['loss'])} (difference"
        f" {change:+.3f}, {_ends(ends, False)}): {sentence}."
    ]


def _next(result: Result) -> str:
    commands = f"veneer chat --adapter {result['out']}"
    if result["judging"] is None:
        rows = f"{result['out']}/data/judge.jsonl"
        judge = f"veneer evaluate --adapter {result['out']} --data {rows}"
        return f"Next: {commands}. To judge it: {judge}."
    if is_better(result) is not True:
        return "Next: read rows with `veneer data check`, collect more, or give more --minutes."
    if result["library"]:
        keep = f" It is in the library as {result['library']}."
    else:
        keep = f" Keep it: veneer adapters add {result['out']}."
    more = ""
    reason = result["run"]["reason"]
    if reason == "time" or (not result["run"]["whole"] and reason != "early_stop"):
        more = " More --minutes may help: the time ended the training."
    return f"Next: {commands}.{keep}{more}"
