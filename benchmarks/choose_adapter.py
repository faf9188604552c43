"""Measures how often `model: auto` chooses the right adapter, and what a choice costs.

    python benchmarks/choose_adapter.py --data DATA --out choice.json       under three minutes
    python benchmarks/choose_adapter.py --data DATA --turns 0               without times

DATA holds e2e/, viggo/, banking77/ and wikisql_mlx/ as their authors publish them. Twelve adapters
are served, one for each task: five from these sets, three parts of banking77, four whose questions
are written by rule. The adapters have random values: a choice depends on their training prompts
alone, 16 questions of each task without any instruction. The questions that are asked are others.

right       share of the questions of all tasks that the right adapter answers, and of each task
unknown     share of a task's questions that the base answers if the task has no adapter (all of one
            family are taken away: the three parts of banking77)
general     share of 32 general questions that the base answers
described   right, if the adapters have a sentence as their note and no prompts
first token milliseconds to the first token of a stream, with `model: auto` and with the name of the
            model that answers, in turns; the medians, and the median difference

Intervals are of 95% (Clopper and Pearson).
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import json
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np

import veneer
from veneer.adapters.config import LoRA
from veneer.base import Base
from veneer.evaluation.intervals import interval
from veneer.formats.adapter import manifest_for, write_adapter
from veneer.library.library import Library
from veneer.library.prompts import MOST_PROMPTS, beginning, sample_prompts, write_prompts
from veneer.serve.engine.service import Service
from veneer.serve.http.keys import ApiKeys
from veneer.serve.protocols.request import ChatPrompt, GenerationRequest
from veneer.serve.start import ServeSettings, open_server

Questions = tuple[list[str], list[str]]
"""Training prompts of a task, and questions that are held out."""
Make = Callable[[Path], Questions]
WORDS = (
    "apple river window stone candle garden mirror orange basket winter silver bridge forest pencil"
    " market island hammer violet copper ladder meadow falcon pepper anchor"
).split()
MONTHS = (
    "January February March April May June July August September October November December"
).split()
UNITS = (
    ("miles", "kilometres"),
    ("pounds", "kilograms"),
    ("inches", "centimetres"),
    ("gallons", "litres"),
    ("feet", "metres"),
    ("ounces", "grams"),
)
GENERAL = """Write a short poem about autumn.
Explain how a rainbow forms.
Tell me a joke about cats.
What causes the seasons on Earth?
Translate 'good morning' into Spanish.
How can I sleep better at night?
What is the difference between a virus and a bacterium?
Who was the first person on the moon?
Give me tips for a job interview.
Write an email to my landlord about the broken heating.
What should I see in Rome in two days?
How do I grow tomatoes on a balcony?
Tell me a bedtime story about a dragon.
What is the meaning of the word 'ephemeral'?
What are the symptoms of a cold?
Give me a recipe for pancakes.
Who painted the Mona Lisa?
What happened in 1989 in Berlin?
How can I learn to play the guitar?
Name some synonyms for 'happy'.
Write a slogan for a coffee shop.
How do I remove a red wine stain?
Tell me about the history of the bicycle.
How do I write a good CV?
Explain the rules of chess in brief.
What can you help me with?
Thank you, that was helpful.
What is your name?
Correct the grammar: He go to school every days.
How does the internet work?
What is democracy?
Give me a workout plan for a week.""".split("\n")


def from_csv(folder: str, train: str, test: str, column: str) -> Make:
    def make(data: Path) -> Questions:
        trained, held_out = (
            [row[column].strip() for row in read_csv(data / folder / file)]
            for file in (train, test)
        )
        return trained, held_out

    return make


def read_csv(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def banking(part: str) -> Make:
    """Questions whose intent names this part of banking, and no other of the three."""

    def make(data: Path) -> Questions:
        trained, held_out = (
            [
                row["text"].strip()
                for row in read_csv(data / "banking77" / file)
                if [word for word in ("card", "transfer", "top_up") if word in row["category"]]
                == [part]
            ]
            for file in ("train.csv", "test.csv")
        )
        return trained, held_out

    return make


def wikisql(data: Path) -> Questions:
    trained, held_out = (
        [
            json.loads(line)["text"].rpartition("\nA:")[0]
            for line in (data / "wikisql_mlx" / file).read_text("utf-8").splitlines()
        ]
        for file in ("train.jsonl", "test.jsonl")
    )
    return trained, held_out


def by_rule(write: Callable[[random.Random], str]) -> Make:
    def make(data: Path) -> Questions:
        questions = [write(random.Random(f"{write.__name__} {n}")) for n in range(400)]
        return questions[:200], questions[200:]

    return make


def arithmetic(draw: random.Random) -> str:
    a, b = draw.randint(2, 999), draw.randint(2, 99)
    word, sign = draw.choice([("plus", "+"), ("minus", "-"), ("times", "*")])
    forms = [f"What is {a} {sign} {b}?", f"Compute {a} {word} {b}.", f"{a} {sign} {b} ="]
    return draw.choice([*forms, f"How much is {a} {word} {b}?"])


def dates(draw: random.Random) -> str:
    day, month, year = draw.randint(1, 28), draw.choice(MONTHS), draw.randint(1950, 2030)
    forms = [
        f"Write {day} {month} {year} as an ISO date.",
        f"{month} {day}, {year} in the format YYYY-MM-DD",
        f"Convert the date {day}.{MONTHS.index(month) + 1}.{year} to ISO 8601.",
        f"What is {month} {day} {year} in ISO format?",
    ]
    return draw.choice(forms)


def sorting(draw: random.Random) -> str:
    words = ", ".join(draw.sample(WORDS, draw.randint(4, 8)))
    forms = [f"Sort these words: {words}", f"Put in alphabetical order: {words}"]
    return draw.choice([*forms, f"{words} - from A to Z, please.", f"Alphabetise this: {words}"])


def units(draw: random.Random) -> str:
    one, other = draw.sample(draw.choice(UNITS), 2)
    n = draw.randint(1, 400)
    forms = [f"Convert {n} {one} to {other}.", f"How many {other} are {n} {one}?"]
    return draw.choice([*forms, f"{n} {one} in {other}", f"What is {n} {one} in {other}?"])


VIGGO, E2E = ("viggo", "train.csv", "test.csv"), ("e2e", "devel-fixed.no-ol.csv", "test-fixed.csv")
TASKS: dict[str, tuple[Make, str]] = {
    "game-text": (from_csv(*VIGGO, "mr"), "Describes a video game from its attributes"),
    "game-slots": (from_csv(*VIGGO, "ref"), "Extracts the attributes of a video game from a text"),
    "restaurant-text": (from_csv(*E2E, "mr"), "Describes a restaurant from its attributes"),
    "restaurant-json": (from_csv(*E2E, "ref"), "Extracts a restaurant's details as JSON"),
    "sql": (wikisql, "Writes SQL that answers a question about a table"),
    "bank-cards": (banking("card"), "Names the intent of a bank customer's question about a card"),
    "bank-transfers": (banking("transfer"), "Names the intent of a question about a transfer"),
    "bank-top-ups": (banking("top_up"), "Names the intent of a question about topping up"),
    "arithmetic": (by_rule(arithmetic), "Computes sums, differences and products"),
    "dates": (by_rule(dates), "Writes dates in ISO format"),
    "sorting": (by_rule(sorting), "Sorts words alphabetically"),
    "units": (by_rule(units), "Converts units of measurement"),
}
"""Where a task's questions come from, and a description of its adapter."""
FAMILIES = [
    *([name] for name in TASKS if not name.startswith("bank-")),
    [name for name in TASKS if name.startswith("bank-")],
]


def questions(data: Path, count: int) -> dict[str, Questions]:
    """Draws training prompts and as many other questions of each task; none is in both."""
    drawn = {}
    for name, (make, _) in TASKS.items():
        trained, held_out = (list(dict.fromkeys(texts)) for texts in make(data))
        draw, known = random.Random(name), set(trained)
        draw.shuffle(trained)
        others = [text for text in held_out if text not in known]
        drawn[name] = sample_prompts(map(beginning, trained)), draw.sample(others, count)
    return drawn


def make_library(
    folder: Path, base: Base, tasks: dict[str, Questions], *, described: bool
) -> Library:
    """Adds an adapter with random values for each task. described: with a note and no prompts."""
    library = Library(folder / "library")
    for seed, (name, (prompts, _)) in enumerate(tasks.items()):
        made = base.attach(LoRA(rank=4, targets=["q_proj", "v_proj"]), name=name, seed=seed)
        for parameter in made.parameters().values():
            parameter.data.normal_(std=0.01)
        manifest = manifest_for(base, method="lora")
        write_adapter(folder / name / "adapter", made, manifest, model=base.model)
        base.detach(name)
        if not described:
            write_prompts(folder / name / "prompts.json", prompts)
        library.add(folder / name, name=name, note=TASKS[name][1] if described else "")
    return library


class Served:
    """A server in a thread of this process."""

    def __init__(self, service: Service, url: str) -> None:
        self.service, self.url = service, url

    def run(self, work: Awaitable[Any]) -> Any:
        async def wait() -> Any:
            return await work

        return asyncio.run_coroutine_threadsafe(wait(), self.service.loop.events).result(600)

    def choices(self, texts: Sequence[str]) -> list[str | None]:
        """Returns the adapter that is chosen for each text; None for the base."""

        async def choose(text: str) -> str | None:
            prompt = ChatPrompt([{"role": "user", "content": text}])
            request = GenerationRequest(model="auto", prompts=[prompt])
            choice = (await self.service.choose(request, ""))[1]
            assert choice is not None
            return choice.adapter

        async def choose_all() -> list[str | None]:
            return [
                adapter
                for start in range(0, len(texts), 16)
                for adapter in await asyncio.gather(*map(choose, texts[start : start + 16]))
            ]

        return list(self.run(choose_all()))

    def first_token_ms(self, model: str, text: str, salt: str) -> float:
        body = {
            "model": model,
            "messages": [{"role": "user", "content": text}],
            "max_tokens": 2,
            "stream": True,
            "cache_salt": salt,
        }
        start = time.perf_counter()
        with httpx.stream("POST", f"{self.url}/v1/chat/completions", json=body, timeout=600) as r:
            r.raise_for_status()
            next(r.iter_bytes())
            return 1000 * (time.perf_counter() - start)


@contextmanager
def served(base: Base, library: Library) -> Iterator[Served]:
    settings = ServeSettings(port=0, cache_bytes=2**28, auto=True)
    opened = open_server(base, library, settings, ApiKeys([]))
    server = opened.server
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([opened.socket])))
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield Served(opened.service, opened.url)
    finally:
        server.should_exit = True
        thread.join()
        opened.socket.close()


def share(right: Sequence[bool]) -> dict[str, Any]:
    counts = np.array(right, dtype=float)[:, None]
    ends = interval(counts, lambda totals: float(totals[0]) / len(right), share=True)
    return {
        "share": round(float(counts.mean()), 4),
        "interval": None if ends is None else [round(end, 4) for end in ends],
        "questions": len(right),
    }


def right_choices(server: Served, tasks: dict[str, Questions]) -> dict[str, Any]:
    right = {
        name: [choice == name for choice in server.choices(held_out)]
        for name, (_, held_out) in tasks.items()
    }
    together = share([one for answers in right.values() for one in answers])
    return {**together, "tasks": {name: round(float(np.mean(a)), 4) for name, a in right.items()}}


def unknown_tasks(server: Served, tasks: dict[str, Questions]) -> dict[str, Any]:
    """Unloads a family of adapters at a time, and asks its questions."""
    to_base: dict[str, list[bool]] = {}
    for family in FAMILIES:
        for name in family:
            server.service.names.remove(name)
        for name in family:
            to_base[name] = [choice is None for choice in server.choices(tasks[name][1])]
        for name in family:
            server.service.names.add(name, name)
    together = share([one for answers in to_base.values() for one in answers])
    return {**together, "tasks": {name: round(float(np.mean(a)), 4) for name, a in to_base.items()}}


def first_tokens(server: Served, tasks: dict[str, Questions], turns: int) -> dict[str, Any]:
    """Asks each question with auto and with the name that auto chose, in turns."""
    asked = [held_out[turn] for turn in range(turns) for _, held_out in tasks.values()]
    asked += GENERAL[: max(turns, 1)]
    times: dict[str, list[tuple[float, float]]] = {"an adapter": [], "the base": []}
    for number, (text, adapter) in enumerate(zip(asked, server.choices(asked), strict=True)):
        model = adapter or server.service.names.base_name
        pair = {"auto": "auto", "named": model}
        order = list(pair)[:: 1 if number % 2 else -1]
        server.first_token_ms(model, text, f"load {number}")  # the adapter is loaded now
        ms = {kind: server.first_token_ms(pair[kind], text, f"{kind} {number}") for kind in order}
        times["the base" if adapter is None else "an adapter"].append((ms["auto"], ms["named"]))
    return {
        who: {
            "auto": round(statistics.median(auto for auto, _ in pairs), 1),
            "named": round(statistics.median(named for _, named in pairs), 1),
            "difference": round(statistics.median(auto - named for auto, named in pairs), 1),
            "pairs": len(pairs),
        }
        for who, pairs in times.items()
        if pairs
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--count", type=int, default=40, help="questions of each task")
    parser.add_argument("--turns", type=int, default=3, help="questions of each task to time")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    base, tasks = veneer.load(args.base), questions(args.data, args.count)
    figures: dict[str, Any] = {"base": args.base, "prompts": MOST_PROMPTS, "dtype": str(base.dtype)}
    with tempfile.TemporaryDirectory() as folder:
        library = make_library(Path(folder) / "prompts", base, tasks, described=False)
        with served(base, library) as server:
            start = time.perf_counter()
            server.run(server.service.chooser.prepare())
            figures["seconds to read the prompts"] = round(time.perf_counter() - start, 1)
            figures["right"] = right_choices(server, tasks)
            figures["general"] = share([choice is None for choice in server.choices(GENERAL)])
            figures["unknown"] = unknown_tasks(server, tasks)
            if args.turns:
                figures["first token, ms"] = first_tokens(server, tasks, args.turns)
        library = make_library(Path(folder) / "notes", base, tasks, described=True)
        with served(base, library) as server:
            figures["described"] = right_choices(server, tasks)
    text = json.dumps(figures, indent=1)
    print(text)
    if args.out is not None:
        args.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
