"""Help texts, defaults and choices of a run's settings, from the fields that define them."""

from __future__ import annotations

from typing import Any

from veneer.files.settings import field_at, nested_models, setting_paths, words_at
from veneer.serve.studio.bodies import DOCUMENT, OFFERED
from veneer.training.config import RunConfig
from veneer.vocabulary import KeyPath


def describe_settings() -> dict[str, dict[str, Any]]:
    """Returns by path, such as method.rank, the text that --help shows, the default and the
    choices. These are the settings that the page offers, in its order, and the document."""
    described = {}
    paths = {".".join(path): path for path in setting_paths(RunConfig)}
    for name in (*OFFERED, DOCUMENT):
        path = paths[name]
        field = field_at(RunConfig, path)
        default = field.get_default(call_default_factory=False)
        described[name] = {
            "help": " ".join((field.description or _of_whole(path)).split()),
            "default": default if isinstance(default, str | int | float | bool) else None,
            "choices": _words(path),
        }
    return described


def _of_whole(path: KeyPath) -> str:
    """Returns the text of the setting that a nested one without its own belongs to."""
    return RunConfig.model_fields[path[0]].description or ""


def _words(path: KeyPath) -> list[str]:
    """Returns the words that a setting may be; of nested settings, those of every variant."""
    *parents, name = path
    variants = nested_models(RunConfig)[parents[0]] if parents else [RunConfig]
    words = [words_at(model, (name,)) for model in variants if name in model.model_fields]
    return list(dict.fromkeys(word for several in words for word in several))
