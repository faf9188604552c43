"""Stands in for the library behind the command line: a base, and rows that were checked."""

import json
from types import SimpleNamespace

from veneer.adapters.preamble import NONE
from veneer.base import Answer
from veneer.errors import InputError

RUN = ["--base", "b", "--data", "d.jsonl", "--out", "o"]


SUMMARY = {"first_loss": 2.0, "last_loss": 1.0, "validation_loss": None}


class StandInBase:
    """Answers with the prompt in capital letters, in two pieces; keeps what it was asked."""

    source = "b"
    compute = SimpleNamespace(widens=False, line=None)
    tokenizer = SimpleNamespace(chat_template="...")
    preamble = NONE
    cut_after: int | None = None

    def __init__(self) -> None:
        self.asked: list[object] = []
        self.used: list[str | None] = []
        self.loaded: list[tuple[str, bool]] = []
        self.attachments: set[str] = set()

    def load_adapter(self, folder, *, name=None, force_base=False):
        self.loaded.append((str(folder), force_base))
        self.attachments.add(name)
        return name

    def use(self, name):
        self.used.append(name)

    def generate(
        self,
        prompt,
        *,
        max_new_tokens=256,
        temperature=0.0,
        system=None,
        variables=None,
        lookup="auto",
        on_text=None,
    ):
        self.asked.append((prompt, max_new_tokens, temperature))
        text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        if "too long" in text:
            raise InputError("the prompt is too long")
        answer = text.upper() + "\x1b]0;owned\x07"
        if on_text is not None:
            on_text(answer[:2])
            on_text(answer[2:])
        return Answer(answer, cut_after=self.cut_after)


def adapter_at(folder, base: str = "trained-on"):
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    return folder
