"""Which tokens end a base's answers."""

from __future__ import annotations

from transformers import GenerationConfig, PreTrainedTokenizerBase

from veneer.data.template.template import ChatTemplate
from veneer.errors import VeneerError


def stop_token_ids(
    tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None
) -> tuple[int, ...]:
    """Sorted ids of every token that ends an answer: the model's eos tokens and the template's end
    of turn.

    The last is what the chat template writes after an assistant's text, if that is a special token;
    many checkpoints name only their end-of-document token as eos and would talk on past their turn.
    """
    named = generation_config.eos_token_id if generation_config else None
    stops = {tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])} - {None}
    if tokenizer.chat_template:
        marker = "An answer."
        turns = [
            {"role": "user", "content": "A question."},
            {"role": "assistant", "content": marker},
        ]
        try:
            tail = ChatTemplate(tokenizer).render(turns).rpartition(marker)[2]
        except VeneerError:
            tail = ""  # a template that cannot render a plain exchange names no end of turn
        first = tokenizer(tail.lstrip(), add_special_tokens=False)["input_ids"][:1]
        stops |= set(first) & set(tokenizer.added_tokens_decoder)
    return tuple(sorted(stops))
