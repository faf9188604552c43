"""What reading the rows shows: near-duplicates, contradictions, personal data, languages; what it
must not claim."""

from __future__ import annotations

import random

import pytest

from veneer.data.checks.closer import language_of, look_closer
from veneer.data.checks.near import nearest, shingles, similarity
from veneer.data.examples import Problem, Row, RowRef, grouped

LONG = (
    "please tell me when the parcel that i ordered on monday from your shop in the old town will be"
    " here"
)


def row(
    line: int,
    question: str,
    answer: str = "Tomorrow, in the afternoon, if nothing stands in its way.",
) -> Row:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Row(RowRef("rows.jsonl", line), messages)


def told(train: list[Row], held_out: list[Row] = []) -> dict[str, Problem]:  # noqa: B006
    return {
        problem.code: problem for problem in grouped(look_closer("rows.jsonl", train, held_out))
    }


def test_a_prompt_that_is_nearly_one_that_is_trained_on_is_told_with_both_rows() -> None:
    train = [
        row(1, "where is the next shop that has it, and until when is it open on a sunday"),
        row(2, LONG),
    ]
    near, same, other = (
        LONG.replace("please", "Please,") + " today?",
        LONG,
        "how do i send it back to you, and when",
    )
    found = told(train, [row(3, near), row(4, same), row(5, other)])["D223"]
    assert (found.lines, found.fatal) == ((3,), False)
    assert "rows.jsonl:3 is " in found.detail and "like rows.jsonl:2" in found.detail


def test_documents_are_compared_by_their_queries() -> None:
    def document(line: int, query: str, text: str) -> Row:
        ref, whole = RowRef("rows.jsonl", line), f"Query: {query}\nDocument: {text}"
        return Row(ref, [], text=whole, query=query, label=1)

    shared = " ".join(f"word{n}" for n in range(60))
    train = [document(1, LONG, "It is on its way."), document(2, "how do i send it back", shared)]
    held_out = [document(3, f"{LONG} today", shared), document(4, "when do you open", shared)]
    assert told(train, held_out)["D223"].lines == (3,)


def test_near_texts_are_found_among_thousands_as_comparing_all_of_them_finds_them() -> None:
    draw = random.Random(0)
    words = [f"w{n}" for n in range(400)]
    texts = [" ".join(draw.choices(words, k=draw.randint(10, 40))) for _ in range(600)]
    asked = []
    for text in draw.sample(texts, 60):
        own = text.split()
        for _ in range(draw.randint(0, 4)):
            own[draw.randrange(len(own))] = draw.choice(words)
        asked.append(" ".join(own))
    known = [shingles(text) for text in texts]
    found = nearest(asked, texts, least=0.8)
    missed = 0
    for text, got in zip(asked, found, strict=True):
        best = max(similarity(shingles(text), other) for other in known)
        assert got is None or got[1] >= 0.8
        missed += (best >= 0.8) != (got is not None)
    assert missed <= 1 and any(found)


def test_an_instruction_that_all_prompts_share_makes_them_no_leak() -> None:
    draw = random.Random(0)
    words = [f"w{n}" for n in range(400)]
    instruction = " ".join(draw.choices(words, k=200))
    asked = [" ".join(draw.choices(words, k=12)) for _ in range(60)]
    train = [row(n, f"{instruction} {text}") for n, text in enumerate(asked[:50])]
    new = [row(n + 100, f"{instruction} {text}") for n, text in enumerate(asked[50:])]
    assert "D223" not in told(train, new)
    again = row(200, f"{instruction} {asked[7]} please")
    assert told(train, [*new, again])["D223"].lines == (200,)


def test_short_prompts_are_never_called_alike() -> None:
    assert not told([row(1, "how are you")], [row(2, "how are you today")])


def test_short_answers_to_the_same_prompt_that_differ_contradict_each_other() -> None:
    train = [
        row(1, "is it red?", "yes"),
        row(2, "is it red?", "no"),
        row(3, "is it red?", "Yes"),
        row(4, "q", "yes"),
    ]
    assert told(train)["D224"].lines == (1, 2)
    texts = [
        row(1, "describe it", "a red one that is on the table"),
        row(2, "describe it", "on the table, and red, it is"),
    ]
    assert not told(texts)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("write to jo.doe+x@mail.example.org please", "an e-mail address"),
        ("call +49 (30) 1234 5678 or not", "a telephone number"),
        ("to DE89 3704 0044 0532 0130 00 by friday", "an IBAN"),
        ("4111 1111 1111 1111", "a card number"),
        ("export KEY=sk-abcdefghijklmnopqrstuvwx", "a secret key"),
        ("-----BEGIN RSA PRIVATE KEY-----", "a private key"),
    ],
)
def test_what_looks_like_personal_data_is_told(text: str, kind: str) -> None:
    found = told([row(1, "q"), row(2, text)])["D225"]
    assert found.lines == (2,) and kind in found.message and not found.fatal


@pytest.mark.parametrize(
    "text",
    [
        "1234 5678 9012 3456",
        "3.14159265358979",
        "a@b",
        "version 1.2.3.4",
        "ISBN 978-3-16-148410-0",
        "2026-11-26",
    ],
)
def test_numbers_and_marks_that_are_nobodys_are_not(text: str) -> None:
    assert "D225" not in told([row(1, text)])


def test_rows_in_another_language_than_the_others_are_told() -> None:
    english = [
        row(n, f"where is the parcel that was sent to the shop with the number {n}")
        for n in range(1, 9)
    ]
    asked = "wo ist das Paket, das ich nicht bekommen habe, und ist es auf dem Weg"
    german = row(9, asked, "Es ist auf dem Weg und nicht weg.")
    found = told([*english, german])["D226"]
    assert found.lines == (9,) and found.message == "in German, while most are in English"
    half = told([*english[:3], *[row(10 + n, asked) for n in range(3)]])
    assert "D226" in half
    assert (
        language_of("Где мой заказ?") == "Russian" and language_of("注文はどこですか") == "Japanese"
    )
    assert language_of("inform(name[Quake], genres[shooter])") is None
