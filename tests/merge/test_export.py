"""Exports: what another program computes from the file is what was trained; what it would not, is
told before."""

import argparse
import json
from typing import get_args

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter, dequantize
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers

from tests.merge.test_combine import EXACT, SETTINGS, assert_equal_updates, changes, make
from tests.parity.test_peft_files import logits
from tests.support.helpers import fill
from tests.support.models.tiny_gguf import with_merges
from tests.support.tiny import save_tiny, tiny_tokenizer
from veneer.adapters.attach import attach
from veneer.adapters.config import Bottleneck, DoRA, LoRA, Prefix
from veneer.cli.main import command_module
from veneer.errors import ConfigError, RefusedError
from veneer.formats.adapter import manifest_for, read_adapter, write_adapter
from veneer.formats.loading import load_adapter
from veneer.merge.export.export_run import export_adapter, export_merged_gguf, lint_adapter
from veneer.merge.gguf.names import names_of
from veneer.merge.gguf.tokenizer import word_rule
from veneer.merge.programs import Program
from veneer.models.load import load_base
from veneer.models.starts.initial_values import begin


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    families = ("llama", "llama_untied", "qwen2", "gpt2", "qwen3")
    return {family: with_merges(save_tiny(root / family, family)) for family in families}


@pytest.fixture(scope="module")
def untied(folders):
    return str(folders["llama_untied"])


PATTERNS = {**SETTINGS["patterns"], "rslora": True}


# vLLM


@pytest.mark.parametrize("name", ["a", "rslora", "patterns"])
def test_vllm_gets_one_rank_and_one_scale_and_the_same_updates(name, untied, tmp_path):
    adapter = make(tmp_path / "a", untied, SETTINGS[name], seed=1)
    report = export_adapter(adapter, to="vllm", base=untied, out=tmp_path / "v")
    config = json.loads((tmp_path / "v" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"] == {} and not config["use_rslora"]
    assert config["r"] == config["lora_alpha"] == 8 and report.notes == []
    assert {
        t.shape[0] for n, t in read_adapter(tmp_path / "v").tensors.items() if "lora_A" in n
    } == {8}
    assert_equal_updates(changes(tmp_path / "v", untied), changes(adapter, untied))
    assert lint_adapter(tmp_path / "v", "vllm", base=untied) == []


def test_vllm_is_told_a_rank_above_its_default(untied, tmp_path):
    adapter = make(tmp_path / "a", untied, {"rank": 20, "alpha": 7}, seed=1)
    assert export_adapter(adapter, to="vllm", base=untied, out=tmp_path / "v").notes == [
        "start vLLM with --max-lora-rank 32"
    ]


def test_what_vllm_would_ignore_is_refused_by_name(untied, tmp_path):
    adapter = make(
        tmp_path / "a", untied, {"rank": 2, "alpha": 3, "train_modules": ["lm_head"]}, seed=1
    )
    with pytest.raises(RefusedError, match=r"lm_head\.weight: a value trained in full"):
        export_adapter(adapter, to="vllm", base=untied, out=tmp_path / "v")
    assert not (tmp_path / "v").exists()


# PEFT


@pytest.mark.parametrize("program", ["peft", "transformers"])
def test_peft_and_transformers_get_the_files_as_they_are(program, untied, tmp_path):
    adapter = make(tmp_path / "a", untied, PATTERNS, seed=1)
    export_adapter(adapter, to=program, base=untied, out=tmp_path / "p")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "p" / name).read_bytes() == (adapter / name).read_bytes()


@pytest.mark.parametrize("program", ["peft", "vllm"])
@pytest.mark.parametrize(("type", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_a_folder_in_half_precision_is_the_rounded_adapter_and_says_what_was_lost(
    program, type, dtype, untied, tmp_path
):
    adapter = make(tmp_path / "a", untied, PATTERNS, seed=1)
    whole, half = (
        export_adapter(adapter, to=program, base=untied, out=tmp_path / name, dtype=name)
        for name in ("f32", type)
    )
    one, other = (read_adapter(tmp_path / name) for name in ("f32", type))
    assert one.tensors.keys() == other.tensors.keys() and half.bytes < 0.7 * whole.bytes
    changes = []
    for name, tensor in one.tensors.items():
        assert torch.equal(other.tensors[name], tensor.to(dtype))
        changes.append(float((other.tensors[name].double() - tensor).norm() / tensor.norm()))
    assert (
        f"{type}: rounding changed a tensor by at most {100 * max(changes):.2g}%" in half.notes[-1]
    )
    assert other.manifest.content_hash == other.content_hash != one.content_hash
    base = load_base(untied, dtype="float32", device="cpu")
    parameters = load_adapter(base, tmp_path / type, name="a").parameters()
    assert {parameter.dtype for parameter in parameters.values()} == {torch.float32}


def test_a_value_that_f16_does_not_hold_is_refused(untied, tmp_path):
    adapter = make(tmp_path / "a", untied, PATTERNS, seed=1)
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = next(iter(tensors))
    tensors[name][0, 0] = 1e6
    save_file(tensors, adapter / "adapter_model.safetensors")
    (adapter / "veneer.json").unlink()
    with pytest.raises(RefusedError, match="bf16"):
        export_adapter(adapter, to="peft", base=untied, out=tmp_path / "p", dtype="f16")
    assert not (tmp_path / "p").exists()
    export_adapter(adapter, to="peft", base=untied, out=tmp_path / "p", dtype="bf16")
    file = tmp_path / "p.gguf"
    with pytest.raises(RefusedError, match=r"65504(.|\n)*Keep f32") as caught:
        export_adapter(adapter, to="llamacpp", base=untied, out=file, dtype="f16")
    assert "bf16" not in caught.value.next_step and not file.exists()


def test_a_gguf_adapter_says_what_half_precision_lost_and_has_no_bf16(untied, tmp_path):
    adapter = make(tmp_path / "a", untied, PATTERNS, seed=1)
    half = export_adapter(adapter, to="llamacpp", base=untied, out=tmp_path / "h.gguf", dtype="f16")
    assert "f16: rounding changed a tensor by at most 0.0" in half.notes[-1]
    with pytest.raises(ConfigError, match="f32 or f16"):
        export_adapter(adapter, to="llamacpp", base=untied, out=tmp_path / "b.gguf", dtype="bf16")
    assert not (tmp_path / "b.gguf").exists()


# llama.cpp, the adapter


def gguf_updates(path, model, heads):
    """What llama.cpp adds, W + alpha / rank(b) * b a, rows of q and k back in the model's order."""
    reader = GGUFReader(path)
    alpha = reader.fields["adapter.lora.alpha"].contents()
    assert reader.fields["general.type"].contents() == "adapter"
    tensors = {t.name: torch.from_numpy(np.array(t.data)).double() for t in reader.tensors}
    names = names_of(model.config)
    found = {}
    for path_, module in model.named_modules():
        target = names.of(f"{path_}.weight") if hasattr(module, "weight") else None
        if target is None or f"{target}.lora_a" not in tensors:
            continue
        a, b = tensors.pop(f"{target}.lora_a"), tensors.pop(f"{target}.lora_b")
        a = a.T if target == "token_embd.weight" else a
        change = alpha / b.shape[-1] * b @ a
        own = {"attn_q": heads[0], "attn_k": heads[1]}.get(target.split(".")[-2])
        if own:
            change = (
                change.view(own, change.shape[0] // own // 2, 2, -1)
                .transpose(1, 2)
                .reshape(change.shape)
            )
        found[path_] = change.T if target == "token_embd.weight" else change
    assert not tensors
    return found


@pytest.mark.parametrize("name", ["a", "rslora", "patterns", "embedding"])
def test_a_gguf_adapter_is_the_same_update_in_llama_cpp_s_terms(name, untied, tmp_path):
    adapter = make(tmp_path / "a", untied, SETTINGS[name], seed=1)
    export_adapter(adapter, to="llamacpp", base=untied, out=tmp_path / "a.gguf")
    found = gguf_updates(tmp_path / "a.gguf", load_base(untied).model, (4, 2))
    assert_equal_updates(found, changes(adapter, untied), EXACT)


def test_qwen_s_rows_stay_in_their_order(folders, tmp_path):
    base = str(folders["qwen3"])
    adapter = make(
        tmp_path / "a", base, {"rank": 2, "alpha": 3, "targets": ["q_proj", "k_proj"]}, seed=1
    )
    export_adapter(adapter, to="llamacpp", base=base, out=tmp_path / "a.gguf")
    assert_equal_updates(
        gguf_updates(tmp_path / "a.gguf", load_base(base).model, (None, None)),
        changes(adapter, base),
    )


@pytest.mark.parametrize(
    ("family", "fields", "said"),
    [
        ("llama", {"targets": ["lm_head", "q_proj"]}, "the head is the embedding here"),
        ("llama", {"targets": ["embed_tokens", "q_proj"]}, "apply it to the head too"),
        (
            "llama_untied",
            {"targets": ["q_proj"], "train_modules": ["model.norm"]},
            r"model\.norm\.weight: values trained",
        ),
        ("gpt2", {}, "gpt2 model cannot be written yet"),
    ],
)
def test_what_llama_cpp_has_no_place_for_is_refused(family, fields, said, folders, tmp_path):
    base = str(folders[family])
    adapter = make(tmp_path / "a", base, {"rank": 2, "alpha": 3, **fields}, seed=1)
    with pytest.raises(RefusedError, match=said):
        export_adapter(adapter, to="llamacpp", base=base, out=tmp_path / "a.gguf")
    assert not (tmp_path / "a.gguf").exists()
    assert any(lint_adapter(adapter, "llamacpp", base=base))


# llama.cpp, the merged model


def merged_pair(base, tmp_path, **settings):
    """An adapter folder, and what base and adapter answer."""
    loaded = load_base(base)
    made = attach(
        loaded.model,
        LoRA(**{"rank": 4, "alpha": 7, **settings}),
        name="x",
        routing=loaded.routing,
        head=loaded.model.get_output_embeddings(),
    )
    fill(made.parameters().values(), scale=0.2)
    write_adapter(tmp_path / "a", made, manifest_for(loaded, method="lora"), model=loaded.model)
    loaded.routing.active = (("x", 1.0),)
    return tmp_path / "a", logits(loaded.model), loaded


@pytest.mark.parametrize("family", ["llama", "llama_untied", "qwen2", "qwen3"])
def test_a_merged_gguf_model_comes_back_as_base_and_adapter(family, folders, tmp_path, monkeypatch):
    """Read by transformers, which undoes row order and names with code of its own."""
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "cache"))
    base = str(folders[family])
    adapter, expected, loaded = merged_pair(base, tmp_path)
    report = export_merged_gguf([(adapter, 1.0)], base=base, out=tmp_path / "m.gguf")
    again = load_base(str(tmp_path / "m.gguf"))
    assert report.total.share == pytest.approx(1.0, abs=0.01)
    assert (
        logits(again.model) - expected
    ).abs().max() < 0.02 * expected.abs().max()  # f16 weights and arithmetic
    text = "naïve  Größe 123\n<|im_start|>user"
    assert again.tokenizer(text)["input_ids"] == loaded.tokenizer(text)["input_ids"]
    assert again.tokenizer.chat_template == loaded.tokenizer.chat_template


def test_an_adapted_tied_embedding_gets_a_head_of_its_own(folders, tmp_path):
    base = str(folders["llama"])
    adapter, _, _ = merged_pair(base, tmp_path, targets=["embed_tokens", "q_proj"])
    export_merged_gguf([(adapter, 1.0)], base=base, out=tmp_path / "m.gguf")
    assert {"output.weight", "token_embd.weight"} <= {
        t.name for t in GGUFReader(tmp_path / "m.gguf").tensors
    }


def test_q8_0_holds_what_it_can_and_says_what_it_cannot(untied, tmp_path):
    adapter, _, _ = merged_pair(untied, tmp_path, targets=["up_proj", "down_proj"])
    report = export_merged_gguf([(adapter, 1.0)], base=untied, out=tmp_path / "m.gguf", type="q8_0")
    kinds = {t.name: t.tensor_type.name for t in GGUFReader(tmp_path / "m.gguf").tensors}
    assert kinds["blk.0.ffn_up.weight"] == "Q8_0"  # rows of 32
    assert kinds["blk.0.ffn_down.weight"] == "F16"  # rows of 48
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    assert report.f16_instead == sum(kind == "F16" for kind in kinds.values())
    own, changed = load_base(untied), read_adapter(adapter)
    layer = load_adapter(own, changed, name="x").layers["model.layers.0.mlp.up_proj"]
    wanted = layer.folded(own.model.model.layers[0].mlp.up_proj.base.weight)
    (stored,) = [
        t for t in GGUFReader(tmp_path / "m.gguf").tensors if t.name == "blk.0.ffn_up.weight"
    ]
    gap = torch.from_numpy(dequantize(stored.data, stored.tensor_type)) - wanted
    assert gap.abs().max() <= wanted.abs().max() / 127


def test_metadata_of_a_gguf_base_is_copied(untied, tmp_path, monkeypatch):
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "cache"))
    export_merged_gguf([], base=untied, out=tmp_path / "base.gguf")
    source = GGUFReader(tmp_path / "base.gguf")
    marked = GGUFWriter(tmp_path / "marked.gguf", "llama")
    for name, field in source.fields.items():
        if not name.startswith(("GGUF.", "general.architecture")):
            inner = field.types[-1] if len(field.types) > 1 else None
            marked.add_key_value(name, field.contents(), field.types[0], inner)
    marked.add_author("who made the base")
    for tensor in source.tensors:
        marked.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    marked.write_header_to_file()
    marked.write_kv_data_to_file()
    marked.write_tensors_to_file()
    marked.close()
    adapter, _, _ = merged_pair(str(tmp_path / "marked.gguf"), tmp_path)
    export_merged_gguf(
        [(adapter, 1.0)], base=str(tmp_path / "marked.gguf"), out=tmp_path / "m.gguf"
    )
    copied = GGUFReader(tmp_path / "m.gguf").fields
    assert copied["general.author"].contents() == "who made the base"
    for name in ("tokenizer.ggml.tokens", "tokenizer.ggml.merges", "llama.block_count"):
        assert copied[name].contents() == source.fields[name].contents()


def test_what_the_file_would_lose_is_refused(untied, tmp_path):
    """Q8_0's steps are far coarser than this update, and the base lies on its grid already."""
    import veneer.merge.gguf.model as module

    loaded = load_base(untied)
    made = attach(loaded.model, LoRA(rank=2, alpha=3), name="x", routing=loaded.routing, head=None)
    fill(made.parameters().values(), scale=0.2)
    with pytest.raises(RefusedError, match="of the update is left in q8_0"):
        module.write_gguf_model(
            loaded, [("x", 1.0)], tmp_path / "m.gguf", type="q8_0", least_survival=1.0
        )
    assert list(tmp_path.iterdir()) == []


def test_a_gguf_export_is_a_file_of_that_name(untied, tmp_path):
    with pytest.raises(ConfigError, match=r"\.gguf"):
        export_adapter(
            make(tmp_path / "a", untied, SETTINGS["a"], seed=1),
            to="llamacpp",
            base=untied,
            out=tmp_path / "x",
        )


def test_ways_of_cutting_text_are_known_by_what_they_do_or_refused():
    tokenizer = tiny_tokenizer()
    stored = json.loads(tokenizer.backend_tokenizer.to_str())
    assert word_rule(stored) == "gpt-2"
    digits = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.backend_tokenizer.pre_tokenizer = digits
    assert word_rule(json.loads(tokenizer.backend_tokenizer.to_str())) == "smollm"
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(RefusedError, match="Whitespace"):
        word_rule(json.loads(tokenizer.backend_tokenizer.to_str()))
    with pytest.raises(RefusedError, match="Unigram"):
        word_rule({**stored, "model": {**stored["model"], "type": "Unigram"}})


# lint


@pytest.mark.parametrize(
    ("consumer", "fields", "said"),
    [
        ("vllm", PATTERNS, ["rank_pattern", "alpha_pattern"]),
        ("vllm", {"rank": 40, "alpha": 7}, ["rank 40"]),
        ("vllm", {"rank": 2, "alpha": 3, "train_modules": ["lm_head"]}, ["lm_head"]),
        ("llamacpp", PATTERNS, ["rank_pattern", "alpha_pattern", "rsLoRA"]),
        ("llamacpp", {"rank": 2, "alpha": 3, "train_modules": ["lm_head"]}, ["lm_head"]),
        ("peft", PATTERNS, []),
        ("transformers", PATTERNS, []),
        ("vllm", {"rank": 8, "alpha": 16}, []),
        ("llamacpp", {"rank": 8, "alpha": 16}, []),
    ],
)
def test_lint_tells_what_each_consumer_would_get_wrong(consumer, fields, said, untied, tmp_path):
    findings = lint_adapter(make(tmp_path / "a", untied, fields, seed=1), consumer, base=untied)
    told = [finding.what for finding in findings]
    assert len(told) == len(said) or (said and len(told) >= len(said))
    assert all(any(part in line for line in told) for part in said)
    assert all(finding.mended for finding in findings)


METHODS = {
    "dora": DoRA(rank=2),
    "prefix": Prefix(tokens=3),
    "prefix of layer 0": Prefix(tokens=3, layers=[0]),
    "bottleneck": Bottleneck(size=4),
    "lora_bias": LoRA(rank=2, lora_bias=True),
}


def make_of(method, place, base):
    held = load_base(str(base))
    made = begin(held, method, name="x").attachment
    write_adapter(place, made, manifest_for(held, method=method.name), model=held.model)
    return place


@pytest.mark.parametrize(
    ("method", "reads", "says"),
    [
        ("dora", ["peft"], "magnitudes"),
        ("prefix", ["peft"], "load_adapter"),
        ("prefix of layer 0", [], "no layout"),
        ("bottleneck", [], "no layout"),
        ("lora_bias", ["peft"], "no product of two factors"),
    ],
)
def test_lint_tells_who_reads_a_method_that_is_more_than_two_factors(
    method, reads, says, untied, tmp_path
):
    adapter = make_of(METHODS[method], tmp_path / "a", untied)
    found = {
        consumer: lint_adapter(adapter, consumer, base=untied)
        for consumer in ("vllm", "llamacpp", "transformers", "peft")
    }
    assert [consumer for consumer, findings in found.items() if not findings] == reads
    assert says in found["transformers"][0].what
    assert all(finding.mended for findings in found.values() for finding in findings)


@pytest.mark.parametrize("method", ["dora", "prefix"])
def test_transformers_gets_no_adapter_that_it_would_apply_otherwise(method, untied, tmp_path):
    adapter = make_of(METHODS[method], tmp_path / "a", untied)
    with pytest.raises(RefusedError, match="load it with PEFT"):
        export_adapter(adapter, to="transformers", base=untied, out=tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_export_and_lint_call_programs_by_the_same_names():
    assert choices_of("export", "--to") == choices_of("lint", "--for") == list(get_args(Program))


def choices_of(command, flag):
    parser = argparse.ArgumentParser()
    command_module(command).add_arguments(parser)
    return list(parser._option_string_actions[flag].choices)


@pytest.mark.parametrize("consumer", ["peft", "transformers", "vllm", "llamacpp"])
def test_lint_tells_that_an_adapter_is_another_bases(consumer, folders, untied, tmp_path):
    adapter = make(tmp_path / "a", untied, {"rank": 2}, seed=1)
    (finding,) = lint_adapter(adapter, consumer, base=str(folders["gpt2"]))
    assert "does not fit" in finding.what and not finding.silent
