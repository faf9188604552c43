"""What is proven on a small copy of a model's structure: windows and switches longer than any quick
look at the model."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    GenerationConfig,
)

from tests.support.helpers import evaluation_loss, make_examples
from tests.support.models.routed import Routed, batch_loss
from tests.support.tiny import tiny_base, tiny_model
from veneer.adapters.placement.routing import Routing
from veneer.decoding.engine import bytes_per_token
from veneer.decoding.generate import generate
from veneer.decoding.proof import loops
from veneer.errors import SourceError
from veneer.execution.attention import decoder
from veneer.execution.proofs import small_copy as structure
from veneer.execution.proofs import structure as proof
from veneer.execution.proofs.model import prove_head
from veneer.execution.proofs.small_copy import NoCopyError, small_copy
from veneer.execution.proofs.structure import proven
from veneer.execution.switches import RopeSwitches, sides, switches
from veneer.models.frozen_base import FrozenBase
from veneer.models.likelihood import example_nats
from veneer.models.step import batch_of, parts_of, prepare

CPU = torch.device("cpu")
LONG = 16
"""Tokens of windows and chunks in these tests: more than the look at the model itself reads."""
FP32 = 1e-4
SMALL = {
    "vocab_size": 272,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "decoder_sparse_step": 1,
}
MASKED = {
    "qwen2_moe": {
        **EXPERTS,
        "shared_expert_intermediate_size": 16,
        "use_sliding_window": True,
        "sliding_window": LONG,
        "max_window_layers": 2,
    },
    "phimoe": {"num_local_experts": 4, "sliding_window": LONG},
    "doge": {"sliding_window": LONG, "keep_window_size": LONG},
    "llama4_text": {
        "attention_chunk_size": LONG,
        "head_dim": 8,
        "num_local_experts": 2,
        "intermediate_size_mlp": 48,
        "attn_temperature_tuning": False,
    },
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "sliding_window": LONG},
}
"""Windows and chunks that the mask alone knows, and one that no mask of transformers obeys."""
FACTORS = {"short_factor": [1.0, 1.3, 2.0, 4.0], "long_factor": [2.0, 3.0, 5.0, 9.0]}
ROTARY = {
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "original_max_position_embeddings": 16,
        **FACTORS,
    },
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
}


def make_model(kind, **fields):
    """A small random model of a family that tests/support/tiny.py does not have."""
    config = CONFIG_MAPPING[kind](**{**SMALL, **fields})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def rotary(kind):
    """A llama whose rotary frequencies change at 16 tokens."""
    positions = 16 if kind == "dynamic" else 64
    return tiny_model("llama", rope_parameters=ROTARY[kind], max_position_embeddings=positions)


def based(model):
    base = tiny_base()
    return FrozenBase(model, base.tokenizer, "tiny", "tiny")


def fresh(model):
    """As if it had read no text yet: a model of dynamic RoPE keeps the frequencies of its
    longest."""
    for module in model.modules():
        if hasattr(module, "original_inv_freq"):
            module.max_seq_len_cached = module.original_max_seq_len
            module.inv_freq.copy_(module.original_inv_freq)


def nats_alone(model, examples):
    """Nats of each row alone, by the model's own forward; read anew each time, as a fresh process
    would."""
    nats = []
    for e in examples:
        ids, rows = torch.from_numpy(e.ids.astype(np.int64))[None], np.flatnonzero(e.trained)
        fresh(model)
        logits = model(input_ids=ids[:, : rows[-1]], use_cache=False).logits[0]
        nats.append(F.cross_entropy(logits[rows - 1], ids[0, rows], reduction="sum").item())
    return nats


def reread(model, prompt, new):
    """Greedy, the whole text read for every token."""
    ids = list(prompt)
    while len(ids) < len(prompt) + new and ids[-1] != 257:
        fresh(model)
        ids.append(
            int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        )
    return [token for token in ids[len(prompt) :] if token != 257]


def generate_ids(model, prompt, new):
    settings = GenerationConfig(
        max_new_tokens=new, do_sample=False, eos_token_id=257, pad_token_id=258
    )
    fresh(model)
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    return [token for token in out[0, len(prompt) :].tolist() if token != 257]


PROMPTS = [[(7 * i + j * j) % 250 for j in range(4 + 9 * i)] for i in range(4)]  # 4 to 31 tokens


@pytest.mark.parametrize("kind", MASKED)
def test_a_window_that_the_mask_alone_knows_is_never_lost(kind):
    model, examples = make_model(kind, **MASKED[kind]), make_examples(4, longest=50)
    expected = nats_alone(model, examples)
    paths = prepare(model)
    assert not paths.packed and "differs" in paths.packed_reason
    found = example_nats(Routed(model, paths), examples, batch=4)[:, 0]
    assert found == pytest.approx(expected, rel=FP32)
    answers = generate(based(model), PROMPTS, max_new_tokens=8)
    assert answers == [reread(model, prompt, 8) for prompt in PROMPTS]


def test_a_selection_of_keys_is_not_taken_for_attention_to_all():
    fields = {"num_hidden_layers": 2, "index_topk": 512, "mlp_layer_types": ["dense", "dense"]}
    config = CONFIG_MAPPING["glm_moe_dsa"](**fields, indexer_types=["full", "full"])
    found = proven(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], config)
    assert "differs" in found.packed and (found.causal, found.padded, found.head) == (
        None,
        None,
        None,
    )


def test_a_structure_is_proven_once_whatever_the_type_and_the_path(monkeypatch):
    monkeypatch.setattr(proof, "_PROOFS", {})
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_model("llama", dtype)
        prepare(model)
        prepare(model)
    assert len(proof._PROOFS) == 1


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3"])
def test_a_window_that_the_interface_hands_on_stays_packed_whatever_its_length(family):
    model, examples = tiny_model(family, sliding_window=LONG), make_examples(4, longest=50)
    expected, paths = nats_alone(model, examples), prepare(model)
    assert paths.packed
    assert example_nats(Routed(model, paths), examples, batch=4)[:, 0] == pytest.approx(
        expected, rel=FP32
    )


def test_dynamic_frequencies_are_those_of_the_tokens_that_are_read():
    """transformers' loss reads the row's last token as well, which predicts nothing, and scales by
    one token more."""
    model, (example, *_) = rotary("dynamic"), make_examples(1, longest=70)
    rows, ids = (
        np.flatnonzero(example.trained),
        torch.from_numpy(example.ids.astype(np.int64))[None],
    )
    assert (len(example.ids), rows[-1]) == (70, 69)
    expected = nats_alone(model, [example])[0]
    fresh(model)
    logits = model(input_ids=ids, use_cache=False).logits[0]
    of_all = F.cross_entropy(logits[rows - 1], ids[0, rows], reduction="sum").item()
    paths = prepare(model)
    found = example_nats(Routed(model, paths), [example], batch=1)[0, 0]
    assert found == pytest.approx(expected, rel=FP32)
    assert 1e-4 < abs(of_all - expected) / expected < 1e-2


@pytest.mark.parametrize("kind", ROTARY)
def test_a_row_gets_the_frequencies_of_its_own_length_whatever_stands_beside_it(kind):
    model, examples = rotary(kind), make_examples(8, longest=40)
    expected = nats_alone(model, examples)
    paths, routing = prepare(model), Routing()
    assert paths.packed and kind in paths.lines[0].lower().replace("dynamic rope", "dynamic")
    for batch in (1, 3, 8):
        assert example_nats(Routed(model, paths), examples, batch=batch)[:, 0] == pytest.approx(
            expected, rel=FP32
        )
        nats, _ = evaluation_loss(model, paths, routing, examples, batch=batch)
        assert nats == pytest.approx(sum(expected), rel=FP32)
    parts = parts_of(Routed(model, paths), examples, [[3, 0, 5], [1, 2]])
    trained = [batch_of(Routed(model, paths), examples, part, share_prompt=True) for part in parts]
    loss = sum(batch_loss(Routed(model, paths, routing), one, total=1.0).item() for one in trained)
    assert loss == pytest.approx(sum(expected[i] for i in (3, 0, 5, 1, 2)), rel=FP32)


@pytest.mark.parametrize("kind", ROTARY)
def test_an_answer_that_crosses_the_switch_is_the_one_given_alone(kind):
    base = based(rotary(kind))
    expected = [generate_ids(base.model, prompt, 8) for prompt in PROMPTS]
    assert generate(base, PROMPTS, max_new_tokens=8) == expected
    assert [
        generate(base, [prompt], max_new_tokens=8)[0] for prompt in reversed(PROMPTS)
    ] == expected[::-1]


@pytest.mark.parametrize("kind", ROTARY)
def test_the_switch_of_the_copy_lies_within_its_texts(kind):
    model = rotary(kind)
    found = switches(small_copy(type(model), model.config).config)
    assert {*found.at, found.dynamic_from} - {None} == {structure.SWITCH}
    assert min(proof.LENGTHS) < structure.SWITCH < max(proof.LENGTHS)


def test_rows_go_together_on_one_side_of_a_switch():
    assert sides([5, 20, 16, 17], RopeSwitches(at=(16,))) == [[0, 2], [1, 3]]
    assert sides([5, 20, 16, 17, 20], RopeSwitches(dynamic_from=16)) == [[0, 2], [1, 4], [3]]
    assert sides([5, 20], switches(tiny_model("llama").config)) == [[0, 1]]


def test_a_cap_on_logits_is_found_under_any_name_and_an_unknown_one_takes_whole_logits(monkeypatch):
    model = make_model(
        "xlstm", num_heads=2, output_logit_soft_cap=7.0, qk_dim_factor=0.5, chunk_size=8
    )
    paths = prepare(model)
    assert (paths.softcap, paths.head_reason) == (7.0, None)
    expected, examples = nats_alone(model, make_examples(3)), make_examples(3)
    assert example_nats(Routed(model, paths), examples, batch=3)[:, 0] == pytest.approx(
        expected, rel=FP32
    )
    monkeypatch.setattr(proof, "_PROOFS", {})
    monkeypatch.setattr(proof, "_softcaps", lambda _: [None])
    assert "not known" in prove_head(model)[2]


def test_hidden_states_of_another_type_than_the_head_take_whole_logits():
    """Mamba keeps its residuals in float32, and its own code casts them before the head."""
    model = make_model("mamba").to(torch.bfloat16)
    paths = prepare(model)
    assert "hidden states are torch.float32" in paths.head_reason
    assert np.isfinite(example_nats(Routed(model, paths), make_examples(3), batch=3)).all()


@pytest.mark.parametrize("kind", ["llama4_text", "mllama_text_model"])
def test_the_decoder_is_a_part_of_the_model_and_gives_hidden_states(kind):
    fields = {**MASKED["llama4_text"]} if kind == "llama4_text" else {"cross_attention_layers": []}
    config = CONFIG_MAPPING[kind](**{**SMALL, **fields})
    if kind == "llama4_text":
        model = make_model(kind, **fields)
    else:
        from transformers import MllamaForCausalLM

        model = MllamaForCausalLM(config).eval()
    assert decoder(model) is not None and decoder(model) is not model
    assert (
        decoder(model)(input_ids=torch.tensor([[1, 2]]), use_cache=False).last_hidden_state.shape[
            -1
        ]
        == 32
    )


@pytest.mark.parametrize("kind", ["gemma3", "bert"])
def test_a_model_that_sees_what_it_is_to_predict_is_refused(kind):
    model = (
        tiny_model("gemma3", use_bidirectional_attention=True)
        if kind == "gemma3"
        else make_model("bert")
    )
    with pytest.raises(SourceError, match="before it alone"):
        prepare(model)
    with pytest.raises(SourceError, match="before it alone"):
        generate(based(model), PROMPTS[:1], max_new_tokens=2)


def test_a_structure_that_cannot_be_copied_takes_no_fast_path_and_says_so(monkeypatch):
    def none(kind, config):
        raise NoCopyError("no small copy of its structure could be made (a reason)")

    monkeypatch.setattr(proof, "small_copy", none)
    monkeypatch.setattr(proof, "_PROOFS", {})
    model, examples = tiny_model("qwen2"), make_examples(3)
    paths = prepare(model)
    assert (
        paths.lines[0].startswith("rows one by one: no small copy")
        and "whole logits" in paths.lines[1]
    )
    assert example_nats(Routed(model, paths), examples, batch=3)[:, 0] == pytest.approx(
        nats_alone(model, examples), rel=FP32
    )
    assert len(generate(based(model), PROMPTS, max_new_tokens=3)) == len(PROMPTS)


def test_prompts_go_one_by_one_where_padding_on_the_left_changes_answers():
    model = make_model("rwkv", attention_hidden_size=32, num_hidden_layers=2)
    assert loops(model).beside is not None
    answers = generate(based(model), PROMPTS, max_new_tokens=6)
    assert answers == [generate_ids(model, prompt, 6) for prompt in PROMPTS]


ROTATED = {
    "head_dim": 8,
    "num_local_experts": 2,
    "intermediate_size_mlp": 48,
    "attention_chunk_size": 64,
    "floor_scale": 64,
}


def test_prompts_go_one_by_one_where_one_layer_in_four_scales_by_position():
    model = make_model("llama4_text", num_hidden_layers=4, **ROTATED)
    assert model.config.no_rope_layers == [1, 1, 1, 0]
    assert loops(model).beside is not None


@pytest.mark.parametrize(
    "fields",
    [
        {"no_rope_layers": [1, 1, 1, 0]},
        {"no_rope_layers": [1, 1, 1, 1, 1, 1, 0, 1]},
        {"no_rope_layers": [1, 1, 1, 0], "moe_layers": [0, 3]},
        {"no_rope_layers": [1, 1, 1, 0], "moe_layers": [0, 1, 2, 3]},
        {"no_rope_layers": [1, 1, 1, 0], "layer_scales": [0.1, 0.2, 0.3, 0.4]},
    ],
)
def test_the_copy_holds_a_layer_of_each_kind_whatever_the_type_of_its_facts(fields):
    depth = len(fields["no_rope_layers"])
    config = CONFIG_MAPPING["llama4_text"](
        **{**SMALL, **ROTATED, **fields, "num_hidden_layers": depth}
    )
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(config)
    copy = small_copy(type(whole), config)

    def kinds(model):
        return {
            (bool(layer.self_attn.use_rope), layer.is_moe_layer) for layer in model.model.layers
        }

    assert kinds(copy) == kinds(whole)


@pytest.mark.parametrize(
    "kind", ["llama", "gemma3_text", "qwen2_moe", "jamba", "llama4_text", "got_ocr2"]
)
def test_the_copy_holds_every_kind_of_module_in_little(kind):
    config = CONFIG_MAPPING[kind]()
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(config)
    copy = small_copy(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], config)
    assert {type(m) for m in whole.modules()} == {type(m) for m in copy.modules()}
    assert (
        sum(p.numel() for p in copy.parameters()) < sum(p.numel() for p in whole.parameters()) / 20
    )


@pytest.mark.parametrize("kind", ["gemma4_text", "dots3_note_text"])
def test_the_copy_holds_settings_of_single_layers_at_their_layers(kind):
    config = CONFIG_MAPPING[kind]()
    copy = small_copy(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], config).config
    read_again = type(copy).from_dict(copy.to_dict())
    assert read_again.to_dict() == copy.to_dict()
    whole, small = (each.to_dict()["per_layer_config"] for each in (config, copy))
    fields = {field for settings in whole.values() for field in settings}
    assert fields == {field for settings in small.values() for field in settings}
    types = {config.layer_types[int(layer)] for layer in whole}
    assert types == {copy.layer_types[int(layer)] for layer in small}


def test_a_model_whose_layers_have_heads_of_different_sizes_answers_as_its_own_loop():
    types = ["sliding_attention", "full_attention"]
    model = make_model(
        "gemma4_text",
        layer_types=types,
        head_dim=8,
        per_layer_config={1: {"head_dim": 16}},
        sliding_window=LONG,
        hidden_size_per_layer_input=4,
        vocab_size_per_layer_input=272,
    )
    heads = model.config.num_key_value_heads
    assert bytes_per_token(based(model)) == 2 * 4 * heads * (8 + 16)
    assert generate(based(model), PROMPTS, max_new_tokens=6) == [
        generate_ids(model, prompt, 6) for prompt in PROMPTS
    ]


LIMITS = {
    "olmo": [{"clip_qkv": 1000.0}],
    "dbrx": [
        {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": limit}}
        for limit in (1000, 1000.0)
    ],
    "mpt": [{"attn_config": {"clip_qkv": 1000.0}}],
    "gpt_oss": [{"swiglu_limit": 1000.0}],
}
"""Some stand in a part of the config, some are whole numbers there, as in dbrx's own."""


@pytest.mark.parametrize(
    ("kind", "fields"), [(kind, one) for kind, some in LIMITS.items() for one in some]
)
def test_limits_of_the_copy_cut_off_what_its_layers_give(kind, fields):
    config = CONFIG_MAPPING[kind](**fields)
    copy, ids = (
        small_copy(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], config),
        torch.arange(20)[None],
    )
    with torch.no_grad():
        cut = copy(ids).logits
        for module in [copy.config, *copy.modules()]:
            for name in ("clip_qkv", "limit"):
                if getattr(module, name, None) is not None:
                    setattr(module, name, 1000.0)
        assert not torch.equal(copy(ids).logits, cut)


@pytest.mark.parametrize("kind", ["mistral", "gpt_neo", "recurrent_gemma", "llama4_text"])
def test_windows_of_the_copy_act_within_a_short_text(kind):
    config = CONFIG_MAPPING[kind]()
    ids = torch.arange(40)[None]
    with torch.no_grad():
        short, long = (
            small_copy(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], config, window=window)(ids).logits
            for window in (structure.WINDOW, 64)
        )
    assert torch.allclose(
        short[:, : structure.WINDOW - 1], long[:, : structure.WINDOW - 1], atol=1e-4
    )
    assert not torch.allclose(short[:, 20:], long[:, 20:], atol=1e-2)


@pytest.mark.parametrize(("kind", "heads"), [("gpt2", 2), ("llama", 2), ("mistral", 4)])
def test_a_copy_has_few_heads_whether_or_not_keys_have_heads_of_their_own(kind, heads):
    config = CONFIG_MAPPING[kind]()
    copy = small_copy(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], config).config
    assert copy.num_attention_heads == heads < config.num_attention_heads


@pytest.mark.parametrize("layers", [2, 5])
def test_a_copy_keeps_multipliers_of_parts_that_are_as_many_as_layers(layers):
    multipliers = [1.0, 2.0, 3.0, 4.0, 5.0]
    config = CONFIG_MAPPING["falcon_h1"](num_hidden_layers=layers, ssm_multipliers=multipliers)
    copy = small_copy(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], config).config
    assert copy.ssm_multipliers == multipliers and copy.mlp_multipliers == [1.0, 1.0]


@pytest.mark.parametrize("kind", ["blenderbot", "roberta"])
def test_where_transformers_loop_does_not_give_what_whole_texts_give_they_are_read_for_every_token(
    kind,
):
    """Blenderbot's decoder has more layers than its cache; generate() tells RoBERTa positions that
    begin at 0."""
    fields = {
        "blenderbot": {
            "encoder_layers": 1,
            "num_hidden_layers": 1,
            "decoder_layers": 2,
            "d_model": 32,
            "decoder_ffn_dim": 48,
        },
        "roberta": {"is_decoder": True, "pad_token_id": 1},
    }[kind]
    model = make_model(kind, **fields)
    model.generation_config = GenerationConfig(eos_token_id=257)
    assert loops(model).cached is not None and loops(tiny_model("bloom")).cached is None
    seen = []
    answers = generate(based(model), PROMPTS, max_new_tokens=5)
    assert answers == [reread(model, prompt, 5) for prompt in PROMPTS]
    assert (
        generate(based(model), PROMPTS[:1], max_new_tokens=5, on_token=seen.append) == answers[:1]
        and seen
    )
    drawn = [
        generate(based(model), PROMPTS[:2], max_new_tokens=5, temperature=2.0, seed=3)
        for _ in range(2)
    ]
    assert drawn[0] == drawn[1] != answers[:2]
