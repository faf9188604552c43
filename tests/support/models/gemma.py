"""A tiny Gemma 3 of texts, as its checkpoints are: five layers with a window and one without, a
tokenizer of pieces."""

from pathlib import Path
from typing import Any

from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GemmaTokenizer,
    PreTrainedModel,
)
from transformers.tokenization_utils_base import generate_merges

from tests.support.tiny import CHATML, tiny_model
from veneer.bases.quiet_transformers import quiet

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<|im_start|>", "<|im_end|>")
SPACE = "\u2581"
WORDS = (
    "th",
    "the",
    "he",
    "in",
    "ing",
    "an",
    "and",
    "er",
    "on",
    "at",
    "ou",
    "or",
    "is",
    "it",
    "to",
    "of",
)
PIECES = (
    *WORDS,
    *(SPACE + word for word in WORDS),
    SPACE + "t",
    SPACE + "a",
    SPACE + "i",
    "ö\u00df",
    "aa",
    "aaa",
    "aaaa",
)
ADDED = ("\n\n", "\n\n\n", "<table>")
TEXTS = (
    "the thing and the other  thinghere",
    "  two spaces, three   ones\n\nand\n\n\n\n\nlines\t\n",
    "naïve Größe 漢字 🙂 <table>is it</table>",
    "aaaaa aaaaaaaa a aa",
    "",
    " ",
    "<|im_start|>user\nit is\u2581\u2581odd<|im_end|>\n",
)


def gemma_tokenizer(pieces: tuple[str, ...] = PIECES, **options: Any) -> GemmaTokenizer:
    letters = [SPACE, *map(chr, range(33, 127)), "\n", "\t", "ö", "\u00df", "ï"]
    tokens = [
        *SPECIAL,
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *ADDED,
        SPACE * 2,
        SPACE * 3,
        *letters,
        *pieces,
    ]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    merges = generate_merges(vocabulary, {token: -number for token, number in vocabulary.items()})
    made = GemmaTokenizer(vocab=vocabulary, merges=merges, **options)
    made.add_special_tokens({"additional_special_tokens": list(SPECIAL[5:])})
    made.add_tokens(list(ADDED))
    made.chat_template = CHATML
    return made


def save_gemma(folder: Path, *, images: bool = False, **overrides: Any) -> Path:
    tokenizer = gemma_tokenizer()
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 256}
    fields = {
        "vocab_size": len(tokenizer) + 9,
        "num_hidden_layers": 7,
        "layer_types": [*["sliding_attention"] * 5, "full_attention", "sliding_attention"],
        "query_pre_attn_scalar": 256,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    model = tiny_model("gemma3", **{**sizes, **fields, **overrides})
    for name, weight in model.named_parameters():
        if "post_" in name:
            weight.data.add_(
                6.0
            )  # else each token is followed by itself, whatever the blocks compute
    with quiet():
        (with_a_tower(model) if images else model).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def with_a_tower(text: PreTrainedModel) -> PreTrainedModel:
    """The same language model within the class of texts and images."""
    eyes = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = Gemma3Config(
        text_config=text.config.to_dict(),
        vision_config={**eyes, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=1,
        architectures=["Gemma3ForConditionalGeneration"],
    )
    model = Gemma3ForConditionalGeneration(config)
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.tie_weights()
    return model
