"""Full fine-tuning with a score head: the model's folder, transformers' reading of it, resuming."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

import veneer
from tests.support.helpers import killed_after_saving
from tests.support.joint import config
from tests.support.tiny import save_tiny, tiny_tokenizer
from veneer.api import write_quantized
from veneer.errors import CorruptFileError, RefusedError
from veneer.training.output.screen import QuietScreen
from veneer.training.run import run_training
from veneer.training.state.folder import resume_config

TEXTS = ["a card", "where is my money", "x"]
LABELS = ["card", "money", "other"]
SETTINGS = {"objective": "classify", "method": "full"}
FILES = {"train": "label", "validation": "held_out"}


def train(world, out, **settings):
    data = {name: str(world / f"{file}.jsonl") for name, file in FILES.items()}
    settings = {**SETTINGS, "data": data, **settings}
    run_training(config(world, out, **settings), resume=False, screen=QuietScreen())
    return out


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base with a head that is not tied, one that transformers cannot classify with, and rows."""
    folder = tmp_path_factory.mktemp("full")
    save_tiny(folder / "base", "llama_untied")
    save_tiny(folder / "cohere", "cohere")
    rows = [
        {"text": f"{'ab' * (number % 5 + 1)} {number}", "label": LABELS[number % 3]}
        for number in range(16)
    ]
    for name, part in (("label", rows[6:]), ("held_out", rows[:6])):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)) + "\n")
    return folder


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    return train(world, tmp_path_factory.mktemp("run") / "full")


def test_every_weight_and_the_head_train_and_are_read_back(run, world):
    """The held-out loss of the run is that of the folder that it wrote."""
    summary = json.loads((run / "summary.json").read_text())
    before = load_file(world / "base" / "model.safetensors")
    after = load_file(run / "model" / "model.safetensors")
    assert {*after} - {*before} == {"score.weight"}
    unchanged = [name for name in before if torch.equal(before[name], after[name])]
    assert unchanged == ["lm_head.weight"]
    base = veneer.load(str(run / "model"))
    result = veneer.evaluate(base, str(world / "held_out.jsonl"))
    assert result["labels"]["names"] == LABELS and result["rows"] == 6
    assert result["loss"] == pytest.approx(summary["validation_loss"], abs=1e-6)
    answers = veneer.classify(base, TEXTS)
    assert [set(answer) for answer in answers] == [set(LABELS)] * 3
    with pytest.raises(RefusedError, match="write no answers"):
        base.generate("a", max_new_tokens=2)
    base.use(None)
    with base.using("score_head"):
        assert veneer.classify(base, TEXTS) == answers
    assert base.generate("a", max_new_tokens=2) is not None


def test_transformers_classifies_with_the_folder(run):
    tokenizer = tiny_tokenizer()
    model, loaded = AutoModelForSequenceClassification.from_pretrained(
        run / "model", dtype=torch.float32, output_loading_info=True
    )
    assert not loaded["missing_keys"] and not loaded["mismatched_keys"]
    assert list(model.config.id2label.values()) == LABELS
    model.config.pad_token_id = tokenizer.pad_token_id
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    ours = veneer.classify(veneer.load(str(run / "model")), TEXTS)
    for row, answer in zip(logits.softmax(dim=1).tolist(), ours, strict=True):
        assert answer == pytest.approx(dict(zip(LABELS, row, strict=True)), abs=1e-5)


def test_a_run_resumes_bit_for_bit(run, world, tmp_path):
    with killed_after_saving(4):
        train(world, tmp_path / "full")
    run_training(resume_config(str(tmp_path / "full")), resume=True, screen=QuietScreen())
    own, other = (
        load_file(folder / "model" / "model.safetensors") for folder in (tmp_path / "full", run)
    )
    assert own.keys() == other.keys()
    assert all(torch.equal(own[name], other[name]) for name in other)


def test_a_head_that_does_not_fit_is_refused(run, world, tmp_path):
    shutil.copytree(run / "model", tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "score.weight": torch.ones(2, 32)}, path, metadata={"format": "pt"})
    with pytest.raises(CorruptFileError, match=r"of shape \(2, 32\), and score_head\.json"):
        veneer.load(str(tmp_path / "model"))
    with pytest.raises(RefusedError, match="no class that classifies"):
        train(world, tmp_path / "run", base="cohere")


def test_a_base_in_four_bits_keeps_its_head(run, tmp_path):
    base = veneer.load(str(run / "model"), quantize="nf4")
    write_quantized(base, tmp_path / "packed")
    packed = veneer.load(str(tmp_path / "packed"))
    assert packed.fingerprint() == base.fingerprint()
    assert veneer.classify(packed, TEXTS) == veneer.classify(base, TEXTS)
    base.use(None)
    base.detach("score_head")
    write_quantized(base, tmp_path / "without")
    answer = veneer.load(str(tmp_path / "without")).generate("a", max_new_tokens=2)
    assert answer is not None
