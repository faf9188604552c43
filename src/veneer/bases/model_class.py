"""Which class of transformers a config's model is: a causal LM, or a model of texts and images with one inside.

A checkpoint of the latter is taken as its files say it is (`architectures`), with its tower: so modules have the names
that PEFT, vLLM and transformers give them, and what is merged is a whole checkpoint again. Text alone is trained and
answered.
"""

from __future__ import annotations

from typing import Any

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    PreTrainedConfig,
)

_STOPS_ON_TEXT = ("Llama4ForConditionalGeneration",)
"""What stops in its own forward (transformers 5.24: its language model gives no image_outputs); the text's own class
reads such a checkpoint without its tower. tests/test_with_images.py fails once that is mended."""


def model_class(config: PreTrainedConfig) -> Any:
    """The class itself; None where transformers has none that answers with text."""
    causal: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    several: Any = MODEL_FOR_MULTIMODAL_LM_MAPPING.get(type(config), None)
    named = set(config.architectures or ()).difference(_STOPS_ON_TEXT)
    return several if several is not None and (causal is None or several.__name__ in named) else causal


def auto_class(config: PreTrainedConfig) -> Any:
    """transformers' loader of that class; Any, as it is annotated as if it always returned the model alone."""
    causal = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return AutoModelForCausalLM if model_class(config) is causal else AutoModelForMultimodalLM
