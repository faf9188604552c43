"""Which places of a model are adapted: its linear layers and its experts, where a layer beside them
would act."""

import threading
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from tests.support.helpers import fill
from tests.support.tiny import save_tiny, tiny_model, tiny_tokenizer
from veneer.adapters.attach import attach
from veneer.adapters.config import DoRA, LoRA
from veneer.adapters.methods.expert_stack import expert_parameters
from veneer.adapters.methods.lora import delta_weight
from veneer.adapters.placement.reads import refused_by_peft, weights_read_past
from veneer.adapters.placement.routing import Routing
from veneer.adapters.placement.wrapping import plain_modules
from veneer.errors import AdapterMismatchError, ConfigError, RefusedError
from veneer.formats.adapter import manifest_for, read_adapter, write_adapter
from veneer.formats.loading import load_adapter
from veneer.merge.export.export_run import export_adapter
from veneer.merge.export.lint import lint
from veneer.models.frozen_base import FrozenBase
from veneer.models.load import load_base
from veneer.models.starts.initial_values import begin
from veneer.training.config import RunConfig
from veneer.training.state.parents import begin_adapter

IDS = torch.tensor([[5, 9, 30, 7, 5, 61, 2, 8, 44, 10, 11, 12]])
_COMMON = {
    "vocab_size": 272,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,
}
_SSM = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
}
_MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
MIXERS = {
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "qwen3_next": {
        "layer_types": ["linear_attention", "full_attention"],
        "head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24,
    },
    "granitemoehybrid": dict(
        layer_types=["mamba", "attention"], shared_intermediate_size=24, **_SSM, **_MOE
    ),
    "mamba": {"state_size": 8, "time_step_rank": 4},
    "mamba2": {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1, "chunk_size": 16},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
    },
    "bamba": dict(attn_layer_indices=[1], **_SSM),
    "zamba2": {
        "layer_types": ["mamba", "hybrid"],
        "hybrid_layer_ids": [1],
        "num_mem_blocks": 1,
        "mamba_d_state": 8,
        "n_mamba_heads": 4,
        "mamba_headdim": 16,
        "mamba_ngroups": 1,
        "chunk_size": 16,
    },
    "falcon_h1": {**_SSM, "mamba_d_head": 8, "mamba_d_ssm": 32, "head_dim": 8},
    "recurrent_gemma": {
        "block_types": ["recurrent", "attention"],
        "head_dim": 8,
        "lru_width": 32,
        "attention_window_size": 16,
    },
    "rwkv": {"attention_hidden_size": 32, "context_length": 64, "rescale_every": 1},
    "jetmoe": dict(kv_channels=8, **{**_MOE, "num_key_value_heads": 4}),
    "ernie4_5_moe": {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 24,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 0,
    },
    "llama4_text": {
        "head_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 48,
        "moe_layers": [0, 1],
    },
}
"""Families that mix tokens by convolutions, recurrences or gates of three axes, or whose experts
are built otherwise."""


def mixer(family, device="cpu", **fields):
    config = AutoConfig.for_model(family, **{**_COMMON, **MIXERS[family], **fields})
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(0)
        return (
            AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            .eval()
            .requires_grad_(False)
        )


def mixer_base(family):
    return FrozenBase(mixer(family), tiny_tokenizer(), source=family, name_or_path=family)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def put(model, routing, **settings):
    config = LoRA(**{"rank": 3, "alpha": 5.0, **settings})
    return attach(model, config, name="a", routing=routing, head=model.get_output_embeddings())


@pytest.mark.parametrize("family", MIXERS)
def test_default_targets_of_a_mixer_act_as_if_added_into_its_weights(family):
    model, routing = mixer(family), Routing()
    before = logits(model)
    attachment = put(model, routing)
    fill(attachment.parameters().values(), scale=0.2)
    routing.active = (("a", 1.0),)
    adapted = logits(model)
    routing.active = ()
    assert torch.equal(logits(model), before) and not torch.allclose(adapted, before, rtol=1e-2)
    modules = plain_modules(model)
    for path, layer in attachment.layers.items():
        owner, _, name = path.rpartition(".")
        in_experts = path not in modules
        weight = modules[owner].get_parameter(name) if in_experts else modules[path].weight
        delta = delta_weight(layer)
        weight.data += delta.transpose(-1, -2) if delta.shape != weight.shape else delta
        assert in_experts == (owner in modules and name in expert_parameters(modules[owner]))
    torch.testing.assert_close(logits(model), adapted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["jetmoe", "llama4_text", "jamba", "qwen3_next", "rwkv"])
def test_an_adapter_of_a_mixer_is_written_and_read_to_the_bit(family, tmp_path):
    base = mixer_base(family)
    made = put(base.model, base.routing)
    fill(made.parameters().values(), scale=0.2)
    write_adapter(tmp_path / "a", made, manifest_for(base, method="lora"), model=base.model)
    fresh = mixer_base(family)
    loaded = load_adapter(fresh, tmp_path / "a", name="b")
    base.routing.active, fresh.routing.active = (("a", 1.0),), (("b", 1.0),)
    assert loaded.layers.keys() == made.layers.keys() and torch.equal(
        logits(fresh.model), logits(base.model)
    )


@pytest.mark.parametrize("family", ["jamba", "mamba"])
def test_a_weight_that_the_model_multiplies_itself_is_left_out_and_refused_by_name(family):
    model = mixer(family)
    assert not any("dt_proj" in path for path in put(model, Routing()).layers)
    for named in (
        {"targets": ["dt_proj"]},
        {"targets": ".*dt_proj"},
        {"targets": ["in_proj"], "train_modules": ["dt_proj"]},
    ):
        with pytest.raises(ConfigError) as caught:
            put(mixer(family), Routing(), **named)
        assert "dt_proj.weight" in str(caught.value.faults), named
    assert put(mixer(family), Routing(), targets=".*proj", exclude=["dt_proj"]).layers


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "olmoe", "deepseek_v3", "ernie4_5_moe"])
def test_a_router_that_is_named_trains_with_the_gradient_of_its_weight(family):
    made = mixer if family in MIXERS else tiny_model
    model, routing = made(family), Routing()
    before = logits(model)
    assert not any(path.endswith("gate") for path in put(made(family), Routing()).layers)
    attachment = put(model, routing, targets=["mlp.gate"])
    routing.active = (("a", 1.0),)
    assert torch.equal(logits(model), before)  # a fresh one changes no bit
    fill(attachment.parameters().values(), scale=0.2)
    parameters = attachment.parameters()
    loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    ours = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
    routing.active = ()
    for path, layer in attachment.layers.items():
        weight = plain_modules(model)[path].weight
        weight.data += delta_weight(layer).detach()
        weight.requires_grad_()
    plain = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    torch.testing.assert_close(plain, loss, rtol=1e-5, atol=1e-6)
    plain.backward()
    for path, layer in attachment.layers.items():
        grad = plain_modules(model)[path].weight.grad * layer.scaling
        torch.testing.assert_close(ours[f"{path}.B"], grad @ layer.A.T, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(ours[f"{path}.A"], layer.B.T @ grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (LoRA(targets=["gate"], dropout=0.1), "dropout"),
        (LoRA(targets=["gate"], init="pissa"), "routers"),
        (DoRA(targets=["gate"]), "routers"),
    ],
    ids=str,
)
def test_what_a_router_cannot_take_is_refused_by_name(settings, said):
    model = tiny_model("qwen3_moe")
    with pytest.raises(ConfigError, match=said) as caught:
        attach(model, settings, name="a", routing=Routing(), head=None)
    assert "model.layers.0.mlp.gate" in caught.value.faults


def test_a_norm_whose_type_the_model_reads_is_trained_as_any_other():
    model, routing = mixer("mamba"), Routing()
    attachment = put(model, routing, targets=["in_proj"], train_modules=["norm"])
    routing.active = (("a", 1.0),)
    before = logits(model)
    attachment.values["backbone.layers.0.norm.weight"].data.mul_(2.0)
    assert not torch.allclose(logits(model), before)


def test_biases_that_the_model_takes_itself_do_not_train():
    attachment = put(mixer("mamba"), Routing(), bias="all")
    assert not any("dt_proj" in path or "conv1d" in path for path in attachment.values)


def test_a_module_made_of_linear_or_embedding_that_computes_something_else_is_no_place():
    assert not any("router" in path for path in put(mixer("llama4_text"), Routing()).layers)
    assert any("query_key_value" in path for path in put(tiny_model("falcon"), Routing()).layers)
    with pytest.raises(ConfigError, match="matches no module"):
        put(tiny_model("opt"), Routing(), targets=["embed_positions"])


def test_quantising_leaves_dense_what_the_model_multiplies_by_itself(tmp_path):
    mixer("mamba").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    model = load_base(str(tmp_path), quantize="nf4", device="cpu").model
    kinds = {
        path.rpartition(".")[2]: type(module).__name__ for path, module in model.named_modules()
    }
    assert (kinds["in_proj"], kinds["dt_proj"]) == ("HeldLinear", "Linear")
    assert logits(model).isfinite().all()


def test_what_a_model_takes_itself_is_known_without_its_values_too():
    for family in ("jamba", "mamba", "lfm2"):
        assert (
            weights_read_past(mixer(family, "meta"))
            == weights_read_past(mixer(family))
            != frozenset()
        )
    few, more = mixer("mamba", "meta"), mixer("mamba", "meta", num_hidden_layers=5)
    assert weights_read_past(more, like=few) == weights_read_past(more) > weights_read_past(few)
    assert (
        weights_read_past(tiny_model("llama"))
        == weights_read_past(tiny_model("mixtral"))
        == frozenset()
    )


def test_a_weight_that_the_model_rescales_before_its_first_answer_is_read_by_its_module():
    model = mixer("rwkv")
    for _ in ("before the first answer", "after it"):
        assert weights_read_past(model) == frozenset()


def test_an_adapter_file_that_updates_such_a_weight_is_refused_and_one_with_a_zero_update_is_not(
    tmp_path,
):
    """PEFT's all-linear puts factors beside dt_proj that no gradient reaches: B is zero in every
    such file."""
    base = mixer_base("mamba")
    made = attach(
        base.model,
        LoRA(rank=2, targets=["in_proj", "dt_proj"]),
        name="a",
        routing=base.routing,
        head=None,
        read_past=(),
    )
    fill(made.parameters().values())
    folder = tmp_path / "a"
    write_adapter(folder, made, manifest_for(base, method="lora"), model=base.model)
    (folder / "veneer.json").unlink()
    fresh = mixer_base("mamba")
    with pytest.raises(AdapterMismatchError, match=r"dt_proj\.weight, 2 places") as refused:
        load_adapter(fresh, folder, name="a")
    assert "train it again without these modules" in str(refused.value.next_step)
    assert "made for" not in str(refused.value), "this is the base that it was made for"
    tensors = load_file(folder / "adapter_model.safetensors")
    for name, tensor in tensors.items():
        if "dt_proj.lora_B" in name:
            tensor.zero_()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    loaded = load_adapter(fresh, folder, name="a")
    assert {path.rpartition(".")[2] for path in loaded.layers} == {"in_proj"}


class AnsweringElsewhere(nn.Module):
    """Multiplies by a weight itself while another thread is inside the module that holds it."""

    def __init__(self):
        super().__init__()
        self.held = nn.Linear(2, 2)
        self.held.forward = self._inside
        self.entered, self.left = threading.Event(), threading.Event()

    def _inside(self, x):
        self.entered.set()
        assert self.left.wait(10)
        return x

    def forward(self, input_ids, use_cache):
        x = torch.ones(1, 2)
        other = threading.Thread(target=self.held, args=(x,))
        other.start()
        assert self.entered.wait(10)
        y = x @ self.held.weight
        self.left.set()
        other.join()
        return y


def test_a_module_at_work_in_another_thread_hides_no_weight_that_is_read_past_it():
    assert weights_read_past(AnsweringElsewhere()) == {"held.weight"}


def test_whatever_a_model_without_values_trips_over_it_is_watched_up_to_there():
    model = AnsweringElsewhere().to("meta")
    model.forward = lambda **_: (torch.ones(1, 2, device="meta") @ model.held.weight, {}["missing"])
    assert weights_read_past(model) == {"held.weight"}


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_all_linear_leaves_out_the_modules_where_peft_refuses_lora(family, tmp_path):
    peft = pytest.importorskip("peft")
    base = mixer_base(family)
    begun = begin(base, LoRA(rank=2), name="a")
    assert (
        not any(path.endswith("out_proj") for path in begun.attachment.layers) and begun.lines == []
    )
    fill(begun.attachment.parameters().values())
    base.routing.active = (("a", 1.0),)
    write_adapter(
        tmp_path / "a", begun.attachment, manifest_for(base, method="lora"), model=base.model
    )
    theirs = peft.PeftModel.from_pretrained(mixer(family), tmp_path / "a")
    torch.testing.assert_close(logits(base.model), theirs(IDS).logits, rtol=1e-4, atol=1e-5)


def test_who_names_a_module_where_peft_refuses_lora_gets_it_and_is_told(tmp_path):
    peft = pytest.importorskip("peft")
    base = mixer_base("mamba")
    begun = begin(base, LoRA(rank=2, targets=["in_proj", "out_proj"]), name="a")
    assert len(begun.attachment.layers) == 4
    assert begun.lines[0].startswith("PEFT refuses LoRA on out_proj of this model (2 modules)")
    write_adapter(
        tmp_path / "a", begun.attachment, manifest_for(base, method="lora"), model=base.model
    )
    with pytest.raises(ValueError, match="incompatible with Mamba"):
        peft.PeftModel.from_pretrained(mixer("mamba"), tmp_path / "a")
    assert (
        load_adapter(mixer_base("mamba"), tmp_path / "a", name="a").layers.keys()
        == begun.attachment.layers.keys()
    )
    for consumer in ("peft", "transformers"):
        [finding] = lint(read_adapter(tmp_path / "a"), base.model, consumer)
        assert "out_proj, 2 modules" in finding.what and not finding.silent


def test_a_run_from_an_adapter_that_peft_refuses_says_so_and_the_export_to_peft_is_refused(
    tmp_path,
):
    base, folder = mixer_base("mamba"), tmp_path / "base"
    base.model.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    for name, targets in (("refused", ["in_proj", "out_proj"]), ("read", ["in_proj"])):
        begun = begin(base, LoRA(rank=2, targets=targets), name=name)
        write_adapter(
            tmp_path / name, begun.attachment, manifest_for(base, method="lora"), model=base.model
        )
    settings = {
        "base": str(folder),
        "data": "rows.jsonl",
        "out": "run",
        "from_adapter": str(tmp_path / "refused"),
    }
    _, begun = begin_adapter(load_base(str(folder)), RunConfig.of(settings), [], resumes=False)
    assert [line[:9] for line in begun.lines] == ["continues", "PEFT refu"]
    with pytest.raises(RefusedError, match=r"LoRA on out_proj, 2 modules[\s\S]*veneer merge"):
        export_adapter(tmp_path / "refused", to="peft", base=str(folder), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    export_adapter(tmp_path / "read", to="peft", base="not here", out=tmp_path / "out")


def test_out_proj_is_exported_to_peft_where_peft_reads_it(tmp_path):
    base = load_base(str(save_tiny(tmp_path / "base", "opt")))
    begun = begin(base, LoRA(rank=2, targets=["out_proj"]), name="a")
    write_adapter(
        tmp_path / "a", begun.attachment, manifest_for(base, method="lora"), model=base.model
    )
    export_adapter(tmp_path / "a", to="peft", base=str(tmp_path / "base"), out=tmp_path / "out")
    with pytest.raises(AdapterMismatchError, match="does not fit the base"):
        other = str(save_tiny(tmp_path / "other", "llama"))
        export_adapter(tmp_path / "a", to="peft", base=other, out=tmp_path / "other out")


def test_the_modules_where_peft_refuses_lora_are_those_of_its_own_check():
    peft_check = pytest.importorskip("peft.tuners.tuners_utils")._check_lora_target_modules_mamba
    settings = pytest.importorskip("peft").LoraConfig(task_type="CAUSAL_LM")
    for kind in sorted(CONFIG_MAPPING):
        model = nn.Module()
        for name in ("out_proj", "conv1d", "in_proj", "x_proj", "dt_proj", "q_proj"):
            model.add_module(name, nn.Linear(2, 2))
        model.config = SimpleNamespace(model_type=kind)
        refused = set()
        for name, _ in model.named_children():
            try:
                peft_check(settings, model, name)
            except ValueError:
                refused.add(name)
        assert refused_by_peft(model) == refused, kind
