"""Odd rows in every layout and kind of file, and odd chat templates."""

from __future__ import annotations

import json
import re
from pathlib import Path
from random import Random
from typing import Any

from tests.soak.inputs.odd import TEXTS, as_json, mutated, odd, spoken, times, torn

ASK, ANSWER = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}
CALL = {
    "type": "function",
    "function": {"name": "add", "arguments": {"a": 2, "b": [1, {"c": None}]}},
}
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
}
ROWS: list[dict[str, Any]] = [
    {"messages": [ASK, ANSWER]},
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            ASK,
            ANSWER,
            ASK,
            {**ANSWER, "weight": 0},
            ASK,
            ANSWER,
        ],
        "id": 1,
    },
    {
        "messages": [
            ASK,
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "4", "name": "add"},
            ANSWER,
        ],
        "tools": [TOOL],
    },
    {
        "messages": [
            {
                "role": "user",
                "content": [{"type": "text", "text": "2"}, {"type": "text", "text": "+"}],
            },
            ANSWER,
        ],
        "references": ["four"],
    },
    {"messages": json.dumps([ASK, ANSWER]), "tools": json.dumps([TOOL]), "system": "Be brief."},
    {"messages": [ASK, {**ANSWER, "reasoning_content": "hm", "name": "bot"}]},
    {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]},
    {"prompt": "2 + 2?", "completion": "4", "system": "Be brief."},
    {"prompt": [ASK, ANSWER, ASK], "completion": [ANSWER]},
    {"instruction": "Add.", "input": "2, 2", "output": "4"},
    {"text": "Once upon a time.", "url": "x", "score": 0.5},
]
ROW_WORDS = """
    messages role content user assistant system tool tool_calls function name arguments weight type
    text
    image_url images from value human gpt prompt completion instruction output input tools
    references
    data reasoning_content thinking label
""".split()


def row_file(random: Random, folder: Path) -> Path:
    records: list[Any] = (
        [random.choice(ROWS)] * random.choice([1, 2, 4]) if random.random() < 0.9 else list(ROWS)
    )
    for _ in range(times(random)):
        at = random.randrange(len(records))
        records = [
            mutated(random, record, ROW_WORDS) if n == at else record
            for n, record in enumerate(records)
        ]
    kind = random.choice(["jsonl", "jsonl", "jsonl", "json", "csv", "parquet"])
    path = folder / f"rows.{kind}"
    if kind == "jsonl":
        data = b"\n".join(as_json(random, record) for record in records)
    elif kind == "json":
        data = as_json(
            random, random.choice([records, {"data": records}, {"version": 1, "data": records}])
        )
    elif kind == "csv":
        flat = [
            {k: v if isinstance(v, str) else json.dumps(v) for k, v in r.items()}
            for r in records
            if isinstance(r, dict)
        ]
        names = list(flat[0]) if flat else ["text"]
        lines = [names, *([r.get(name, "") for name in names] for r in flat)]
        quoted = [",".join('"' + str(c).replace('"', '""') + '"' for c in line) for line in lines]
        data = "\n".join(quoted).encode("utf-8", "surrogatepass")
        data = torn(random, data) if random.random() < 0.3 else data
    else:
        data = parquet_of(random, records)
    path.write_bytes(data)
    return path


def parquet_of(random: Random, records: list[Any]) -> bytes:
    import pyarrow
    from pyarrow import parquet

    sink = pyarrow.BufferOutputStream()
    try:
        parquet.write_table(
            pyarrow.Table.from_pylist([r for r in records if isinstance(r, dict)]), sink
        )
    except (
        pyarrow.ArrowException,
        ValueError,
        TypeError,
        OverflowError,
        RecursionError,
        UnicodeError,
    ):
        parquet.write_table(pyarrow.table({"text": ["a"]}), sink)
    data = bytes(sink.getvalue())
    return torn(random, data) if random.random() < 0.3 else data


def base_of(random: Random, world: Path) -> str:
    return str(world / random.choice(["base", "base", "base", "bare", "short", "untied"]))


def rows(random: Random, folder: Path, world: Path) -> list[str]:
    file = str(row_file(random, folder))
    base = ["--base", base_of(random, world)]
    more: list[str] = []
    if random.random() < 0.3:
        more += [
            "--format",
            random.choice(["auto", "chat", "prompt_completion", "alpaca", "sharegpt", "text"]),
        ]
    if random.random() < 0.3:
        more += ["--train-on", random.choice(["assistant", "last", "all"])]
    if random.random() < 0.3:
        more += ["--length", random.choice(["2", "10", "40", "100000"])]
    what = random.random()
    if what < 0.75:
        more += (
            ["--long-rows", random.choice(["refuse", "drop", "cut"])]
            if random.random() < 0.5
            else []
        )
        more += ["--row", random.choice(["0", "1", "-1"])] if random.random() < 0.2 else []
        more += ["--validation", str(world / "rows.jsonl")] if random.random() < 0.2 else []
        return ["data", "check", file, *base, *more, *(["--json"] if random.random() < 0.3 else [])]
    if what < 0.9:
        metric = random.choice("exact_match field_f1 accuracy rougeL,bleu json_validity".split())
        more += ["--metrics", metric] if random.random() < 0.7 else []
        more += ["--max-new-tokens", "2", *(["--json"] if random.random() < 0.5 else [])]
        return ["evaluate", "--data", file, *base, *more]
    more = f"--steps 1 --batch 2 --set method.rank=1 --quiet --out {folder}/out".split()
    more += ["--set", f"data.long_rows={random.choice(['refuse', 'drop', 'cut'])}"]
    more += ["--length", random.choice(["8", "64"])]
    more += ["--validation", str(world / "rows.jsonl")] if random.random() < 0.5 else []
    return ["train", "--data", file, *base, *more]


# --- templates ---

PLAIN = """
{% for m in messages %}
{% endfor %}
{{ m.content }}
{{ m['role'] }}
{{ messages[0].content }}
{% if add_generation_prompt %}
{% endif %}
{% else %}
{{ bos_token }}
{{ eos_token }}
{{ tools | tojson }}
{% set x = namespace(a=1) %}
{{ x.a }}
{{ raise_exception('no') }}
{{ strftime_now('%Y') }}
{{ strftime_now(1) }}
{% generation %}
{% endgeneration %}
{{ m.tool_calls[0].function.name }}
{{ m.content | trim }}
{{ m.content.split('</think>')[-1] }}
{{ 'a' * 40000 }}
{{ 1 / 0 }}
{{ undefined.x }}
{{ messages | length }}
{{ (messages | last).content }}
{% macro f(x) %}
{% endmacro %}
{{ f(1) }}
{% break %}
{{ loop.index }}
{{ m | tojson(indent=2) }}
<|im_start|>
{{ m.content[::-1] }}
{{ m.content | upper }}
{# {{ #}
{%-
}}
{{ dict(a=1).items() | list }}
{{ [1] * 100000 }}
{{ m.content.encode() }}
{{ range(10) | list }}
{% for a in range(50) %}
{{ messages | map(attribute='content') | join }}
""".strip().split("\n")
FRAGMENTS = [*PLAIN, "{{ '\\ud83d' }}", "{{ '\x00' }}", "\udc00", "<|im_end|>\n"]
COMPLETE = [text for text in FRAGMENTS if text.startswith("{{") or not text.startswith("{")]


def templates(random: Random, folder: Path, world: Path) -> list[str]:
    base = linked_base(folder, world / "base", "chat_template.jinja", "tokenizer_config.json")
    good = (world / "base" / "chat_template.jinja").read_text(encoding="utf-8")
    if random.random() < 0.4:
        source = "".join(random.choice(FRAGMENTS) for _ in range(random.randint(1, 12)))
    else:
        pieces = re.split(r"(?=\{[{%])", good)
        at = random.randrange(len(pieces))
        new = random.choice([*FRAGMENTS, *COMPLETE, *COMPLETE])
        source = "".join([*pieces[:at], new, *pieces[at + (random.random() < 0.2) :]])
    data = source.encode("utf-8", "surrogatepass")
    data = torn(random, data) if random.random() < 0.1 else data
    config = json.loads((world / "base" / "tokenizer_config.json").read_text())
    if random.random() < 0.6:
        (base / "chat_template.jinja").write_bytes(data)
    else:
        named = [
            {"name": name, "template": source}
            for name in random.choice([["default"], ["tool_use"], ["default", "a"]])
        ]
        config["chat_template"] = random.choice([source, named, odd(random)])
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    more = ["--json"] if random.random() < 0.5 else []
    if random.random() < 0.7:
        return ["data", "check", str(world / "rows.jsonl"), "--base", str(base), *more]
    if random.random() < 0.5:
        line = f"evaluate --data {world}/few.jsonl --base {base} --metrics exact_match".split()
        line += ["--max-new-tokens", "2"]
        return [*line, *more]
    asked = random.choice(["hello", *TEXTS[-10:], "<|im_end|>"])
    return [*f"generate --base {base} --max-new-tokens 2".split(), *more, spoken(asked)]


def linked_base(folder: Path, of: Path, *without: str) -> Path:
    """A folder of links to a base's files, but for those that the caller writes."""
    base = folder / "base"
    base.mkdir()
    for file in of.iterdir():
        if file.name not in without:
            (base / file.name).symlink_to(file)
    return base
