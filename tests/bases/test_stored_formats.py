"""Folders that other programs quantised: read as they are, decoded as their own programs do it,
trained over."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.adapters import test_methods as methods
from tests.quant.test_runs import rows
from tests.support.models.packed import packed_modules
from tests.support.models.packed_folders import (
    WRITERS,
    write_awq,
    write_compressed,
    write_fp8,
    write_gptq,
    write_mxfp4,
)
from tests.support.tiny import save_tiny
from veneer import api
from veneer.adapters.config import LoRA
from veneer.bases.identity.weight_table import packed_sizes, weight_table
from veneer.bases.loading.from_config import blueprint
from veneer.bases.packed.moving import LoaderWeight
from veneer.bases.quiet_transformers import quiet
from veneer.cli.main import main
from veneer.errors import ConfigError, CorruptFileError
from veneer.linear import PackedExperts, num_parameters
from veneer.models.load import load_base
from veneer.plan.ask import PlanQuestion, answer_question
from veneer.plan.choice import Choice
from veneer.plan.fit import find_remedy
from veneer.plan.planner import Planner
from veneer.plan.table import all_methods
from veneer.quant.int4 import Int4

IDS = torch.tensor([[5, 80, 99, 7, 250, 31, 31, 80, 12, 0, 77, 140]])
PLAIN = {
    "fp8": ("llama", write_fp8),
    "fp8, experts": ("mixtral", write_fp8),
    "fp8, row": ("llama", write_compressed),
    "fp8, weight": ("llama", lambda folder: write_compressed(folder, "tensor")),
    "gptq": ("llama", write_gptq),
    "gptq, Conv1D": ("gpt2", write_gptq),
    "gptq, symmetric": (
        "qwen2",
        lambda folder: write_gptq(folder, symmetric=True, layout="gptq_v2"),
    ),
    "gptq, order": ("llama", lambda folder: write_gptq(folder, act_order=True)),
    "gptq, last group short": ("llama", lambda folder: write_gptq(folder, group=20)),
    "gptq, whole rows": ("llama", lambda folder: write_gptq(folder, group=48)),
    "gptq, experts": ("qwen3_moe", write_gptq),
    "awq": ("llama", write_awq),
    "awq, experts": ("mixtral", write_awq),
    "mxfp4": ("gpt_oss", write_mxfp4),
}
every_layout = pytest.mark.parametrize(("family", "write"), PLAIN.values(), ids=PLAIN)


def folder_of(tmp_path, family, write, dtype=torch.bfloat16, **overrides):
    folder = save_tiny(tmp_path / "base", family, dtype, **overrides)
    return folder, write(folder)


def edit(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def configure(folder, **settings):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= settings
    (folder / "config.json").write_text(json.dumps(config))


@every_layout
def test_weights_are_decoded_to_what_was_written_and_the_model_computes_with_them(
    family, write, tmp_path
):
    folder, dense = folder_of(tmp_path, family, write)
    base, twin = packed_and_dense_of(folder, tmp_path, family, dense)
    with torch.no_grad():
        torch.testing.assert_close(base.model(IDS).logits, twin(IDS).logits, rtol=2e-4, atol=2e-4)
        few = base.model(IDS[:, :1]).logits
    torch.testing.assert_close(few, twin(IDS[:, :1]).logits, rtol=2e-4, atol=2e-4)
    assert num_parameters(base.model) == num_parameters(twin)
    assert [n for n, _ in base.model.named_parameters()] == [n for n, _ in twin.named_parameters()]
    name = write.__name__.removeprefix("write_")
    assert base.quantize in WRITERS
    assert name in (base.quantize, "compressed", "<lambda>")


def packed_and_dense_of(folder, tmp_path, family, dense):
    """(the base in float32, the same family's model with `dense` in the places of the packed
    weights)."""
    twin = save_tiny(tmp_path / "dense", family, torch.bfloat16)
    weights = {name: each.float() for name, each in load_file(twin / "model.safetensors").items()}
    save_file(
        {n: t.contiguous() for n, t in (weights | dense).items()},
        twin / "model.safetensors",
        metadata={"format": "pt"},
    )
    base = load_base(str(folder), dtype="float32", device="cpu")
    assert packed_modules(base.model)
    return base, load_base(str(twin), dtype="float32", device="cpu").model


@pytest.mark.parametrize(
    ("family", "write"), [("llama", lambda f: write_fp8(f, (8, 16))), ("gpt_oss", write_mxfp4)]
)
def test_the_bits_are_those_that_transformers_decodes_to(family, write, tmp_path):
    folder, _ = folder_of(tmp_path, family, write)
    with quiet():
        theirs = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, device_map="cpu"
        )
    base = load_base(str(folder), dtype="stored", device="cpu")
    for path, module in packed_modules(base.model).items():
        own = theirs.get_submodule(path)
        if isinstance(module, PackedExperts):
            for name in module.packed_shapes():
                for number in range(4):
                    found = module.expert(name, number).dense_weight(torch.bfloat16)
                    assert torch.equal(found, own.get_parameter(name)[number].T)
        else:
            assert torch.equal(module.dense_weight(torch.bfloat16), own.weight)


def test_a_weight_that_no_module_of_ours_takes_is_held_dense_as_it_decodes(tmp_path):
    """The head, and what a model takes past its modules."""
    folder, dense = folder_of(
        tmp_path, "llama_untied", lambda f: write_gptq(f, names=r"(.*_proj|lm_head)\.weight")
    )
    base = load_base(str(folder), dtype="float32", device="cpu")
    torch.testing.assert_close(
        base.model.lm_head.weight, dense["lm_head.weight"].bfloat16().float()
    )
    held = {g.what: g.held for g in weight_table(base.model)}
    assert (held["output head"], held["linear layers"]) == ("float32", "gptq")


@pytest.mark.parametrize(
    ("family", "write", "bits"),
    [
        ("llama", lambda f: write_fp8(f, (128, 128)), 8 + 32 / 128**2),
        ("llama", lambda f: write_gptq(f, group=128), 4 + 24 / 128),
        ("llama", lambda f: write_awq(f, group=128), 4 + 24 / 128),
        ("gpt_oss", write_mxfp4, 4.25),
    ],
    ids=["fp8", "gptq", "awq", "mxfp4"],
)
def test_what_is_packed_takes_no_more_memory_than_in_the_files(family, write, bits, tmp_path):
    folder, _ = folder_of(
        tmp_path, family, write, hidden_size=256, intermediate_size=512, head_dim=64
    )
    base = load_base(str(folder), dtype="float32", device="cpu")
    packed = {g.what: g for g in weight_table(base.model) if g.held == base.quantize}
    (group,) = packed.values()
    biases = 4 * 4 * (512 * 2 + 256) * 2 if family == "gpt_oss" else 0
    assert group.bytes - biases == pytest.approx(group.values * bits / 8, rel=0.03)


@pytest.mark.parametrize("name", PLAIN)
def test_moving_to_another_type_leaves_packed_values_to_the_bit(name, tmp_path):
    folder, _ = folder_of(tmp_path, *PLAIN[name])
    model = load_base(str(folder), dtype="float32", device="cpu").model
    modules = packed_modules(model)
    held = {
        n: t.clone()
        for p, m in modules.items()
        for n, t in m.state_dict(prefix=f"{p}.").items()
        if "bias" not in n
    }
    model.to(torch.bfloat16)
    assert all(
        torch.equal(model.state_dict()[n], t) and model.state_dict()[n].dtype == t.dtype
        for n, t in held.items()
    )
    assert all(m.dtype == torch.bfloat16 for m in modules.values())
    assert model(IDS).logits.dtype == torch.bfloat16


def test_the_same_folder_is_the_same_base_and_another_scale_another_one(tmp_path):
    folder, _ = folder_of(tmp_path, "llama", write_awq)
    base, again = (
        load_base(str(folder), quantize=quantize, device="cpu") for quantize in (None, "awq")
    )
    assert base.fingerprint() == again.fingerprint()
    assert base.fingerprint().dtype == "awq+bfloat16"
    assert base.fingerprint().quantize == "awq"
    dense = load_base(
        str(save_tiny(tmp_path / "dense", "llama", torch.bfloat16)), device="cpu"
    ).fingerprint()
    assert dense.shapes_hash == base.fingerprint().shapes_hash
    edit(folder, lambda w: w["model.layers.0.mlp.up_proj.scales"][0].mul_(2))
    assert (
        load_base(str(folder), device="cpu").fingerprint().weights_hash
        != base.fingerprint().weights_hash
    )


def test_a_format_that_the_folder_does_not_hold_is_refused(tmp_path):
    packed, _ = folder_of(tmp_path, "llama", write_awq)
    for quantize in ("gptq", "nf4"):
        with pytest.raises(ConfigError, match=f"holds its weights as awq, not as {quantize}"):
            load_base(str(packed), quantize=quantize)
    dense = save_tiny(tmp_path / "dense", "llama")
    with pytest.raises(ConfigError, match="does not hold its weights as gptq"):
        load_base(str(dense), quantize="gptq")
    config = json.loads((dense / "config.json").read_text()) | {
        "quantization_config": {"quant_method": "gptq"}
    }
    (dense / "config.json").write_text(json.dumps(config))
    with pytest.raises(CorruptFileError, match="says that the weights are stored as gptq"):
        load_base(str(dense))


def test_an_adapter_trained_over_it_answers_is_measured_and_merged(tmp_path, monkeypatch, capsys):
    folder, _ = folder_of(tmp_path, "gpt_oss", write_mxfp4)
    monkeypatch.chdir(tmp_path)
    data = rows(tmp_path / "rows.jsonl")
    started = ["--data", data, "--out", "run", "--steps", "2", "--batch", "4"]
    assert main(["train", "--base", str(folder), *started]) == 0
    adapter = tmp_path / "run" / "adapter"
    assert (
        json.loads((adapter / "veneer.json").read_text())["base"]["fingerprint"]["dtype"]
        == "bfloat16+mxfp4"
    )
    for typed in (["generate", "what is 3", "--max-new-tokens", "3"], ["evaluate", "--data", data]):
        assert main([*typed, "--base", str(folder), "--adapter", str(adapter)]) == 0
    more = ["--from", "run", "--set", 'new_tokens=["<call>"]', "--out", "more"]
    assert (
        main(
            ["train", "--base", str(folder), "--data", data, "--steps", "1", "--batch", "4", *more]
        )
        == 0
    )
    says = json.loads((tmp_path / "more" / "adapter" / "veneer.json").read_text())
    assert "<call>" in str(says["new_tokens"]) and says["parent"]
    merging = ["merge", "--base", str(folder), "--adapter", str(adapter)]
    assert main([*merging, "--out", "no"]) != 0
    assert "give --into original or --into dequantised" in capsys.readouterr().err
    assert main([*merging, "--into", "original", "--out", "no"]) != 0
    assert "these are not the original ones" in capsys.readouterr().err
    assert main([*merging, "--into", "dequantised", "--out", "merged"]) == 0
    merged = load_base("merged", dtype="float32")
    assert merged.quantize is None
    base = api.load(str(folder), dtype="float32")
    base.use(base.load_adapter(adapter))
    with torch.no_grad():
        expected = base.model(IDS).logits
        assert (merged.model(IDS).logits.float() - expected).norm() <= 0.02 * expected.norm()


@pytest.mark.parametrize("name", ["fp8, experts", "gptq, order", "mxfp4"])
def test_it_is_planned_by_the_bytes_that_it_is_held_in(name, tmp_path):
    folder, _ = folder_of(tmp_path, *PLAIN[name])
    base = load_base(str(folder), device="cpu")
    found = blueprint(str(folder))
    held, told = packed_sizes(base.model), found.packed
    joined = (
        name == "fp8, experts"
    )  # gate and up by the model alone, where no block of scales goes over both
    assert joined or [
        (tensor.name, tensor.shape) for tensor in sorted(told, key=lambda e: e.name)
    ] == [(tensor.name, tensor.shape) for tensor in sorted(held, key=lambda e: e.name)]
    assert sum(tensor.bytes for tensor in told) == pytest.approx(
        sum(tensor.bytes for tensor in held), rel=0.03 if joined else 0
    )
    planner, choice = Planner(found), Choice(method=LoRA(rank=2), length=16)
    static = planner.step_run(choice).static
    assert static["weights"] == pytest.approx(num_bytes(base.model), rel=0.02 if joined else 2e-3)
    largest = max(tensor.shape[-1] * tensor.shape[-2] for tensor in held)
    assert static["decoded weights"] * (1 + joined) == base.dtype.itemsize * largest
    assert (
        find_remedy(planner, choice, 10**6, lambda choice: 1.0) is None
    )  # 4 bits are not offered again


def num_bytes(model):
    return sum(each.nbytes for each in [*model.parameters(), *model.buffers()])


def test_what_a_run_over_it_refuses_is_not_planned(tmp_path, monkeypatch, capsys):
    folder, _ = folder_of(tmp_path, "llama", write_gptq)
    monkeypatch.chdir(tmp_path)
    for method, says in (
        (
            ["--method", "full"],
            "method full trains every weight, and weights held as gptq cannot train",
        ),
        (["--method", "qlora"], "holds its weights as gptq, not as nf4"),
    ):
        assert main(["plan", "--base", str(folder), *method]) != 0
        assert says in capsys.readouterr().err
        typed = [
            "train",
            "--base",
            str(folder),
            "--data",
            rows(tmp_path / "rows.jsonl"),
            "--out",
            "run",
            *method,
        ]
        assert main(typed) != 0
        assert says in capsys.readouterr().err
    planner = Planner(blueprint(str(folder)))
    assert [c.label for c in all_methods(Choice(method=LoRA())) if not planner.takes(c)] == [
        "qlora",
        "full",
    ]
    for weights in folder.glob("*.safetensors"):
        weights.unlink()
    with pytest.raises(ConfigError) as caught:
        answer_question(PlanQuestion([str(folder)], Choice(method=LoRA())))
    assert "only its files say how large they are" in str(caught.value)


CONTRACT = [
    methods.test_attaching_changes_a_bit_only_where_the_row_says_so_and_detaching_restores_every_bit,
    methods.test_the_packed_step_with_a_shared_prompt_is_the_models_own_forward_row_by_row,
    methods.test_only_the_adapters_parameters_train_and_all_of_them_do,
]
CELLS = [
    ("lora", "llama", "gptq", torch.float32),
    ("dora", "llama", "gptq", torch.float32),
    ("houlsby", "llama", "gptq", torch.float32),
    ("prefix", "llama", "gptq", torch.float32),
    ("lora", "gpt2", "gptq", torch.bfloat16),
    ("lora", "llama", "fp8", torch.float32),
    ("lora", "llama", "awq", torch.float32),
    ("lora", "gpt_oss", "mxfp4", torch.float32),  # of fused experts DoRA is refused
    ("prefix", "gpt_oss", "mxfp4", torch.float32),
]


def methods_base(tmp_path, family, name, monkeypatch):
    """The table of test_methods over a folder of ours: what a base of it is called there."""
    folder, _ = folder_of(tmp_path, family, WRITERS[name], torch.float32)
    monkeypatch.setattr(methods, "written", lambda family: folder)
    monkeypatch.setattr(methods, "SHARED", {})
    monkeypatch.setattr(methods, "ATTACHED", [])
    return f"{family} {name}"


@pytest.mark.parametrize("contract", CONTRACT, ids=["detached", "step", "trains"])
@pytest.mark.parametrize(("method", "family", "name", "dtype"), CELLS, ids=lambda cell: str(cell))
def test_what_every_method_owes_it_keeps_over_packed_weights(
    contract, method, family, name, dtype, tmp_path, monkeypatch
):
    contract(methods.METHODS[method], methods_base(tmp_path, family, name, monkeypatch), dtype)


@pytest.mark.parametrize(("family", "name"), [("llama", "gptq"), ("gpt_oss", "mxfp4")])
def test_its_files_and_checkpointing_are_those_of_any_base(family, name, tmp_path, monkeypatch):
    cell = methods.METHODS["lora"], methods_base(tmp_path, family, name, monkeypatch), torch.float32
    methods.test_its_files_hold_all_of_it_in_the_size_foretold(*cell, tmp_path)
    methods.SHARED.clear()
    methods.test_checkpointing_changes_no_bit(*cell)


def int4(seed, *, groups=False, width=8, scale=torch.float16):
    draw = torch.Generator().manual_seed(seed)
    tensors = {
        "": torch.randint(0, 256, (4, 8), dtype=torch.uint8, generator=draw),
        "scales": torch.rand(4, 2, generator=draw).to(scale),
        "zeros": torch.randint(0, 16, (4, 2), dtype=torch.uint8, generator=draw),
    }
    if groups:
        tensors["groups"] = torch.randint(0, 2, (16,), dtype=torch.int32, generator=draw)
    return LoaderWeight(Int4(format="gptq", tensors=tensors, width=width))


@pytest.mark.parametrize("make", [torch.stack, torch.cat], ids=["experts", "gate and up"])
@pytest.mark.parametrize(
    ("other", "said"),
    [({"groups": True}, "order of columns"), ({"width": 4}, "width"), ({}, None)],
    ids=str,
)
@pytest.mark.parametrize("first", [True, False])
def test_weights_that_are_held_as_one_are_all_looked_at_not_the_first(make, other, said, first):
    weights = [int4(0), int4(1, **other)]
    made = make(weights if first else weights[::-1], dim=0)
    assert (made.fault is None) if said is None else (said in made.fault)
