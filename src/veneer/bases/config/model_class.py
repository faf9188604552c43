"""Which class of transformers a config's model is: a causal LM, or a model of texts and images with
one inside.

A checkpoint of the latter is taken as its files say it is (`architectures`), with its tower: so
modules have the names that PEFT, vLLM and transformers give them, and what is merged is a whole
checkpoint again. Text alone is trained and answered.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import transformers
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    PreTrainedConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

_STOPS_ON_TEXT = ("Llama4ForConditionalGeneration",)
"""What stops in its own forward (transformers 5.24: its language model gives no image_outputs); the
text's own class reads such a checkpoint without its tower. tests/bases/test_with_images.py fails
once that is mended."""


def whole_class(config: PreTrainedConfig) -> str | None:
    """The class of texts and images that the files name, where the text's own class is taken in its
    place."""
    return next((name for name in config.architectures or () if name in _STOPS_ON_TEXT), None)


def parts_not_read(
    config: PreTrainedConfig, stored: Iterable[str], model: nn.Module
) -> tuple[str, ...]:
    """What the files hold beside the text then, as far up as they name it. stored: names in the
    files."""
    if whole_class(config) is None:
        return ()
    own = {
        str(getattr(model, "base_model_prefix", "")),
        *(name for name, _ in model.named_children()),
    }
    return tuple(
        dict.fromkeys(first for name in stored if (first := name.partition(".")[0]) not in own)
    )


class _OwnLoader:
    """transformers' loader for a class that its auto classes do not find by the config."""

    def __init__(self, kind: Any) -> None:
        self.from_pretrained = kind.from_pretrained
        self.from_config = kind._from_config


def _class_of_text_config(config: PreTrainedConfig) -> Any:
    """The causal LM that the config names and that takes this config, or None. Emu3's text model is
    one: transformers' auto classes find it by the config of the whole model alone."""
    known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    for name in known.intersection(config.architectures or ()):
        kind = getattr(transformers, name, None)
        if getattr(kind, "config_class", None) is type(config):
            return kind
    return None


def model_class(config: PreTrainedConfig) -> Any:
    """The class itself; None where transformers has none that answers with text."""
    causal: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None) or _class_of_text_config(
        config
    )
    several: Any = MODEL_FOR_MULTIMODAL_LM_MAPPING.get(type(config), None)
    named = set(config.architectures or ()).difference(_STOPS_ON_TEXT)
    return (
        several if several is not None and (causal is None or several.__name__ in named) else causal
    )


def auto_class(config: PreTrainedConfig) -> Any:
    """transformers' loader of that class; Any, as it is annotated as if it always returned the
    model alone."""
    causal = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if causal is None and (kind := _class_of_text_config(config)) is not None:
        return _OwnLoader(kind)
    return AutoModelForCausalLM if model_class(config) is causal else AutoModelForMultimodalLM
