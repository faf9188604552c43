"""An adapter with an activation (aLoRA) acts from the last invocation tokens of a prompt on: in
training as in PEFT, and refused where it would train nothing or act on all tokens."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import veneer
from tests.support.helpers import ended_before_step, fill, make_examples
from tests.support.joint import config
from tests.support.models.routed import batch_loss
from tests.support.tiny import save_tiny, tiny_tokenizer
from veneer.adapters.activation import activation_start
from veneer.adapters.config import LoRA
from veneer.adapters.placement.acting import Acting
from veneer.cli import main
from veneer.data.activation import activation_problems
from veneer.data.batching import shared_prompt
from veneer.errors import ConfigError, DataError, RefusedError
from veneer.files.strict_json import read_json
from veneer.formats.adapter import manifest_for, read_adapter, write_adapter
from veneer.models.step import batch_of
from veneer.training.config import RunConfig
from veneer.training.output.screen import QuietScreen
from veneer.training.run import run_training

INVOCATION = [7, 9]
CLOSE = 1e-5
"""Relative to the largest value, in float32: sums in another order."""


def rows():
    """Four rows with the activation at 3, one of them once more at 9, and one row without it."""
    examples = []
    for number, example in enumerate(make_examples(5, prompt=9, longest=30)):
        ids, trained = example.ids.copy(), np.zeros(len(example.ids), dtype=bool)
        trained[12:] = True
        if number < 4:
            ids[3:5] = INVOCATION
        if number == 2:
            ids[9:11] = INVOCATION
        examples.append(replace(example, ids=ids, trained=trained))
    return examples


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    for family in ("llama_untied", "bloom"):
        save_tiny(folder / family, family)
    lines = [json.dumps({"prompt": f"number {n}", "completion": f"it is {n}"}) for n in range(12)]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "mixed.jsonl").write_text("\n".join([*lines, '{"prompt": "a", "completion": "b"}']))
    return folder


def adapted(world, family="llama_untied", **settings):
    base = veneer.load(str(world / family), dtype="float32")
    adapter = base.attach(LoRA(rank=3, alpha=5.0, activation=INVOCATION, **settings), name="a")
    fill(adapter.parameters().values(), scale=0.1)
    base.use("a")
    return base, adapter


@pytest.mark.parametrize(
    ("ids", "start"),
    [
        ([7, 9], 0),
        ([1, 7, 9, 3, 7, 9, 2], 4),
        ([7, 7, 9], 1),
        ([9, 7], 2),
        ([1, 7], 2),
        ([7], 1),
        ([], 0),
    ],
)
def test_the_last_occurrence_counts_and_a_text_without_one_has_none(ids, start):
    assert activation_start(ids, INVOCATION) == start


def test_runs_of_rows_divide_what_acts_and_leave_the_base_elsewhere(world):
    _, adapter = adapted(world)
    acts = ((adapter, 1.0),)
    found = Acting.everywhere(acts).within([slice(2, 5), slice(5, 6), slice(8, 10)], 12)
    assert [(part.rows, bool(part.adapters)) for part in found.parts] == [
        *((2, False), (4, True), (2, False), (2, True), (2, False))
    ]
    assert Acting.everywhere(acts).within([], 4).parts[0].adapters == ()


@pytest.mark.parametrize("family", ["llama_untied", "bloom"])
def test_losses_and_gradients_are_pefts(family, world, tmp_path):
    """Packed with a shared prompt and without, and padded; bloom cannot be packed."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    base, adapter = adapted(world, family)
    examples, parameters = rows(), adapter.parameters()
    total = float(sum(example.trained_tokens for example in examples))
    found = []
    for share in (True, False):
        for parameter in parameters.values():
            parameter.requires_grad_(True).grad = None
        batch = batch_of(base, examples, range(5), share_prompt=share, adapters=((adapter, 1.0),))
        loss = batch_loss(base, batch, total=total)
        loss.backward()
        found.append((loss.item(), {name: p.grad for name, p in parameters.items()}))
    write_adapter(tmp_path / "a", adapter, manifest_for(base, method="lora"), model=base.model)
    model = AutoModelForCausalLM.from_pretrained(world / family, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(model, tmp_path / "a", is_trainable=True)
    nats = 0.0
    for example in examples:
        ids = torch.from_numpy(example.ids.astype(np.int64))[None]
        predicted = np.flatnonzero(example.trained)
        logits = theirs(input_ids=ids).logits[0, predicted - 1]
        nats = nats + F.cross_entropy(logits, ids[0, predicted], reduction="sum")
        with torch.no_grad():
            plain = base.model(input_ids=ids).logits[0, predicted - 1]
        assert (plain - logits).abs().max() <= CLOSE * logits.abs().max()
    (nats / total).backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    assert len(gradients) == len(parameters)
    for loss, ours in found:
        assert loss == pytest.approx((nats / total).item(), rel=CLOSE)
        for name, gradient in ours.items():
            path, _, part = name.rpartition(".")
            their = gradients[f"base_model.model.{path}.lora_{part}.default.weight"]
            assert (gradient - their).abs().max() <= 2 * CLOSE * their.abs().max()


def test_a_prompt_is_shared_up_to_the_first_activation_that_differs():
    examples = rows()
    assert shared_prompt(examples[:2], [3, 3]) == 9
    assert shared_prompt(examples[:3], [3, 3, 9]) == 3


def test_rows_that_would_train_nothing_are_named():
    examples = rows()
    problems = activation_problems(examples, INVOCATION)
    assert [(p.code, p.lines) for p in problems] == [("D230", (5,))]
    early = examples[0].trained.copy()
    early[2] = True
    problems = activation_problems([replace(examples[0], trained=early)], INVOCATION)
    assert [p.code for p in problems] == ["D231"]
    assert activation_problems(examples, ()) == []


def run(world, out, **fields):
    method = {"name": "lora", "rank": 2, "alpha": 3, "activation": "number "}
    own = {"base": "llama_untied", "steps": 4, "batch": 2, "method": method}
    settings = config(world, out, **{**own, **fields})
    return run_training(settings, resume=False, screen=QuietScreen())


def test_a_run_trains_resumes_and_another_goes_on(world, tmp_path):
    run(world, tmp_path / "a")
    with ended_before_step(2):
        run(world, tmp_path / "again")
    assert main.main(["train", "--resume", str(tmp_path / "again"), "--quiet"]) == 0
    folder = tmp_path / "a" / "adapter"
    ids = tiny_tokenizer()("number ", add_special_tokens=False)["input_ids"]
    tensors = [
        (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes()
        for name in ("a", "again")
    ]
    assert tensors[0] == tensors[1]
    assert read_json(folder / "adapter_config.json")["alora_invocation_tokens"] == ids
    assert read_json(folder / "veneer.json")["recipe"]["method"]["activation"] == "number "
    parent = {"from_adapter": str(folder), "method": {"name": "lora"}}
    run(world, tmp_path / "b", **parent, steps=1)
    assert read_adapter(tmp_path / "b" / "adapter").config.activation == ids
    half = [{"adapter": str(folder), "weight": 0.5}]
    with pytest.raises(RefusedError, match="cannot be combined"):
        run(world, tmp_path / "c", **{**parent, "from_adapter": half})


def test_a_run_refuses_rows_without_it_and_data_check_names_them(world, tmp_path, capsys):
    mixed, base = str(world / "mixed.jsonl"), str(world / "llama_untied")
    with pytest.raises(DataError, match="does not act on all trained tokens") as fault:
        run(world, tmp_path / "a", rows="mixed")
    assert "D230" in str(fault.value)
    assert main.main(["data", "check", mixed, "--base", base, "--activation", "number "]) == 4
    assert "D230" in capsys.readouterr().out
    assert main.main(["data", "check", mixed, "--base", base]) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": {"bias": "all"}}, "activation does not go with trained biases"),
        ({"method": {"train_modules": ["norm"]}}, "modules trained in full"),
        ({"method": {"init": "loftq"}}, "loftq corrects the base"),
        ({"method": {"name": "dora"}}, "activation"),
        ({"replay": {"rows": "general"}}, "replay rows do not hold the activation"),
    ],
    ids=str,
)
def test_settings_that_act_on_all_tokens_are_refused(settings, message, world):
    method = {"name": "lora", "activation": "number ", **settings.pop("method", {})}
    with pytest.raises(ConfigError) as fault:
        RunConfig.of({"base": "b", "data": "d", "out": "o", "method": method, **settings})
    assert message in str(fault.value)


@pytest.mark.parametrize("targets", [["lm_head", "q_proj"], ["embed_tokens"]], ids=str)
def test_targets_outside_the_decoder_are_refused(targets, world):
    base = veneer.load(str(world / "llama_untied"))
    with pytest.raises(ConfigError, match="linear layers inside the model"):
        base.attach(LoRA(activation=INVOCATION, targets=targets), name="a")
    with pytest.raises(ConfigError, match="would act on all tokens"):
        base.attach(LoRA(activation=INVOCATION), name="a", new_tokens=["<new>"])
    assert not base.attachments


@pytest.mark.parametrize("field", ["modules_to_save", "use_dora", "bias"])
def test_a_file_with_values_on_all_tokens_is_refused(field, world, tmp_path):
    base, adapter = adapted(world)
    write_adapter(tmp_path / "a", adapter, manifest_for(base, method="lora"), model=base.model)
    (tmp_path / "a" / "veneer.json").unlink()
    path = tmp_path / "a" / "adapter_config.json"
    value = {"modules_to_save": ["norm"], "use_dora": True, "bias": "all"}[field]
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(RefusedError, match="Veneer does not support") as fault:
        read_adapter(tmp_path / "a")
    assert f"{field} beside alora_invocation_tokens" in str(fault.value)


def test_a_forward_that_gets_no_whole_text_is_refused(world):
    base, _ = adapted(world)
    ids = torch.tensor([[1, 7, 9, 4]])
    with torch.no_grad():
        first = base.model(input_ids=ids, use_cache=True)
        with pytest.raises(RefusedError, match="acts from its activation on"):
            base.model(input_ids=ids[:, -1:], past_key_values=first.past_key_values)


def test_other_programs_get_the_activation_or_the_adapter_is_refused(world, tmp_path):
    import gguf

    from veneer.merge.export.export_run import export_adapter, lint_adapter

    base, adapter = adapted(world)
    folder, source = Path(tmp_path / "a"), str(world / "llama_untied")
    write_adapter(folder, adapter, manifest_for(base, method="lora"), model=base.model)
    export_adapter(folder, to="llamacpp", base=source, out=tmp_path / "a.gguf")
    field = gguf.GGUFReader(tmp_path / "a.gguf").fields["adapter.alora.invocation_tokens"]
    assert field.contents() == INVOCATION and field.types[1] is gguf.GGUFValueType.UINT32
    export_adapter(folder, to="peft", base=source, out=tmp_path / "peft")
    assert (tmp_path / "peft" / "adapter_config.json").read_text() == (
        folder / "adapter_config.json"
    ).read_text()
    for program in ("vllm", "transformers"):
        with pytest.raises(RefusedError) as fault:
            export_adapter(folder, to=program, base=source, out=tmp_path / program)
        assert "an activation" in str(fault.value)
        (finding,) = lint_adapter(folder, program, base=source)
        assert finding.silent == (program == "transformers") and "an activation" in finding.what
    assert lint_adapter(folder, "peft", base=source) == []


def test_it_is_never_merged_or_combined(world, tmp_path):
    from veneer.merge.combine.combine import Recipe
    from veneer.merge.combine.combine_run import combine_adapters
    from veneer.merge.export.export_run import export_merged_gguf

    base, adapter = adapted(world)
    folder, source = tmp_path / "a", str(world / "llama_untied")
    write_adapter(folder, adapter, manifest_for(base, method="lora"), model=base.model)
    base.use(None)
    for merge in (
        lambda: base.merge("a"),
        lambda: export_merged_gguf([(folder, 1.0)], base=source, out=tmp_path / "m.gguf"),
    ):
        with pytest.raises(RefusedError, match="cannot be merged") as fault:
            merge()
        assert "an activation" in str(fault.value)
    with pytest.raises(RefusedError, match="cannot be combined"):
        combine_adapters([(folder, 0.5)], Recipe("linear"), base=source, out=tmp_path / "half")


def test_a_trainer_refuses_rows_without_it(world):
    base = veneer.load(str(world / "llama_untied"))
    with base.trainer(LoRA(rank=2, activation="number "), name="b") as trainer:
        assert len(trainer.encode(world / "rows.jsonl")) == 12
        with pytest.raises(DataError, match="does not act on all trained tokens"):
            trainer.encode(world / "mixed.jsonl")
