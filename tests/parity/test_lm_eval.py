"""The classes of docs/guides/scores.md in lm-eval's harness, beside the harness's own way:
transformers and PEFT. Two tasks on local rows."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import veneer
from tests.formats.test_adapter import adapted, write
from tests.support.tiny import save_tiny

lm_eval = pytest.importorskip("lm_eval")
huggingface = pytest.importorskip("lm_eval.models.huggingface")
peft = pytest.importorskip("peft")

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "scores.md"
CLOSE = 1e-4
LETTERS = ["alpha", "beta", "gamma"]


def classes_of_guide():
    blocks = [part.partition("```")[0] for part in GUIDE.read_text().split("```python\n")]
    names = {}
    for block in blocks:
        if "class " in block:
            exec(block, names)
    return names["VeneerLM"], names["AdaptersLM"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("harness")
    save_tiny(folder / "base", "llama_untied")
    write(folder / "a", *adapted())
    rows = [
        {"question": f"Which is number {n}?", "choices": LETTERS, "answer": n % 3}
        for n in range(12)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def tasks(folder):
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
        "doc_to_text": "Question: {{question}}\nAnswer:",
    }
    choice = {
        "task": "choose",
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    likelihood = {
        "task": "likelihood",
        "output_type": "loglikelihood",
        "doc_to_target": " {{choices[answer]}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    }
    return [{**shared, **choice}, {**shared, **likelihood}]


def evaluated(model, folder):
    return lm_eval.simple_evaluate(
        model, tasks=tasks(folder), bootstrap_iters=0, log_samples=True, verbosity="ERROR"
    )


@pytest.mark.parametrize("name", [None, "a"])
def test_the_guides_class_gives_what_the_harness_gives(folder, name, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
    base = veneer.load(folder / "base", dtype="float32")
    if name is not None:
        base.use(base.load_adapter(folder / name))
    ours = evaluated(classes_of_guide()[0](base), folder)
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    if name is not None:
        # The harness's own `peft` cuts the vocabulary to the tokenizer's, which changes softmax.
        model = peft.PeftModel.from_pretrained(model, folder / name).eval()
    own = huggingface.HFLM(pretrained=model, tokenizer=base.tokenizer, batch_size=4)
    theirs = evaluated(own, folder)
    for task in ("choose", "likelihood"):
        assert len(ours["samples"][task]) == 12
        for mine, other in zip(ours["samples"][task], theirs["samples"][task], strict=True):
            for (log, greedy), (their_log, theirs_greedy) in zip(
                answers_of(mine), answers_of(other), strict=True
            ):
                assert log == pytest.approx(their_log, abs=CLOSE) and greedy == theirs_greedy
        for metric, value in theirs["results"][task].items():
            if isinstance(value, float):
                assert ours["results"][task][metric] == pytest.approx(value, rel=CLOSE)


def test_adapters_that_are_scored_in_one_pass_have_the_scores_of_each_alone(folder):
    base = veneer.load(folder / "base", dtype="float32")
    adapter = base.load_adapter(folder / "a")
    single, several = classes_of_guide()
    model = several(base, [adapter, None])
    requests = [(("", ""), base.tokenizer.encode(f"{n}"), [5, 6 + n]) for n in range(3)]
    for name in model.adapters:
        model.current = name
        base.use(name)
        alone = single(base)._loglikelihood_tokens(requests)
        for (log, _), (alone_log, _) in zip(
            model._loglikelihood_tokens(requests), alone, strict=True
        ):
            assert log == pytest.approx(alone_log, abs=CLOSE)
    assert len(model.scores) == 1  # the second adapter found all scores


def answers_of(sample):
    """(log-likelihood, greedy) of each request of a sample."""
    return [(float(log), str(greedy) == "True") for ((log, greedy),) in sample["resps"]]
