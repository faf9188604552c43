"""A base without its weights: its modules, names and shapes, on the meta device.

What asks only which places a base has (does this adapter fit, how is it named in a file) reads a
config of a few kB instead of gigabytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from veneer.bases.config.announced import without_storage
from veneer.bases.config.model_class import whole_class
from veneer.bases.config.model_config import checked_config
from veneer.bases.names.sources import locate
from veneer.bases.quiet_transformers import quiet


@dataclass(frozen=True)
class Skeleton:
    """model: on the meta device; name_or_path, revision: as FrozenBase (models) has them. whole:
    the class that the files name, where the model is the text's own (config/model_class.py)."""

    model: PreTrainedModel
    name_or_path: str
    revision: str | None
    whole: str | None = None


def load_skeleton(source: str) -> Skeleton:
    """Raises as models.load.load_base does where the base cannot be found or is no causal LM."""
    found = locate(source)
    with quiet():
        config = checked_config(found.folder)
        model = without_storage(config)
    return Skeleton(
        model.eval().requires_grad_(False), found.name_or_path, found.revision, whole_class(config)
    )
