"""Lines of an evaluation by labels: calibration, reliability curve, most frequent errors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from veneer.wording import cut, number, shown

SHOWN_ERRORS = 5
"""Most frequent confusions that are shown; --json has all."""


def label_lines(details: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Yields lines, each a name, a figure and notes. details: `labels` of an evaluation."""
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


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"
