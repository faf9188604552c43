"""PEFT loads what Veneer writes and answers the same; Veneer loads what PEFT writes and answers the
same.

One row per option, each at alpha != rank on non-square layers, every trained value random: an
update that is dropped, misplaced, transposed or misscaled moves the logits by far more than the
tolerance.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.support.tiny import tiny_base, tiny_model

peft = pytest.importorskip("peft")

from veneer.adapters.attach import attach  # noqa: E402
from veneer.adapters.config import DoRA, LoRA, LowRank  # noqa: E402
from veneer.adapters.placement.attachment import Attachment  # noqa: E402
from veneer.errors import AdapterMismatchError  # noqa: E402
from veneer.formats.adapter import manifest_for, read_adapter, write_adapter  # noqa: E402
from veneer.formats.loading import load_adapter  # noqa: E402
from veneer.models.frozen_base import FrozenBase  # noqa: E402

RELATIVE = 1e-5  # float32 against float32: other orders of summation, nothing else
IDS = torch.tensor([[5, 200, 17, 99, 3, 64, 230], [1, 90, 31, 7, 255, 12, 80]])


@dataclass(frozen=True, kw_only=True)
class Row:
    ours: dict[str, Any]
    theirs: dict[str, Any]
    family: str = "llama_untied"
    model: dict[str, Any] = field(default_factory=dict)
    same: bool = True  # both settings name the same modules
    method: type[LowRank] = LoRA


SHARED_EXPERTS = {"mlp_only_layers": [0]}
GQA = ("q_proj", "k_proj", "v_proj", "o_proj")
ROWS = {
    "all-linear": Row(ours={}, theirs={"target_modules": "all-linear"}),
    "rslora": Row(
        ours={"rslora": True}, theirs={"use_rslora": True, "target_modules": "all-linear"}
    ),
    "activation": Row(  # the second row of IDS lacks it
        ours={"activation": [17, 99]},
        theirs={"alora_invocation_tokens": [17, 99], "target_modules": "all-linear"},
    ),
    "list": Row(
        ours={"targets": ["q_proj", "down_proj"]},
        theirs={"target_modules": ["q_proj", "down_proj"]},
    ),
    "regex": Row(ours={"targets": r".*\.1\..*_proj"}, theirs={"target_modules": r".*\.1\..*_proj"}),
    "one module": Row(
        ours={"targets": ["model.layers.1.mlp.up_proj"]},
        theirs={"target_modules": ["model.layers.1.mlp.up_proj"]},
    ),
    "layers": Row(
        ours={"targets": ["v_proj", "o_proj"], "layers": [1]},
        theirs={"target_modules": ["v_proj", "o_proj"], "layers_to_transform": [1]},
    ),
    "layers by pattern": Row(
        ours={"targets": ["v_proj"], "layers": [0]},
        theirs={"target_modules": ["v_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
    ),
    "exclude": Row(
        ours={"exclude": ["down_proj", "layers.0.self_attn.q_proj"]},
        theirs={
            "target_modules": "all-linear",
            "exclude_modules": ["down_proj", "layers.0.self_attn.q_proj"],
        },
    ),
    "exclude by regex": Row(
        ours={"exclude": [r".*\.0\..*"]},
        theirs={"target_modules": "all-linear", "exclude_modules": r".*\.0\..*"},
    ),
    "patterns": Row(
        ours={
            "rank_pattern": {"v_proj": 3, "layers.0.mlp.up_proj": 6},
            "alpha_pattern": {"[qk]_proj": 5.5, r"model\.layers\.1\..*": 2},
            "rslora": True,
        },
        theirs={
            "target_modules": "all-linear",
            "rank_pattern": {"v_proj": 3, "layers.0.mlp.up_proj": 6},
            "alpha_pattern": {"[qk]_proj": 5.5, r"model\.layers\.[1]\..*(v_proj|o_proj)": 2},
            "use_rslora": True,
        },
    ),
    "bias all": Row(
        family="phi",
        ours={"targets": ["q_proj", "fc2"], "bias": "all"},
        theirs={"target_modules": ["q_proj", "fc2"], "bias": "all"},
    ),
    "bias of targets": Row(
        family="phi",
        ours={"targets": ["q_proj", "fc2"], "bias": "lora_only"},
        theirs={"target_modules": ["q_proj", "fc2"], "bias": "lora_only"},
    ),
    "lora_bias": Row(
        family="phi",
        ours={"targets": ["q_proj", "fc2"], "lora_bias": True, "rslora": True},
        theirs={"target_modules": ["q_proj", "fc2"], "lora_bias": True, "use_rslora": True},
    ),
    "lora_bias beside trained biases": Row(
        family="gpt2",
        ours={"targets": ["c_attn", "c_proj"], "lora_bias": True, "bias": "lora_only"},
        theirs={
            "target_modules": ["c_attn", "c_proj"],
            "lora_bias": True,
            "bias": "lora_only",
            "fan_in_fan_out": True,
        },
    ),
    "trained head": Row(
        ours={"targets": ["q_proj"], "train_modules": ["lm_head"]},
        theirs={"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ),
    "trained head beside all biases": Row(
        family="phi",
        ours={"targets": ["q_proj"], "train_modules": ["lm_head"], "bias": "all"},
        theirs={"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "bias": "all"},
    ),
    "trained norm": Row(
        ours={"targets": ["q_proj"], "train_modules": ["input_layernorm"]},
        theirs={"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]},
    ),
    "trained embedding": Row(
        ours={"targets": ["q_proj"], "train_modules": ["embed_tokens"]},
        theirs={"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ),
    "embedding": Row(
        ours={"targets": ["embed_tokens", "v_proj"]},
        theirs={"target_modules": ["embed_tokens", "v_proj"]},
    ),
    "scaled embedding": Row(
        family="gemma2",
        ours={"targets": ["embed_tokens", "v_proj"]},
        theirs={"target_modules": ["embed_tokens", "v_proj"]},
    ),
    "head": Row(
        ours={"targets": ["lm_head", "v_proj"]}, theirs={"target_modules": ["lm_head", "v_proj"]}
    ),
    "tied embedding": Row(
        family="llama",
        ours={"targets": ["embed_tokens", "v_proj"]},
        theirs={"target_modules": ["embed_tokens", "v_proj"]},
    ),
    "tied head": Row(
        family="llama",
        ours={"targets": ["lm_head", "v_proj"]},
        theirs={"target_modules": ["lm_head", "v_proj"]},
    ),
    "tied, all-linear": Row(family="llama", ours={}, theirs={"target_modules": "all-linear"}),
    "dora": Row(method=DoRA, ours={}, theirs={"target_modules": "all-linear", "use_dora": True}),
    "dora, patterns, rslora": Row(
        method=DoRA,
        ours={"rank_pattern": {"v_proj": 3}, "rslora": True, "targets": ["v_proj", "down_proj"]},
        theirs={
            "target_modules": ["v_proj", "down_proj"],
            "rank_pattern": {"v_proj": 3},
            "use_rslora": True,
            "use_dora": True,
        },
    ),
    "dora, biases": Row(
        method=DoRA,
        family="phi",
        ours={"targets": ["q_proj", "fc2"], "bias": "lora_only"},
        theirs={"target_modules": ["q_proj", "fc2"], "bias": "lora_only", "use_dora": True},
    ),
    "dora, conv1d": Row(
        method=DoRA,
        family="gpt2",
        ours={},
        theirs={"target_modules": "all-linear", "use_dora": True},
    ),
    "dora, head": Row(
        method=DoRA,
        ours={"targets": ["lm_head", "v_proj"]},
        theirs={"target_modules": ["lm_head", "v_proj"], "use_dora": True},
    ),
    "dora, embedding": Row(
        method=DoRA,
        ours={"targets": ["embed_tokens", "v_proj"]},
        theirs={"target_modules": ["embed_tokens", "v_proj"], "use_dora": True},
    ),
    "dora, tied embedding": Row(
        method=DoRA,
        family="llama",
        ours={"targets": ["embed_tokens", "v_proj"]},
        theirs={"target_modules": ["embed_tokens", "v_proj"], "use_dora": True},
    ),
    "conv1d": Row(family="gpt2", ours={}, theirs={"target_modules": "all-linear"}),
    "conv1d, embedding, all biases": Row(
        family="gpt2",
        ours={"targets": ["c_attn", "wte"], "bias": "all"},
        theirs={"target_modules": ["c_attn", "wte"], "bias": "all", "fan_in_fan_out": True},
    ),
    "default targets": Row(ours={"targets": ["q_proj", "v_proj"]}, theirs={"target_modules": None}),
    "experts": Row(
        family="mixtral",
        ours={"targets": ["gate_up_proj", "down_proj", "q_proj"]},
        theirs={"target_parameters": ["down_proj", "gate_up_proj"], "target_modules": ["q_proj"]},
    ),
    "experts only": Row(
        family="mixtral",
        ours={"targets": ["gate_up_proj", "down_proj"]},
        theirs={"target_parameters": ["down_proj", "gate_up_proj"], "target_modules": []},
    ),
    "experts, one parameter": Row(
        family="qwen3_moe",
        ours={"targets": ["layers.1.mlp.experts.down_proj", "v_proj"], "rslora": True},
        theirs={
            "target_parameters": ["layers.1.mlp.experts.down_proj"],
            "target_modules": ["v_proj"],
            "use_rslora": True,
        },
    ),
    "experts of old names": Row(
        family="qwen3_moe",
        ours={
            "targets": ["gate_up_proj", "down_proj", "q_proj"],
            "rank_pattern": {"gate_up_proj": 8},
            "alpha_pattern": {"gate_up_proj": 14},
        },
        theirs={"target_modules": ["gate_proj", "up_proj", "down_proj", "q_proj"]},
    ),
    "experts, all-linear, dropout": Row(
        family="qwen3_moe",
        ours={"dropout": 0.1},
        theirs={
            "target_parameters": ["down_proj", "gate_up_proj"],
            "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
        },
    ),
    "experts beside a dense layer of the old names": Row(
        family="qwen3_moe",
        model=SHARED_EXPERTS,
        ours={},
        theirs={"target_parameters": ["down_proj", "gate_up_proj"], "target_modules": ["q_proj"]},
        same=False,  # PEFT cannot name the dense layer by target_modules here
    ),
    "dense layer of the old names alone": Row(
        family="qwen3_moe",
        model=SHARED_EXPERTS,
        ours={"targets": ["mlp.gate_proj"], "bias": "lora_only"},
        theirs={"target_parameters": ["mlp.gate_proj.weight"], "target_modules": []},
    ),
    "router alone": Row(
        family="qwen3_moe",
        ours={
            "targets": ["gate"],
            "rank_pattern": {"layers.0.mlp.gate": 2},
            "alpha_pattern": {"layers.0.mlp.gate": 5},
        },
        theirs={
            "target_parameters": ["gate.weight"],
            "target_modules": [],
            "rank_pattern": {"layers.0.mlp.gate.weight": 2},
            "alpha_pattern": {"layers.0.mlp.gate.weight": 5},
        },
    ),
    **{
        f"all-linear of PEFT: {family}": Row(
            family=family,
            ours={
                "targets": [*attention, "gate_up_proj", "experts.down_proj", "gate"],
                "rank_pattern": {"gate_up_proj": 8},
                "alpha_pattern": {"gate_up_proj": 14},
            },
            theirs={"target_modules": "all-linear"},
        )
        for family, attention in {
            "qwen3_moe": GQA,
            "mixtral": GQA,
            "olmoe": GQA,
            "deepseek_v3": ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"),
        }.items()
    },
}
every_row = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())


def randomise(parameters: dict[str, torch.nn.Parameter]) -> None:
    """Every trained value, by a seed of its own: alike in every process, different everywhere."""
    for number, (_, parameter) in enumerate(sorted(parameters.items())):
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
        parameter.data.add_(0.2 * noise)


def ours(row: Row) -> tuple[FrozenBase, Attachment]:
    base = tiny_base(row.family, **row.model)
    base.fingerprint()
    settings = row.method(**{"rank": 4, "alpha": 7, **row.ours})
    head = base.model.get_output_embeddings()
    attachment = attach(base.model, settings, name="lora.weight", routing=base.routing, head=head)
    randomise(attachment.parameters())
    return base, attachment


def theirs(row: Row) -> Any:
    settings = {"r": 4, "lora_alpha": 7, "task_type": "CAUSAL_LM", **row.theirs}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(
            tiny_model(row.family, **row.model), peft.LoraConfig(**settings)
        )
    randomise({name: p for name, p in model.named_parameters() if p.requires_grad})
    return model.eval()


@torch.no_grad()
def logits(model: Callable[..., Any]) -> Tensor:
    return model(IDS).logits


def answers(base: FrozenBase, name: str) -> Tensor:
    base.routing.active = ((name, 1.0),)
    try:
        return logits(base.model)
    finally:
        base.routing.active = ()


def assert_same_update(found: Tensor, expected: Tensor, base: Tensor) -> None:
    assert (expected - base).abs().max() > 0.1 * base.abs().max(), "the adapter must matter"
    assert (found - expected).abs().max() <= RELATIVE * expected.abs().max()


def load_in_peft(model: Any, folder: Any) -> Any:
    """PEFT only warns about tensors it does not find; here that is a failure."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = peft.PeftModel.from_pretrained(model, folder)
    assert not [w for w in caught if "missing" in str(w.message) or "nexpected" in str(w.message)]
    return loaded.eval()


@every_row
def test_peft_loads_ours_and_answers_the_same(row, tmp_path):
    base, attachment = ours(row)
    plain, expected = logits(base.model), answers(base, "lora.weight")
    write_adapter(tmp_path / "a", attachment, manifest_for(base, method="lora"), model=base.model)
    loaded = load_in_peft(tiny_model(row.family, **row.model), tmp_path / "a")
    assert_same_update(logits(loaded), expected, plain)


@every_row
def test_peft_uses_every_tensor_of_ours(row, tmp_path):
    base, attachment = ours(row)
    write_adapter(tmp_path / "a", attachment, manifest_for(base, method="lora"), model=base.model)
    loaded = load_in_peft(tiny_model(row.family, **row.model), tmp_path / "a")
    again = peft.get_peft_model_state_dict(loaded, save_embedding_layers=False)
    stored = read_adapter(tmp_path / "a").tensors
    missing = {name for name in stored if f"base_model.model.{name}" not in again}
    assert not missing
    assert all(
        torch.equal(again[f"base_model.model.{name}"], tensor) for name, tensor in stored.items()
    )


@every_row
def test_ours_loads_what_peft_wrote_and_answers_the_same(row, tmp_path):
    model = theirs(row)
    expected = logits(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path / "a")
    base = tiny_base(row.family, **row.model)
    plain = logits(base.model)
    stored = read_adapter(tmp_path / "a")
    assert stored.manifest is None and stored.notes == []
    load_adapter(base, stored, name="x")
    assert_same_update(answers(base, "x"), expected, plain)


@pytest.mark.parametrize(
    "row", [row for row in ROWS.values() if row.same], ids=[n for n, r in ROWS.items() if r.same]
)
def test_what_came_from_peft_and_is_written_again_is_peft_s_tensors(row, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs(row).save_pretrained(tmp_path / "theirs")
    base = tiny_base(row.family, **row.model)
    base.fingerprint()
    attachment = load_adapter(base, tmp_path / "theirs", name="x")
    write_adapter(
        tmp_path / "ours", attachment, manifest_for(base, method="lora"), model=base.model
    )
    before, after = (
        read_adapter(tmp_path / "theirs").tensors,
        read_adapter(tmp_path / "ours").tensors,
    )
    # what PEFT writes besides: frozen tables of adapted embeddings and heads, copies around trained
    # modules
    extra = {name for name in before if name not in after}
    assert all(
        name.split(".")[-2] in ("base_layer", "original_module", "modules_to_save")
        for name in extra
    )
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())
    _, fresh = ours(row)
    assert (
        attachment.layers.keys() == fresh.layers.keys()
        and attachment.values.keys() == fresh.values.keys()
    )


def test_a_pattern_order_that_peft_loses_is_read_as_the_file_has_it(tmp_path):
    """PEFT saves patterns sorted: the live adapter had 5 on layer 0, the file says 9, and so does
    PEFT's reload."""
    row = Row(
        ours={},
        theirs={
            "target_modules": ["q_proj"],
            "alpha_pattern": {"q_proj": 5, "layers.0.self_attn.q_proj": 9},
        },
    )
    theirs(row).save_pretrained(tmp_path / "a")
    base = tiny_base(row.family)
    attachment = load_adapter(base, tmp_path / "a", name="x")
    assert {path: layer.alpha for path, layer in attachment.layers.items()} == {
        "model.layers.0.self_attn.q_proj": 9,
        "model.layers.1.self_attn.q_proj": 5,
    }
    reloaded = load_in_peft(tiny_model(row.family), tmp_path / "a")
    assert_same_update(answers(base, "x"), logits(reloaded), logits(base.model))


def test_ours_reads_in_peft_as_the_settings_peft_would_hold(tmp_path):
    row = ROWS["list"]
    base, attachment = ours(row)
    write_adapter(tmp_path / "a", attachment, manifest_for(base, method="lora"), model=base.model)
    found = peft.PeftConfig.from_pretrained(tmp_path / "a").to_dict()
    expected = peft.LoraConfig(
        r=4,
        lora_alpha=7,
        task_type="CAUSAL_LM",
        inference_mode=True,
        base_model_name_or_path="tiny-llama_untied",
        peft_version="0.21.2",
        **row.theirs,
    ).to_dict()
    assert found == expected


def test_bf16_values_keep_their_type_and_factors_are_float32(tmp_path):
    base = tiny_base("phi", torch.bfloat16)
    base.fingerprint()
    settings = LoRA(
        rank=4, alpha=7, targets=["q_proj"], train_modules=["lm_head"], bias="lora_only"
    )
    head = base.model.get_output_embeddings()
    attachment = attach(base.model, settings, name="x", routing=base.routing, head=head)
    randomise(attachment.parameters())
    write_adapter(tmp_path / "a", attachment, manifest_for(base, method="lora"), model=base.model)
    model = load_in_peft(tiny_model("phi", torch.bfloat16), tmp_path / "a")
    again = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    stored = {
        f"base_model.model.{name}": tensor
        for name, tensor in read_adapter(tmp_path / "a").tensors.items()
    }
    assert {str(tensor.dtype) for tensor in stored.values()} == {"torch.float32", "torch.bfloat16"}
    assert again.keys() == stored.keys()
    assert all(
        torch.equal(again[name], stored[name]) and again[name].dtype == stored[name].dtype
        for name in stored
    )


@pytest.mark.parametrize(
    ("init", "family"),
    # PEFT's OLoRA does not know how a Conv1D lies: its factors there have the wrong shapes.
    [("pissa", "llama_untied"), ("pissa", "gpt2"), ("olora", "llama_untied")],
)
def test_a_start_from_the_weight_is_peft_s_and_loads_there_as_plain_lora(init, family, tmp_path):
    """PEFT changes the base, we keep it: after the same change of A and B both answer the same, and
    so does our file."""
    settings = LoRA(rank=4, alpha=7, init=init)
    base = tiny_base(family)
    head = base.model.get_output_embeddings()
    attachment = attach(base.model, settings, name="x", routing=base.routing, head=head)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(
            tiny_model(family),
            peft.LoraConfig(
                r=4,
                lora_alpha=7,
                task_type="CAUSAL_LM",
                target_modules="all-linear",
                init_lora_weights=init,
            ),
        ).eval()
    named = dict(model.named_parameters())
    generator = torch.Generator().manual_seed(3)
    for path, layer in attachment.layers.items():
        for part, parameter in layer.parts().items():
            twin = named[f"base_model.model.{path}.lora_{part}.default.weight"]
            torch.testing.assert_close(parameter, twin, rtol=1e-4, atol=1e-5)
            noise = 0.2 * torch.randn(parameter.shape, generator=generator)
            parameter.data.add_(noise)
            twin.data.copy_(parameter.data)
    found = answers(base, "x")
    assert_same_update(found, logits(model), logits(base.model))
    write_adapter(tmp_path / "a", attachment, manifest_for(base, method="lora"), model=base.model)
    loaded = load_in_peft(tiny_model(family), tmp_path / "a")
    assert loaded.peft_config["default"].init_lora_weights is True
    assert loaded.peft_config["default"].r == 8
    assert_same_update(logits(loaded), found, logits(base.model))


OLD_EXPERTS = {
    "mixtral": (
        "block_sparse_moe",
        ("w1", "w3", "w2"),
        {"target_modules": ["v_proj", "w1", "w2", "w3"]},
    ),
    "mixtral, down alone": ("block_sparse_moe", ("w2",), {"target_modules": ["v_proj", "w2"]}),
    "qwen3_moe": (
        "mlp",
        ("gate_proj", "up_proj", "down_proj"),
        {"target_modules": ["v_proj", "gate_proj", "up_proj", "down_proj"]},
    ),
}


@pytest.mark.parametrize(("block", "parts", "fields"), OLD_EXPERTS.values(), ids=OLD_EXPERTS)
def test_files_from_before_experts_were_fused_answer_as_in_peft(block, parts, fields, tmp_path):
    family = "mixtral" if block == "block_sparse_moe" else "qwen3_moe"
    generator = torch.Generator().manual_seed(0)
    wide, values = {"mixtral": (48, 16), "qwen3_moe": (24, 24)}[family]
    tensors = {}
    for layer in range(2):
        root = f"base_model.model.model.layers.{layer}"
        modules = {f"{root}.self_attn.v_proj": (32, values)}
        for part in parts:
            shape = (wide, 32) if part in ("w2", "down_proj") else (32, wide)
            modules |= {f"{root}.{block}.experts.{e}.{part}": shape for e in range(4)}
        for module, (inner, outer) in modules.items():
            tensors[f"{module}.lora_A.weight"] = 0.3 * torch.randn(3, inner, generator=generator)
            tensors[f"{module}.lora_B.weight"] = 0.3 * torch.randn(outer, 3, generator=generator)
    peft.LoraConfig(r=3, lora_alpha=7, task_type="CAUSAL_LM", **fields).save_pretrained(tmp_path)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    base = tiny_base(family)
    plain = logits(base.model)
    load_adapter(base, tmp_path, name="x")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = logits(peft.PeftModel.from_pretrained(tiny_model(family), tmp_path).eval())
    assert_same_update(answers(base, "x"), expected, plain)
    del tensors[f"base_model.model.model.layers.1.{block}.experts.2.{parts[0]}.lora_B.weight"]
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterMismatchError, match=rf"experts\.2\.{parts[0]}\.lora_A"):
        load_adapter(tiny_base(family), tmp_path, name="x")
