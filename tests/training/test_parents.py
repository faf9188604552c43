"""An adapter goes on: what it has learnt is taken over to the bit, a larger rank adds to it, its
lineage is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import veneer
from tests.support.helpers import ended_before_step, fill
from tests.support.tiny import save_tiny
from veneer.adapters.config import Bottleneck, DoRA, LoRA, Prefix
from veneer.cli import main
from veneer.errors import ConfigError, RefusedError, VeneerError
from veneer.files.strict_json import read_json
from veneer.formats.adapter import manifest_for, read_adapter, write_adapter
from veneer.formats.loading import load_adapter
from veneer.models.load import load_base
from veneer.training.config import RunConfig
from veneer.training.output.screen import QuietScreen
from veneer.training.run import run_training
from veneer.training.state.parents import begin_adapter, with_parent_settings

METHODS = {
    "lora": LoRA(rank=3, alpha=5.0, dropout=0.1),
    "lora of a few": LoRA(
        rank=2, alpha=4.0, targets=["q_proj", "down_proj"], rank_pattern={"down_proj": 3}
    ),
    "lora with more": LoRA(
        rank=2, alpha=3.0, lora_bias=False, bias="lora_only", train_modules=["lm_head"]
    ),
    "pissa": LoRA(rank=2, alpha=3.0, init="pissa"),
    "dora": DoRA(rank=2, alpha=6.0),
    "bottleneck": Bottleneck(size=3),
    "prefix": Prefix(tokens=4, start="random"),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    save_tiny(folder / "base", "llama_untied")
    rows = [{"prompt": f"number {n}", "completion": f"it is {n}"} for n in range(12)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def save_parent(world: Path, place: Path, config: Any, seed: int = 0) -> Path:
    base = veneer.load(str(world / "base"))
    adapter = base.attach(config, name="a", seed=seed)
    with torch.no_grad():
        for parameter in adapter.parameters().values():
            parameter.add_(
                torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)) * 0.1
            )
    write_adapter(place, adapter, manifest_for(base, method=config.name), model=base.model)
    return place


def run_of(world: Path, out: Path, **fields: Any) -> RunConfig:
    own = {
        "base": str(world / "base"),
        "data": str(world / "rows.jsonl"),
        "out": str(out),
        "steps": 2,
        "batch": 2,
    }
    return RunConfig.of({**own, **fields})


def begin_run(world: Path, **fields: Any) -> tuple[Any, RunConfig, Any]:
    """As a run begins; a plan knows the shapes of what would train, without a base."""
    base, asked = load_base(str(world / "base")), run_of(world, Path("out"), **fields)
    config, found = begin_adapter(base, asked, [], resumes=False)
    planned = with_parent_settings(asked).method
    assert planned.update_rank == config.method.update_rank
    if len(asked.from_adapter) == 1:
        named = {"targets", "rank_pattern", "alpha_pattern"}  # in short, or by whole paths
        assert planned.model_dump(exclude=named) == config.method.model_dump(exclude=named)
    return base, config, found


def logits(base: Any) -> torch.Tensor:
    ids = torch.arange(20)[None] * 7 % 250
    with torch.no_grad():
        return base.model(ids, use_cache=False).logits


@pytest.mark.parametrize("config", METHODS.values(), ids=METHODS)
def test_no_steps_change_no_bit(world: Path, tmp_path: Path, config: Any) -> None:
    parent = save_parent(world, tmp_path / "parent", config)
    base, run, found = begin_run(world, from_adapter=str(parent))
    assert list(base.attachments) == ["trained"]
    write_adapter(
        tmp_path / "child",
        found.attachment,
        manifest_for(base, method=config.name),
        model=base.model,
    )
    before, after = (
        load_file(tmp_path / n / "adapter_model.safetensors") for n in ("parent", "child")
    )
    assert before.keys() == after.keys() and all(
        torch.equal(before[name], after[name]) for name in before
    )
    assert read_adapter(tmp_path / "child").content_hash == read_adapter(parent).content_hash
    assert run.from_adapter[0].content == read_adapter(parent).content_hash
    assert all(p.requires_grad for p in found.attachment.parameters().values())


@pytest.mark.parametrize("config", [METHODS["lora"], METHODS["dora"]], ids=["lora", "dora"])
@pytest.mark.parametrize(
    "method", [{"rank": 8}, {"rank": 5, "alpha": 9.0}, {"rank": 8, "rslora": True}]
)
def test_a_larger_rank_computes_the_same_and_has_more_to_train(
    world: Path, tmp_path: Path, config: Any, method: dict[str, Any]
) -> None:
    parent = save_parent(world, tmp_path / "parent", config)
    before = load_base(str(world / "base"))
    load_adapter(before, parent, name="a")
    before.routing.active = (("a", 1.0),)
    base, run, found = begin_run(
        world, from_adapter=str(parent), method={"name": config.name, **method}
    )
    assert run.method.update_rank == method["rank"]
    assert torch.allclose(logits(base), logits(before), atol=1e-5, rtol=1e-5)
    assert found.attachment.num_parameters() > before.attachments["a"].num_parameters()


def test_other_settings_of_the_method_are_taken_and_the_rest_is_the_adapters_own(
    world: Path, tmp_path: Path
) -> None:
    parent = save_parent(world, tmp_path / "parent", METHODS["lora"])
    _, run, _ = begin_run(
        world, from_adapter=str(parent), method={"name": "lora", "dropout": 0.0, "lr_ratio": 4.0}
    )
    found = run.method.model_dump(include={"rank", "alpha", "dropout", "lr_ratio"})
    assert found == {"rank": 3, "alpha": 5.0, "dropout": 0.0, "lr_ratio": 4.0}


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ({"name": "dora"}, "it is of method lora"),
        ({"name": "lora", "rank": 2}, "it has rank 3"),
        ({"name": "lora", "init": "pissa"}, "init pissa"),
        ({"name": "lora", "targets": ["q_proj"]}, "not trained with these settings"),
    ],
)
def test_settings_with_which_it_cannot_go_on_are_refused(
    world: Path, tmp_path: Path, method: dict[str, Any], said: str
) -> None:
    parent = save_parent(world, tmp_path / "parent", METHODS["lora"])
    with pytest.raises(VeneerError) as caught:
        begin_run(world, from_adapter=str(parent), method=method)
    assert said in str(caught.value)
    with pytest.raises(ConfigError, match="from_adapter"):
        run_of(world, tmp_path, from_adapter=str(parent), method="full")


@pytest.mark.parametrize(
    "trained", [[], ["norm", "o_proj"]], ids=["updates", "and modules trained in full"]
)
def test_the_weighted_sum_of_several_is_where_it_starts(
    world: Path, tmp_path: Path, trained: list[str]
) -> None:
    targets = ["q_proj", "down_proj"] if trained else "all-linear"
    first = save_parent(
        world,
        tmp_path / "a",
        LoRA(rank=2, alpha=3.0, targets=targets, train_modules=trained),
        seed=1,
    )
    second = save_parent(
        world,
        tmp_path / "b",
        LoRA(rank=3, alpha=5.0, targets=targets, train_modules=trained),
        seed=2,
    )
    before = load_base(str(world / "base"))
    for name, folder in (("a", first), ("b", second)):
        load_adapter(before, folder, name=name)
    before.routing.active = (("a", 0.5), ("b", -0.25))
    parents = [{"adapter": str(first), "weight": 0.5}, {"adapter": str(second), "weight": -0.25}]
    base, run, _ = begin_run(world, from_adapter=parents)
    assert torch.allclose(logits(base), logits(before), atol=1e-4, rtol=1e-4)
    assert run.method.update_rank == 5
    base, run, _ = begin_run(world, from_adapter=parents, method={"name": "lora", "rank": 5})
    assert torch.allclose(logits(base), logits(before), atol=1e-4, rtol=1e-4)


def test_a_run_that_goes_on_is_planned(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parent = save_parent(world, tmp_path / "parent", METHODS["lora"])
    _, _, found = begin_run(world, from_adapter=str(parent), method={"name": "lora", "rank": 8})
    run = run_of(
        world,
        tmp_path / "run",
        from_adapter=str(parent),
        method={"name": "lora", "rank": 8},
        steps=4,
    )
    (tmp_path / "run.yaml").write_text(json.dumps(run.model_dump(mode="json", exclude_unset=True)))
    assert main.main(["plan", str(tmp_path / "run.yaml"), "--json"]) == 0
    (planned,) = json.loads(capsys.readouterr().out)["plans"]
    assert planned["trainable_parameters"] == found.attachment.num_parameters()


def test_an_adapter_of_pefts_goes_on_too(world: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(world / "base")
    settings = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    tuned = peft.get_peft_model(model, settings)
    fill([p for n, p in tuned.named_parameters() if "lora_" in n])
    tuned.save_pretrained(tmp_path / "peft")
    base, run, found = begin_run(world, from_adapter=str(tmp_path / "peft"))
    ids = torch.arange(20)[None] * 7 % 250
    with torch.no_grad():
        assert torch.allclose(logits(base), tuned(ids).logits, atol=1e-4, rtol=1e-4)
    assert (run.method.update_rank, len(found.attachment.layers)) == (4, 4)


def test_a_second_stage_keeps_its_lineage_and_resumes_without_its_parent(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = save_parent(world, tmp_path / "parent", METHODS["lora"])
    content = read_adapter(parent).content_hash

    class Told(QuietScreen):
        def start(self, info: Any) -> None:
            said.extend(info["paths"])

    said: list[str] = []
    config = run_of(world, tmp_path / "run", from_adapter=str(parent), steps=4)
    run_training(config, resume=False, screen=Told())
    manifest = read_json(tmp_path / "run" / "adapter" / "veneer.json")
    assert (manifest["parent"], manifest["parents"]) == (content, [])
    assert any("continues" in line and content[:12] in line for line in said)

    with ended_before_step(2):
        run_training(
            run_of(world, tmp_path / "b", from_adapter=str(parent), steps=4, evaluate_every=1),
            resume=False,
            screen=QuietScreen(),
        )
    (parent / "adapter_model.safetensors").unlink()
    assert main.main(["train", "--resume", str(tmp_path / "b"), "--quiet"]) == 0
    assert read_json(tmp_path / "b" / "adapter" / "veneer.json")["parent"] == content


def test_the_command_takes_the_base_from_the_adapter(world: Path, tmp_path: Path) -> None:
    parent = save_parent(world, tmp_path / "parent", METHODS["lora"])
    command = [
        "train",
        "--from",
        str(parent),
        "--data",
        str(world / "rows.jsonl"),
        "--out",
        str(tmp_path / "run"),
    ]
    assert main.main([*command, "--steps", "1", "--quiet"]) == 0
    assert main.main(["train", "--from", str(tmp_path / "none"), *command[3:]]) == 2
    parents = json.dumps([{"adapter": str(parent), "weight": 0.5}, str(parent)])
    command = ["train", "--from", parents, *command[3:-1], str(tmp_path / "sum")]
    assert main.main([*command, "--steps", "1", "--quiet"]) == 0
    manifest = read_json(tmp_path / "sum" / "adapter" / "veneer.json")
    assert [one["weight"] for one in manifest["parents"]] == [0.5, 1.0]
    assert main.main([*command[:2], "[]", *command[3:]]) == 2


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("prefix", "a trained prefix"),
        ("bottleneck", "bottleneck layers"),
        ("dora", "DoRA magnitudes"),
        ("biases", "trained biases"),
    ],
)
def test_a_sum_that_a_run_refuses_is_not_planned(
    world: Path, tmp_path: Path, name: str, said: str
) -> None:
    parent = save_parent(
        world,
        tmp_path / "parent",
        METHODS.get(name) or METHODS["lora"].model_copy(update={"bias": "all"}),
    )
    asked = run_of(world, tmp_path / "out", from_adapter=[{"adapter": str(parent), "weight": 0.5}])
    for begins in (
        lambda: with_parent_settings(asked),
        lambda: begin_adapter(load_base(asked.base), asked, [], resumes=False),
    ):
        with pytest.raises(RefusedError, match=said):
            begins()
