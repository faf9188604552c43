"""Limits of a scheduler, and whether a request can ever run within them."""

from dataclasses import dataclass

from veneer.bounds import COUNT, ROWS, WAITS, check_numbers
from veneer.decoding.schedule.blocks import BlockManager
from veneer.decoding.schedule.sequence import Request
from veneer.errors import ConfigError, DoesNotFitError


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of a step and of the queue. Raises ConfigError if they are out of bounds.

    rows           sequences that run at the same time
    step_tokens    tokens computed in a step, over all sequences; at least one per row
    chunk_tokens   tokens of one prompt in a step, so that a long prompt leaves room for others
    max_waiting    sequences that wait and have not run yet
    max_adapters   different adapters (by content) that run at the same time, without the base
    max_overtaken  younger sequences that may overtake one that waits for an adapter's place
    """

    rows: int = 64
    step_tokens: int = 512
    chunk_tokens: int = 256
    max_waiting: int = 256
    max_adapters: int = 64
    max_overtaken: int = 16

    def __post_init__(self) -> None:
        check_numbers(
            rows=(ROWS, self.rows),
            step_tokens=(COUNT, self.step_tokens),
            chunk_tokens=(COUNT, self.chunk_tokens),
            max_waiting=(COUNT, self.max_waiting),
            max_adapters=(COUNT, self.max_adapters),
            max_overtaken=(WAITS, self.max_overtaken),
        )
        if self.step_tokens < self.rows:
            raise ConfigError(
                "a step has fewer tokens than rows",
                [f"rows {self.rows:,}, step_tokens {self.step_tokens:,}"],
                "Give a step at least as many tokens as rows.",
            )


def most_tokens(
    blocks: BlockManager, positions: int | None, prefix_length: int, *, prompt_only: bool = False
) -> int:
    """Returns the most tokens of a prompt and its answer, behind a prefix of `prefix_length`.

    prompt_only: the answer is one token that is discarded, which takes no position.
    """
    room = (blocks.num_blocks - blocks.blocks_for(prefix_length)) * blocks.tokens_per_block
    tokens = room + 1  # the last token's keys and values are not needed
    if positions is not None:
        tokens = min(tokens, positions + prompt_only - prefix_length)
    return max(0, tokens)


def check_fits(
    request: Request, blocks: BlockManager, positions: int | None, prefix_length: int
) -> None:
    """Raises DoesNotFitError if a request is too long for the model's positions or for all blocks.
    prefix_length: tokens of its adapter's trained prefix."""
    lengths = f"{len(request.prompt):,} tokens and {request.max_new_tokens:,} new ones"
    if positions is not None and prefix_length + request.needed_positions > positions:
        prefix = f" behind its adapter's prefix of {prefix_length:,}" if prefix_length else ""
        raise DoesNotFitError(
            f"{lengths}{prefix} are more than the {positions:,} positions that the model reads"
            " alike",
            next_step="Shorten the prompt, or ask for fewer new tokens.",
        )
    prefix_blocks = blocks.blocks_for(prefix_length)
    if prefix_blocks + blocks.blocks_for(request.max_positions) > blocks.num_blocks:
        prefix_room = prefix_blocks * blocks.tokens_per_block
        prefix = f", its adapter's prefix for {prefix_room:,}" if prefix_room else ""
        raise DoesNotFitError(
            f"{lengths} need room for {request.max_positions:,}{prefix}; there is room for"
            f" {blocks.capacity:,}",
            next_step=(
                "Shorten the prompt, ask for fewer new tokens, or give keys and values more bytes."
            ),
        )
