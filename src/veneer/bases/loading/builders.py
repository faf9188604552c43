"""Chooses the builder that loads the weights of a base, one per weight format.

A builder turns a checked folder into a model whose linear layers hold their weights in that format.
These modules are `FrozenLinear`s (linear.py), so that no method knows the format it trains over. A
new format is described in quant/config.py and adds its builder to BUILDERS; `load_base` calls
nothing else.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from veneer.bases.folder.model_folder import ModelFolder
from veneer.bases.gguf import blocks as gguf_blocks
from veneer.bases.loading.streaming import build_packed
from veneer.errors import ConfigError
from veneer.quant.config import Quantize, formats_that, weight_format

Builder = Callable[[ModelFolder, PreTrainedConfig, torch.dtype, torch.device], PreTrainedModel]
"""(folder, its checked config, dtype of dense weights and of products, device) -> the model."""

BUILDERS: Mapping[Quantize, Builder] = {
    "nf4": partial(build_packed, book="nf4"),
    "fp4": partial(build_packed, book="fp4"),
    "gguf": gguf_blocks.build,
    **dict.fromkeys(formats_that("from_folder"), partial(build_packed, book=None)),
}


def builder_for(quantize: Quantize | None, keep_dense: Sequence[str] = ()) -> Builder | None:
    """Returns the builder of a weight format; None for dense weights.

    Raises ConfigError for a format that cannot be loaded, or that cannot keep modules dense.
    """
    if not weight_format(quantize).keeps_dense and keep_dense:
        raise ConfigError(
            f"keep_dense does not work with quantize {quantize}: {', '.join(keep_dense)}",
            next_step=(
                f"It excludes modules from quantize {' and '.join(formats_that('keeps_dense'))}."
            ),
        )
    if quantize is None:
        return None
    builder: Any = BUILDERS[quantize]
    return partial(builder, keep_dense=tuple(keep_dense)) if keep_dense else builder
