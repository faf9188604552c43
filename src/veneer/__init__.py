"""Fine-tune language models by training a thin layer over a frozen base.

The public names; each is loaded from where it lives when it is first used, so that `import veneer`
loads neither torch nor transformers.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "Base": "veneer.base",
    "Bottleneck": "veneer.adapters.config",
    "DoRA": "veneer.adapters.config",
    "Full": "veneer.adapters.config",
    "Library": "veneer.library.library",
    "LoRA": "veneer.adapters.config",
    "Prefix": "veneer.adapters.config",
    "RunConfig": "veneer.train.config",
    "VeneerError": "veneer.errors",
    "compare": "veneer.api",
    "evaluate": "veneer.api",
    "load": "veneer.api",
    "train": "veneer.trained",
}

__all__ = [
    "Base",
    "Bottleneck",
    "DoRA",
    "Full",
    "Library",
    "LoRA",
    "Prefix",
    "RunConfig",
    "VeneerError",
    "compare",
    "evaluate",
    "load",
    "train",
]

if TYPE_CHECKING:  # what `__getattr__` finds, for type checkers and editors
    from veneer.adapters.config import Bottleneck as Bottleneck
    from veneer.adapters.config import DoRA as DoRA
    from veneer.adapters.config import Full as Full
    from veneer.adapters.config import LoRA as LoRA
    from veneer.adapters.config import Prefix as Prefix
    from veneer.api import compare as compare
    from veneer.api import evaluate as evaluate
    from veneer.api import load as load
    from veneer.base import Base as Base
    from veneer.errors import VeneerError as VeneerError
    from veneer.library.library import Library as Library
    from veneer.train.config import RunConfig as RunConfig
    from veneer.trained import train as train


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(
            f"module 'veneer' has no attribute {name!r}; it has {', '.join(__all__)}"
        )
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


class _Surface(ModuleType):
    """Keeps `veneer.train` the function, whatever was imported before.

    Importing the package veneer/train binds it here under the same name, as Python does with every
    package inside another; the function must win. `from veneer.train.loop import ...` is not
    touched.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Surface


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
