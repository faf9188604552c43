"""A row as token ids with a loss mask: spans of characters become positions of tokens."""

from collections.abc import Collection
from dataclasses import dataclass, replace

from veneer.data.examples import RoleRun
from veneer.data.template.reasoning import Reasons
from veneer.data.template.tokens import TokenizedText
from veneer.data.template.turns import RenderedRow


@dataclass(frozen=True)
class EncodedRow:
    """A row in tokens, or its first messages up to an answer.

    control   number of control tokens' names found in its text
    upto      number of its messages; None: all, or plain text
    reasons   kind of reasoning at the start of each trained answer
    """

    ids: list[int]
    trained: list[bool]
    roles: tuple[RoleRun, ...]
    control: int
    upto: int | None = None
    reasons: tuple[Reasons, ...] = ()


def mask_tokens(tokens: TokenizedText, rendered: RenderedRow) -> EncodedRow:
    """Converts spans of characters to a mask of tokens, and assigns tokens to roles."""
    shift = len(rendered.begin)
    ids = [*rendered.begin, *tokens.ids, *rendered.end]
    at = {0: 0, **tokens.at}
    trained = [False] * len(ids)
    for start, end in rendered.spans:
        trained[shift + at[start] : shift + at[end]] = [True] * (at[end] - at[start])
    trained[len(ids) - len(rendered.end) :] = [True] * len(rendered.end)
    trained[:1] = [False]
    runs = [RoleRun(role, shift + at[end]) for role, end in rendered.roles if end in at]
    if runs:
        runs[-1] = RoleRun(runs[-1].role, len(ids))
    return EncodedRow(ids, trained, tuple(runs), rendered.control, rendered.upto, rendered.reasons)


def without_end(
    encoded: EncodedRow, tokens: TokenizedText, rendered: RenderedRow, stop_ids: Collection[int]
) -> EncodedRow:
    """Excludes from training the token that ends the last answer, and what follows it."""
    if not rendered.spans:
        return encoded
    size = len(encoded.ids)
    first = len(rendered.begin) + {0: 0, **tokens.at}[rendered.spans[-1][0]]
    stops = (n for n in reversed(range(first, size)) if encoded.ids[n] in stop_ids)
    stop = next(stops, size)
    return replace(encoded, trained=[*encoded.trained[:stop], *[False] * (size - stop)])
