"""Gemma 3 as a .gguf file: read back by transformers' own code, and cut as llama.cpp's rule for
pieces cuts.

tests/merge/test_llama_cpp.py asks llama.cpp itself, where it is installed.
"""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader, TokenType

from tests.support.helpers import fill
from tests.support.models.gemma import PIECES, SPACE, TEXTS, gemma_tokenizer, save_gemma
from veneer.adapters.attach import attach
from veneer.adapters.config import LoRA
from veneer.errors import RefusedError
from veneer.formats.adapter import manifest_for, write_adapter
from veneer.merge.export.export_run import export_merged_gguf
from veneer.merge.gguf.sentencepiece import sentencepiece_faults
from veneer.models.load import load_base

IDS = torch.arange(40)[None]
LAYERS = ("full_attention", "sliding_attention")


def merged(folder: Path, source: Path) -> tuple[Path, torch.Tensor]:
    """An adapter over it, a norm of it trained too; and the logits with it."""
    base = load_base(str(source), dtype="float32")
    settings = LoRA(rank=3, alpha=7.0, train_modules=["norm"])
    head = base.model.get_output_embeddings()
    made = attach(base.model, settings, name="x", routing=base.routing, head=head)
    fill(made.parameters().values(), scale=0.2)
    write_adapter(folder, made, manifest_for(base, method="lora"), model=base.model)
    base.routing.active = (("x", 1.0),)
    with torch.no_grad():
        return folder, base.model(input_ids=IDS).logits


@pytest.mark.parametrize("images", [False, True])
def test_a_merged_gemma_3_comes_back_as_base_and_adapter(images, tmp_path, monkeypatch):
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "cache"))
    source = save_gemma(tmp_path / "base", images=images)
    adapter, expected = merged(tmp_path / "a", source)
    report = export_merged_gguf([(adapter, 1.0)], base=str(source), out=tmp_path / "m.gguf")
    assert report.total.share == pytest.approx(1.0, abs=0.01)
    again, own = load_base(str(tmp_path / "m.gguf"), dtype="float32"), load_base(str(source))
    assert type(again.model).__name__ == "Gemma3ForCausalLM"
    with torch.no_grad():
        found = again.model(input_ids=IDS).logits
        assert (found - expected).abs().max() < 0.02 * expected.abs().max()  # weights in f16
        assert (own.model(input_ids=IDS).logits - expected).abs().max() > 0.2 * expected.abs().max()
    for text in TEXTS:
        assert again.tokenizer(text)["input_ids"] == own.tokenizer(text)["input_ids"]
    assert again.tokenizer.chat_template == own.tokenizer.chat_template


def cut_by_scores(text: str, tokens: list[str], scores: list[float]) -> list[int]:
    """llm_tokenizer_spm: of all neighbours that make a piece, those of the highest score, the
    leftmost of several, are joined; what is no piece then is written in bytes. Control and user's
    tokens are not looked for in the text here."""
    ids = {token: number for number, token in enumerate(tokens)}
    parts = list(text.replace(" ", SPACE))
    while True:
        made = [ids.get(a + b) for a, b in pairwise(parts)]
        pairs = [(-scores[number], at) for at, number in enumerate(made) if number is not None]
        if not pairs:
            break
        at = min(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return [
        n
        for part in parts
        for n in ([ids[part]] if part in ids else [ids[f"<0x{b:02X}>"] for b in part.encode()])
    ]


def test_scores_join_the_pieces_that_merges_join(tmp_path):
    source = save_gemma(tmp_path / "base")
    export_merged_gguf([], base=str(source), out=tmp_path / "m.gguf")
    fields = GGUFReader(tmp_path / "m.gguf").fields
    tokens, scores, kinds = (
        fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "scores", "token_type")
    )
    tokenizer = load_base(str(source)).tokenizer
    assert fields["tokenizer.ggml.model"].contents() == "llama"
    assert fields["tokenizer.ggml.add_space_prefix"].contents() is False
    kind_of = dict(zip(tokens, kinds, strict=True))
    assert kind_of["<bos>"] == kind_of["<|im_end|>"] == TokenType.CONTROL
    assert (
        kind_of["<0x0A>"] == TokenType.BYTE
        and kind_of[SPACE * 2] == kind_of["the"] == TokenType.NORMAL
    )
    assert kind_of["\n\n"] == kind_of["<table>"] == TokenType.USER_DEFINED
    assert kinds[-9:] == [TokenType.UNUSED] * 9 and len(tokens) == len(set(tokens))
    for text in (*TEXTS[:2], TEXTS[3], "naïve Größe 漢字 🙂", "inging anding theing  th th ath"):
        if "\n\n" not in text:
            assert cut_by_scores(text, tokens, scores) == tokenizer(text)["input_ids"], text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t["model"]["merges"].pop(), "are not among its merges"),
        (lambda t: t["model"].update(ignore_merges=True), "ignore_merges"),
        (lambda t: t.update(normalizer=None), "to a text first"),
        (lambda t: t.update(pre_tokenizer={"type": "Whitespace"}), "into words"),
        (lambda t: t["model"]["vocab"].pop("<0x07>"), "1 bytes have no piece"),
    ],
)
def test_a_tokenizer_that_llama_cpp_would_cut_by_otherwise_is_refused(change, said):
    stored = json.loads(gemma_tokenizer().backend_tokenizer.to_str())
    assert sentencepiece_faults(stored) == []
    change(stored)
    (found,) = sentencepiece_faults(stored)
    assert said in found


def test_pairs_of_a_piece_in_several_places_are_refused():
    stored = json.loads(gemma_tokenizer().backend_tokenizer.to_str())
    merges = stored["model"]["merges"]
    two = [number for number, pair in enumerate(merges) if "".join(pair) == "aaa"]
    assert "aaa" in PIECES and len(two) == 2
    merges.insert(0, merges.pop(two[1]))
    assert sentencepiece_faults(stored) == [
        "pairs that make 'aaa' stand in several places of its list of merges"
    ]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"query_pre_attn_scalar": 128},
            "query_pre_attn_scalar is 128, where llama.cpp computes with 256",
        ),
        (
            {"layer_types": ["full_attention"] * 7},
            "layer_types is ['full_attention', 'full_attention'",
        ),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
        ({"hidden_activation": "silu"}, "hidden_activation is silu"),
        ({"attention_bias": True}, "attention_bias is True"),
        (
            {
                "rope_parameters": {
                    name: {"rope_type": "default", "rope_theta": 5e4} for name in LAYERS
                }
            },
            "'sliding_attention': {'rope_type': 'default', 'rope_theta': 50000.0",
        ),
    ],
)
def test_what_llama_cpp_takes_for_granted_of_a_gemma_3_is_held_against_it(settings, said, tmp_path):
    source = save_gemma(tmp_path / "base", **settings)
    with pytest.raises(RefusedError) as caught:
        export_merged_gguf([], base=str(source), out=tmp_path / "m.gguf")
    assert any(said in fault for fault in caught.value.faults)
    assert not (tmp_path / "m.gguf").exists()


def test_a_scaled_rotation_is_written(tmp_path):
    rope = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    source = save_gemma(tmp_path / "base", rope_parameters=rope)
    export_merged_gguf([], base=str(source), out=tmp_path / "m.gguf")
    fields = GGUFReader(tmp_path / "m.gguf").fields
    said = {
        name: fields[f"gemma3.{name}"].contents()
        for name in ("rope.scaling.type", "rope.scaling.factor")
    }
    assert said == {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}
    assert fields["gemma3.rope.freq_base"].contents() == 1e6
    assert (
        fields["gemma3.attention.sliding_window"].contents()
        == load_base(str(source)).config.sliding_window
    )
