"""Files to rows: every broken row is found and named by its line; what is read is what stands
there."""

from __future__ import annotations

import csv
import gzip
import json
import re
import sys
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from veneer.data.examples import Problem, refusal
from veneer.data.files import parquet, sources, tables
from veneer.data.files.records import MAX_COLUMNS
from veneer.data.files.sources import read_rows, scan_rows
from veneer.errors import DataError


def chat(question: str = "Why?", answer: str = "So.") -> dict[str, object]:
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


GOOD = json.dumps(chat()).encode()
BROKEN = {
    "CP1252 text": (
        json.dumps(chat()).replace("Why", "caf\\u00e9").encode().replace(b"\\u00e9", b"\xe9"),
        "D102",
    ),
    "a NUL byte": (GOOD.replace(b"W", b"\0"), "D102"),
    "half a surrogate pair": (GOOD.replace(b"Why", b"\\ud83d"), "D102"),
    "a cut line": (GOOD[:-10], "D103"),
    "two values": (GOOD + b" " + GOOD, "D103"),
    "NaN": (b'{"score": NaN, ' + GOOD[1:], "D103"),
    "a number of 5,000 digits": (b'{"n": ' + b"9" * 5000 + b", " + GOOD[1:], "D103"),
    "deep nesting": (b"[" * 100_000, "D103"),
    "keys nested 600 deep": (
        b'{"score": ' + b'{"a":' * 600 + b"1" + b"}" * 600 + b", " + GOOD[1:],
        "D103",
    ),
    "a number beyond all": (b'{"score": 1e999, ' + GOOD[1:], "D103"),
    "half a surrogate pair beside the text": (
        GOOD.replace(b'"role"', b'"na\\udc00me": 1, "role"', 1),
        "D102",
    ),
    "a key twice": (b'{"messages": [], ' + GOOD[1:], "D104"),
    "an inner key twice": (
        GOOD.replace(b'"role": "user"', b'"role": "user", "role": "system"'),
        "D104",
    ),
    "a list": (b"[1, 2]", "D105"),
    "a string": (b'"hello"', "D105"),
    "unknown columns": (b'{"question": "a", "answer": "b"}', "D107"),
    "an empty answer": (json.dumps(chat(answer=" \n")).encode(), "D101"),
    "no answer": (json.dumps({"messages": chat()["messages"][:1]}).encode(), "D112"),  # type: ignore[index]
}


def write(path: Path, *lines: bytes) -> Path:
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def found(problems: list[Problem]) -> dict[int, str]:
    return {line: problem.code for problem in problems for line in problem.lines}


@pytest.mark.parametrize(("line", "code"), BROKEN.values(), ids=BROKEN)
def test_a_broken_line_is_named_by_its_number_and_the_lines_around_it_are_read(
    tmp_path: Path, line: bytes, code: str
) -> None:
    file = write(tmp_path / "rows.jsonl", GOOD, b"", line, GOOD)
    rows, problems = scan_rows(file)
    assert found(problems) == {3: code}
    assert [row.ref.line for row in rows] == [1, 4]
    with pytest.raises(DataError, match=rf"{code} .*rows\.jsonl:3  "):
        read_rows(file)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([None, *BROKEN]), min_size=1, max_size=30))
def test_every_broken_line_is_reported_with_its_number(
    tmp_path_factory: pytest.TempPathFactory, kinds: list[str | None]
) -> None:
    lines = [GOOD if kind is None else BROKEN[kind][0] for kind in kinds]
    rows, problems = scan_rows(write(tmp_path_factory.mktemp("rows") / "rows.jsonl", *lines))
    assert found(problems) == {
        n: BROKEN[kind][1] for n, kind in enumerate(kinds, 1) if kind is not None
    }
    assert [row.ref.line for row in rows] == [n for n, kind in enumerate(kinds, 1) if kind is None]


def test_an_error_shows_twenty_faults_and_counts_the_rest() -> None:
    problems = [Problem("D107", "rows.jsonl", f"fault {n}", (n,)) for n in range(1, 51)]
    error = refusal("rows.jsonl cannot be read", problems)
    assert len(error.faults) == 21
    assert error.faults[-1] == "… and 30 more"


def test_equal_faults_of_many_rows_are_one_line_that_names_them_all() -> None:
    problems = [Problem("D101", "rows.jsonl", "empty", (n,)) for n in (9, 1, 2, 3, 7)]
    assert refusal("x", problems).faults == ["D101 rows.jsonl:1-3, 7, 9 (5 rows)  empty"]


def test_a_byte_order_mark_and_windows_line_ends_are_no_fault(tmp_path: Path) -> None:
    for name, content in {
        "rows.jsonl": b"\xef\xbb\xbf" + GOOD + b"\r\n" + GOOD + b"\r\n",
        "rows.json": b"\xef\xbb\xbf[" + GOOD + b",\r\n" + GOOD + b"]",
        "rows.csv": b"\xef\xbb\xbfprompt,completion\r\nWhy?,So.\r\nWhy?,So.\r\n",
    }.items():
        (tmp_path / name).write_bytes(content)
        assert [row.messages for row in read_rows(tmp_path / name)] == [chat()["messages"]] * 2


def test_utf_16_is_named(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(GOOD.decode().encode("utf-16"))
    with pytest.raises(DataError, match="UTF-16"):
        read_rows(tmp_path / "rows.jsonl")


def test_a_huge_line_is_skipped_and_the_next_keeps_its_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "MAX_LINE_BYTES", 1000)
    huge = json.dumps(chat(answer="x" * 5000)).encode()
    rows, problems = scan_rows(write(tmp_path / "rows.jsonl", GOOD, huge, huge, GOOD))
    assert found(problems) == {2: "D106", 3: "D106"}
    assert [row.ref.line for row in rows] == [1, 4]


def test_a_huge_row_of_a_csv_is_skipped_and_the_next_keeps_its_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "MAX_LINE_BYTES", 1000)
    huge, lines = b"a," + b"x" * 5000, b'b,"' + b"\n".join([b"y" * 600] * 2)
    rows, problems = scan_rows(
        write(tmp_path / "rows.csv", b"prompt,completion", b"a,b", huge, lines, b"c,d")
    )
    assert found(problems) == {3: "D106", 4: "D106"}
    assert [row.ref.line for row in rows] == [2, 6]


def test_a_small_csv_file_with_a_large_line_takes_little_memory(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "rows.csv.gz", "wb", compresslevel=1) as file:
        file.write(b"prompt,completion\na,")
        for _ in range(128):
            file.write(b"x" * 2**20)
    tracemalloc.start()
    try:
        _, problems = scan_rows(tmp_path / "rows.csv.gz")
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found(problems) == {2: "D106"} and most < 80 * 2**20


@pytest.mark.parametrize(
    "layout",
    [
        "[%s, %s]",
        '{"version": {"n": 1}, "data": [%s, %s]}',
        '{"data": [%s, %s] , "n": [1], "m": "]"}\n',
        " [\n%s\n,%s]\n",
    ],
)
def test_a_json_file_is_a_list_or_holds_one_under_data(tmp_path: Path, layout: str) -> None:
    (tmp_path / "rows.json").write_text(layout % (json.dumps(chat("A")), json.dumps(chat("B"))))
    rows = read_rows(tmp_path / "rows.json")
    assert [(row.ref.line, row.messages[0]["content"]) for row in rows] == [(1, "A"), (2, "B")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("%s\n%s", "rename it to .jsonl"),
        ('{"rows": [%s, %s]}', "keys: rows"),
        ("[%s, %s", "cut off"),
        ("[%s %s]", "comma"),
        ("[%s]\n[%s]", "rows.json:1  something follows the list of rows"),
        ('{"data": [%s]}{"data": [%s]}', "something follows the list of rows"),
        ('{"data": [%s], "n": 1', "does not end: the file may be cut off"),
        ('{"data": [%s]', "does not end: the file may be cut off"),
        ('{"data": [%s], "n" 1}', "does not end"),
        ('{"data": [%s], "data": [%s]}', 'two lists are called "data"'),
        ("3", "neither a list"),
        ("[%s, 7, %s]", "rows.json:2  is a number"),
        ('[%s, {"a": 1, "a": 2}, %s]', "rows.json:2  duplicate key 'a'"),
        ("[]", "no rows"),
        ("", "no rows"),
    ],
)
def test_what_is_wrong_with_a_json_file_is_said(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "rows.json").write_text(text.replace("%s", json.dumps(chat())))
    with pytest.raises(DataError, match=message):
        read_rows(tmp_path / "rows.json")


def test_csv_rows_are_numbered_by_their_first_line(tmp_path: Path) -> None:
    lines = [
        b"prompt,completion",
        b'"two',
        b'lines",yes',
        b"only one",
        "ä,ö".encode(),
        b"a,\xe9",
        b"a,b,c",
        b"",
        b"last,row",
    ]
    rows, problems = scan_rows(write(tmp_path / "rows.csv", *lines))
    assert found(problems) == {4: "D105", 6: "D102", 7: "D105"}
    assert [(row.ref.line, row.messages[0]["content"]) for row in rows] == [
        (2, "two\nlines"),
        (5, "ä"),
        (9, "last"),
    ]


AS_SPREADSHEETS_WRITE: dict[str, tuple[str, str, list[str]]] = {
    "commas, UTF-8": (",", "utf-8", []),
    "commas, UTF-8 with a mark": (",", "utf-8-sig", []),
    "semicolons, UTF-8 with a mark": (";", "utf-8-sig", ["separated by semicolons"]),
    "semicolons, CP1252": (";", "cp1252", ["separated by semicolons", "Windows text .*'Größe €'"]),
    "commas, CP1252": (",", "cp1252", ["Windows text .*'Größe €'"]),
    "tabs, UTF-16": ("\t", "utf-16", ["UTF-16", "separated by tabs"]),
}


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
@pytest.mark.parametrize(
    ("separator", "encoding", "said"), AS_SPREADSHEETS_WRITE.values(), ids=AS_SPREADSHEETS_WRITE
)
def test_what_a_spreadsheet_writes_is_read_and_how_is_said_once(
    tmp_path: Path, separator: str, encoding: str, said: list[str], ends: str
) -> None:
    table = [
        ["prompt", "completion"],
        ["plain", "1"],
        ["Größe €", "Maß, 2; drei"],
        ['a "quoted"\nline', "groß"],
    ]
    file = tmp_path / "rows.csv"
    with file.open("w", encoding=encoding, newline="") as stream:
        csv.writer(stream, delimiter=separator, lineterminator=ends).writerows(table)
    rows, problems = scan_rows(file)
    assert [[message["content"] for message in row.messages] for row in rows] == table[1:]
    assert [row.ref.line for row in rows] == [2, 3, 4]
    assert len(problems) == len(said)
    for problem, words in zip(problems, said, strict=True):
        assert (problem.code, problem.fatal, problem.lines) == ("D120", False, ())
        assert re.search(words, problem.message)
    assert len(read_rows(file)) == 3


def test_a_table_of_two_encodings_is_one_finding(tmp_path: Path) -> None:
    windows, utf8 = "Größe,2".encode("cp1252"), "Größe,2".encode()
    head = b"prompt,completion"
    _, problems = scan_rows(write(tmp_path / "a.csv", head, windows, *[utf8] * 40))
    assert [(p.code, len(p.lines)) for p in problems if p.fatal] == [("D102", 40)]
    rows, problems = scan_rows(write(tmp_path / "b.csv", head, utf8, *[windows] * 40))
    assert [(p.code, len(p.lines)) for p in problems] == [("D102", 40)] and len(rows) == 1
    _, problems = scan_rows(write(tmp_path / "c.csv", head, b"a\x81,b", b"\x90bb,b"))
    assert [(p.code, len(p.lines)) for p in problems] == [("D102", 2)]


def test_lines_that_are_not_utf_8_are_one_finding(tmp_path: Path) -> None:
    lines = [json.dumps(chat("x" * n)).encode() + b"\xe9" for n in range(30)]
    _, problems = scan_rows(write(tmp_path / "rows.jsonl", *lines))
    assert [(problem.code, len(problem.lines)) for problem in problems] == [("D102", 30)]


@pytest.mark.parametrize("start", ["[", " [ \n", "\ufeff["])
def test_a_list_that_is_called_jsonl_is_read_and_that_is_said(tmp_path: Path, start: str) -> None:
    body = [json.dumps(chat(f"row {n}"), indent=2) for n in range(3)]
    (tmp_path / "rows.jsonl").write_text(start + ",\n".join(body) + "]\n", encoding="utf-8")
    rows, problems = scan_rows(tmp_path / "rows.jsonl")
    assert [row.ref.line for row in rows] == [1, 2, 3]
    assert rows[2].messages[0]["content"] == "row 2"
    assert [(problem.code, problem.fatal) for problem in problems] == [("D120", False)]
    (tmp_path / "rows.jsonl").write_text(start + ",\n".join(body), encoding="utf-8")
    _, problems = scan_rows(tmp_path / "rows.jsonl")
    assert [problem.code for problem in problems if problem.fatal] == ["D103"]


@pytest.mark.parametrize("name", ["rows.xlsx", "rows.XLS", "rows.ods"])
def test_a_workbook_is_told_what_to_save(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"PK")
    with pytest.raises(DataError, match="workbook") as fault:
        read_rows(tmp_path / name)
    assert "CSV UTF-8" in fault.value.next_step


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompt,prompt\na,b\n", "two columns are called 'prompt'"),
        ('prompt,completion\n"a,b\n', "rows.csv:2  is not CSV"),
        (
            "text,category\nLost card,card_lost\n",
            "rename column 'text' to 'prompt' and 'category' to 'completion'",
        ),
        ("mr,ref\na,b\n", "rename column 'mr' to 'prompt' and 'ref' to 'completion'"),
        ("prompt,answer\na,b\n", "rename column 'answer' to 'completion'"),
        ("a,b,c\n1,2,3\n", "Name the column with the question 'prompt'"),
    ],
)
def test_what_is_wrong_with_a_csv_file_is_said(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "rows.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        read_rows(tmp_path / "rows.csv")


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_more_columns_than_the_limit_are_refused_and_few_names_are_shown(
    tmp_path: Path, suffix: str
) -> None:
    def write_columns(count: int) -> Path:
        names, file = [f"{place}" * 20 for place in range(count)], tmp_path / f"rows{suffix}"
        if suffix == ".csv":
            file.write_text(f"text,{','.join(names)}\nOnce.{',1' * count}\n")
        else:
            arrow, table = pytest.importorskip("pyarrow"), {"text": ["Once."]}
            pytest.importorskip("pyarrow.parquet").write_table(
                arrow.table(table | {name: [1] for name in names}), file
            )
        return file

    with pytest.raises(DataError, match="has 10,001 columns, the limit is 10,000") as refused:
        read_rows(write_columns(MAX_COLUMNS))
    assert "D106" in str(refused.value)
    with pytest.raises(DataError, match=r"text would leave out 0000.*, …") as refused:
        read_rows(write_columns(MAX_COLUMNS - 1))
    assert "D107" in str(refused.value) and len(str(refused.value)) < 2000


def test_parquet_rows_equal_the_rows_they_were_written_from(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    plain = chat()["messages"]
    with_call = [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "2."},
    ]
    table = pyarrow.table({"messages": [plain, with_call], "id": [1, 2]})
    parquet.write_table(table, tmp_path / "rows.parquet")
    assert [row.messages for row in read_rows(tmp_path / "rows.parquet")] == [plain, with_call]


def test_times_that_python_does_not_know_hide_no_parquet_rows(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    times = {
        "made": pyarrow.array([1], pyarrow.timestamp("ns")),
        "far": pyarrow.array([2**62], pyarrow.timestamp("ms", tz="UTC")),
        "day": pyarrow.array([2**30], pyarrow.date32()),
        "took": pyarrow.array([3], pyarrow.duration("ns")),
        "none": pyarrow.array([None], pyarrow.timestamp("ns")),
    }
    parquet.write_table(
        pyarrow.table({"prompt": ["a"], "completion": ["b"], **times}), tmp_path / "rows.parquet"
    )
    (row,) = read_rows(tmp_path / "rows.parquet")
    assert [message["content"] for message in row.messages] == ["a", "b"]


def test_two_columns_of_one_name_are_refused_in_parquet_too(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    columns = [pyarrow.array([text]) for text in "abc"]
    table = pyarrow.Table.from_arrays(columns, names=["prompt", "prompt", "completion"])
    parquet.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"D105 .*two columns are called 'prompt'"):
        read_rows(tmp_path / "rows.parquet")


def test_a_small_parquet_file_with_large_rows_takes_little_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet as writer

    monkeypatch.setattr(parquet, "MAX_LINE_BYTES", 2**20)
    monkeypatch.setattr(parquet, "BATCH_BYTES", 2**20)
    answer = {"role": "assistant", "content": "So."}
    turn = {"role": "user", "content": "x" * 2**13}  # stored once, named by every row
    rows = [[turn, answer], [turn] * 200, *([[turn, answer]] * 900)]
    writer.write_table(pyarrow.table({"messages": rows}), path := tmp_path / "rows.parquet")
    assert path.stat().st_size < 2**16
    kept: list[Any] = []
    tracemalloc.start()
    for row in sources.iterate_rows(path):
        kept.append((row.code, row.lines) if isinstance(row, Problem) else len(row.messages))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept == [2, ("D106", (2,)), *([2] * 900)] and peak < 5 * 2**20
    with path.open("rb") as file:
        assert parquet.holds_more_than(file, 2**23)
        assert not parquet.holds_more_than(file, 2**24)


def test_text_of_another_type_counts_as_text_in_parquet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet as writer

    monkeypatch.setattr(parquet, "MAX_LINE_BYTES", 1000)
    text = pyarrow.array(["x" * 1001, "{}"])
    for kind in (pyarrow.json_(), pyarrow.large_string(), pyarrow.string_view()):
        column = (
            pyarrow.ExtensionArray.from_storage(kind, text)
            if isinstance(kind, pyarrow.BaseExtensionType)
            else text.cast(kind)
        )
        writer.write_table(pyarrow.table({"text": column}), tmp_path / "rows.parquet")
        long, short = sources.iterate_rows(tmp_path / "rows.parquet")
        assert isinstance(long, Problem) and long.code == "D106" and not isinstance(short, Problem)


@pytest.mark.parametrize(
    ("bound", "value", "message"),
    [
        ("MAX_PARQUET_ROWS", 3, "the file has 4 rows, the limit is 3"),
        ("MAX_GROUP_VALUES", 3, "lists of row group 1 hold 4 more values than rows, .* is 3"),
        ("MAX_UNPACKED_RATIO", 1, "row group 1 unpacks"),
    ],
)
def test_a_row_group_that_unpacks_to_too_much_is_refused_by_its_metadata(
    bound: str, value: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet as writer

    monkeypatch.setattr(parquet, "MIN_UNPACKED_BYTES", 0)
    monkeypatch.setattr(parquet, bound, value)
    prompts, pairs = ["x" * 1000 + str(n) for n in range(4)], [[1, 2]] * 2 + [None] * 2
    table = pyarrow.table({"prompt": prompts, "a": pairs, "b": pairs})
    writer.write_table(table, tmp_path / "rows.parquet", use_dictionary=False)
    with pytest.raises(DataError, match=message):
        read_rows(tmp_path / "rows.parquet")


def test_a_json_file_that_unpacks_to_too_much_or_is_nested_too_deeply_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match="nested deeper than 64 levels"):
        read_rows(tmp_path / "rows.json")
    monkeypatch.setattr(sources, "MAX_JSON_FILE_BYTES", 1000)
    (tmp_path / "rows.json.gz").write_bytes(gzip.compress(b"[" + b" " * 1000 + b"]"))
    with pytest.raises(DataError, match=r"holds more than 1,000 bytes.*\n.*jsonl"):
        read_rows(tmp_path / "rows.json.gz")


def test_a_file_that_is_not_parquet_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(DataError, match="the Parquet file cannot be read"):
        read_rows(tmp_path / "rows.parquet")


def test_without_pyarrow_the_error_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"pip install 'veneer\[parquet\]'"):
        read_rows(tmp_path / "rows.parquet")


def test_unknown_kinds_missing_and_empty_files_are_told_apart(tmp_path: Path) -> None:
    for name in ("rows.txt", "rows", "rows.jsonl"):
        (tmp_path / name).write_text("")
    for name, message in {
        "rows.txt": "extension '.txt'",
        "rows": "no extension",
        "rows.jsonl": "no rows",
        "other.jsonl": "file not found",
        "nowhere/rows.jsonl": "does not exist either",
    }.items():
        with pytest.raises(DataError, match=message):
            read_rows(tmp_path / name)
    with pytest.raises(DataError, match="unknown format 'chatml'"):
        read_rows(tmp_path / "rows.jsonl", "chatml")


def test_a_file_of_several_layouts_is_refused_with_lines_of_each(tmp_path: Path) -> None:
    text = b'{"text": "plain"}'
    with pytest.raises(DataError) as error:
        read_rows(write(tmp_path / "rows.jsonl", GOOD, text, GOOD, text, text))
    assert "rows.jsonl:1, 3 (2 rows)  2 rows are chat" in str(error.value)
    assert "rows.jsonl:2, 4-5 (3 rows)  3 rows are text" in str(error.value)


def test_a_key_that_stands_there_a_hundred_thousand_times_costs_no_more_than_others(
    tmp_path: Path,
) -> None:
    twice = b"{" + b", ".join(b'"k%d": 1' % (number // 2) for number in range(100_000)) + b"}"
    _, problems = scan_rows(
        write(tmp_path / "rows.jsonl", twice)
    )  # compared one by one, it takes minutes
    assert found(problems) == {1: "D104"} and len(problems[0].message) < 200


def test_a_csv_field_may_be_as_long_as_a_line(tmp_path: Path) -> None:
    long = "word " * 60_000
    (tmp_path / "rows.csv").write_text(f'prompt,completion\na,"{long}"\n')
    (row,) = read_rows(tmp_path / "rows.csv")
    assert row.messages[1]["content"] == long


def _labelled(suffix: str, labels: Sequence[Any]) -> bytes:
    """Rows of prompt, completion and these labels, as a file of this kind."""
    if suffix == ".csv":
        return b"prompt,completion,label\n" + b"".join(
            f"a {n},b,{v}\n".encode() for n, v in enumerate(labels)
        )
    rows = [
        {"prompt": f"a {n}", "completion": "b", "label": label} for n, label in enumerate(labels)
    ]
    return b"\n".join(json.dumps(row).encode() for row in rows)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_rows_that_booleans_mark_as_good_and_bad_answers_are_refused(
    tmp_path: Path, suffix: str
) -> None:
    file = write(tmp_path / f"rows{suffix}", _labelled(suffix, [True, False, True, False]))
    rows, problems = scan_rows(file)
    at = (3, 5) if suffix == ".csv" else (2, 4)
    assert len(rows) == 4 and [(p.code, p.lines, p.fatal) for p in problems] == [("D116", at, True)]
    assert "2 rows of the set have true" in problems[0].message
    assert len(read_rows(file, columns={"label": None})) == 4


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_answers_that_are_all_marked_as_bad_are_refused(tmp_path: Path, suffix: str) -> None:
    file = write(tmp_path / f"rows{suffix}", _labelled(suffix, [False, "", False]))
    _, (problem,) = scan_rows(file)
    assert (problem.code, len(problem.lines)) == ("D116", 2)
    assert "no row of the set have true" in problem.message
    rated = write(tmp_path / f"rated{suffix}", _labelled(suffix, [False, False]))
    assert [row.liked for row in read_rows(rated, kind="ratings")] == [False, False]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
@pytest.mark.parametrize(
    "labels", [[True, True], [0, 1], ["spam", "ham"], [True, False, "unknown"]]
)
def test_other_labels_are_metadata(tmp_path: Path, suffix: str, labels: list[Any]) -> None:
    file = write(tmp_path / f"rows{suffix}", _labelled(suffix, labels))
    assert len(read_rows(file)) == len(labels)


def test_a_label_marks_answers_over_all_files_of_a_set_and_in_one_layout_alone(
    tmp_path: Path,
) -> None:
    for name, label in (("bad", False), ("good", True)):
        write(tmp_path / f"{name}.jsonl", _labelled(".jsonl", [label, label]))
    _, problems = scan_rows(tmp_path)
    assert [(Path(p.file).name, p.code, p.lines) for p in problems] == [
        ("bad.jsonl", "D116", (1, 2))
    ]
    chats = [json.dumps({**json.loads(GOOD), "label": label}).encode() for label in (True, False)]
    assert len(read_rows(write(tmp_path / "chats.jsonl", *chats))) == 2
