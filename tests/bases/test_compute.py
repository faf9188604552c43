"""The type that a base is held in: measured, said, kept; and float32 is the same base as the bf16
that it was widened from."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from gguf import GGMLQuantizationType
from transformers import AutoModelForCausalLM

from tests.adapters.test_methods import move
from tests.kernels.test_tiles import limited
from tests.models.test_step import loss_and_gradients
from tests.quant.test_runs import rows, run, settings
from tests.support.helpers import killed_after_saving, make_examples
from tests.support.models.tiny_gguf import tiny, write_gguf
from tests.support.tiny import save_tiny, tiny_model
from veneer import api
from veneer.adapters.config import LoRA
from veneer.bases import compute
from veneer.bases.compute import choose
from veneer.bases.identity.fingerprint import earlier_fingerprint
from veneer.bases.loading.blueprint import Blueprint
from veneer.bases.quiet_transformers import quiet
from veneer.comparison.comparison import resolved
from veneer.comparison.environment import find_environment
from veneer.comparison.plan import Candidate
from veneer.errors import AdapterMismatchError, ConfigError
from veneer.formats.adapter import manifest_for, write_adapter
from veneer.kernels.bindings import library as native
from veneer.models.load import compute_of, load_base
from veneer.plan.choice import Choice
from veneer.plan.planner import Planner
from veneer.plan.simulation.step_counts import WEIGHTS
from veneer.training.state.folder import resume_config

IDS = torch.arange(24).view(1, 24) * 7 % 256
CPU = torch.device("cpu")
LORA = LoRA(rank=2)
HELD = [None, "nf4", "fp4"]
FEW_ROWS = 1e-5
"""Relative to the largest value: gradients of few rows are sums in another order than torch's."""

AS_AN_OLDER_PROCESSOR = {
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "ATEN_CPU_CAPABILITY": "avx2",
    native.MAX_ISA: "avx2",
}
COMMANDS = """
import json, sys
from veneer.cli.main import main
base, data, out = sys.argv[1:]
for command in (
    ["train", "--base", base, "--data", data, "--out", out,
     "--set", "steps=2", "--set", "show_answers=false"],
    ["generate", "--adapter", out, "--max-new-tokens", "2", "hello"],
    ["evaluate", "--adapter", out, "--data", data],
    ["plan", "--base", base, "--length", "64", "--json"],
    ["doctor"],
):
    assert main(command) == 0
    print("=====", flush=True)
"""


@pytest.fixture
def slow(monkeypatch):
    """A processor on which products of 16-bit types take 30 times as long as float32's."""
    monkeypatch.setattr(compute, "times_float32", lambda dtype: 30.0)


def has_bf16_products() -> bool:
    flags = Path("/proc/cpuinfo")
    limited = os.environ.keys() & AS_AN_OLDER_PROCESSOR.keys()
    return flags.is_file() and "avx512_bf16" in flags.read_text() and not limited


def test_without_bf16_products_float32_is_chosen_said_planned_and_kept(tmp_path):
    save_tiny(tmp_path / "base", "llama", torch.bfloat16)
    arguments = [str(tmp_path / "base"), rows(tmp_path / "rows.jsonl"), str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, "-P", "-W", "ignore", "-c", COMMANDS, *arguments],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **AS_AN_OLDER_PROCESSOR},
    )
    trained, _, _, planned, doctor, _ = done.stdout.split("=====\n")
    assert (
        "dtype float32, weights in bfloat16 in memory: in bfloat16 a product takes about" in trained
    )
    assert yaml.safe_load((tmp_path / "run" / "run.yaml").read_text())["dtype"] == "float32"
    assert done.stderr.count("dtype float32") == 2  # generate and evaluate
    plan = json.loads(planned)
    assert plan["plans"][0]["dtype"] == "float32"
    assert any("weights in bfloat16 in memory" in note for note in plan["notes"])
    assert "multiplied as float32" in doctor
    assert "AVX2" in doctor.partition("our kernels use")[2].split("\n")[0] or native.level() < 0


@pytest.mark.skipif(not has_bf16_products(), reason="this processor has no bf16 products")
def test_with_bf16_products_the_stored_type_stays(tmp_path):
    base = load_base(str(save_tiny(tmp_path, "llama", torch.bfloat16)))
    assert base.dtype == torch.bfloat16
    assert not base.compute.widens and "dtype bfloat16, as stored" in base.compute.line


def test_what_is_asked_for_is_followed_and_only_a_cpu_is_measured(slow):
    half = torch.bfloat16
    assert choose(half, "auto", CPU).held == torch.float32
    assert choose(half, "stored", CPU).held == choose(half, "bfloat16", CPU).held == half
    assert choose(half, "auto", torch.device("cuda")).held == half
    assert choose(torch.float32, "auto", CPU).line is None
    assert choose(half, "float32", CPU).line is None  # nothing was chosen: nothing is said


def test_a_measurement_leaves_the_number_of_threads_alone():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        compute.times_float32.__wrapped__(torch.bfloat16)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "mixtral"])
@pytest.mark.parametrize("quantize", HELD)
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_widened_to_float32_it_is_the_same_base(family, quantize, stored, tmp_path):
    folder = str(save_tiny(tmp_path, family, stored))
    wide, narrow = (
        load_base(folder, dtype=dtype, quantize=quantize) for dtype in ("float32", "stored")
    )
    assert wide.fingerprint() == narrow.fingerprint()
    assert (wide.dtype, narrow.dtype) == (torch.float32, stored)
    assert wide.config.dtype == torch.float32
    theirs = narrow.model.state_dict()
    for name, value in wide.model.state_dict().items():
        assert torch.equal(value.to(theirs[name].dtype), theirs[name]), name
    assert wide.model(IDS).logits.dtype == torch.float32
    if quantize is None:
        with quiet():
            expected = (
                AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(IDS).logits
            )
        assert torch.equal(wide.model(IDS).logits, expected)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma", "gemma3"])
def test_weights_that_stay_in_bf16_give_what_widened_ones_give(family, tmp_path, monkeypatch):
    """The bits of logits and answers, with LoRA and after merging; loss and gradients within
    rounding."""
    monkeypatch.setattr("veneer.kernels.dense.few_rows.LEAST_VALUES", 0)
    folder, results = str(save_tiny(tmp_path, family, torch.bfloat16)), []
    lora = LoRA(rank=2, targets=r".*\.(\w+_proj|c_attn|c_fc|embed_tokens|wte)")
    with limited("avx2"):
        for wide in (False, True):
            base = api.load(folder, dtype="float32")
            assert base.compute.narrow and base.dtype == torch.float32
            if wide:
                base.model.float()
            matrices, others = (
                {w.dtype for w in base.model.parameters() if (w.dim() == 2) is is_matrix}
                for is_matrix in (True, False)
            )
            assert matrices == {torch.float32 if wide else torch.bfloat16}
            assert others == {torch.float32}
            logits = base.model(IDS).logits
            adapter = base.attach(lora, name="a")
            move(adapter)
            answers = [base.generate("one two", max_new_tokens=9)]
            base.use("a")
            answers.append(base.generate(["one two", "three"], max_new_tokens=9)[0])
            loss, gradients = loss_and_gradients(
                base.model, base.paths, base.routing, adapter, make_examples(3)
            )
            base.merge("a")
            answers.append(base.generate("one two", max_new_tokens=9))
            results.append((answers, loss, logits, gradients))
    (answers, loss, logits, gradients), (wide_answers, wide_loss, wide_logits, wide) = results
    assert answers == wide_answers and len({*answers}) > 1
    assert loss == pytest.approx(wide_loss, rel=1e-6) and torch.equal(logits, wide_logits)
    for ours, theirs in zip(gradients, wide, strict=True):
        assert (ours - theirs).abs().max() <= FEW_ROWS * theirs.abs().max()


@pytest.mark.parametrize("module", ["lm_head", "o_proj", "embed_tokens"])
def test_modules_that_an_adapter_trains_have_float32_over_weights_in_bf16(module, tmp_path):
    folder = str(save_tiny(tmp_path, "llama_untied", torch.bfloat16))
    config, results = LoRA(rank=2, targets=["q_proj"], train_modules=[module]), []
    with limited("avx2"):
        for wide in (False, True):
            base = api.load(folder, dtype="float32")
            assert base.compute.narrow
            if wide:
                base.model.float()
            adapter = base.attach(config, name="a")
            assert {value.dtype for value in adapter.parameters().values()} == {torch.float32}
            move(adapter)
            base.use("a")
            own = base.model, base.paths, base.routing, adapter, make_examples(3)
            results.append(loss_and_gradients(*own))
    (loss, gradients), (wide_loss, wide_gradients) = results
    assert loss == pytest.approx(wide_loss, rel=1e-6)
    for ours, theirs in zip(gradients, wide_gradients, strict=True):
        assert theirs.abs().max() > 0
        assert (ours - theirs).abs().max() <= FEW_ROWS * theirs.abs().max()


def test_a_base_that_trains_is_widened_in_memory(tmp_path):
    folder = str(save_tiny(tmp_path, "llama", torch.bfloat16))
    with limited("avx2"):
        base = load_base(folder, dtype="float32", trains=True)
    assert base.compute.widens and not base.compute.narrow
    assert {weight.dtype for weight in base.model.parameters()} == {torch.float32}


def test_a_type_that_rounds_is_another_base(tmp_path):
    folder = str(save_tiny(tmp_path, "llama"))
    rounded = load_base(folder, dtype="bfloat16")
    assert rounded.fingerprint() != load_base(folder).fingerprint()
    assert not rounded.compute.widens


@pytest.mark.parametrize("quantize", [None, "gguf"])
def test_a_gguf_file_is_computed_in_the_type_that_is_chosen(quantize, slow, tmp_path, monkeypatch):
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "cache"))
    file = str(
        write_gguf(tmp_path / "m.gguf", tiny("llama"), "llama", kind=GGMLQuantizationType.Q8_0)
    )
    wide, narrow = (load_base(file, dtype=dtype, quantize=quantize) for dtype in ("auto", "stored"))
    assert wide.model(IDS).logits.dtype == torch.float32
    assert wide.fingerprint() == narrow.fingerprint()
    gap = (wide.model(IDS).logits - narrow.model(IDS).logits.float()).abs().max()
    assert gap < 0.05 * wide.model(IDS).logits.abs().max()


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_an_adapter_goes_from_either_type_to_the_other(method, slow, tmp_path, monkeypatch):
    save_tiny(tmp_path / "base", "llama", torch.bfloat16)
    chosen = {"method": {"name": method, "rank": 2}, "dtype": "bfloat16"}
    run(settings(tmp_path, "narrow", **chosen))
    run(settings(tmp_path, "wide", **{**chosen, "dtype": "auto"}))
    quantize = "nf4" if method == "qlora" else None
    for dtype in ("auto", "bfloat16"):
        base = api.load(str(tmp_path / "base"), dtype=dtype, quantize=quantize)
        for name in ("narrow", "wide"):
            base.load_adapter(tmp_path / name / "adapter", name=name)  # refused for another base
    recipe = json.loads((tmp_path / "wide" / "adapter" / "veneer.json").read_text())["recipe"]
    assert recipe["dtype"] == "float32"
    with pytest.raises(AdapterMismatchError):
        api.load(str(tmp_path / "base"), dtype="float16").load_adapter(
            tmp_path / "wide" / "adapter"
        )


@pytest.mark.parametrize("quantize", HELD)
def test_an_adapter_of_a_version_that_read_the_base_as_float32_finds_it_there(quantize, tmp_path):
    """It kept the fingerprint of the float32 values."""
    folder, kept = save_tiny(tmp_path / "base", "llama", torch.bfloat16), tmp_path / "adapter"
    wide = api.load(str(folder), dtype="float32", quantize=quantize)
    mine = wide.attach(LORA, name="mine")
    write_adapter(kept, mine, manifest_for(wide, method="lora"), model=wide.model)
    manifest = json.loads((kept / "veneer.json").read_text())
    manifest["base"]["fingerprint"] = earlier_fingerprint(
        as_read_in_float32(folder, quantize)
    ).to_dict()
    (kept / "veneer.json").write_text(json.dumps(manifest))
    api.load(str(folder), dtype="float32", quantize=quantize).load_adapter(kept, name="mine")
    with pytest.raises(AdapterMismatchError, match="float32"):
        api.load(str(folder), dtype="stored", quantize=quantize).load_adapter(kept, name="mine")


def as_read_in_float32(folder, quantize):
    with quiet():
        dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    dense.save_pretrained(folder.parent / "float32")
    for file in folder.glob("token*"):
        shutil.copy(file, folder.parent / "float32")
    return load_base(str(folder.parent / "float32"), quantize=quantize).model


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_a_resumed_run_keeps_its_type_on_whatever_processor(method, slow, tmp_path, monkeypatch):
    save_tiny(tmp_path / "base", "llama", torch.bfloat16)
    chosen = {"method": method, "show_answers": False}
    whole = run(settings(tmp_path, "whole", **chosen))
    with killed_after_saving(3):
        run(settings(tmp_path, "stopped", **chosen))
    monkeypatch.setattr(compute, "times_float32", lambda dtype: 0.3)
    config = resume_config(tmp_path / "stopped")
    assert config.dtype == "float32"
    resumed = run(config, resume=True)
    assert resumed["last_loss"] == whole["last_loss"]
    assert resumed["base_fingerprint"] == whole["base_fingerprint"]


def test_the_plan_counts_the_bytes_of_the_type_that_is_chosen(slow):
    blueprint = Blueprint("tiny", tiny_model("llama_untied", torch.bfloat16).config, torch.bfloat16)
    planner = Planner(blueprint, idle_bytes=0)
    sizes = {
        dtype: planner.estimate(Choice(LORA, length=64, dtype=dtype)).parts[WEIGHTS]
        for dtype in ("auto", "float32", "bfloat16")
    }
    assert (
        sizes["auto"] == sizes["float32"] > 1.99 * sizes["bfloat16"]
    )  # frequencies are float32 in both
    with limited("avx2"):
        narrow = planner.estimate(Choice(LORA, length=64)).parts[WEIGHTS]
    assert sizes["bfloat16"] < narrow < 1.02 * sizes["bfloat16"]  # norms are float32
    assert Planner(blueprint, idle_bytes=0, device="cuda").dtype(Choice(LORA)) == torch.bfloat16


def test_a_comparison_names_one_type_for_all_its_processes(slow, tmp_path):
    save_tiny(tmp_path / "base", "llama", torch.bfloat16)
    candidate = Candidate("lora", settings(tmp_path, "out"))
    found = find_environment(str(tmp_path / "base"), [candidate.config])
    assert found.dtypes == ["float32"]
    assert resolved(candidate, found.dtypes[0], found.rates[0]).config.dtype == "float32"
    assert (
        compute_of(str(tmp_path / "base"), dtype="bfloat16", device="cpu", quantize=None).name
        == "bfloat16"
    )


def test_what_is_written_in_4_bits_keeps_the_stored_type_of_what_stays_dense(
    slow, tmp_path, capsys
):
    folder = str(save_tiny(tmp_path / "base", "llama", torch.bfloat16))
    with pytest.raises(ConfigError, match="dtype stored"):
        api.write_quantized(api.load(folder, quantize="nf4"), tmp_path / "no")
    written = api.write_quantized(
        api.load(folder, dtype="stored", quantize="nf4"), tmp_path / "packed"
    )
    assert load_base(str(written.path), dtype="stored").fingerprint().dtype == "bfloat16+nf4"
    wide = load_base(str(written.path))
    assert wide.dtype == torch.float32 and wide.fingerprint().dtype == "bfloat16+nf4"
