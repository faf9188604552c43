"""Adapters with a score head: losses, files that PEFT and transformers read, and refusals."""

import json
import random
import shutil
from decimal import Decimal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification

import veneer
from tests.support.helpers import killed_after_saving
from tests.support.joint import FLOAT32, assert_same_run, config, together
from tests.support.tiny import save_tiny, tiny_tokenizer
from veneer.adapters.labels import HeadSettings
from veneer.data.config import DataConfig
from veneer.data.encoder import RowRules
from veneer.data.examples import Capacity, Example, Row, RowRef
from veneer.data.files.labels import label_name, with_labels
from veneer.data.files.sources import scan_rows
from veneer.data.load import load_data
from veneer.errors import (
    AdapterMismatchError,
    ConfigError,
    CorruptFileError,
    DataError,
    RefusedError,
)
from veneer.formats.adapter import read_adapter
from veneer.merge.export.export_run import export_adapter
from veneer.models.predictions import ScorePredictions
from veneer.objectives.config import Classify
from veneer.objectives.labels import balanced, resolved
from veneer.objectives.objective import AnswerBatch
from veneer.objectives.registry import make_objective
from veneer.training.config import RunConfig
from veneer.training.output.records import read_records
from veneer.training.output.screen import QuietScreen
from veneer.training.run import run_training
from veneer.training.state.folder import resume_config
from veneer.training.teachers.teacher import attach_teacher

TEXTS = ["a card", "where is my money", "x", "the app does not open at all today"]
LABELS = ["card", "money", "other"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base and rows with one label, several, a number, and a relevance."""
    folder = tmp_path_factory.mktemp("labels")
    save_tiny(folder / "base")
    chance = random.Random(4)
    rows = {"label": [], "labels": [], "regression": [], "rerank": [], "rows": []}
    for number in range(16):
        text = f"{'ab' * chance.randrange(1, 8)} {number}"
        label = LABELS[number % 3]
        rows["label"].append({"text": text, "label": label})
        rows["labels"].append({"text": text, "label": LABELS[: number % 4]})
        rows["regression"].append({"text": text, "label": number / 16})
        rows["rerank"].append({"query": "ab", "document": text, "label": number % 2})
        rows["rows"].append({"prompt": text, "completion": label})
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return folder


def settings_of(kind, **settings):
    return {"objective": {"name": "classify", "kind": kind}, "rows": kind, **settings}


def train(world, out, **settings):
    run_training(config(world, out, **settings), resume=False, screen=QuietScreen())
    return out / "adapter"


@pytest.fixture(scope="module")
def adapters(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("adapters")
    return {
        kind: train(world, out / kind, **settings_of(kind))
        for kind in ("label", "labels", "regression", "rerank")
    }


@pytest.fixture(scope="module")
def base(world):
    return veneer.load(str(world / "base"))


def example(label):
    ids, trained = np.arange(4, dtype=np.int32), np.array([False, False, False, True])
    return Example(ids, trained, RowRef("rows", 1), 1, label=label)


OF_PYTORCH = {
    "label": (
        Classify(labels=LABELS, class_weights={"money": 3.0}),
        [(1.0,), (0.0,), (2.0,)],
        lambda z, y: F.cross_entropy(
            z, y[:, 0].long(), weight=torch.tensor([1.0, 3.0, 1.0]).double()
        ),
    ),
    "labels": (
        Classify(kind="labels", labels=LABELS, class_weights={"card": 2.0}),
        [(1.0, 0.0, 1.0), (0.0, 0.0, 0.0), (0.0, 1.0, 0.0)],
        lambda z, y: F.binary_cross_entropy_with_logits(
            z, y, pos_weight=torch.tensor([2.0, 1.0, 1.0])
        ),
    ),
    "regression": (Classify(kind="regression"), [(0.5,), (-2.0,), (4.0,)], F.mse_loss),
    "rerank": (
        Classify(kind="rerank"),
        [(1.0,), (0.0,), (0.3,)],
        F.binary_cross_entropy_with_logits,
    ),
}


@pytest.mark.parametrize("kind", OF_PYTORCH)
def test_the_loss_is_that_of_pytorch_however_a_step_is_divided(kind):
    settings, labels, loss_of = OF_PYTORCH[kind]
    objective, examples = make_objective(settings), [example(label) for label in labels]
    width = settings.head.num_outputs
    z = torch.randn(3, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours, theirs = z.clone().requires_grad_(), z.clone().requires_grad_()
    total = float(objective.counts(examples).sum())

    class Outputs:
        def __init__(self, part):
            self.part = part

        def outputs(self):
            return ours[self.part]

    for part in (slice(0, 2), slice(2, 3)):
        answers = AnswerBatch.without_reference(examples[part])
        objective.loss(Outputs(part), answers, total).loss.backward()
    expected = loss_of(theirs, torch.tensor(labels, dtype=torch.float64))
    expected.backward()
    answers = AnswerBatch.without_reference(examples)
    losses = objective.answer_losses(z.numpy().ravel(), answers)
    assert losses.sum() / total == pytest.approx(expected.item(), rel=1e-6)
    assert torch.allclose(ours.grad, theirs.grad, rtol=1e-6)


def test_balanced_weights_make_labels_count_the_same():
    settings = Classify(balanced=True)
    examples = [example((float(n),)) for n in (0, 0, 0, 1)]
    chosen = resolved(settings, Classify(labels=["a", "b"]).head)
    assert chosen.labels == ["a", "b"] and chosen.class_weights == {}
    assert balanced(chosen, examples).class_weights == pytest.approx({"a": 4 / 6, "b": 2.0})
    own = chosen.model_copy(update={"class_weights": {"b": 5.0}})
    assert balanced(own, examples).class_weights == pytest.approx({"a": 4 / 6, "b": 5.0})
    with pytest.raises(ConfigError, match="weights and thresholds of labels"):
        resolved(Classify(class_weights={"c": 1}), chosen.head)
    with pytest.raises(ConfigError, match="kind label has no thresholds"):
        resolved(Classify(thresholds={"a": 0.2}), chosen.head)


def of_transformers(world, folder, texts, side):
    """Outputs of transformers with PEFT for padded texts."""
    peft = pytest.importorskip("peft")
    weight = load_file(folder / "adapter_model.safetensors")["base_model.model.score.weight"]
    tokenizer = tiny_tokenizer()
    model = AutoModelForSequenceClassification.from_pretrained(
        world / "base", num_labels=len(weight), dtype=torch.float32
    )
    model.config.pad_token_id = tokenizer.pad_token_id
    model = peft.PeftModel.from_pretrained(model, folder).eval()
    batch = tokenizer(texts, padding=True, padding_side=side, return_tensors="pt")
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def outputs_of(base, folder, texts):
    name = base.load_adapter(folder, name="own")
    try:
        base.use(name)
        from veneer.evaluation.classify import text_examples
        from veneer.models.score_heads import part_outputs

        examples = text_examples(base, texts)
        parts = [list(range(len(texts)))]
        return torch.tensor(part_outputs(base, examples, parts)[0])
    finally:
        base.use(None)
        base.detach(name)


@pytest.mark.parametrize("side", ["right", "left"])
def test_peft_and_transformers_compute_the_same_on_either_side_of_padding(
    side, world, adapters, base
):
    """The head reads the last real token, not the last place of a padded row."""
    theirs = of_transformers(world, adapters["label"], TEXTS, side)
    ours = outputs_of(base, adapters["label"], TEXTS)
    assert theirs.abs().max() > 0.1
    assert torch.allclose(ours.float(), theirs, rtol=1e-5, atol=1e-5)


def test_the_head_is_saved_as_peft_saves_it(adapters):
    stored = json.loads((adapters["label"] / "adapter_config.json").read_text())
    assert stored["task_type"] == "SEQ_CLS" and stored["modules_to_save"] == ["score"]
    manifest = json.loads((adapters["label"] / "veneer.json").read_text())
    assert manifest["head"] == {"kind": "label", "labels": LABELS, "thresholds": {}}
    tensors = load_file(adapters["labels"] / "adapter_model.safetensors")
    weight = tensors["base_model.model.score.weight"]
    assert weight.shape == (3, 32) and weight.abs().max() > 0


def test_an_adapter_of_peft_is_read_with_its_head(world, tmp_path, base):
    peft = pytest.importorskip("peft")
    model = AutoModelForSequenceClassification.from_pretrained(world / "base", num_labels=4)
    settings = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj"], task_type="SEQ_CLS")
    model = peft.get_peft_model(model, settings)
    generator = torch.Generator().manual_seed(2)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    model.save_pretrained(tmp_path)
    theirs = of_transformers(world, tmp_path, TEXTS, "right")
    ours = outputs_of(base, tmp_path, TEXTS)
    assert torch.allclose(ours.float(), theirs, rtol=1e-5, atol=1e-5)
    name = base.load_adapter(tmp_path)
    answer = veneer.classify(base, "a card", adapter=name)
    assert set(answer) == {f"LABEL_{number}" for number in range(4)}
    base.detach(name)


def changed(folder, out, *, tensors=lambda tensors: tensors, **fields):
    """A copy of an adapter without veneer.json, with other tensors and settings."""
    shutil.copytree(folder, out)
    (out / "veneer.json").unlink()
    path = out / "adapter_model.safetensors"
    save_file(tensors(load_file(path)), path, metadata={"format": "pt"})
    path = out / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return out


def test_a_missing_or_misplaced_head_is_refused(adapters, tmp_path, base):
    own, name = adapters["label"], "base_model.model.score.weight"

    def drop(tensors):
        del tensors[name]
        return tensors

    lost = changed(own, tmp_path / "lost", tensors=drop)
    with pytest.raises(CorruptFileError, match="classifier without a head"):
        base.load_adapter(lost)
    causal = changed(own, tmp_path / "causal", task_type="CAUSAL_LM", modules_to_save=None)
    with pytest.raises(AdapterMismatchError, match=r"score\.weight"):
        base.load_adapter(causal)
    narrow = changed(
        own, tmp_path / "narrow", tensors=lambda t: {**t, name: t[name][:, :5].contiguous()}
    )
    with pytest.raises(AdapterMismatchError, match=r"score\.weight   adapter \(3, 5\)"):
        base.load_adapter(narrow)
    wide = tmp_path / "wide"
    shutil.copytree(own, wide)
    stored = json.loads((wide / "veneer.json").read_text())
    stored["head"]["labels"] = ["a", "b"]
    (wide / "veneer.json").write_text(json.dumps(stored))
    with pytest.raises(CorruptFileError, match=r"3 outputs, veneer\.json names 2"):
        base.load_adapter(wide)
    other = changed(own, tmp_path / "other", task_type="TOKEN_CLS")
    with pytest.raises(RefusedError, match="TOKEN_CLS"):
        base.load_adapter(other)


def test_probabilities_follow_the_kind_of_the_head(adapters, base):
    outputs = {kind: outputs_of(base, folder, TEXTS) for kind, folder in adapters.items()}
    for kind, folder in adapters.items():
        base.load_adapter(folder, name=kind)
    answers = veneer.classify(base, TEXTS, adapter="label")
    for answer, row in zip(answers, outputs["label"].softmax(dim=1).tolist(), strict=True):
        assert answer == pytest.approx(dict(zip(LABELS, row, strict=True)), abs=1e-5)
        assert list(answer.values()) == sorted(answer.values(), reverse=True)
    one = veneer.classify(base, TEXTS[1], adapter="labels")
    expected = outputs["labels"].sigmoid()[1].tolist()
    assert one == pytest.approx(dict(zip(LABELS, expected, strict=True)), abs=1e-5)
    number = veneer.classify(base, TEXTS[1], adapter="regression")
    assert number == pytest.approx(outputs["regression"][1].item(), abs=1e-5)
    ranking = veneer.rerank(base, "ab", TEXTS, adapter="rerank")
    assert sorted(n for n, _ in ranking) == [0, 1, 2, 3]
    assert [score for _, score in ranking] == sorted((s for _, s in ranking), reverse=True)
    joined = [f"Query: ab\nDocument: {text}" for text in TEXTS]
    alone = veneer.classify(base, joined, adapter="rerank")
    assert dict(ranking) == pytest.approx(dict(enumerate(alone)), abs=1e-5)
    with pytest.raises(ConfigError, match="needs kind rerank"):
        veneer.rerank(base, "ab", TEXTS, adapter="label")
    with pytest.raises(RefusedError, match="no score head"):
        veneer.classify(base, TEXTS)
    for kind in adapters:
        base.detach(kind)


@pytest.mark.parametrize("program", ["vllm", "llamacpp"])
def test_no_export_drops_the_head(program, world, adapters, tmp_path):
    with pytest.raises(RefusedError, match="write no answers"):
        export_adapter(
            adapters["label"], to=program, base=str(world / "base"), out=tmp_path / "a.gguf"
        )
    assert not (tmp_path / "a.gguf").exists()


def test_an_export_for_peft_keeps_the_head(world, adapters, tmp_path):
    export_adapter(adapters["label"], to="peft", base=str(world / "base"), out=tmp_path / "peft")
    name = "base_model.model.score.weight"
    tensors = [
        load_file(folder / "adapter_model.safetensors")[name]
        for folder in (adapters["label"], tmp_path / "peft")
    ]
    assert torch.equal(*tensors)


def test_what_a_head_cannot_do_is_refused_by_name(adapters, base):
    base.load_adapter(adapters["label"], name="own")
    rows = [{"prompt": "a", "completion": "b"}]
    with base.using("own"):
        for refused in (
            lambda: base.generate("a", max_new_tokens=2),
            lambda: base.score(rows, adapter="own"),
            lambda: veneer.choose(base, "a", ["x", "y"]),
        ):
            with pytest.raises(RefusedError, match="write no answers") as error:
                refused()
            assert "own: a score head" in str(error.value)
    for refused, message in (
        (lambda: base.merge("own"), "cannot be merged"),
        (lambda: base.trainer(adapters["label"], name="more"), "write no answers"),
        (lambda: attach_teacher(base, read_adapter(adapters["label"])), "write no answers"),
    ):
        with pytest.raises(RefusedError, match=message):
            refused()
    with pytest.raises(ConfigError, match="one adapter with a score head"):
        base.use("own", weights=[0.5])
    base.detach("own")
    with pytest.raises(ConfigError, match="a head beside them: leave shard out"):
        RunConfig(base="b", data="d", out="o", objective="classify", method="full", shard=True)
    with pytest.raises(ConfigError, match="predicts none"):
        RunConfig(base="b", data="d", out="o", objective="classify", replay={"rows": "r"})


@pytest.mark.parametrize("method", ["lora", "dora", "bottleneck", "prefix"])
def test_every_method_stands_beneath_a_head(method, world, tmp_path, base):
    settings = settings_of("label", method={"name": method})
    folder = train(world, tmp_path / "run", **settings)
    base.load_adapter(folder, name=method)
    before = veneer.classify(base, TEXTS, adapter=method)
    base.detach(method)
    copied = changed(folder, tmp_path / "as_peft")
    base.load_adapter(copied, name=method)
    after = veneer.classify(base, TEXTS, adapter=method)
    base.detach(method)
    assert [sorted(row.values()) for row in before] == [sorted(row.values()) for row in after]


def test_a_run_resumes_bit_for_bit(world, tmp_path):
    settings = settings_of(
        "label",
        method={"name": "lora", "rank": 4, "dropout": 0.2},
        micro_batch=2,
        objective={"name": "classify", "balanced": True},
    )
    whole = train(world, tmp_path / "whole", **settings)
    records = read_records(tmp_path / "whole" / "metrics.jsonl")
    figures = [r["labels"] for r in records if r["kind"] == "evaluation"]
    assert [set(f) for f in figures] == [{"accuracy", "macro_f1"}] * 4
    with killed_after_saving(4):
        train(world, tmp_path / "part", **settings)
    run_training(resume_config(str(tmp_path / "part")), resume=True, screen=QuietScreen())
    assert_same_run(tmp_path / "part", tmp_path / "whole", tolerance=0.0)
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert summary["objective"] == "classify" and "macro_f1" in summary["labels"]
    for folder in ("whole", "part"):
        asked = resume_config(str(tmp_path / folder)).objective
        assert asked.balanced and asked.class_weights == {}
        summary = json.loads((tmp_path / folder / "summary.json").read_text())
        assert set(summary["class_weights"]) == set(LABELS)
    assert records[0]["class_weights"] == summary["class_weights"]
    assert whole.is_dir()


def test_a_job_with_a_head_beside_one_that_answers_is_what_it_is_alone(world, tmp_path):
    jobs = {"head": settings_of("labels"), "plain": {"seed": 3}}
    together([config(world, tmp_path / "joint" / n, **jobs[n]) for n in jobs])
    for name, settings in jobs.items():
        train(world, tmp_path / name, **settings)
        assert_same_run(tmp_path / "joint" / name, tmp_path / name, tolerance=5 * FLOAT32)


def test_a_head_goes_on_by_label(world, adapters, tmp_path, base):
    """Rows of known labels keep their weights; a new label starts at zero; no head is dropped."""
    more = ["new", *LABELS]
    settings = settings_of(
        "label",
        from_adapter=str(adapters["label"]),
        method="lora",
        objective={"name": "classify", "labels": more},
        learning_rate=1e-9,
        steps=1,
    )
    folder = train(world, tmp_path / "more", **settings)
    old = load_file(adapters["label"] / "adapter_model.safetensors")
    new = load_file(folder / "adapter_model.safetensors")
    name = "base_model.model.score.weight"
    assert torch.allclose(new[name][1:], old[name], atol=1e-6)
    assert new[name][0].abs().max() < 1e-6
    for rows, objective in (
        ("rows", "answers"),
        ("labels", {"name": "classify", "kind": "labels"}),
    ):
        with pytest.raises(AdapterMismatchError, match="does not go on with it"):
            train(world, tmp_path / rows, **{**settings, "objective": objective, "rows": rows})


def test_a_head_that_goes_on_keeps_its_thresholds(world, tmp_path):
    thresholds = {"card": 0.9, "money": 0.8}, {"money": 0.2}
    parent = {}
    for number, own in enumerate(thresholds):
        objective = {"name": "classify", "kind": "labels", "thresholds": own}
        settings = settings_of("labels", steps=1, **parent) | {"objective": objective}
        folder = train(world, tmp_path / str(number), **settings)
        parent = {"from_adapter": str(folder)}
    manifest = json.loads((folder / "veneer.json").read_text())
    assert manifest["head"]["thresholds"] == {"card": 0.9, "money": 0.2}
    assert manifest["recipe"]["objective"]["thresholds"] == manifest["head"]["thresholds"]


def test_labels_of_rows_are_checked(world, tmp_path):
    def run(lines, name, **settings):
        (world / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
        return train(world, tmp_path / name, **settings_of("label", rows=name, **settings))

    numbers = [{"text": f"t {n}", "label": n % 11} for n in range(22)]
    manifest = json.loads((run(numbers, "numbers", steps=1) / "veneer.json").read_text())
    assert manifest["head"]["labels"] == [str(n) for n in range(11)]
    assert manifest["recipe"]["objective"]["labels"] == manifest["head"]["labels"]
    bad = [*numbers, {"text": "t", "label": 0.5}, {"text": "u", "label": ["a"]}]
    with pytest.raises(DataError, match="D119") as error:
        run(bad, "bad")
    assert "bad.jsonl:23" in str(error.value) and "bad.jsonl:24" in str(error.value)
    with pytest.raises(DataError, match="1 labels"):
        run([{"text": "a", "label": "x"}] * 9, "same")
    with pytest.raises(DataError, match="learns from texts with labels"):
        run([{"prompt": "a", "completion": "b"}] * 9, "answers")
    with pytest.raises(DataError, match="'q' is not one of the 2 labels"):
        rows = [{"text": f"{n}", "label": "pq"[n % 2]} for n in range(9)]
        run(rows, "unknown", objective={"name": "classify", "labels": ["p", "r"]})


def test_settings_name_labels_as_rows_do():
    settings = Classify.model_validate(
        {"labels": [0, True, "c"], "class_weights": {0: 2, True: 3}, "kind": "labels"}
        | {"thresholds": {0: 0.3}}
    )
    assert settings.labels == [label_name(label) for label in (0, True, "c")]
    assert settings.class_weights == {"0": 2, "true": 3} and settings.thresholds == {"0": 0.3}


def test_a_weight_of_zero_which_may_leave_a_step_nothing_to_learn_is_refused():
    with pytest.raises(ConfigError, match="a class weight of 0"):
        RunConfig.of(
            {
                "base": "b",
                "out": "o",
                "data": {"train": "t"},
                "objective": {"name": "classify", "class_weights": {"a": 0}},
            }
        )
    assert Classify(kind="labels", labels=["a", "b"], class_weights={"a": 0}).class_weights


@pytest.mark.parametrize(
    ("kind", "values", "labels"),
    [
        ("regression", [Decimal("0.25"), Decimal(2)], [(0.25,), (2.0,)]),
        ("label", [b"a", b"b"], "holds a value of type bytes"),
    ],
)
def test_labels_of_every_type_in_parquet_are_read_or_named(kind, values, labels, tmp_path):
    arrow = pytest.importorskip("pyarrow")
    file = tmp_path / "rows.parquet"
    table = arrow.table({"text": ["t", "u"], "label": arrow.array(values)})
    pytest.importorskip("pyarrow.parquet").write_table(table, file)
    data, head = DataConfig(train=str(file), validation_share=0.0), Classify(kind=kind).head
    rules = RowRules(64, Capacity(), kind="labels", head=head)
    if isinstance(labels, str):
        with pytest.raises(DataError, match=labels):
            load_data(data, rules, tiny_tokenizer())
    else:
        assert [e.label for e in load_data(data, rules, tiny_tokenizer()).train] == labels


def test_labels_that_no_file_could_hold_are_refused_and_lists_are_read_from_csv(tmp_path):
    half = tmp_path / "rows.jsonl"
    half.write_text('{"text": "t", "label": "\\ud83d"}\n{"text": "u", "label": "b"}\n')
    _, problems = scan_rows(half, kind="labels")
    assert [(problem.code, problem.lines) for problem in problems] == [("D102", (1,))]
    listed = tmp_path / "rows.csv"
    listed.write_text('text,label\nt,"[""a"", ""b""]"\nu,[]\n')
    data = DataConfig(train=str(listed), validation_share=0.0)
    rules = RowRules(64, Capacity(), kind="labels", head=Classify(kind="labels").head)
    assert [e.label for e in load_data(data, rules, tiny_tokenizer()).train] == [(1, 1), (0, 0)]


def test_labels_are_in_one_order_in_every_process():
    orders = {
        ("1", "01", "001", "-2"): ("-2", "001", "01", "1"),
        ("10", "9"): ("9", "10"),
        ("--1", "1", "0"): ("--1", "0", "1"),
    }
    for names, expected in orders.items():
        rows = [Row(RowRef("f", 1), [], text="t", label=name) for name in names]
        assert with_labels(HeadSettings("label"), rows).labels == expected


def test_a_text_that_is_cut_keeps_its_label(world, tmp_path):
    rows = [{"text": "ab" * 20 + str(n), "label": "xy"[n % 2]} for n in range(12)]
    (world / "long.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    data = {"train": str(world / "long.jsonl"), "validation_share": 0.2, "long_rows": "cut"}
    train(world, tmp_path / "cut", **settings_of("label", rows="long", data=data, length=10))
    steps = [r for r in read_records(tmp_path / "cut" / "metrics.jsonl") if r["kind"] == "step"]
    assert {r["tokens"] / r["trained_tokens"] for r in steps} == {10.0}


def test_a_head_without_labels_predicts_no_tokens():
    with pytest.raises(TypeError, match="predicts no tokens"):
        ScorePredictions(torch.zeros(1, 2), None).nats()


def test_an_evaluation_of_a_head_has_intervals_and_every_label(world, adapters, base):
    rows = [json.loads(line) for line in (world / "label.jsonl").read_text().splitlines()]
    base.load_adapter(adapters["label"], name="own")
    with base.using("own"):
        result = veneer.evaluate(base, rows)
        twice = veneer.evaluate(base, rows * 2)
        answers = veneer.classify(base, [row["text"] for row in rows])
        with pytest.raises(RefusedError, match="evaluated by its labels"):
            veneer.evaluate(base, rows, metrics=["exact_match"])
        with pytest.raises(DataError, match="'new' is not one of the 3 labels"):
            veneer.evaluate(base, [{"text": "a", "label": "new"}])
    chosen = [next(iter(answer)) for answer in answers]
    right = [row["label"] for row in rows]
    accuracy = np.mean([a == b for a, b in zip(chosen, right, strict=True)])
    assert result["accuracy"] == pytest.approx(accuracy)
    low, high = result["intervals"]["accuracy"]
    assert low <= accuracy <= high
    assert twice["intervals"]["loss"] == pytest.approx(result["intervals"]["loss"])
    expected = -np.mean([np.log(a[b]) for a, b in zip(answers, right, strict=True)])
    assert result["loss"] == pytest.approx(expected, rel=1e-4)
    for line in result["labels"]["per_label"]:
        both = sum(c == r == line["label"] for c, r in zip(chosen, right, strict=True))
        total = chosen.count(line["label"]) + right.count(line["label"])
        assert line["rows"] == right.count(line["label"])
        assert line["f1"] == pytest.approx(2 * both / total)
    f1 = [line["f1"] for line in result["labels"]["per_label"]]
    assert result["macro_f1"] == pytest.approx(np.mean(f1))
    assert sum(cell["rows"] for cell in result["labels"]["confusion"]) == len(rows)
    base.detach("own")


@pytest.mark.parametrize("kind", ["labels", "regression", "rerank"])
def test_the_command_evaluates_heads_of_every_kind(kind, world, adapters, capsys):
    from veneer.cli.main import main

    args = ["evaluate", "--base", str(world / "base"), "--adapter", str(adapters[kind])]
    assert main([*args, "--data", str(world / f"{kind}.jsonl")]) == 0
    shown = capsys.readouterr().out
    assert ("mean_error" if kind == "regression" else "accuracy") in shown
    assert "95% interval" in shown and "nats a token" not in shown
