"""A sentencepiece tokenizer as the tokenizer.ggml.* entries of a .gguf file (model "llama").

transformers merges the first pair of a list; llama.cpp, like sentencepiece, merges the pair whose
result has the highest score, the leftmost of several. So a piece's score is the position of its
pairs in that list. Both cut text alike if every pair that makes a piece is listed, and all pairs of
a piece come before those of the next; anything else is refused. Source: llama.cpp,
convert_hf_to_gguf.py (_create_vocab_sentencepiece), src/llama-vocab.cpp (llm_tokenizer_spm).
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

from gguf import GGUFWriter, TokenType

_SPACE = "\u2581"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_NO_PIECE = -1000.0
"""Score of a piece that no pair makes, as in the converter."""
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
_NO_SPLIT = {
    "type": "Split",
    "pattern": {"String": " "},
    "behavior": "MergedWithPrevious",
    "invert": False,
}
"""A split that has no effect, because no space is left by then."""


def is_sentencepiece(stored: Mapping[str, Any]) -> bool:
    """Returns whether a tokenizer.json merges characters and falls back to bytes."""
    return stored["model"]["type"] == "BPE" and bool(stored["model"].get("byte_fallback"))


def sentencepiece_faults(stored: Mapping[str, Any]) -> list[str]:
    """Lists why llama.cpp would cut text differently."""
    model, faults = stored["model"], []
    if stored.get("normalizer") != _REPLACE:
        faults.append(f"it does more, or less, to a text first than to write {_SPACE} for a space")
    if stored.get("pre_tokenizer") not in (None, _NO_SPLIT):
        faults.append("it cuts text into words before it merges")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges"):
        if model.get(name):
            faults.append(f"{name}: {model[name]}")
    if missing := [
        name for name in (f"<0x{byte:02X}>" for byte in range(256)) if name not in model["vocab"]
    ]:
        faults.append(f"{len(missing)} bytes have no piece ({missing[0]}, ...)")
    return faults or _order_faults(model, {token["content"] for token in stored["added_tokens"]})


def _order_faults(model: Mapping[str, Any], added: Collection[str]) -> list[str]:
    pairs = _pairs(model)
    pair_set, last = set(pairs), ""
    seen: set[str] = set()
    for a, b in pairs:
        if (piece := a + b) != last and piece in seen:
            return [f"pairs that make {piece!r} stand in several places of its list of merges"]
        seen.add(piece)
        last = piece
    for piece in model["vocab"]:
        if piece in added or _BYTE.fullmatch(piece):
            continue
        for position in range(1, len(piece)):
            pair = piece[:position], piece[position:]
            if pair not in pair_set and all(
                half in model["vocab"] and half not in added for half in pair
            ):
                return [f"{pair[0]!r} and {pair[1]!r} make {piece!r}, and are not among its merges"]
    return []


def _pairs(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    split = (m.split(" ", 1) if isinstance(m, str) else m for m in model["merges"])
    return [(a, b) for a, b in split]


def write_pieces(
    writer: GGUFWriter, stored: Mapping[str, Any], special: Collection[int], rows: int
) -> None:
    """Writes vocabulary, kinds and scores. special: ids of control tokens; rows: of the
    embedding.
    """
    model = stored["model"]
    positions: dict[str, int] = {}
    for a, b in _pairs(model):
        positions.setdefault(a + b, len(positions))
    by_id = {number: piece for piece, number in model["vocab"].items()}
    added = {token["id"]: token["content"] for token in stored["added_tokens"]}
    tokens, scores, kinds = [], [], []
    for number in range(rows):
        piece = added.get(number, by_id.get(number))
        score, kind = _NO_PIECE, TokenType.NORMAL
        if piece is None:
            piece, kind = f"[PAD{number}]", TokenType.UNUSED
        elif number in special:
            kind = TokenType.CONTROL
        elif _BYTE.fullmatch(piece):
            kind = TokenType.BYTE
        elif number in added and piece not in positions:
            piece, kind = piece.replace(_SPACE, " "), TokenType.USER_DEFINED
        elif number in added and _SPACE not in piece:
            kind = TokenType.USER_DEFINED
        if kind in (TokenType.NORMAL, TokenType.USER_DEFINED) and piece in positions:
            score = -float(positions[piece])
        tokens.append(piece)
        scores.append(score)
        kinds.append(kind)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
