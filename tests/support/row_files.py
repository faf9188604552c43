"""Makes rows in files, and loads them as a run does."""

from __future__ import annotations

import json
from typing import Any

from tests.support.tiny import tiny_tokenizer
from veneer.data.config import DataConfig
from veneer.data.encoder import RowRules
from veneer.data.examples import Capacity
from veneer.data.files.sources import scan_rows
from veneer.data.load import DataSet, load_data


def records(count: int, word: str = "question") -> list[dict[str, Any]]:
    return [{"prompt": f"{word} {n}", "completion": f"answer {n}"} for n in range(count)]


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def loaded(train: Any, **more: Any) -> DataSet:
    data = DataConfig.of({"train": train, "validation_share": 0.0, **more})
    return load_data(data, RowRules(512, Capacity()), tiny_tokenizer())


def prompts(path: str, **more: Any) -> list[str]:
    rows, problems = scan_rows(path, **more)
    assert not problems
    return [row.messages[0]["content"] for row in rows]


QA = {"question": "prompt", "answer": "completion"}
