"""Builds a base without its weights: its modules, names and shapes, on the meta device.

Checks of names and shapes (does this adapter fit, how is it named in a file) then read a config of
a few kB instead of gigabytes.
"""

from dataclasses import dataclass

from transformers import PreTrainedModel

from veneer.bases.config.announced import without_storage
from veneer.bases.config.model_class import whole_class
from veneer.bases.config.model_config import checked_config
from veneer.bases.names.sources import locate
from veneer.bases.quiet_transformers import quiet


@dataclass(frozen=True)
class Skeleton:
    """A base on the meta device.

    name_or_path, revision: as in FrozenBase (models); whole: class named by the files, if the model
    is only its text part (config/model_class.py)
    """

    model: PreTrainedModel
    name_or_path: str
    revision: str | None
    whole: str | None = None


def load_skeleton(source: str) -> Skeleton:
    """Loads a base's structure. Raises as models.load.load_base for a missing base or another kind
    of model."""
    model_folder = locate(source)
    with quiet():
        config = checked_config(model_folder.folder)
        model = without_storage(config)
    return Skeleton(
        model.eval().requires_grad_(False),
        model_folder.name_or_path,
        model_folder.revision,
        whole_class(config),
    )
