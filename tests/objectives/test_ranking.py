"""Reranking: figures of queries, whole queries held out, and where the figures are shown."""

import json
import random

import numpy as np
import pytest

import veneer
from tests.support.joint import config
from tests.support.tiny import save_tiny, tiny_tokenizer
from veneer.adapters.labels import HeadSettings
from veneer.data.config import DataConfig
from veneer.data.encoder import RowRules
from veneer.data.examples import Capacity, RowRef, prompt_key
from veneer.data.files.labels import make_row
from veneer.data.load import load_data
from veneer.objectives.ranking import ranking_counts
from veneer.report.page import write_report
from veneer.training.output.records import read_records
from veneer.training.output.screen import QuietScreen
from veneer.training.run import run_training

QUERIES = 12
FIGURES = ("mrr", "ndcg_at_10", "best_first")


def test_figures_are_those_of_the_formulas():
    """Two queries: the relevant document second of three, and graded labels with a tie."""
    outputs = np.array([0.1, 3.0, 2.0, 1.0, 5.0, 5.0, 0.0])
    labels = np.array([0.0, 0.0, 1.0, 1.0, 0.2, 0.6, 0.0])
    queries = [1, 1, 1, 2, 2, 2, 3]
    of = {
        name: counts.tolist() for name, counts in ranking_counts(outputs, labels, queries).items()
    }
    assert of["mrr"] == [[1 / 2, 1], [1 / 2, 1], [0, 0]]
    assert of["best_first"] == [[0, 1], [0, 1], [0, 0]]
    second = (0.2 + 0.6 / np.log2(3) + 1 / 2) / (1 + 0.6 / np.log2(3) + 0.2 / 2)
    expected = [[1 / np.log2(3), 1], [second, 1], [0, 0]]
    assert of["ndcg_at_10"] == [pytest.approx(pair) for pair in expected]
    best = ranking_counts(labels, labels, queries)
    assert all(counts.tolist() == [[1, 1], [1, 1], [0, 0]] for counts in best.values())


def test_only_ten_places_count_and_a_constant_output_gains_nothing():
    labels = np.array([1.0] + [0.0] * 11)
    last = ranking_counts(np.zeros(12), labels, [1] * 12)
    assert last["mrr"].tolist() == [[1 / 12, 1]] and last["ndcg_at_10"].tolist() == [[0, 1]]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rerank")
    save_tiny(folder / "base")
    chance = random.Random(3)
    rows = [
        {"query": f"q{query}", "document": "ab" * chance.randrange(1, 6) + str(n), "label": n % 2}
        for query in range(QUERIES)
        for n in range(4)
    ]
    chance.shuffle(rows)
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "rerank"
    objective = {"name": "classify", "kind": "rerank"}
    data = {"train": str(world / "rows.jsonl"), "validation_share": 0.25}
    settings = config(world, out, objective=objective, data=data)
    run_training(settings, resume=False, screen=QuietScreen())
    return out


def test_the_prompt_of_a_document_is_its_query():
    pairs = [("a", "x"), ("a", "y"), ("b", "x"), ("b", "z\nDocument: z")]
    records = [{"query": query, "document": text, "label": 1} for query, text in pairs]
    keys = [prompt_key(make_row(record, RowRef("f", 1), "relevance")) for record in records]
    assert keys[0] == keys[1] != keys[2] == keys[3]


def test_whole_queries_are_held_out(world):
    data = load_data(
        DataConfig.of({"train": str(world / "rows.jsonl"), "validation_share": 0.25}),
        RowRules(64, Capacity(), kind="labels", head=HeadSettings("rerank")),
        tiny_tokenizer(),
    )
    trained, held_out = (
        {row.query for row in rows} for rows in (data.train_rows, data.validation_rows)
    )
    assert not trained & held_out
    assert len(data.validation) == len(data.validation_rows) == 4 * len(held_out) == QUERIES
    assert len({example.query for example in data.validation}) == len(held_out)


def test_records_and_report_have_the_figures_with_intervals_over_queries(run, tmp_path):
    records = [r for r in read_records(run / "metrics.jsonl") if r["kind"] == "evaluation"]
    last = records[-1]["labels"]
    assert set(last) == {"accuracy", *FIGURES}
    for name in FIGURES:
        assert last[name]["low"] <= last[name]["value"] <= last[name]["high"]
    page = write_report(run).read_text()
    assert "MRR" in page and "NDCG@10" in page and "best document first" in page


def test_evaluate_gives_the_figures_of_what_rerank_orders(run, world):
    base = veneer.load(str(world / "base"))
    base.use(base.load_adapter(run))
    rows = [json.loads(line) for line in (world / "rows.jsonl").read_text().splitlines()]
    result = veneer.evaluate(base, rows)
    ranks = []
    for query in {row["query"] for row in rows}:
        own = [row for row in rows if row["query"] == query]
        order = [number for number, _ in veneer.rerank(base, query, [r["document"] for r in own])]
        ranks.append(next(n for n, place in enumerate(order, 1) if own[place]["label"]))
    assert result["queries"] == QUERIES
    assert result["mrr"] == pytest.approx(np.mean([1 / rank for rank in ranks]))
    assert result["best_first"] == pytest.approx(np.mean([rank == 1 for rank in ranks]))
    assert set(FIGURES) <= set(result["intervals"]) and set(FIGURES) <= set(result["units"])
