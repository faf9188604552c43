"""Help texts, defaults and choices of a run's settings, from the fields that define them."""

from __future__ import annotations

from typing import Any

from veneer.files.settings import field_at, setting_paths, words_at
from veneer.serve.studio.bodies import OFFERED
from veneer.training.config import RunConfig


def describe_settings() -> dict[str, dict[str, Any]]:
    """Returns by path, such as method.rank, the text that --help shows, the default and the
    choices. These are the settings that the page offers, in its order."""
    described = {}
    paths = {".".join(path): path for path in setting_paths(RunConfig)}
    for name in OFFERED:
        path = paths[name]
        field = field_at(RunConfig, path)
        default = field.get_default(call_default_factory=False)
        described[name] = {
            "help": " ".join((field.description or "").split()),
            "default": default if isinstance(default, str | int | float | bool) else None,
            "choices": list(words_at(RunConfig, path)),
        }
    return described
