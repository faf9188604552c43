"""Text said piece by piece is the text of the whole answer, cut before its first stop string, in
linear time."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from tests.support.tiny import tiny_base, tiny_tokenizer
from veneer.base import Base
from veneer.decoding.text import MANY, TextStream, stop_check, text_of


def sentencepiece():
    """Llama 2's kind: a mark for each space, the first one of a text taken away, bytes where a
    character is unknown."""
    pieces = [
        "<unk>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *"abcdeh",
        "▁a",
        "▁he",
        "▁▁",
        "é",
        "日",
    ]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    marks = [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    backend.decoder = decoders.Sequence(marks)
    backend.add_special_tokens(["</s>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", clean_up_tokenization_spaces=False
    )


TOKENIZERS = {"bytes": tiny_tokenizer(), "pieces": sentencepiece()}


class Counted:
    def __init__(self, tokenizer):
        self.tokenizer, self.ids = tokenizer, 0

    def decode(self, ids, **options):
        self.ids += len(ids)
        return self.tokenizer.decode(ids, **options)


TEXTS = ["Grüße, 世界! 👩‍👩‍👧 ok", "a  b   c", "", "🙂", "he said: a he"]


def ids_of(name, text):
    tokenizer = TOKENIZERS[name]
    if name == "bytes":
        return tokenizer(text)["input_ids"]
    known = {piece: i for piece, i in tokenizer.get_vocab().items() if len(piece) == 1}
    marked = text.replace(" ", "▁")
    return [
        i for c in marked for i in ([known[c]] if c in known else [1 + byte for byte in c.encode()])
    ]


def said(stream, ids):
    pieces = [stream.push(token) for token in ids]
    return [*pieces, stream.end()]


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("text", TEXTS)
def test_the_pieces_are_the_text_and_no_character_is_said_by_halves(name, text):
    tokenizer = TOKENIZERS[name]
    special = tokenizer.eos_token_id
    ids = [i for token in ids_of(name, text) for i in (token, special)]
    pieces = said(TextStream(tokenizer), ids)
    assert "".join(pieces) == text_of(tokenizer, ids) == text
    assert all("\ufffd" not in piece for piece in pieces) and pieces[-1] == ""


def test_the_pieces_of_any_bytes_are_their_text():
    tokenizer, draw = TOKENIZERS["bytes"], random.Random(3)
    for length in (1, 5, 40, 300):
        for _ in range(30):
            ids = [draw.randrange(len(tokenizer)) for _ in range(length)]
            assert "".join(said(TextStream(tokenizer), ids)) == text_of(tokenizer, ids)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_several_tokens_at_once_say_what_they_say_one_by_one(name):
    tokenizer, draw = TOKENIZERS[name], random.Random(6)
    for text in TEXTS * 5:
        ids = [
            i
            for token in ids_of(name, text)
            for i in (token, *[tokenizer.eos_token_id] * draw.randrange(2))
        ]
        for stops in ([], ["he"], ["  b", "界!"]):
            one_by_one, stream, pieces, place = (
                TextStream(tokenizer, stops),
                TextStream(tokenizer, stops),
                [],
                0,
            )
            while place < len(ids):
                many = draw.choice([0, 1, 2, 5, 40])
                pieces.append(stream.push_all(ids[place : place + many]))
                place += many
            assert "".join([*pieces, stream.end()]) == "".join(said(one_by_one, ids))
            assert stream.stopped == one_by_one.stopped


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokens_without_a_text_of_their_own_change_nothing(name):
    tokenizer, draw = TOKENIZERS[name], random.Random(4)
    nothing = tokenizer.eos_token_id
    for text in TEXTS:
        for before in (0, 1, 3 * MANY):
            ids = [nothing] * before
            for token in ids_of(name, " " + text):
                ids += [token, *[nothing] * draw.choice([0, 0, 2, 3 * MANY])]
            assert "".join(said(TextStream(tokenizer), ids)) == text_of(tokenizer, ids)


def first_end(text, stops):
    """(end, start) of the string that is complete first, the longest of those that are."""
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    return min(ends, default=None)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_nothing_of_a_stop_string_is_said_and_everything_before_it_is(name):
    tokenizer, draw = TOKENIZERS[name], random.Random(5)
    for _ in range(300):
        text = "".join(draw.choices("ab é", k=draw.randint(1, 30)))
        stops = [
            "".join(draw.choices("ab é", k=draw.randint(1, 5))) for _ in range(draw.randint(0, 3))
        ]
        ids = ids_of(name, text)
        text = text_of(tokenizer, ids)
        stream, sofar = TextStream(tokenizer, stops), ""
        check = stop_check(tokenizer, stops)()
        for count, token in enumerate(ids, 1):
            before = stream.stopped
            sofar += stream.push(token)
            assert check(token) == stream.stopped or before
            assert text.startswith(sofar)
            found = first_end(text_of(tokenizer, ids[:count]).rstrip("\ufffd"), stops)
            assert stream.stopped == (found is not None)
        found = first_end(text, stops)
        assert sofar + stream.end() == (text if found is None else text[: found[1]])


def test_what_cannot_begin_a_stop_string_is_said_at_once():
    stream = TextStream(TOKENIZERS["bytes"], ["STOP", "TO"])
    pieces = said(stream, ids_of("bytes", "an S, an ST and SSTO!"))
    assert pieces[:6] == ["a", "n", " ", "", "S,", " "]
    assert "".join(pieces) == "an S, an ST and SS" and stream.stopped


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_token_costs_the_same_however_long_the_answer_is(name):
    """Counted in ids that are decoded; of bytes that are no characters too."""
    tokenizer = TOKENIZERS[name]
    alone = ids_of(name, "é")[0] if name == "bytes" else 1 + 0xC3
    behind = ids_of(name, "é")[1] if name == "bytes" else 1 + 0xA9
    for ids in (
        ids_of(name, "abc ") * 300,
        [alone] * 1200,
        [behind] * 1200,
        [tokenizer.eos_token_id] * 1200,
    ):
        counted = Counted(tokenizer)
        assert "".join(said(TextStream(counted, ["zz"]), ids)) == text_of(tokenizer, ids)
        assert counted.ids <= 3 * MANY * len(ids), counted.ids / len(ids)


@pytest.mark.parametrize("temperature", [0.0, 5.0])
def test_an_answer_said_piece_by_piece_is_the_answer(temperature):
    plain = tiny_base()
    base = Base(model=plain.model, tokenizer=plain.tokenizer, source="tiny", name_or_path="tiny")
    pieces: list[str] = []
    answer = base.generate("é", max_new_tokens=60, temperature=temperature, on_text=pieces.append)
    assert (
        "".join(pieces) == answer == base.generate("é", max_new_tokens=60, temperature=temperature)
    )
    assert answer and all(pieces)
