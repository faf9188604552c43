"""Modules trained in full beside the update, norms above all: a whole run, resumed, loaded, and
read by PEFT."""

import json

import pytest
import torch

from tests.support.helpers import killed_after_saving
from tests.support.tiny import save_tiny
from veneer import api
from veneer.formats.adapter import read_adapter
from veneer.training.config import RunConfig
from veneer.training.output.screen import QuietScreen

IDS = torch.tensor([[5, 200, 17, 99, 3, 64, 230]])
TRAINED = ["norm", "input_layernorm", "lm_head"]


@pytest.mark.parametrize(
    ("family", "dtype"), [("llama_untied", torch.bfloat16), ("mixtral", torch.float32)], ids=str
)
def test_a_run_that_trains_norms_resumes_to_the_byte_and_its_adapter_answers_as_the_run_did(
    family, dtype, tmp_path
):
    base = save_tiny(tmp_path / "base", family, dtype)
    rows = [{"prompt": f"Number {n} is followed by ", "completion": str(n + 1)} for n in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def config(out):
        return RunConfig(
            base=str(base),
            data={"train": str(tmp_path / "rows.jsonl"), "validation_share": 0.2},
            out=str(tmp_path / out),
            steps=4,
            batch=4,
            evaluate_every=2,
            learning_rate=1e-2,
            show_answers=False,
            method={"name": "lora", "rank": 2, "targets": ["q_proj"], "train_modules": TRAINED},
        )

    whole = api.train_run(config("whole"), resume=False, screen=QuietScreen())
    with killed_after_saving(2):
        api.train_run(config("stopped"), resume=False, screen=QuietScreen())
    resumed = api.train_run(
        api.resume_config(tmp_path / "stopped"), resume=True, screen=QuietScreen()
    )
    assert resumed["adapter_sha256"] == whole["adapter_sha256"]
    stored = read_adapter(tmp_path / "whole" / "adapter")
    loaded = api.load(str(base))
    names = {
        "model.norm",
        "model.layers.0.input_layernorm",
        "model.layers.1.input_layernorm",
        "lm_head",
    }
    assert set(stored.config.train_modules) == names
    moved = [
        n
        for n in names
        if not torch.equal(stored.tensors[f"{n}.weight"], loaded.model.get_parameter(f"{n}.weight"))
    ]
    assert set(moved) == names
    loaded.use(loaded.load_adapter(tmp_path / "whole" / "adapter"))
    with torch.no_grad():
        ours = loaded.model(input_ids=IDS).logits
    if dtype == torch.float32:
        peft = pytest.importorskip("peft")
        theirs = peft.PeftModel.from_pretrained(
            api.load(str(base)).model, str(tmp_path / "whole" / "adapter")
        )
        with torch.no_grad():
            torch.testing.assert_close(ours, theirs(input_ids=IDS).logits, rtol=1e-4, atol=1e-4)
