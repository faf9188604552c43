"""What prompt lookup changes: decoding speed with lookup on and off.

    python benchmarks/lookup.py                                       edits and stories, by the base
    python benchmarks/lookup.py --adapter runs/e2e --data held.jsonl  answers of an adapter too
    OMP_NUM_THREADS=1 python benchmarks/lookup.py --processor-time    on a machine that is busy

Greedy, smollm2-135m in bf16, answers up to 160 tokens. At one row, an engine answers the prompts in
turn. The two modes alternate within a turn, after one turn that is not counted. Prints, for each
task and number of rows, milliseconds a token with and without lookup from the second new token on
(medians), the ratio of the two (median, least, most), and tokens a step. Both modes must give the
same tokens.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import veneer
from veneer.base import Base
from veneer.data.template.template import ChatTemplate
from veneer.decoding.engine import Engine, bytes_per_token
from veneer.decoding.schedule.adapters import FixedAdapters
from veneer.decoding.schedule.block_names import Identity
from veneer.decoding.schedule.lookup import LookupMode
from veneer.decoding.schedule.sequence import Request

NEW = 160
PARAGRAPHS = [
    "The old bridge crosses the river near the mill. In spring the water rises to the third step,"
    " and the boats cannot pass below the arch. Every year the town talks about a new bridge.",
    "Our store opens at nine and closes at six. On Sundays we are closed. You can return goods"
    " within thirty days if you still have the receipt, and we refund the price in full.",
    "def area(width, height):\n    result = width * height\n    print(result)\n    return result\n"
    "\ndef volume(width, height, depth):\n    return area(width, height) * depth",
    "The committee met on Tuesday. It agreed on the budget for the school, on the date of the fair,"
    " and on the colour of the new benches. The next meeting takes place in November.",
]
EDIT = "Repeat the following text word for word, without any change:\n\n{}"
STORY = "Write a story about {}."
SUBJECTS = ["a fox and the moon", "a clock that stops", "a lighthouse", "the last train home"]


def tasks(base: Base, data: Path | None) -> dict[str, tuple[list[list[int]], Identity]]:
    """Task -> prompts and who answers them."""
    template = ChatTemplate(base.tokenizer)

    def prompts(texts: list[str]) -> list[list[int]]:
        return [template.encode_prompt([{"role": "user", "content": text}]) for text in texts]

    made: dict[str, tuple[list[list[int]], Identity]] = {
        "edit": (prompts([EDIT.format(text) for text in PARAGRAPHS]), ()),
        "story": (prompts([STORY.format(text) for text in SUBJECTS]), ()),
    }
    if data is not None:
        rows = [json.loads(line)["messages"] for line in data.read_text().splitlines()]
        made["adapter"] = prompts([row[0]["content"] for row in rows]), (("adapter", 1.0),)
    return made


def answer(
    base: Base,
    groups: list[list[list[int]]],
    who: Identity,
    lookup: LookupMode,
    clock: Callable[[], float],
) -> tuple[float, int, int, list[list[int]]]:
    """Answers groups of prompts in turn. Returns seconds, tokens and steps after the first tokens
    of each group, and the answers."""
    places = max(sum(len(ids) + NEW + 64 for ids in group) for group in groups)
    applied = {who: base.routing.applied(who)} if who else {}
    engine = Engine(
        base,
        budget_bytes=places * bytes_per_token(base),
        adapters=FixedAdapters(applied),
        lookup=lookup,
    )
    stops = frozenset([base.tokenizer.eos_token_id])
    seconds, tokens, steps, texts = 0.0, 0, 0, []
    for group in groups:
        answers = [
            engine.add(Request(prompt=tuple(ids), max_new_tokens=NEW, adapter=who, stops=stops))[0]
            for ids in group
        ]
        while not all(answer.new for answer in answers):
            engine.step(0.0)
        first, start = sum(len(answer.new) for answer in answers), clock()
        while not engine.scheduler.idle:
            engine.step(0.0)
            steps += 1
        seconds += clock() - start
        tokens += sum(len(answer.new) for answer in answers) - first
        texts += [answer.new for answer in answers]
    return seconds, tokens, steps, texts


def measure(
    base: Base,
    prompts: list[list[int]],
    who: Identity,
    rows: int,
    turns: int,
    clock: Callable[[], float],
) -> str:
    groups = [
        [prompts[(start + row) % len(prompts)] for row in range(rows)]
        for start in range(0, max(len(prompts), rows), rows)
    ]
    modes: tuple[LookupMode, LookupMode] = ("off", "auto")
    milliseconds: dict[str, list[float]] = {mode: [] for mode in modes}
    tokens_a_step, texts = {}, {}
    for turn in range(turns + 1):
        for mode in modes if turn % 2 else modes[::-1]:
            seconds, tokens, steps, texts[mode] = answer(base, groups, who, mode, clock)
            tokens_a_step[mode] = tokens / steps
            milliseconds[mode] += [1e3 * seconds / tokens] if turn else []
        if texts["off"] != texts["auto"]:
            raise SystemExit("lookup changed a text")
    ratios = [off / auto for off, auto in zip(*milliseconds.values(), strict=True)]
    off, auto = (statistics.median(values) for values in milliseconds.values())
    return (
        f"{rows:2} rows: {off:6.2f} ms a token without, {auto:6.2f} with lookup;"
        f" {statistics.median(ratios):.2f} times ({min(ratios):.2f} to {max(ratios):.2f}),"
        f" {tokens_a_step['auto'] / tokens_a_step['off']:.2f} times the tokens a step"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--adapter", help="an adapter that answers the rows of --data")
    parser.add_argument("--data", type=Path, help="rows whose first turns are prompts")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--processor-time", action="store_true", help="count this process's alone")
    options = parser.parse_args()
    clock = time.process_time if options.processor_time else time.perf_counter
    base = veneer.load(options.base)
    if options.adapter:
        base.load_adapter(options.adapter, name="adapter")
    for name, (prompts, who) in tasks(base, options.data).items():
        for rows in options.rows:
            print(f"{name:8}", measure(base, prompts, who, rows, options.turns, clock), flush=True)


if __name__ == "__main__":
    main()
