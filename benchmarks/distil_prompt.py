"""Rows for docs/guides/distil.md: a prompt of some 1,000 tokens with examples of E2E NLG,
questions, and test rows with and without the prompt.

    python benchmarks/distil_prompt.py --data DATA --out ROWS

DATA holds `e2e/devel-fixed.no-ol.csv` and `e2e/test-fixed.csv` (Dušek, Howcroft, Rieser 2019). The
commands that train and measure are in docs/results/distil.json.
"""

import argparse
import csv
import json
import random
from pathlib import Path

EXAMPLES, QUESTIONS, TEST = 13, 160, 60
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
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
    asked = attributes[EXAMPLES : EXAMPLES + QUESTIONS]
    (args.out / "questions.txt").write_text(
        "".join(f"Attributes: {text}\n" for text in asked), encoding="utf-8"
    )
    test = read_sentences(args.data / "e2e" / "test-fixed.csv")
    chosen = sorted(test)
    generator.shuffle(chosen)
    system = [{"role": "system", "content": prompt.strip()}]
    for name, before in (("plain", []), ("prompted", system)):
        rows = [
            {
                "messages": [
                    *before,
                    {"role": "user", "content": f"Attributes: {text}"},
                    {"role": "assistant", "content": test[text][0]},
                ],
                "references": test[text][1:8],
            }
            for text in chosen[:TEST]
        ]
        (args.out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
