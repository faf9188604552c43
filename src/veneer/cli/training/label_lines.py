"""Lines of an evaluation by labels: calibration, reliability curve, most frequent errors."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from veneer.wording import cut, number, shown

SHOWN_ERRORS = 5
"""Most confusions and labels with a low F1 that are shown; --json has all."""


def label_lines(details: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Yields lines, each a name, a figure and notes. details: `labels` of an evaluation."""
    yield from _lowest_lines(details.get("per_label", []))
    if "uncalibrated" not in details:
        return
    plain, calibrated = details["uncalibrated"], details["calibrated"]
    yield "ece", _percent(plain["ece"]), "distance of confidence from accuracy, uncalibrated"
    if calibrated is None:
        yield "", "", "not calibrated: too few rows to fit a temperature on other rows"
    else:
        temperatures = " and ".join(map(number, calibrated["temperatures"]))
        yield (
            "calibrated",
            _percent(calibrated["ece"]),
            f"with temperatures {temperatures}, each fitted on the other half of the rows",
        )
    for part in (calibrated or plain)["bins"]:
        yield (
            f"  {part['low']:.1f} to {part['high']:.1f}",
            f"{part['rows']:,}",
            f"rows · confidence {_percent(part['confidence'])}, right {_percent(part['accuracy'])}",
        )
    errors = [cell for cell in details["confusion"] if cell["right"] != cell["chosen"]]
    for cell in errors[:SHOWN_ERRORS]:
        right, chosen = (cut(shown(cell[name]), 40) for name in ("right", "chosen"))
        yield "  confused", f"{cell['rows']:,}", f"rows of {right} as {chosen}"


def _lowest_lines(per_label: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    """Yields the labels with the lowest F1."""
    measured = [line for line in per_label if line["f1"] is not None]
    for line in sorted(measured, key=lambda line: line["f1"])[:SHOWN_ERRORS]:
        notes = f"F1 of {cut(shown(line['label']), 40)}, {line['rows']:,} rows"
        yield "  lowest", _percent(line["f1"]), notes


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"
