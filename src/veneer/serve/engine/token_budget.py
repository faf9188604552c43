"""The tokens that the prompts of one request may have: each of them, and all together.

A text of many bytes is first tokenised in pieces, until they show that it has too many tokens. So
what a prompt costs that is refused depends on its places, not on its length.
"""

from typing import Any

from veneer.serve.refusals import Refusal

BYTES_PER_TOKEN = 4
"""A text of at most this many bytes for each token that it may have is tokenised at once."""
PIECE = 2**14
"""Characters that are tokenised at once to count tokens."""
CUT_TOKENS = 256
"""Most tokens that the end of a piece may add, where the text is cut."""
TOO_LONG = "context_length_exceeded"


class TokenBudget:
    """Counts the tokens of a request's prompts, in their order.

    places         tokens of each prompt; None: without a limit of its own
    most           tokens of all prompts together
    param          the field of the prompts
    prefix_length  tokens of the adapter's prefix, which are in front of the places
    """

    def __init__(
        self, places: int | None, most: int, param: str, *, prefix_length: int = 0
    ) -> None:
        self._places, self._most, self._param = places, most, param
        self._behind = f" behind the adapter's prefix of {prefix_length:,}" if prefix_length else ""
        self._left = most

    def check(self, text: str, tokenizer: Any, what: str) -> None:
        """Refuses a text that has too many tokens, as far as pieces of it show. what: as in
        `take`."""
        most = self._left if self._places is None else min(self._places, self._left)
        if len(text.encode("utf-8", "surrogatepass")) <= BYTES_PER_TOKEN * most:
            return
        count = 0
        for start in range(0, len(text), PIECE):
            piece = text[start : start + PIECE]
            count += len(tokenizer(piece, add_special_tokens=False)["input_ids"]) - CUT_TOKENS
            self._check_count(count, what, f"more than {most:,} tokens")

    def take(self, count: int, what: str) -> None:
        """Takes the tokens of a prompt off the budget. what: the prompt, in an error. Refusal: it
        has too many, or all prompts together have."""
        self._check_count(count, what, f"{count:,} tokens")
        self._left -= count

    def _check_count(self, count: int, what: str, tokens: str) -> None:
        param, places = self._param, self._places
        if places is not None and count > places:
            message = f"{what} is too long: it has {tokens}, and there are {places:,} places"
            raise Refusal(400, f"{param}: {message}{self._behind}. Shorten it.", param, TOO_LONG)
        if count > self._left:
            message = f"this request has more than {self._most:,} tokens, which is the limit"
            raise Refusal(400, f"{param}: {message}. Send fewer at once.", param, TOO_LONG)
