"""A tokenizer of sentencepiece's kind as the tokenizer.ggml.* entries of a .gguf file (model
"llama").

transformers merges the pair that stands first in a list; llama.cpp, as sentencepiece itself, the
pair whose result has the highest score, the leftmost of several. So a piece's score is the place of
its pairs in that list, and the two cut alike where every pair that makes a piece is listed, and all
pairs of a piece before those of the next. What is otherwise is refused. Source: llama.cpp,
convert_hf_to_gguf.py (_create_vocab_sentencepiece), src/llama-vocab.cpp (llm_tokenizer_spm).
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

from gguf import GGUFWriter, TokenType

_SPACE = "\u2581"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_NO_PIECE = -1000.0
"""Score of what no pair makes, as the converter has it."""
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
_NO_SPLIT = {
    "type": "Split",
    "pattern": {"String": " "},
    "behavior": "MergedWithPrevious",
    "invert": False,
}
"""No space is left where this looks for one."""


def is_sentencepiece(stored: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json merges characters, and writes bytes where a character has no
    piece."""
    return stored["model"]["type"] == "BPE" and bool(stored["model"].get("byte_fallback"))


def sentencepiece_faults(stored: Mapping[str, Any]) -> list[str]:
    """Why llama.cpp would cut text otherwise."""
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
    listed, last = set(pairs), ""
    made: set[str] = set()
    for a, b in pairs:
        if (piece := a + b) != last and piece in made:
            return [f"pairs that make {piece!r} stand in several places of its list of merges"]
        made.add(piece)
        last = piece
    for piece in model["vocab"]:
        if piece in added or _BYTE.fullmatch(piece):
            continue
        for at in range(1, len(piece)):
            pair = piece[:at], piece[at:]
            if pair not in listed and all(
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
    """Vocabulary, kinds and scores. special: ids of control tokens; rows: of the model's
    embedding."""
    model = stored["model"]
    places: dict[str, int] = {}
    for a, b in _pairs(model):
        places.setdefault(a + b, len(places))
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
        elif number in added and piece not in places:
            piece, kind = piece.replace(_SPACE, " "), TokenType.USER_DEFINED
        elif number in added and _SPACE not in piece:
            kind = TokenType.USER_DEFINED
        if kind in (TokenType.NORMAL, TokenType.USER_DEFINED) and piece in places:
            score = -float(places[piece])
        tokens.append(piece)
        scores.append(score)
        kinds.append(kind)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
