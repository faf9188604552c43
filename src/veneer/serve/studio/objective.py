"""The objective of a draft's run: it follows from the layout of the rows."""

from __future__ import annotations

from veneer.data.examples import Format
from veneer.data.files.layouts import FORMATS_OF
from veneer.errors import ConfigError
from veneer.objectives.config import OBJECTIVES, ObjectiveConfig


def objectives_for(layout: Format | None) -> list[str]:
    """Returns the objectives that learn from rows of a layout, the usual one first; those of
    answers if the layout is not known."""
    wanted = layout or "prompt_completion"
    return [name for name, config in OBJECTIVES.items() if wanted in FORMATS_OF[config.rows]]


def chosen_objective(layout: Format | None, name: object = None) -> ObjectiveConfig:
    """Returns the objective of a run. ConfigError: it does not learn from such rows.

    name: the one that was chosen; None: the usual one of the layout
    """
    offered = objectives_for(layout)
    if name is not None and name not in offered:
        raise ConfigError(
            f"objective {name} does not learn from rows of layout {layout or 'auto'}",
            next_step=f"Choose one of: {', '.join(offered)}; or another layout in step 1.",
        )
    return OBJECTIVES[str(name or offered[0])]()
