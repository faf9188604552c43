"""Decodes ids to text as they arrive, up to the first stop string, in linear time.

Only certain text is returned: half a character waits for its other bytes, and what may begin a stop
string waits for what follows. All pieces together are the text of all ids, cut before the stop
string that ends first. (Some tokenizers decode a run of bytes differently once an invalid byte
follows; text that was returned before stays.)
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerFast

from veneer.private.transformers import decodes_alike

UNSURE = "\ufffd"
"""Ends a text whose last character may still get its other bytes."""
MANY = 16
"""If more tokens wait than a character has bytes, some of them are no character."""
BYTES_OF_CHARACTER = 4


def text_of(tokenizer: Any, ids: Sequence[int]) -> str:
    """Returns the text of ids, without special tokens."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))


def _decoder(tokenizer: Any) -> Callable[[list[int]], str]:
    """Returns `text_of` for a tokenizer, without transformers' overhead if the result is the
    same."""
    kind, fast = type(tokenizer), PreTrainedTokenizerFast
    plain = issubclass(kind, fast) and decodes_alike(kind, fast)
    if not plain or tokenizer.clean_up_tokenization_spaces:
        return partial(text_of, tokenizer)
    return partial(tokenizer.backend_tokenizer.decode, skip_special_tokens=True)


class TextStream:
    """The text of one answer. stops: strings that end the answer and are left out; none is empty.

    stopped: a stop string has come; no more text is returned
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self._text_of = _decoder(tokenizer)
        self._stops = [_StopMatcher(stop) for stop in stops]
        self._firsts = {stop[0] for stop in stops}
        self._context: list[int] = []
        """Ids of the last piece, decoded with the next: a space between them may depend on both."""
        self._context_text = ""
        self._waiting: list[int] = []
        self._waiting_text = ""
        self._many = MANY
        self._pending = ""
        """Text that may begin a stop string."""
        self.stopped = False

    def push_all(self, tokens: Sequence[int]) -> str:
        """Does what `push` does for each token, but decodes once if no character is incomplete."""
        if len(tokens) > 1 and not self.stopped:
            text = self._text_of([*self._context, *self._waiting, *tokens])[
                len(self._context_text) :
            ]
            if text and not text.endswith(UNSURE):
                self._waiting += tokens
                return self._certain(text, len(self._waiting))
        return "".join(map(self.push, tokens))

    def push(self, token: int) -> str:
        """Returns the text that has become certain with this token."""
        if self.stopped:
            return ""
        self._waiting.append(token)
        text = self._new_text(len(self._waiting))
        if text == self._waiting_text and not self._text_of([token]):  # a special token
            # At the very beginning it may be a space, which later tokens show.
            if text or self._context or len(self._waiting) > MANY:
                self._waiting.pop()
            return ""
        self._waiting_text = text
        if not text.endswith(UNSURE):
            return self._certain(text, len(self._waiting))
        return self._broken(text) if len(self._waiting) > self._many else ""

    def end(self) -> str:
        """Returns the remaining text of an answer that ends without a stop string."""
        if self.stopped:
            return ""
        rest = self._certain(self._new_text(len(self._waiting)), len(self._waiting))
        pending, self._pending = self._pending, ""
        return rest if self.stopped else rest + pending

    def _new_text(self, count: int) -> str:
        """Returns the text of the first `count` waiting ids."""
        return self._text_of([*self._context, *self._waiting[:count]])[len(self._context_text) :]

    def _broken(self, text: str) -> str:
        """Returns the certain text of a long run of invalid bytes: all but the last, which may
        still become a character."""
        most = len(self._waiting) - BYTES_OF_CHARACTER
        for count in range(most, most - BYTES_OF_CHARACTER, -1):
            first = self._new_text(count)
            rest = self._text_of(self._waiting[count:])
            if first + rest == text:  # no character is cut
                return self._certain(first, count)
        self._many *= 2
        return ""

    def _certain(self, text: str, count: int) -> str:
        """Accepts `text`, that of the first `count` waiting ids, and returns what cannot begin a
        stop string."""
        if count:
            self._context, self._waiting = self._waiting[:count], self._waiting[count:]
            self._context_text, self._waiting_text, self._many = (
                self._text_of(self._context),
                "",
                MANY,
            )
        if not self._pending and self._firsts.isdisjoint(text):  # no stop string has begun
            return text
        whole = self._pending + text
        for place, character in enumerate(text, len(self._pending) + 1):
            if complete := [stop.length for stop in self._stops if stop.follows(character)]:
                self.stopped, self._pending = True, ""
                return whole[: place - max(complete)]
        pending = max((stop.matched for stop in self._stops), default=0)
        self._pending = whole[len(whole) - pending :]
        return whole[: len(whole) - pending]


class _StopMatcher:
    """Matches a string with the end of a text (Knuth, Morris and Pratt 1977)."""

    def __init__(self, text: str) -> None:
        assert text, "a stop string is empty"
        self.text, self.length, self.matched = text, len(text), 0
        self.shorter = [0, 0]  # length of a prefix -> its longest suffix that is a prefix
        for end in range(1, len(text)):
            best = self.shorter[end]
            while best and text[best] != text[end]:
                best = self.shorter[best]
            self.shorter.append(best + (text[best] == text[end]))

    def follows(self, character: str) -> bool:
        """Adds a character. Returns whether the string is complete with it."""
        while self.matched and self.text[self.matched] != character:
            self.matched = self.shorter[self.matched]
        self.matched += self.text[self.matched] == character
        return self.matched == self.length


def stop_check(tokenizer: Any, stops: Sequence[str]) -> Callable[[], Callable[[int], bool]]:
    """Makes Request.checks: a check whether the newest token completes one of these strings."""

    def new_check() -> Callable[[int], bool]:
        stream = TextStream(tokenizer, stops)

        def check(token: int) -> bool:
            stream.push(token)
            return stream.stopped

        return check

    return new_check
