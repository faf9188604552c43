"""How the weights of a base come into memory: one builder per weight format.

A builder turns a folder that is found and checked into a model whose linear layers hold their
weights in that format: modules that are their own `FrozenLinear` (linear.py), so that no method
knows which format it trains over. A new format says in quant/config.py what it is, and adds its
builder to BUILDERS; `load_base` calls nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from veneer.bases.folder.model_folder import Found
from veneer.bases.gguf import blocks as gguf_blocks
from veneer.bases.loading.streaming import build_packed
from veneer.errors import ConfigError
from veneer.quant.config import Quantize, formats_that, weight_format

Builder = Callable[[Found, PreTrainedConfig, torch.dtype, torch.device], PreTrainedModel]
"""(found, its checked config, dtype of what is not packed and of the products, device) -> the model
there."""

BUILDERS: Mapping[Quantize, Builder] = {
    "nf4": partial(build_packed, book="nf4"),
    "fp4": partial(build_packed, book="fp4"),
    "gguf": gguf_blocks.build,
    **dict.fromkeys(formats_that("from_folder"), partial(build_packed, book=None)),
}


def builder_for(quantize: Quantize | None, keep_dense: Sequence[str] = ()) -> Builder | None:
    """None: dense. Raises ConfigError for a format that cannot be loaded, or one in which nothing
    can stay dense."""
    if not weight_format(quantize).keeps_dense and keep_dense:
        raise ConfigError(
            f"keep_dense means nothing with quantize {quantize}: {', '.join(keep_dense)}",
            next_step=(
                f"It leaves modules out of quantize {' and '.join(formats_that('keeps_dense'))}."
            ),
        )
    if quantize is None:
        return None
    found: Any = BUILDERS[quantize]
    return partial(found, keep_dense=tuple(keep_dense)) if keep_dense else found
