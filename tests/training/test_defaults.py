"""A run keeps the values it began with: other defaults of a later version change nothing in it."""

import json
from contextlib import contextmanager, nullcontext
from typing import Any, get_args

import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from tests.support.helpers import killed_after_saving
from tests.support.tiny import save_tiny
from veneer.adapters.config import METHODS, Bottleneck
from veneer.data.config import DataConfig
from veneer.files.settings import part_models
from veneer.files.strict_json import read_yaml
from veneer.objectives.config import DPO, OBJECTIVES
from veneer.training import config as run_settings
from veneer.training.config import RunConfig, StartFrom
from veneer.training.output.loggers import flat
from veneer.training.output.screen import QuietScreen
from veneer.training.run import run_training
from veneer.training.state.folder import resume_config
from veneer.training.state.origin import MAY_CHANGE, with_rate_by_width

RUNS: dict[str, dict[str, Any]] = {
    "lora": {"reduce": "exact"},
    "bottleneck": {"method": "bottleneck"},
    "prefix": {"method": {"name": "prefix", "projection": 8}},
    "full": {"method": "full"},
    "dpo": {"objective": "dpo", "data": "pairs"},
    "classify": {"objective": "classify", "data": "labels"},
}
NONE_IS_A_VALUE = {
    *("data.validation", "data.train.name", "data.validation.name", "replay.rows"),
    *("quantize", "steps", "patience"),
    *("method.frozen_tokens", "method.projection", "method.reduction"),
    *("method.svd_iterations", "method.prompt"),  # of the initial values alone
    "micro_batch",  # the whole batch; under reduce: exact a checkpoint keeps it
    "save_every",  # at each evaluation
    "keep",  # shows in no value
}
"""Settings that a run may record as None: it says what is done, in every version."""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    save_tiny(folder / "base")
    rows = {
        "rows": lambda n: {"prompt": f"number {n}", "completion": f"it is {n}"},
        "pairs": lambda n: {"prompt": f"number {n}", "chosen": "good", "rejected": f"bad {n}"},
        "labels": lambda n: {"text": f"number {n}", "label": ["odd", "even"][n % 2]},
    }
    for name, row in rows.items():
        lines = [json.dumps(row(n)) for n in range(12)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def config_of(world, out, *, data="rows", **settings):
    rows = {"train": str(world / f"{data}.jsonl"), "validation_share": 0.2}
    fields = {"base": str(world / "base"), "show_answers": False, "out": str(out)}
    return RunConfig.model_validate({**fields, "data": rows, **settings})


def another(field: FieldInfo) -> Any:
    """A value that is not the default."""
    match field.default:
        case bool():
            return not field.default
        case int() | float():
            return field.default + 1
        case default:
            choices = [value for value in get_args(field.annotation) if value != default]
            return next(iter(choices), "another")


@contextmanager
def other_defaults():
    """Within, every default is another: those of fields, and those that are computed."""
    models = [StartFrom, *METHODS.values(), *OBJECTIVES.values()]
    models += [*part_models(RunConfig).values(), RunConfig]
    with pytest.MonkeyPatch.context() as patch:
        for model in models:
            for name, field in model.model_fields.items():
                has_value = field.default not in (None, PydanticUndefined)
                if has_value and name not in ("name", *MAY_CHANGE):
                    patch.setattr(field, "default", another(field))
        rebuild(models)
        for method in METHODS.values():
            patch.setattr(method, "usual_rate", 7e-2)
            patch.setattr(method, "rate_falls", 0.3)
        for objective in OBJECTIVES.values():
            patch.setattr(objective, "share_of_rate", 0.3)
        patch.setattr(Bottleneck, "bottleneck_size", lambda self, width: self.size or 3)
        patch.setattr(Bottleneck, "effective_scaling", property(lambda self: self.scaling or 9.0))
        patch.setattr(run_settings, "EPOCHS_UNSAID", 7.0)
        patch.setattr(run_settings, "EXACT_PARTS", 1)
        patch.setattr(RunConfig, "evaluation_interval", lambda self, n: self.evaluate_every or n)
        yield
    rebuild(models)


def rebuild(models: list[type[BaseModel]]) -> None:
    for model in models:
        model.model_rebuild(force=True)


def values_of(out):
    return {file.name: file.read_bytes() for file in out.glob("*/*.safetensors")}


@pytest.mark.parametrize("case", RUNS)
def test_a_run_goes_on_with_the_defaults_it_began_with(case, world, tmp_path):
    for name in ("whole", "stopped"):
        config = config_of(world, tmp_path / name, **RUNS[case])
        with killed_after_saving(2) if name == "stopped" else nullcontext():
            run_training(config, resume=False, screen=QuietScreen())
    with other_defaults():
        assert DPO().beta == 1.1 and DataConfig(train="rows.jsonl").validation_share == 1.05
        config = resume_config(tmp_path / "stopped")
        run_training(config, resume=True, screen=QuietScreen())
    assert_complete(read_yaml(tmp_path / "whole" / "run.yaml"))
    whole, resumed = values_of(tmp_path / "whole"), values_of(tmp_path / "stopped")
    assert whole and resumed == whole


def assert_complete(recorded):
    """What it records as None is no default that a later version could choose otherwise."""
    settings = flat(recorded)
    assert {name for name, value in settings.items() if value is None} <= NONE_IS_A_VALUE
    parts = part_models(RunConfig) | {
        "method": METHODS[recorded["method"]["name"]],
        "objective": OBJECTIVES[recorded["objective"]["name"]],
    }
    assert recorded.keys() == RunConfig.model_fields.keys()
    for name, model in parts.items():
        assert recorded[name].keys() == model.model_fields.keys()


def test_a_run_that_recorded_no_rate_still_resumes(world, tmp_path):
    """Earlier versions left these settings open in run.yaml and in checkpoints."""
    open_settings = dict.fromkeys(("epochs", "learning_rate", "evaluate_every"))
    config = config_of(world, tmp_path, method={"name": "lora", "lr_ratio": 1.0})
    with pytest.MonkeyPatch.context() as patch, killed_after_saving(2):
        patch.setattr(RunConfig, "resolved", lambda self, hidden_size, rows: self)
        run_training(config, resume=False, screen=QuietScreen())
    assert open_settings.items() <= read_yaml(tmp_path / "run.yaml").items()
    resumed = with_rate_by_width(resume_config(tmp_path), hidden_size=576)
    assert resumed.learning_rate == 1.3e-3  # what those versions took
    assert run_training(resume_config(tmp_path), resume=True, screen=QuietScreen())["steps"] == 6
