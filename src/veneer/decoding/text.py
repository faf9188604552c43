"""Ids to text as they come, up to the first stop string, in time linear in the answer's length.

Said is only what is certain: half a character waits for its rest, and what may be the beginning of
a stop string for what follows. The text said in all is the text of all ids, cut before the stop
string that ends first. (Where a tokenizer reads a whole run of bytes otherwise for one that is no
character, what was said before that one stays.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerFast

UNSURE = "\ufffd"
"""At the end of a text: a character whose other bytes may come."""
MANY = 16
"""Tokens that wait: more than a character has bytes, so that some of them never make one."""
BYTES_OF_CHARACTER = 4


def text_of(tokenizer: Any, ids: Sequence[int]) -> str:
    """Without special tokens."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))


def _decoder(tokenizer: Any) -> Callable[[list[int]], str]:
    """`text_of` of lists: without what transformers looks at in between, where it changes
    nothing."""
    own, fast = type(tokenizer), PreTrainedTokenizerFast
    plain = issubclass(own, fast) and (own.decode, own._decode) == (fast.decode, fast._decode)
    if not plain or tokenizer.clean_up_tokenization_spaces:
        return partial(text_of, tokenizer)
    return partial(tokenizer.backend_tokenizer.decode, skip_special_tokens=True)


class TextStream:
    """tokenizer: transformers'. stops: strings that end the answer and are not said; none empty."""

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self._text_of = _decoder(tokenizer)
        self._stops = [_StopMatcher(stop) for stop in stops]
        self._firsts = {stop[0] for stop in stops}
        self._said: list[
            int
        ] = []  # ids of the last piece, in front of the next: a space between them may be lost
        self._before = ""  # their text
        self._wait: list[int] = []
        self._uncertain = ""  # their text
        self._many = MANY
        self._held = ""
        self.stopped = False
        """Whether a stop string has come; nothing is said any more."""

    def push_all(self, tokens: Sequence[int]) -> str:
        """As `push` one after another, decoded once where no character is left open."""
        if len(tokens) > 1 and not self.stopped:
            text = self._text_of([*self._said, *self._wait, *tokens])[len(self._before) :]
            if text and not text.endswith(UNSURE):
                self._wait += tokens
                return self._certain(text, len(self._wait))
        return "".join(map(self.push, tokens))

    def push(self, token: int) -> str:
        """The text that is certain now and was not before."""
        if self.stopped:
            return ""
        self._wait.append(token)
        text = self._new_text(len(self._wait))
        if text == self._uncertain and not self._text_of([token]):  # a special one
            if (
                text or self._said or len(self._wait) > MANY
            ):  # at the very beginning it may be a space
                self._wait.pop()
            return ""
        self._uncertain = text
        if not text.endswith(UNSURE):
            return self._certain(text, len(self._wait))
        return self._broken(text) if len(self._wait) > self._many else ""

    def end(self) -> str:
        """The rest, where the answer ends without a stop string."""
        if self.stopped:
            return ""
        rest = self._certain(self._new_text(len(self._wait)), len(self._wait))
        held, self._held = self._held, ""
        return rest if self.stopped else rest + held

    def _new_text(self, count: int) -> str:
        """That of the first `count` ids that wait."""
        return self._text_of([*self._said, *self._wait[:count]])[len(self._before) :]

    def _broken(self, text: str) -> str:
        """The same where bytes that are no character go on and on: all but the last, which may
        still become one."""
        most = len(self._wait) - BYTES_OF_CHARACTER
        for count in range(most, most - BYTES_OF_CHARACTER, -1):
            begin = self._new_text(count)
            rest = self._text_of(self._wait[count:])
            if begin + rest == text:  # no character lies across
                return self._certain(begin, count)
        self._many *= 2
        return ""

    def _certain(self, text: str, count: int) -> str:
        """`text` is that of the first `count` ids that wait; what of it and of the held text may be
        said."""
        if count:
            self._said, self._wait = self._wait[:count], self._wait[count:]
            self._before, self._uncertain, self._many = self._text_of(self._said), "", MANY
        if not self._held and self._firsts.isdisjoint(text):  # none has begun, none begins
            return text
        whole = self._held + text
        for place, character in enumerate(text, len(self._held) + 1):
            if complete := [stop.length for stop in self._stops if stop.follows(character)]:
                self.stopped, self._held = True, ""
                return whole[: place - max(complete)]
        held = max((stop.matched for stop in self._stops), default=0)
        self._held = whole[len(whole) - held :]
        return whole[: len(whole) - held]


class _StopMatcher:
    """How much of one string stands at the end of a text (Knuth, Morris and Pratt 1977)."""

    def __init__(self, text: str) -> None:
        assert text, "an empty string stops everything"
        self.text, self.length, self.matched = text, len(text), 0
        self.shorter = [0, 0]  # of each beginning: the longest shorter one that it ends with
        for end in range(1, len(text)):
            best = self.shorter[end]
            while best and text[best] != text[end]:
                best = self.shorter[best]
            self.shorter.append(best + (text[best] == text[end]))

    def follows(self, character: str) -> bool:
        """Whether the string is complete with this character."""
        while self.matched and self.text[self.matched] != character:
            self.matched = self.shorter[self.matched]
        self.matched += self.text[self.matched] == character
        return self.matched == self.length


def stop_check(tokenizer: Any, stops: Sequence[str]) -> Callable[[], Callable[[int], bool]]:
    """For Request.checks: whether the answer has one of these strings in it with its newest
    token."""

    def made() -> Callable[[int], bool]:
        stream = TextStream(tokenizer, stops)

        def check(token: int) -> bool:
            stream.push(token)
            return stream.stopped

        return check

    return made
