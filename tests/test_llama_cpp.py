"""An exported adapter and an exported model in llama.cpp itself: the same greedy answers as ours.

Skipped where llama-cpp-python is not installed (pip install "veneer[llamacpp]").
"""

import pytest

from tests.gemma import TEXTS, save_gemma
from tests.helpers import fill
from tests.tiny import save_tiny
from tests.tiny_gguf import with_merges
from veneer.adapters.attach import attach
from veneer.adapters.config import LoRA
from veneer.decoding.generate import generate
from veneer.formats.adapter import manifest_for, write_adapter
from veneer.merge.export_run import export_adapter, export_merged_gguf
from veneer.models.load import load_base

llama_cpp = pytest.importorskip("llama_cpp")

PROMPTS = [[5, 80, 99, 7], [200, 31, 31, 80, 12, 77, 140], list(range(100, 130))]
TOKENS = 8
F32 = 0
"""ggml's number of the type. llama.cpp's default is a cache of keys and values in f16, on which close choices turn."""
SETTINGS = {
    "alpha and rank": {"rank": 4, "alpha": 14},
    "rsLoRA and patterns": {"rank": 4, "alpha": 7, "rslora": True, "rank_pattern": {"v_proj": 2}},
}


def answers(model, adapter=None):
    """Greedy tokens of llama.cpp for every prompt; it does not stop at the tokens that end an answer."""
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
    for prompt in PROMPTS:
        found.reset()
        ids = []
        for token in found.generate(prompt, temp=0.0, repeat_penalty=1.0):
            ids.append(token)
            if len(ids) == TOKENS:
                break
        made.append(ids)
    return made


def ours(base):
    base.model.generation_config.eos_token_id = None
    return generate(base, PROMPTS, max_new_tokens=TOKENS)


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
    fill(made.parameters().values(), scale=1.0 if family == "gemma3" else 0.3)  # norms stand behind its blocks
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
