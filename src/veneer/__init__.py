"""Fine-tune language models by training a thin layer over a frozen base.

A public name is imported on first use, so `import veneer` loads neither torch nor transformers.
No package below has the name of a public function: importing it would replace the function.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "AdamW": "veneer.training.own_loop.adamw",
    "Base": "veneer.base",
    "Bottleneck": "veneer.adapters.config",
    "DPO": "veneer.objectives.config",
    "Distil": "veneer.objectives.config",
    "DoRA": "veneer.adapters.config",
    "Full": "veneer.adapters.config",
    "IPO": "veneer.objectives.config",
    "KTO": "veneer.objectives.config",
    "Library": "veneer.library.library",
    "LoRA": "veneer.adapters.config",
    "ORPO": "veneer.objectives.config",
    "Prefix": "veneer.adapters.config",
    "RunConfig": "veneer.training.config",
    "VeneerError": "veneer.errors",
    "choose": "veneer.api",
    "classify": "veneer.evaluation.classify",
    "compare": "veneer.api",
    "evaluate": "veneer.api",
    "load": "veneer.api",
    "rerank": "veneer.evaluation.classify",
    "train": "veneer.trained",
    "tune": "veneer.tuning.tune",
}

__all__ = [
    "DPO",
    "IPO",
    "KTO",
    "ORPO",
    "AdamW",
    "Base",
    "Bottleneck",
    "Distil",
    "DoRA",
    "Full",
    "Library",
    "LoRA",
    "Prefix",
    "RunConfig",
    "VeneerError",
    "choose",
    "classify",
    "compare",
    "evaluate",
    "load",
    "rerank",
    "train",
    "tune",
]

if TYPE_CHECKING:  # the same names as _HOMES, for type checkers and editors
    from veneer.adapters.config import Bottleneck as Bottleneck
    from veneer.adapters.config import DoRA as DoRA
    from veneer.adapters.config import Full as Full
    from veneer.adapters.config import LoRA as LoRA
    from veneer.adapters.config import Prefix as Prefix
    from veneer.api import choose as choose
    from veneer.api import compare as compare
    from veneer.api import evaluate as evaluate
    from veneer.api import load as load
    from veneer.base import Base as Base
    from veneer.errors import VeneerError as VeneerError
    from veneer.evaluation.classify import classify as classify
    from veneer.evaluation.classify import rerank as rerank
    from veneer.library.library import Library as Library
    from veneer.objectives.config import DPO as DPO
    from veneer.objectives.config import IPO as IPO
    from veneer.objectives.config import KTO as KTO
    from veneer.objectives.config import ORPO as ORPO
    from veneer.objectives.config import Distil as Distil
    from veneer.trained import train as train
    from veneer.training.config import RunConfig as RunConfig
    from veneer.training.own_loop.adamw import AdamW as AdamW
    from veneer.tuning.tune import tune as tune


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(
            f"module 'veneer' has no attribute {name!r}; it has {', '.join(__all__)}"
        )
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
