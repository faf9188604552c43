"""The score head of a model that full fine-tuning wrote, in a folder that transformers reads.

model.safetensors   the base's weights, and score.weight (C, D) float32
config.json         architectures: [...ForSequenceClassification], id2label, problem_type
score_head.json     {"kind": ..., "labels": [...], "thresholds": {...}}: all that Veneer reads

The base's own head stays in the folder, so the folder is a base too. A ...ForSequenceClassification
folder without score_head.json is not read: its head may be another module.
"""

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, PreTrainedModel

from veneer.adapters.labels import HeadKind, HeadSettings, StoredHead
from veneer.adapters.placement.score_head import PART, ScoreHead
from veneer.bases.folder.faults import NEXT_DOWNLOAD
from veneer.bases.folder.tensor_files import StoredTensor
from veneer.errors import CorruptFileError, RefusedError
from veneer.files.strict_json import json_text, read_json, read_model_json, validated
from veneer.private.transformers import constructor_of, forget_attention

FILE = "score_head.json"
_PROBLEMS: Mapping[HeadKind, str] = {
    "label": "single_label_classification",
    "labels": "multi_label_classification",
    "regression": "regression",
    "rerank": "multi_label_classification",
}
"""problem_type of transformers by kind: it decides their loss."""


def has_score_head(folder: Path) -> bool:
    return (folder / FILE).is_file()


def read_score_head(
    folder: Path, tensors: Mapping[str, StoredTensor], width: int, device: torch.device
) -> ScoreHead:
    """Reads the head of a model folder. width: D, of the hidden states.

    Raises CorruptFileError if its weight is missing, or does not fit the labels or the model.
    """
    path = folder / FILE
    head = validated(StoredHead, read_json(path), f"{path} is not valid").settings
    expected, stored = (head.num_outputs, width), tensors.get(PART)
    if stored is None or stored.shape != expected:
        text = "missing" if stored is None else f"of shape {stored.shape}"
        raise CorruptFileError(
            f"{PART} in {folder} is {text}, and {FILE} describes a head of shape {expected}",
            next_step=NEXT_DOWNLOAD,
        )
    return ScoreHead(head, nn.Parameter(stored[...].to(device, torch.float32), requires_grad=False))


def classifier_class(model: PreTrainedModel) -> str:
    """Returns the name of transformers' class for this model with a score head.

    Raises RefusedError if there is none, or if it needs weights that the model does not have.
    """
    kind: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(model.config), None)
    if kind is not None:
        config = deepcopy(model.config)
        forget_attention(config)
        with torch.device("meta"):
            expected = constructor_of(kind)(config).state_dict().keys()
        if expected <= {*model.state_dict(), PART}:
            return str(kind.__name__)
    raise RefusedError(
        f"transformers has no class that classifies with a {type(model).__name__}",
        next_step="Take method lora: its head is part of the adapter.",
    )


def with_head(state: Mapping[str, Tensor], head: ScoreHead) -> dict[str, Tensor]:
    """Returns a model's weights together with the head's."""
    return {**state, PART: head.weight.detach().float().contiguous()}


def score_head_files(folder: Path, head: HeadSettings, class_name: str) -> dict[str, str]:
    """Returns the content of config.json and score_head.json of a written model, by file name."""
    names = dict(enumerate(head.output_names))
    fields = {
        **read_model_json(folder / "config.json"),
        "architectures": [class_name],
        "id2label": {str(number): name for number, name in names.items()},
        "label2id": {name: number for number, name in names.items()},
        "problem_type": _PROBLEMS[head.kind],
    }
    return {"config.json": json_text(fields), FILE: settings_text(head)}


def settings_text(head: HeadSettings) -> str:
    """Returns the content of score_head.json."""
    return json_text(StoredHead.of(head).model_dump())
