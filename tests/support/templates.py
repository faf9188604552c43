"""Makes tokenizers with chat templates, messages and rows."""

from __future__ import annotations

from functools import cache
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.support.tiny import CHATML, tiny_tokenizer
from veneer.data.examples import Row, RowRef, TrainOn
from veneer.data.template.template import ChatTemplate

START, END, PAD = 256, 257, 258


Message = dict[str, Any]


MODES: tuple[TrainOn, ...] = ("assistant", "last", "all")


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str, **more: Any) -> Message:
    return {"role": "assistant", "content": content, **more}


def row(*messages: Message, **more: Any) -> Row:
    return Row(RowRef("rows.jsonl", 1), list(messages), **more)


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, with merges that cross the end of the generation prompt ("\\n\\n") and of a turn, and
    words."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [
        ("Ċ", "Ċ"),
        ("ĊĊ", "Ċ"),
        ("Ċ", "a"),
        ("Ġ", "a"),
        ("a", "b"),
        ("Ġa", "b"),
        ("Ġ", "Ġ"),
        ("<", "|"),
    ]
    vocabulary = {token: n for n, token in enumerate([*alphabet, *(a + b for a, b in merges)])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return dressed(backend)


def spaced_tokenizer(prepend: str = "first") -> PreTrainedTokenizerFast:
    """As sentencepiece does: a space in front of the text's first word, spaces as ▁, rare
    characters as bytes."""
    tokens = ["<unk>", *(f"<0x{n:02X}>" for n in range(256)), "▁", *map(chr, range(33, 127)), "\n"]
    merges = [("▁", "a"), ("a", "b"), ("▁", "▁"), ("\n", "\n")]
    tokens += [a + b for a, b in merges]
    vocabulary = {token: n for n, token in enumerate(tokens)}
    backend = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True)
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=False)
    steps = [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    backend.decoder = decoders.Sequence(steps)
    return dressed(backend)


def dressed(backend: Tokenizer) -> PreTrainedTokenizerFast:
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = CHATML
    return tokenizer


TOKENIZERS = {"bytes": tiny_tokenizer, "merging": merging_tokenizer, "spaced": spaced_tokenizer}


@cache
def template(name: str) -> ChatTemplate:
    return ChatTemplate(TOKENIZERS[name]())


@cache
def character(text: str) -> tuple[int, ...]:
    return tuple(tiny_tokenizer()(text, add_special_tokens=False).input_ids)


def spelled(text: str) -> list[int]:
    """One character at a time, so that no control token can come of it."""
    return [number for one in text for number in character(one)]


def with_template(source: str) -> ChatTemplate:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = source
    return ChatTemplate(tokenizer)
