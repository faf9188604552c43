"""Reads and writes the score head of an adapter as PEFT's SEQ_CLS, for every method.

adapter_config.json          task_type: SEQ_CLS; of low-rank methods also modules_to_save: ["score"]
adapter_model.safetensors    base_model.model.score.weight    (C, D) float32

transformers' ...ForSequenceClassification calls the head `score`. What its outputs mean stands in
veneer.json; a file without one means what transformers assumes: one output is a number, several are
labels LABEL_0, LABEL_1, ... A file of a classifier without a head is refused: a made-up head would
answer at random. Facts: PEFT 0.21.2, peft/peft_model.py, PeftModelForSequenceClassification.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from veneer.adapters.labels import HeadSettings, StoredHead
from veneer.adapters.placement.attachment import Attachment
from veneer.adapters.placement.score_head import PART
from veneer.errors import CorruptFileError
from veneer.formats.manifest import Manifest
from veneer.formats.peft.tensors import PREFIX

TASK, CAUSAL, CLASSIFIES = "task_type", "CAUSAL_LM", "SEQ_CLS"
SAVED = "modules_to_save"
MODULES = ("score", "classifier")
"""Modules that PEFT lists for every classifier; causal models have the first one."""


def head_fields(
    attachment: Attachment, fields: Mapping[str, Any], *, lists: bool
) -> dict[str, Any]:
    """Returns the entries of adapter_config.json that differ for a head.

    fields: the method's own entries; lists: whether the format lists saved modules
    """
    if attachment.score is None:
        return {}
    saved = {SAVED: [*(fields.get(SAVED) or []), MODULES[0]]} if lists else {}
    return {TASK: CLASSIFIES, **saved}


def head_tensors(attachment: Attachment) -> dict[str, Tensor]:
    """Returns the head's weight by its full name."""
    if attachment.score is None:
        return {}
    return {f"{PREFIX}{PART}": attachment.score.weight.detach().contiguous().cpu()}


def has_head(stored: Mapping[str, Any]) -> bool:
    """Whether an adapter_config.json with this content is that of a classifier."""
    return stored.get(TASK) == CLASSIFIES


def without_head(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the content of adapter_config.json as the method alone would have written it."""
    if not has_head(stored):
        return dict(stored)
    fields = {**stored, TASK: CAUSAL}
    if isinstance(saved := stored.get(SAVED), list):
        fields[SAVED] = [name for name in saved if name not in MODULES] or None
    return fields


def split_head(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor | None]:
    """Splits the tensors of a file by bare names: all but the head's weight, and that weight."""
    rest = {name: tensor for name, tensor in tensors.items() if name != PART}
    return rest, tensors.get(PART)


def read_head(
    folder: Path,
    stored: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    manifest: Manifest | None,
) -> HeadSettings | None:
    """Returns the settings of the head of an adapter's files; None if it is no classifier.

    Raises CorruptFileError for a classifier whose head is missing, or does not fit its labels.
    """
    if not has_head(stored):
        return None
    weight = tensors.get(PART)
    if weight is None:
        raise CorruptFileError(
            f"{folder} is a classifier without a head: {PART} is missing",
            [f"{TASK} {CLASSIFIES}, tensors of {len(tensors)} other names"],
            f'Save it again with its head, {SAVED}: ["score"], or train it again: a new head would'
            " answer at random.",
        )
    if weight.dim() != 2:
        raise CorruptFileError(f"{folder}: {PART} has shape {tuple(weight.shape)}, not (C, D)")
    outputs = weight.shape[0]
    entry = None if manifest is None else manifest.head
    if entry is None:
        names = tuple(f"LABEL_{number}" for number in range(outputs))
        return HeadSettings("regression") if outputs == 1 else HeadSettings("label", names)
    head = entry.settings
    if head.num_outputs != outputs:
        raise CorruptFileError(
            f"{folder}: the head has {outputs} outputs, veneer.json names {head.num_outputs}"
        )
    return head


def head_entry(attachment: Attachment) -> StoredHead | None:
    """Returns the entry of veneer.json."""
    return None if attachment.score is None else StoredHead.of(attachment.score.settings)
