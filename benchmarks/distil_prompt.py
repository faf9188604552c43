"""Rows for docs/guides/distil.md: a prompt of some 1,000 tokens with examples of E2E NLG,
questions, and held-out and test rows with and without the prompt.

`recombined.txt` has questions that are in no file: the attributes of a question, each with a value
that another question gives it. `more_held_out` and `more_test` follow the first 60 rows of each.

    python benchmarks/distil_prompt.py --data DATA --out ROWS --questions 640

DATA holds `e2e/devel-fixed.no-ol.csv` and `e2e/test-fixed.csv` (Dušek, Howcroft, Rieser 2019). The
commands that train and measure are in docs/results/distil.json.
"""

import argparse
import csv
import json
import random
import re
from collections.abc import Set
from pathlib import Path

EXAMPLES, HELD_OUT, TEST = 13, 60, 60
MORE_HELD_OUT, MORE_TEST = 120, 300
TASK = (
    "You turn the attributes of a restaurant into one natural sentence. Name every attribute, add"
    " nothing, and answer with the sentence alone.\n\nExamples:\n"
)


def read_sentences(file: Path) -> dict[str, list[str]]:
    """Returns the sentences of each distinct set of attributes."""
    sentences: dict[str, list[str]] = {}
    with file.open(encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines):
            sentences.setdefault(row["mr"], []).append(row["ref"])
    return sentences


def recombine(questions: list[str], known: Set[str], count: int) -> list[str]:
    """Returns new questions, whose values are drawn from those of all questions."""
    generator = random.Random(2)
    split = [re.findall(r"(\w[\w ]*)\[(.*?)\]", text) for text in questions]
    values: dict[str, list[str]] = {}
    for pairs in split:
        for name, value in pairs:
            if value not in values.setdefault(name, []):
                values[name].append(value)
    new: dict[str, None] = {}
    while len(new) < count:
        names = [name for name, _ in generator.choice(split)]
        text = ", ".join(f"{name}[{generator.choice(values[name])}]" for name in names)
        if text not in known:
            new[text] = None
    return list(new)


def write_questions(file: Path, attributes: list[str]) -> None:
    file.write_text("".join(f"Attributes: {text}\n" for text in attributes), encoding="utf-8")


def write_rows(
    folder: Path,
    name: str,
    sentences: dict[str, list[str]],
    attributes: list[str],
    system: dict[str, str],
) -> None:
    """Writes rows with up to 8 references, once without the prompt and once behind it."""
    for suffix, before in (("", []), ("_prompted", [system])):
        rows = [
            {
                "messages": [
                    *before,
                    {"role": "user", "content": f"Attributes: {text}"},
                    {"role": "assistant", "content": sentences[text][0]},
                ],
                "references": sentences[text][1:8],
            }
            for text in attributes
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}{suffix}.jsonl").write_text(lines, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--questions", type=int, default=640)
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    generator = random.Random(1)
    known = read_sentences(args.data / "e2e" / "devel-fixed.no-ol.csv")
    attributes = sorted(known)
    generator.shuffle(attributes)
    prompt = TASK + "".join(
        f"\nAttributes: {text}\nSentence: {known[text][0]}\n" for text in attributes[:EXAMPLES]
    )
    (args.out / "prompt.txt").write_text(prompt, encoding="utf-8")
    questions = attributes[EXAMPLES : EXAMPLES + args.questions]
    write_questions(args.out / "questions.txt", questions)
    test = read_sentences(args.data / "e2e" / "test-fixed.csv")
    test_attributes = sorted(test)
    generator.shuffle(test_attributes)
    recombined = recombine(questions, known.keys() | test.keys(), args.questions)
    write_questions(args.out / "recombined.txt", recombined)
    system = {"role": "system", "content": prompt.strip()}
    write_rows(args.out, "held_out", known, attributes[-HELD_OUT:], system)
    more = attributes[-HELD_OUT - MORE_HELD_OUT : -HELD_OUT]
    write_rows(args.out, "more_held_out", known, more, system)
    write_rows(args.out, "test", test, test_attributes[:TEST], system)
    write_rows(args.out, "more_test", test, test_attributes[TEST : TEST + MORE_TEST], system)


if __name__ == "__main__":
    main()
