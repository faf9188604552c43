"""llama.cpp itself: exported adapters and models give the same greedy answers, files that we read
the same logits.

Skipped where llama-cpp-python is not installed (pip install "veneer[llamacpp]").
"""

import numpy as np
import pytest
import torch

from tests.bases.test_gguf_config import CASES, model_of, rebuilt
from tests.support.helpers import fill
from tests.support.models.gemma import TEXTS, save_gemma
from tests.support.models.tiny_gguf import header_of, with_merges, write_gguf
from tests.support.tiny import save_tiny
from veneer.adapters.attach import attach
from veneer.adapters.config import LoRA
from veneer.bases.gguf.convert import dense_model, read_header
from veneer.decoding.generate import generate
from veneer.errors import SourceError
from veneer.formats.adapter import manifest_for, write_adapter
from veneer.merge.export.export_run import export_adapter, export_merged_gguf
from veneer.models.load import load_base

llama_cpp = pytest.importorskip("llama_cpp")

PROMPTS = [[5, 80, 99, 7], [200, 31, 31, 80, 12, 77, 140], list(range(100, 130))]
TOKENS = 8
F32 = 0
"""ggml's number of the type. llama.cpp's default is a cache of keys and values in f16, on which
close choices turn."""
SETTINGS = {
    "alpha and rank": {"rank": 4, "alpha": 14},
    "rsLoRA and patterns": {"rank": 4, "alpha": 7, "rslora": True, "rank_pattern": {"v_proj": 2}},
}


def answers(model, adapter=None, prompts=PROMPTS):
    """Greedy tokens of llama.cpp for every prompt; it does not stop at the tokens that end an
    answer."""
    found = llama_cpp.Llama(
        str(model),
        n_ctx=128,
        n_threads=1,
        n_threads_batch=1,
        verbose=False,
        type_k=F32,
        type_v=F32,
        lora_path=None if adapter is None else str(adapter),
    )
    made = []
    for prompt in prompts:
        found.reset()
        ids = []
        for token in found.generate(prompt, temp=0.0, repeat_penalty=1.0):
            ids.append(token)
            if len(ids) == TOKENS:
                break
        made.append(ids)
    return made


def ours(base, prompts=PROMPTS):
    base.model.generation_config.eos_token_id = None
    return generate(base, prompts, max_new_tokens=TOKENS)


def test_a_tokenizer_of_pieces_cuts_text_as_ours(tmp_path):
    source = str(save_gemma(tmp_path / "base"))
    export_merged_gguf([], base=source, out=tmp_path / "base.gguf")
    theirs = llama_cpp.Llama(str(tmp_path / "base.gguf"), vocab_only=True, verbose=False)
    ours = load_base(source).tokenizer
    for text in TEXTS:
        found = theirs.tokenize(text.encode(), add_bos=False, special=True)
        assert found == ours(text, add_special_tokens=False)["input_ids"], text


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("family", ["llama_untied", "qwen2", "gemma3"])
def test_adapter_and_merged_model_answer_as_ours(family, settings, tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 96}
    if family == "gemma3":
        source = str(save_gemma(tmp_path / "base", **sizes))
    else:
        source = str(with_merges(save_tiny(tmp_path / "base", family, **sizes)))
    base = load_base(source)
    head = base.model.get_output_embeddings()
    made = attach(base.model, LoRA(**settings), name="x", routing=base.routing, head=head)
    fill(
        made.parameters().values(), scale=1.0 if family == "gemma3" else 0.3
    )  # norms stand behind its blocks
    write_adapter(tmp_path / "a", made, manifest_for(base, method="lora"), model=base.model)
    plain = ours(base)
    base.routing.active = (("x", 1.0),)
    adapted = ours(base)
    assert all(one != other for one, other in zip(plain, adapted, strict=True))
    export_merged_gguf([], base=source, out=tmp_path / "base.gguf")
    export_adapter(tmp_path / "a", to="llamacpp", base=source, out=tmp_path / "a.gguf")
    export_merged_gguf([(tmp_path / "a", 1.0)], base=source, out=tmp_path / "m.gguf")
    assert answers(tmp_path / "base.gguf") == plain
    assert answers(tmp_path / "base.gguf", tmp_path / "a.gguf") == adapted
    assert answers(tmp_path / "m.gguf") == adapted


CHANGES = {
    "rope.freq_base": 700.0,
    "rope.scaling.factor": 3.0,
    "rope.scale_linear": 5.0,
    "rope.dimension_count": 2,
    "attention.layer_norm_rms_epsilon": 0.05,
    "attention.layer_norm_epsilon": 0.05,
    "attn_logit_softcapping": 1.5,
    "final_logit_softcapping": 3.0,
    "attention.sliding_window": 3,
    "attention.sliding_window_pattern": 2,
    "expert_used_count": 1,
    "rope.freq_base_swa": 700.0,
    "rope.scaling.finetuned": True,
    "attention.scale": 0.9,
    "expert_weights_scale": 3.0,
    "attention.max_alibi_bias": 4.0,
}
"""Hyperparameters that change no shape."""
ALWAYS = {"phi3": {"phi3.attention.sliding_window": 0}}
"""llama.cpp computes Phi 3 without its window, since its converter has not always written it
right."""


def their_logits(path):
    model = llama_cpp.Llama(
        str(path),
        n_ctx=64,
        n_threads=1,
        n_threads_batch=1,
        verbose=False,
        logits_all=True,
        type_k=F32,
        type_v=F32,
    )
    model.eval(list(range(40, 70)))
    return torch.from_numpy(np.array(model.scores[:30]))


def our_logits(path):
    model = dense_model(read_header(path))
    return rebuilt(model.config, model)(torch.arange(40, 70)[None]).logits[0]


def gap(one, other):
    return float((one - other).abs().max() / other.abs().max())


@pytest.mark.parametrize("case", CASES)
def test_a_header_means_to_us_what_it_means_to_llama_cpp(case, tmp_path):
    architecture, model = model_of(case)
    always = ALWAYS.get(architecture, {})
    plain = their_logits(write_gguf(tmp_path / "plain.gguf", model, architecture, extra=always))
    assert gap(our_logits(tmp_path / "plain.gguf"), plain) < 2e-3  # its GELU is a table in f16
    for number, (key, value) in enumerate(CHANGES.items()):
        path = tmp_path / f"{number}.gguf"
        extra = {f"{architecture}.{key}": value, **always}
        if architecture == "nemotron" and "epsilon" in key:
            extra = dict.fromkeys(
                (f"nemotron.attention.layer_norm{rms}_epsilon" for rms in ("", "_rms")), value
            )
        write_gguf(path, model, architecture, extra=extra)
        try:
            ours = our_logits(path)
        except SourceError as refused:
            assert key in str(refused)
            continue
        theirs = their_logits(path)
        assert gap(ours, theirs) < 2e-3, key
        if key in header_of(architecture, model.config) and f"{architecture}.{key}" not in always:
            assert gap(theirs, plain) > 1e-3, key
