"""Single tokens as text and as bytes, of tokenizers that write bytes in different ways."""

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from tests.support.tiny import tiny_tokenizer
from veneer.serve.engine.token_text import TokenTexts

TEXT = "Zürich, 今日 🙂"


def with_byte_fallback():
    """Returns a tokenizer that writes what is no letter of ASCII as tokens of one byte."""
    names = [chr(code) for code in range(32, 127)] + [f"<0x{byte:02X}>" for byte in range(256)]
    model = models.BPE(
        vocab={name: i for i, name in enumerate(names)}, merges=[], byte_fallback=True
    )
    backend = Tokenizer(model)
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.mark.parametrize("made", [tiny_tokenizer, with_byte_fallback])
def test_the_bytes_of_the_tokens_of_a_text_are_the_texts(made):
    tokenizer = made()
    texts = TokenTexts(tokenizer)
    chances = [texts.logprob(token, -1.0) for token in tokenizer(TEXT).input_ids]
    assert bytes(byte for chance in chances for byte in chance.bytes) == TEXT.encode()
    assert [chance.text for chance in chances if chance.text.isalpha()] == list("Zrich")
    assert {chance.text for chance in chances if chance.bytes[0] >= 128} == {"\ufffd"}


def test_a_row_that_no_token_has_is_empty_and_a_chance_of_none_is_a_number():
    texts = TokenTexts(tiny_tokenizer())
    assert texts.logprob(100_000, float("-inf")) == texts.logprob(100_001, -9999.0)
    assert (texts.logprob(100_000, -1.0).text, texts.logprob(100_000, -1.0).bytes) == ("", [])
    special = texts.logprob(256, -1.0)
    assert bytes(special.bytes).decode() == special.text == "<|im_start|>"
