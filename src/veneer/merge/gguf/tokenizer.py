"""A tokenizer as the tokenizer.ggml.* entries of a .gguf file, as llama.cpp's converter writes
them.

llama.cpp cuts text into words by its own rules, chosen by name (tokenizer.ggml.pre). The name is
found from what the tokenizer does, not from its name; an unknown rule is refused, because a nearly
right file gives wrong answers. Source: llama.cpp, convert_hf_to_gguf.py (get_vocab_base_pre) and
src/llama-vocab.cpp.
"""

import json
from typing import Any

from gguf import GGUFWriter, TokenType
from transformers import PreTrainedTokenizerBase

from veneer.errors import RefusedError
from veneer.merge.gguf.sentencepiece import is_sentencepiece, sentencepiece_faults, write_pieces

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3 = (
    _CONTRACTIONS
    + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = (
    _CONTRACTIONS
    + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BY_PATTERN = {_LLAMA3: "llama-bpe", _QWEN2: "qwen2"}


def write_tokenizer(
    writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, vocab_size: int
) -> None:
    """Writes vocabulary, merges, special tokens and the chat template. vocab_size: rows of the
    embedding.

    RefusedError: an unknown kind of tokenizer.
    """
    stored = json.loads(tokenizer.backend_tokenizer.to_str())
    if is_sentencepiece(stored):
        _refuse(sentencepiece_faults(stored))
        special = {
            number for number, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        write_pieces(writer, stored, special, vocab_size)
    else:
        _write_words(writer, tokenizer, stored, vocab_size)
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(bool(ids) and ids[0] == tokenizer.bos_token_id)
    writer.add_add_space_prefix(False)
    for number, add in (
        (tokenizer.bos_token_id, writer.add_bos_token_id),
        (tokenizer.eos_token_id, writer.add_eos_token_id),
        (tokenizer.unk_token_id, writer.add_unk_token_id),
        (tokenizer.pad_token_id, writer.add_pad_token_id),
    ):
        if isinstance(number, int):
            add(number)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _write_words(
    writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, stored: dict[str, Any], vocab_size: int
) -> None:
    """Writes byte-level pieces, merged within words."""
    pre = word_rule(stored)
    by_id = {number: token for token, number in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    tokens, kinds = [], []
    for number in range(vocab_size):
        if number not in by_id:
            tokens.append(f"[PAD{number}]")
            kinds.append(TokenType.UNUSED)
        elif number in added:
            tokens.append(added[number].content)
            kinds.append(TokenType.CONTROL if added[number].special else TokenType.USER_DEFINED)
        else:
            tokens.append(by_id[number])
            kinds.append(TokenType.NORMAL)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(
        [m if isinstance(m, str) else " ".join(m) for m in stored["model"]["merges"]]
    )


def word_rule(stored: dict[str, Any]) -> str:
    """Returns tokenizer.ggml.pre of a tokenizer.json. RefusedError if llama.cpp has no equal
    rule.
    """
    faults = []
    if stored["model"]["type"] != "BPE" or stored["model"].get("byte_fallback"):
        faults.append(
            f"vocabulary {stored['model']['type']}: only BPE of bytes or with bytes to fall back on"
            " is written"
        )
    steps = _steps(stored.get("pre_tokenizer"))
    name = _known(steps)
    if name is None:
        faults.append(
            f"it cuts text by {', '.join(step['type'] for step in steps) or 'nothing'} with"
            " settings that have no name here"
        )
    normalizer = stored.get("normalizer")
    if normalizer is not None and not (name == "qwen2" and normalizer["type"] == "NFC"):
        faults.append(f"it rewrites text first ({normalizer['type']})")
    if name == "llama-bpe" and not stored["model"].get("ignore_merges"):
        faults.append("it merges words that are tokens already, which llama.cpp does not")
    _refuse(faults)
    assert name is not None
    return name


def _refuse(faults: list[str]) -> None:
    if faults:
        raise RefusedError(
            "this tokenizer cannot be written into a .gguf file",
            faults,
            "Merge into a folder (veneer merge) and use llama.cpp's convert_hf_to_gguf.py on it.",
        )


def _steps(rule: Any) -> list[dict[str, Any]]:
    if rule is None:
        return []
    return list(rule["pretokenizers"]) if rule["type"] == "Sequence" else [rule]


def _known(steps: list[dict[str, Any]]) -> str | None:
    if not steps or steps[-1]["type"] != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    first_steps, uses_regex = steps[:-1], steps[-1].get("use_regex", True)
    if not first_steps:
        return "gpt-2" if uses_regex else None
    if len(first_steps) > 1:
        return None
    if (
        first_steps[0]["type"] == "Digits"
        and first_steps[0].get("individual_digits")
        and uses_regex
    ):
        return "smollm"
    if (
        first_steps[0]["type"] == "Split"
        and not uses_regex
        and first_steps[0].get("behavior") == "Isolated"
        and not first_steps[0].get("invert")
    ):
        return _BY_PATTERN.get(first_steps[0]["pattern"].get("Regex"))
    return None
