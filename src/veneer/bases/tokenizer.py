"""Reads a base's tokenizer from an untrusted folder."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from veneer.bases.config.model_config import checked_config
from veneer.bases.folder.faults import NEXT_DOWNLOAD, tokenizer_faults
from veneer.bases.names.sources import locate
from veneer.bases.quiet_transformers import quiet
from veneer.errors import CorruptFileError, SourceError, fault_lines

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")


def load_tokenizer(source: str) -> tuple[PreTrainedTokenizerBase, PreTrainedConfig]:
    """Loads the tokenizer and the config of a base, without its weights. Raises as load_base
    does."""
    model_folder = locate(source)
    with quiet():
        config = checked_config(model_folder.folder)
        return read_tokenizer(model_folder.folder), config


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Reads the fast tokenizer in the folder.

    Raises SourceError if there is none, CorruptFileError if it is damaged.
    """
    names = {path.name for path in folder.iterdir()}
    if not names.intersection(_TOKENIZER_FILES):  # transformers would make an empty one
        raise SourceError(
            f"{folder} holds no tokenizer",
            [f"none of {', '.join(_TOKENIZER_FILES)}"],
            "Copy the tokenizer files of the original model into the folder.",
        )
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        tokenizer("A text.\n1 \u00e9 \U0001f642")  # some faults appear only here
    except Exception as fault:  # the tokenizers library raises plain Exception for a broken file
        faults = fault_lines(fault)
        if "tokenizer.json" in names:
            raise CorruptFileError(
                f"the tokenizer in {folder} cannot be read", faults, NEXT_DOWNLOAD
            ) from fault
        raise SourceError(
            f"the tokenizer in {folder} cannot be built without a tokenizer.json",
            faults,
            "Choose a version of the model with a tokenizer.json, or install the package named"
            " above.",
        ) from fault
    if faults := tokenizer_faults(tokenizer):
        raise CorruptFileError(f"the tokenizer in {folder} cannot be used", faults, NEXT_DOWNLOAD)
    if not tokenizer.is_fast:
        raise SourceError(
            f"the tokenizer in {folder} ({type(tokenizer).__name__}) has no fast form"
            " (tokenizer.json)",
            next_step="Choose a version of the model with a tokenizer.json.",
        )
    return tokenizer


def check_vocabulary(
    folder: Path, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
) -> None:
    """Raises CorruptFileError if the tokenizer has more tokens than the model has embeddings."""
    embeddings: Any = model.get_input_embeddings()
    rows = embeddings.weight.shape[0]
    if tokenizer.vocab_size > rows:
        raise CorruptFileError(
            f"the tokenizer in {folder} belongs to another model",
            [f"it has {tokenizer.vocab_size:,} tokens, the model has embeddings for {rows:,}"],
            "Copy the tokenizer files of the original model into the folder.",
        )
