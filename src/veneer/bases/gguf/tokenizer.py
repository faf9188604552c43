"""Rebuilds the tokenizer of a .gguf file, and refuses unknown rules of splitting text."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from veneer.bases.gguf.config import OTHER_SOURCE
from veneer.errors import SourceError

# tokenizer.ggml.pre: how text is split before merges. llama.cpp's names and groups, from
# src/llama-vocab.cpp.
_SPLIT_BY_TRANSFORMERS = (
    *(
        "llama3",
        "llama-v3",
        "llama-bpe",
        "falcon3",
        "falcon-h1",
        "pixtral",
        "midm-2.0",
        "dbrx",
        "smaug-bpe",
    ),
    *("tekken", "qwen2", "deepseek-r1-qwen", "kormo", "megrez", "gpt-4o", "llama4", "kanana2"),
)
_SPLIT_LIKE_GPT2 = (
    "gpt-2",
    "phi-2",
    "olmo",
    "mpt",
    "jais",
    "gigachat",
    "trillion",
)  # also split by transformers
_SPLIT_SINGLE_DIGITS = (
    "smollm",
    "starcoder",
    "refact",
    "command-r",
    "codeshell",
    "exaone",
    "minerva-7b",
)
# A word that is a token becomes that token, even if merges do not lead to it.
_WHOLE_WORDS = (
    "llama3",
    "llama-v3",
    "llama-bpe",
    "falcon3",
    "falcon-h1",
    "pixtral",
    "midm-2.0",
    "tekken",
)

# Tokens that end an answer under these names, though no key of the header says so: llama.cpp's
# list (special_eog_ids), from src/llama-vocab.cpp.
_ENDS = frozenset(
    """<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn>
    <|endoftext|> </s> <|eom_id|> <EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance>
    <eos>""".split()
)
_END_KEYS = ("eos", "eot", "eom")


def end_token_ids(tokenizer: PreTrainedTokenizerFast, fields: Mapping[str, Any]) -> set[int]:
    """Returns the ids of tokens at which llama.cpp ends an answer: those that the header names, and
    special tokens of known names. fields: of the header."""
    keys = [f"tokenizer.ggml.{key}_token_id" for key in _END_KEYS]
    named = {int(fields[key]) for key in keys if fields.get(key) is not None}
    special = {
        token.content: index
        for index, token in tokenizer.added_tokens_decoder.items()
        if token.content in _ENDS
    }
    if {"<|return|>", "<|call|>", "<|end|>"} <= special.keys():
        del special["<|end|>"]  # between the messages of one answer (gpt-oss)
    return named | set(special.values())


def rebuild_tokenizer(folder: Path, split_rule: str | None) -> PreTrainedTokenizerFast:
    """Rebuilds the tokenizer from the file. Raises SourceError if that fails."""
    try:
        tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(  # type: ignore[assignment]
            folder, gguf_file="model.gguf", local_files_only=True
        )
    except Exception as fault:  # each kind of vocabulary fails differently
        raise SourceError(
            "the tokenizer in the .gguf file cannot be rebuilt",
            [f"{type(fault).__name__}: {fault}"],
            OTHER_SOURCE,
        ) from fault
    if split_rule in _SPLIT_SINGLE_DIGITS:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    if split_rule in _WHOLE_WORDS:
        tokenizer.backend_tokenizer.model.ignore_merges = True
    return tokenizer


def split_rule_faults(split_rule: str | None) -> list[str]:
    """Reports an unknown value of tokenizer.ggml.pre."""
    known = (*_SPLIT_BY_TRANSFORMERS, *_SPLIT_LIKE_GPT2, *_SPLIT_SINGLE_DIGITS)
    if split_rule is None or split_rule in known:
        return []
    return [
        f"tokenizer.ggml.pre {split_rule}: it splits text in an unknown way; known are"
        f" {', '.join(known)}"
    ]
