"""The page's table reads files of prompts as training reads their rows."""

import csv
import io
import json
import shutil
import subprocess

import pytest

from tests.support.helpers import ROOT
from veneer.cli.main import main
from veneer.data.examples import RowRef
from veneer.data.files.formats import to_row
from veneer.data.files.layouts import detect

NODE = shutil.which("node")
pytestmark = pytest.mark.skipif(NODE is None, reason="no node is on the path")
SCRIPT = ROOT / "src" / "veneer" / "serve" / "web" / "rows.js"
READ = """
const files = JSON.parse(require("fs").readFileSync(0, "utf8"));
const found = files.map(([name, text, column]) => {
  try {
    const rows = rowsOf(name, text);
    return conversationsOf(rows, column ?? likelyColumn(columnsOf(rows)));
  } catch (fault) {
    return fault.message;
  }
});
console.log(JSON.stringify(found));
"""
USER, ASSISTANT = {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}
SYSTEM = {"role": "system", "content": "Be short."}
ROWS = {
    "prompt": {"prompt": "Hello", "completion": "Hi"},
    "prompt as messages": {"prompt": [SYSTEM, USER, ASSISTANT, USER], "completion": [ASSISTANT]},
    "chat": {"messages": [SYSTEM, USER, ASSISTANT, USER, ASSISTANT]},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}]
    },
    "alpaca": {"instruction": "Translate.", "input": "Hello", "output": "Hallo"},
    "alpaca without input": {"instruction": "Say hello.", "input": "", "output": "Hello"},
    "system": {"system": "Be short.", "prompt": "Hello", "completion": "Hi"},
}


def read(*files):
    script = SCRIPT.read_text(encoding="utf-8") + READ
    done = subprocess.run(
        [NODE, "-e", script], input=json.dumps(files), capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def trained(row):
    """The messages of a row as they are trained, without the answers at the end."""
    messages = to_row(row, RowRef("rows", 1), detect(frozenset(row))).messages
    while messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    return [{name: message[name] for name in ("role", "content")} for message in messages]


def as_csv(*rows):
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(
        {k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()} for row in rows
    )
    return text.getvalue()


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_a_row_is_asked_as_it_is_trained(row):
    lines = read(("a.jsonl", json.dumps(row)), ("a.json", json.dumps([row])))
    assert lines == [[trained(row)], [trained(row)]]
    assert read(("a.csv", "\ufeff" + as_csv(row))) == [[trained(row)]]


def test_what_data_convert_and_split_write_is_read(tmp_path, capsys):
    source = tmp_path / "rows.csv"
    source.write_text(as_csv(*({"question": f"Hello {n}", "answer": "Hi"} for n in range(40))))
    converted, split = tmp_path / "converted.jsonl", tmp_path / "split"
    named = ["--map", "question=prompt", "--map", "answer=completion"]
    assert main(["data", "convert", str(source), *named, "--out", str(converted)]) == 0
    assert main(["data", "split", str(converted), "--out", str(split), "--test", "0.2"]) == 0
    files = [converted, *sorted(split.glob("*.jsonl"))]
    found = read(*((file.name, file.read_text()) for file in files))
    for file, conversations in zip(files, found, strict=True):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        assert conversations == [trained(row) for row in rows]
    assert len(files) > 2 and len(found[0]) == sum(map(len, found[1:])) == 40


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.jsonl", '{"prompt": "a"}\n{"nothing": 1}\n', "prompt 2 has nothing in column prompt"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt"', "line 2 is not JSON"),
        ("a.csv", "prompt,x\n,1\n", "prompt 1 has nothing in column prompt"),
        ("a.csv", "", "there is no prompt in it"),
        ("a.jsonl", "3\n", "prompt 1 has nothing in it"),
        ("a.jsonl", "null\n", "prompt 1 has nothing in it"),
        ("a.jsonl", '{"messages": [null]}\n', "prompt 1 has nothing in column messages"),
        ("a.txt", "a\n" * 2001, "it has 2001 prompts; 2000 are allowed"),
    ],
)
def test_a_file_that_cannot_be_read_is_told_in_a_sentence(name, text, said):
    assert read((name, text))[0].startswith(said)
