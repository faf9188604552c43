"""Answers that reason: each is learnt behind exactly what the model will see in front of it, and
nothing else is."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import veneer
from tests.support.models.reasoning import (
    DROPS_EARLIER,
    FORGETS,
    OPENS,
    TEMPLATES,
    check_by_brute_force,
    conversation,
    reasoning_tokenizer,
)
from tests.support.models.routed import Routed, batch_loss
from tests.support.tiny import tiny_model
from veneer.adapters.config import LoRA, Prefix
from veneer.adapters.placement.routing import Routing
from veneer.adapters.preamble import Preamble
from veneer.data.batching import RowSpans, best_groups, make_batch, packed_rows, plan_epoch
from veneer.data.config import DataConfig
from veneer.data.encoder import RowRules
from veneer.data.examples import Capacity, Problem
from veneer.data.large import training_data
from veneer.data.load import DataSet, examine_data, load_data
from veneer.errors import DataError
from veneer.evaluation.predictions import read_predictions
from veneer.models.likelihood import example_nats
from veneer.models.step import prepare


@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_and_masks_equal_a_brute_force_rendering(name: str) -> None:
    assert check_by_brute_force(TEMPLATES[name])["learnt"] >= 8


def write(path: Any, *conversations: list[dict[str, Any]]) -> str:
    path.write_text(
        "".join(json.dumps({"messages": messages}) + "\n" for messages in conversations)
    )
    return str(path)


def loaded(
    path: str, source: str = DROPS_EARLIER, *, examine: bool = False, **variables: Any
) -> DataSet:
    return (examine_data if examine else load_data)(
        DataConfig(train=path, validation_share=0.0),
        RowRules(2048, Capacity(), Preamble(variables=variables)),
        reasoning_tokenizer(source),
    )


def several(tmp_path: Any) -> DataSet:
    """Rows of three, one and two answers; the template drops earlier reasoning."""
    rows = [conversation(turns, reasons=True, tools=False, system=True) for turns in (3, 1, 2)]
    rows[1][1]["content"] = "another question"
    return loaded(write(tmp_path / "rows.jsonl", *rows))


def test_the_examples_of_a_row_stay_together_and_a_batch_counts_rows(tmp_path: Any) -> None:
    data = several(tmp_path)
    rows = RowSpans.of(data.train)
    assert [rows.examples([n]) for n in range(3)] == [[0, 1, 2], [3], [4, 5]]
    assert (data.report.rows, data.report.examples) == (3, 6)
    plan = [*plan_epoch(rows.lengths, batch=2, seed=0, epoch=0, order="shuffled")]
    assert sorted(i for batch in plan for i in batch) == [0, 1, 2] and [
        len(batch) for batch in plan
    ] == [2, 1]
    assert len({example.key for example in data.train}) == 6


def test_equal_rows_in_a_row_stay_rows_of_their_own(tmp_path: Any) -> None:
    """Six conversations of several answers, each twice, then eight rows of one: 20 rows, in memory
    and in files."""
    texts = [conversation(2 + n % 2, reasons=True, tools=False, system=True) for n in range(6)]
    for n, row in enumerate(texts):
        row[1]["content"] += f" {n}"
    single = [conversation(1, reasons=True, tools=False, system=True) for _ in range(8)]
    path = write(tmp_path / "rows.jsonl", *(row for row in texts for _ in range(2)), *single)
    other = write(tmp_path / "other.jsonl", *texts[:2])
    sets: list[dict[str, Any]] = [{"path": path, "weight": 0.5}, {"path": other, "weight": 2.0}]
    data = DataConfig.of({"train": sets, "validation_share": 0.0})
    asked = RowRules(2048, Capacity()), reasoning_tokenizer(DROPS_EARLIER)
    memory = load_data(data, *asked)
    files = training_data(data.model_copy(update={"tokens": "files"}), *asked)
    for found in (memory, files):
        rows = RowSpans.of(found.train)
        assert len(rows.lengths) == 22 == found.report.rows
        assert [len(rows.examples([n])) for n in range(12)] == [2, 2, 3, 3] * 3
        assert found.mixture is not None
        assert len(rows.examples(found.mixture.rows(0, 0))) > 0  # all of these rows are there
        groups = best_groups(found.train[:4])
        assert sum(map(len, groups)) == 4


def test_what_the_examples_of_a_row_begin_with_is_computed_once(tmp_path: Any) -> None:
    data = several(tmp_path)
    first = data.train[:3]
    apart = sum(packed_rows([example], share_prompt=True) for example in first)
    assert packed_rows(first, share_prompt=True) < apart - 2 * 40
    groups = best_groups(data.train)
    assert [len(group) for group in groups] == [3, 1, 2]
    batch = make_batch(data.train, packed=True, share_prompt=True, device=torch.device("cpu"))
    assert batch.computed_tokens == packed_rows(data.train, share_prompt=True)


@pytest.mark.parametrize(
    "method", [LoRA(rank=2), Prefix(tokens=3, start="random")], ids=["lora", "prefix"]
)
def test_groups_of_rows_give_the_loss_and_the_gradient_of_each_example_alone(
    tmp_path: Any, method: Any
) -> None:
    from veneer.adapters.attach import attach

    data = several(tmp_path)
    model, routing = tiny_model("llama", torch.float64), Routing()
    paths = prepare(model)
    made = attach(model, method, name="a", routing=routing, head=model.get_output_embeddings())
    torch.manual_seed(0)
    for parameter in made.parameters().values():
        parameter.data.normal_(std=0.3)
    routing.active = (("a", 1.0),)

    def gradient(groups: list[Any]) -> list[torch.Tensor]:
        for parameter in made.parameters().values():
            parameter.grad = None
        for group in groups:
            batch = make_batch(group, packed=True, share_prompt=True, device=torch.device("cpu"))
            batch_loss(Routed(model, paths, routing), batch, total=10.0).backward()
        return [
            parameter.grad.clone()
            for parameter in made.parameters().values()
            if parameter.grad is not None
        ]

    for together, alone in zip(
        gradient([data.train]), gradient([[e] for e in data.train]), strict=True
    ):
        assert torch.allclose(together, alone, rtol=1e-5, atol=1e-7)
    nats = example_nats(Routed(model, paths), data.train, batch=3)
    assert nats[:, 1].tolist() == [e.trained.sum() for e in data.train]


def test_a_run_over_rows_of_several_examples_learns_and_says_so(tmp_path: Any) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "base")
    reasoning_tokenizer().save_pretrained(tmp_path / "base")
    rows = [conversation(1 + n % 3, reasons=True, tools=False, system=True) for n in range(8)]
    for n, row in enumerate(rows):
        row[1]["content"] += f" {n}"
    data = write(tmp_path / "rows.jsonl", *rows)
    run = veneer.train(
        str(tmp_path / "base"), data, out=tmp_path / "run", steps=3, batch=4, micro_batch=2
    )
    assert run["last_loss"] < run["first_loss"]
    file = tmp_path / "predictions.jsonl"
    base = veneer.load(str(tmp_path / "base"))
    assert veneer.evaluate(base, data, predictions=file)["rows"] == len(rows)
    assert len(read_predictions(file)) == sum(1 + n % 3 for n in range(8))


def codes(data: DataSet) -> dict[str, Problem]:
    return {problem.code: problem for problem in data.report.problems}


def test_the_check_counts_answers_that_reason_and_says_what_a_mixture_teaches(
    tmp_path: Any,
) -> None:
    both = [conversation(1, reasons=n < 3, tools=False, system=False) for n in range(4)]
    for n, each in enumerate(both):
        each[0]["content"] += f" {n}"
    inline = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\ny"},
    ]
    data = loaded(write(tmp_path / "rows.jsonl", *both, inline))
    assert data.report.reasons == {"reasons": 4, "empty": 1}
    assert (
        "4 of 5 answers (80%) begin with reasoning, the others with an empty block"
        in codes(data)["D220"].message
    )
    none = loaded(write(tmp_path / "rows.jsonl", both[3]))
    assert none.report.reasons == {"empty": 1} and "D221" in codes(none)
    supplied = loaded(write(tmp_path / "rows.jsonl", both[3]), enable_thinking=False)
    assert supplied.report.reasons == {"none": 1} and not {"D220", "D221"} & set(codes(supplied))


def test_reasoning_that_the_template_leaves_out_is_refused_and_one_that_the_prompt_forbids(
    tmp_path: Any,
) -> None:
    rows = write(tmp_path / "rows.jsonl", conversation(1, reasons=True, tools=False, system=False))
    plain = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}<|im_end|>{% endfor %}{% if"
        " add_generation_prompt %}"
    )
    plain += "assistant:{% endif %}"
    with pytest.raises(DataError, match=r"D219 .*left out by the chat template"):
        loaded(rows, plain)
    with pytest.raises(DataError, match="reasons, and the prompt forbids it"):
        loaded(rows, enable_thinking=False)
    assert codes(loaded(rows, plain, examine=True))["D219"].fatal


def test_rows_of_several_examples_are_named(tmp_path: Any) -> None:
    found = codes(several(tmp_path))["D222"]
    assert (found.lines, found.fatal) == ((1, 3), False)


def test_an_answer_is_learnt_behind_the_reasoning_that_the_prompt_opens_and_the_template_forgets(
    tmp_path: Any,
) -> None:
    """As DeepSeek-R1's does: what the model writes stands in no rendering of the whole
    conversation."""
    inline = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\ny"},
    ]
    apart = [
        {"role": "user", "content": "z"},
        {"role": "assistant", "content": "y", "reasoning_content": "hm"},
    ]
    two = [*inline, {"role": "user", "content": "again"}, apart[1]]
    data = loaded(write(tmp_path / "rows.jsonl", inline, apart, two), FORGETS)
    tokenizer = reasoning_tokenizer(FORGETS)
    texts = [tokenizer.decode(e.ids) for e in data.train]
    turn = "<|im_start|>assistant\n<think>\nhm\n</think>\n\ny<|im_end|>\n"
    first = f"<|im_start|>user\nx<|im_end|>\n{turn}"
    assert texts == [
        first,
        f"<|im_start|>user\nz<|im_end|>\n{turn}",
        first,
        f"<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\ny<|im_end|>\n<|im_start|>user\nagain<|im_end|>\n{turn}",
    ]
    learnt = tokenizer.decode(data.train[3].ids[data.train[3].trained])
    assert learnt == "hm\n</think>\n\ny<|im_end|>\n" and data.report.reasons == {"reasons": 4}


def test_an_answer_that_does_not_reason_where_the_prompt_opens_it_is_refused_with_what_to_do(
    tmp_path: Any,
) -> None:
    rows = write(tmp_path / "rows.jsonl", conversation(1, reasons=False, tools=False, system=False))
    with pytest.raises(DataError, match="does not reason, and the prompt opens it"):
        loaded(rows, FORGETS)
    assert loaded(rows, OPENS).report.reasons == {"none": 1}
