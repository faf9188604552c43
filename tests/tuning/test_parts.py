"""Rows are divided by content: no prompt, and nothing close to it, is in two parts."""

import random

import pytest

from veneer.data.checks.near import similar_groups
from veneer.data.examples import Row, RowRef, prompt_key
from veneer.errors import DataError
from veneer.tuning.parts import divide, write_parts

WORDS = [f"word{n}" for n in range(400)]


def row(prompt, answer="yes", line=1):
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return Row(ref=RowRef("rows.jsonl", line), messages=messages)


def rows(count, seed=0, instruction=""):
    chance = random.Random(seed)
    return [row(instruction + " ".join(chance.sample(WORDS, 20))) for _ in range(count)]


def prompts(part):
    return {prompt_key(each) for each in part}


def test_parts_share_no_prompt_and_lose_no_row():
    all_rows = rows(200)
    again = [row(other.messages[0]["content"], "no") for other in all_rows[:60]]
    parts = divide([*all_rows, *again], "d")
    sides = [parts.train, parts.search, parts.judge]
    assert parts.judge_groups == parts.judge_prompts == len(prompts(parts.judge))
    assert parts.judge_prompts < len(parts.judge)
    assert sum(map(len, sides)) == 260 and min(map(len, sides)) >= 30
    assert all(
        not prompts(a) & prompts(b) for a, b in zip(sides, sides[1:] + sides[:1], strict=True)
    )


def test_similar_prompts_stay_together():
    all_rows = rows(100)
    similar = [row(other.messages[0]["content"] + " please") for other in all_rows]
    parts = divide([*all_rows, *similar], "d")
    assert parts.by_likeness
    assert 2 * parts.judge_groups == parts.judge_prompts == len(parts.judge)
    for part in (parts.train, parts.search, parts.judge):
        texts = {each.messages[0]["content"].removesuffix(" please") for each in part}
        assert len(part) == 2 * len(texts)


def test_short_prompts_that_differ_in_case_or_punctuation_stay_together():
    texts = [" ".join(random.Random(n).sample(WORDS, 3)) for n in range(80)]
    twins = [row(form) for text in texts for form in (text, text.upper(), f"{text}?")]
    parts = divide(twins, "d")
    assert parts.by_likeness and min(len(parts.search), len(parts.judge)) >= 30
    for part in (parts.train, parts.search, parts.judge):
        texts = {each.messages[0]["content"].lower().removesuffix("?") for each in part}
        assert len(part) == 3 * len(texts)


def test_a_conversation_stays_with_the_rows_that_are_its_beginning():
    beginnings = rows(100)
    hello = row("hello").messages
    longer = [
        Row(ref=beginning.ref, messages=[*beginning.messages, *more.messages])
        for beginning, more in zip(beginnings, rows(100, seed=1), strict=True)
    ]
    parts = divide([*beginnings, *longer], "d")
    assert parts.by_likeness and min(len(parts.search), len(parts.judge)) >= 25
    for part in (parts.train, parts.search, parts.judge):
        assert len(part) == 2 * len({each.messages[0]["content"] for each in part})
    greeted = [Row(ref=each.ref, messages=[*hello, *each.messages]) for each in longer]
    assert divide(greeted, "d").by_likeness


def test_a_shared_instruction_does_not_make_prompts_similar():
    instruction = "Extract the details from the following text as JSON with these keys. Text: "
    parts = divide(rows(100, instruction=instruction), "d")
    assert parts.by_likeness and min(len(parts.search), len(parts.judge)) >= 12


def test_prompts_that_are_all_alike_are_divided_by_equality():
    # Each prompt has all words of the one before but one, so all are joined by a chain.
    chained = [row(" ".join(WORDS[n : n + 16])) for n in range(200)]
    parts = divide(chained, "d")
    assert not parts.by_likeness and len(parts.judge) == 30


def test_the_order_of_the_rows_does_not_matter():
    all_rows = rows(120)
    shuffled = random.Random(5).sample(all_rows, len(all_rows))
    assert prompts(divide(all_rows, "d").judge) == prompts(divide(shuffled, "d").judge)


def test_large_sets_keep_only_so_many_rows_aside():
    parts = divide([row(f"question {n}") for n in range(3000)], "d")
    assert (len(parts.search), len(parts.judge)) == (100, 300)


@pytest.mark.parametrize("few", [rows(39), [row("same")] * 200, rows(3) * 50])
def test_too_few_rows_or_prompts_are_refused(few):
    with pytest.raises(DataError, match="too small to train, search and judge"):
        divide(few, "d")


def test_a_frequent_prompt_does_not_keep_similar_prompts_apart():
    """More than a fifth of the rows are equal, so no similarity made their group that large."""
    frequent = [row("the same question", str(n)) for n in range(30)]
    assert divide([*rows(70), *frequent], "d").by_likeness


def test_the_smallest_set_has_three_parts(tmp_path):
    parts = divide(rows(40), "d")
    assert [len(parts.train), len(parts.search), len(parts.judge)] == [24, 8, 8]
    files = write_parts(tmp_path / "data", parts)
    assert len(files.judge.read_text().splitlines()) == 8


def test_groups_are_named_by_their_first_text():
    long = " ".join(WORDS[:20])
    assert similar_groups([long, "short", f"{long} too", "short"], least=0.8) == [0, 1, 0, 3]
