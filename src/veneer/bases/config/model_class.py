"""Chooses the transformers class of a config's model: a causal LM, or one of texts and images.

A checkpoint of texts and images is loaded as its files say (`architectures`), with its tower. So
modules have the names that PEFT, vLLM and transformers use, and a merged model is a whole
checkpoint again. Only text is trained and generated.
"""

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

from veneer.private.transformers import constructor_of

_READ_AS_TEXT = ("Llama4ForConditionalGeneration",)
"""Classes that are loaded as their text model, without the tower: before transformers 5.25 their
forward failed on text."""


def whole_class(config: PreTrainedConfig) -> str | None:
    """Returns the class of texts and images that the files name, if only its text class is
    loaded."""
    return next((name for name in config.architectures or () if name in _READ_AS_TEXT), None)


def parts_not_read(
    config: PreTrainedConfig, stored: Iterable[str], model: nn.Module
) -> tuple[str, ...]:
    """Returns the top-level parts of the files that the text class does not read.

    stored: names in the files
    """
    if whole_class(config) is None:
        return ()
    model_parts = {
        str(getattr(model, "base_model_prefix", "")),
        *(name for name, _ in model.named_children()),
    }
    return tuple(
        dict.fromkeys(
            first for name in stored if (first := name.partition(".")[0]) not in model_parts
        )
    )


class _OwnLoader:
    """transformers' loader for a class that its auto classes do not find by the config."""

    def __init__(self, kind: Any) -> None:
        self.from_pretrained = kind.from_pretrained
        self.from_config = constructor_of(kind)


def _class_of_text_config(config: PreTrainedConfig) -> Any:
    """Returns the causal LM that the config names and that takes this config, or None. Emu3's text
    model is one: transformers' auto classes find it by the config of the whole model alone."""
    known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    for name in known.intersection(config.architectures or ()):
        kind = getattr(transformers, name, None)
        if getattr(kind, "config_class", None) is type(config):
            return kind
    return None


def model_class(config: PreTrainedConfig) -> Any:
    """Returns the model's class; None if transformers has none that generates text."""
    causal: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None) or _class_of_text_config(
        config
    )
    multimodal: Any = MODEL_FOR_MULTIMODAL_LM_MAPPING.get(type(config), None)
    architectures = set(config.architectures or ()).difference(_READ_AS_TEXT)
    return (
        multimodal
        if multimodal is not None and (causal is None or multimodal.__name__ in architectures)
        else causal
    )


def auto_class(config: PreTrainedConfig) -> Any:
    """Returns transformers' loader of that class; Any, because its annotation names only one return
    type."""
    causal = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if causal is None and (kind := _class_of_text_config(config)) is not None:
        return _OwnLoader(kind)
    return AutoModelForCausalLM if model_class(config) is causal else AutoModelForMultimodalLM
