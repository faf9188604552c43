"""Finds near-duplicates, contradictions, personal data and languages, for `veneer data check`.

All are reported with their rows; they never prevent a run, and nothing is changed.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from veneer.data.checks.near import nearest
from veneer.data.examples import Problem, Row, prompt_key
from veneer.wording import percent

LIKE = 0.8
"""Share of common three-word runs from which two prompts are reported as similar."""
LABEL_WORDS = 4
"""Answers of at most this many words are labels: two different labels for a prompt contradict each
other."""
_PERSONAL = {
    "an e-mail address": re.compile(
        r"(?<![\w.+-])[\w.+-]{1,64}@(?:[\w-]{1,63}\.){1,8}[A-Za-z]{2,24}\b"
    ),
    "a telephone number": re.compile(
        r"(?<![\w.])\+\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d(?:[ .-]?\d){6,11}(?![\w.])"
    ),
    "an IBAN": re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){3,7}(?: ?[A-Z0-9]{1,3})?\b"),
    "a card number": re.compile(r"(?<![\d.])\d(?:[ -]?\d){12,18}(?![\d.])"),
    "a secret key": re.compile(
        r"\b(?:sk-[\w-]{20,}|gh[pousr]_\w{30,}|AKIA[0-9A-Z]{16}|hf_\w{30,}|xox[abp]-[\w-]{10,})"
    ),
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
}
_COMMON = {
    "English": "the and of to is that for with you it are this was have",
    "German": "der die und das ist nicht ein eine mit auf sich auch werden ich",
    "French": "le la les des est une dans que pour qui pas sur vous avec",
    "Spanish": "el los las una que por con para del como está pero muy",
    "Italian": "il che di una per non sono con della gli anche questo",
    "Portuguese": "o os uma que não com para dos como mais você está",
    "Dutch": "het een van en dat niet zijn voor met aan ook wordt",
    "Polish": "nie się jest na że do jak dla czy przez tego",
}
_SCRIPTS = (
    ("Russian", 0x0400, 0x04FF),
    ("Arabic", 0x0600, 0x06FF),
    ("Hindi", 0x0900, 0x097F),
    ("Japanese", 0x3040, 0x30FF),
    ("Korean", 0xAC00, 0xD7AF),
    ("Chinese", 0x4E00, 0x9FFF),
)
_WORDS = {language: frozenset(words.split()) for language, words in _COMMON.items()}


def look_closer(file: str, train: Sequence[Row], held_out: Sequence[Row]) -> list[Problem]:
    """Reports everything that only reading the rows shows. file: name of the set"""
    rows = [*train, *held_out]
    return [
        *_near_duplicates(train, held_out),
        *_contradictions(train),
        *_personal(rows),
        *_languages(file, rows),
    ]


def text_of(row: Row, *roles: str) -> str:
    """Returns the text of the messages of these roles, or the plain text."""
    if row.text is not None:
        return row.text
    return "\n".join(
        str(message.get("content") or "") for message in row.messages if message["role"] in roles
    )


def prompt_text(row: Row) -> str:
    """Returns what a row asks: of a document its query, else the users' messages or the text."""
    return text_of(row, "user") if row.query is None else row.query


def _near_duplicates(train: Sequence[Row], held_out: Sequence[Row]) -> list[Problem]:
    known = {prompt_key(row) for row in train}
    new_rows = [
        row for row in held_out if prompt_key(row) not in known
    ]  # exact repeats are reported as D210
    matches = nearest(
        [prompt_text(row) for row in new_rows], [prompt_text(row) for row in train], least=LIKE
    )
    message = "held out, and nearly the same prompt is trained on (a leak, likely)"
    return [
        row.ref.problem(
            "D223",
            message,
            fatal=False,
            detail=f"{row.ref} is {percent(match[1], 1)} like {train[match[0]].ref}, for instance",
        )
        for row, match in zip(new_rows, matches, strict=True)
        if match is not None
    ]


def _contradictions(train: Sequence[Row]) -> list[Problem]:
    answers: defaultdict[int, dict[str, Row]] = defaultdict(dict)
    for row in train:
        answer = (
            " ".join(str(row.messages[-1].get("content") or "").split()) if row.messages else ""
        )
        if answer and len(answer.split()) <= LABEL_WORDS:
            answers[prompt_key(row)].setdefault(answer.lower(), row)
    message = (
        "the same prompt has a different short answer in another row: they contradict each other"
    )
    return [
        row.ref.problem("D224", message, fatal=False, detail=" / ".join(list(rows_by_answer)[:4]))
        for rows_by_answer in answers.values()
        if len(rows_by_answer) > 1
        for row in rows_by_answer.values()
    ]


def _personal(rows: Iterable[Row]) -> list[Problem]:
    problems = []
    step = "If it is private, remove it: a model can repeat it."
    for row in rows:
        text = text_of(row, "system", "user", "assistant", "tool")
        for kind, pattern in _PERSONAL.items():
            if any(kind != "a card number" or _luhn(match[0]) for match in pattern.finditer(text)):
                message = f"holds what looks like {kind}"
                problems.append(row.ref.problem("D225", message, step, fatal=False))
    return problems


def _luhn(text: str) -> bool:
    """Whether the last digit of a card number is a valid check digit."""
    digits = [int(character) for character in text if character.isdigit()][::-1]
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[1::2]]
    return (sum(digits[::2]) + sum(doubled)) % 10 == 0 and len(set(digits)) > 1


def language_of(text: str) -> str | None:
    """Guesses the language by script or common words; None if unclear."""
    letters = [ord(c) for c in text if c.isalpha()]
    for language, first, last in _SCRIPTS:
        if letters and sum(first <= letter <= last for letter in letters) > 0.3 * len(letters):
            return language
    words = re.findall(r"\w+", text.lower())
    counts = {
        language: sum(word in common for word in words) for language, common in _WORDS.items()
    }
    best, second, *_ = sorted(counts.values(), reverse=True)
    if best < 3 or best < 0.08 * len(words) or best < 1.5 * second:
        return None
    return max(counts, key=counts.__getitem__)


def _languages(file: str, rows: Sequence[Row]) -> list[Problem]:
    languages = [(row, language_of(text_of(row, "user", "assistant"))) for row in rows]
    counts = Counter(language for _, language in languages if language)
    if len(counts) < 2:
        return []
    (most, _), *minorities = counts.most_common()
    problems = []
    for language, count in minorities:
        message = f"in {language}, while most are in {most}"
        lines = [row.ref for row, row_language in languages if row_language == language]
        if count > 0.4 * len(rows):
            shares = ", ".join(
                f"{name} {percent(n, len(rows))}" for name, n in counts.most_common()
            )
            return [
                Problem("D226", file, f"the rows are in several languages: {shares}", fatal=False)
            ]
        problems += [Problem("D226", ref.file, message, (ref.line,), fatal=False) for ref in lines]
    return problems
