"""Finds the tokens that end a base's answers."""

from transformers import GenerationConfig, PreTrainedTokenizerBase

from veneer.data.template.template import ChatTemplate
from veneer.errors import VeneerError


def stop_token_ids(
    tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None
) -> tuple[int, ...]:
    """Returns the sorted ids of tokens that end an answer: the model's eos tokens and the end of
    turn.

    The end of turn is the special token that the chat template writes after an assistant's text.
    Many checkpoints name only their end-of-document token as eos and would write on past their
    turn.
    """
    configured = generation_config.eos_token_id if generation_config else None
    stops = {
        tokenizer.eos_token_id,
        *(configured if isinstance(configured, list) else [configured]),
    } - {None}
    if tokenizer.chat_template:
        marker = "An answer."
        turns = [
            {"role": "user", "content": "A question."},
            {"role": "assistant", "content": marker},
        ]
        try:
            tail = ChatTemplate(tokenizer).render(turns).rpartition(marker)[2]
        except VeneerError:
            tail = ""  # the template cannot render a plain exchange
        first = tokenizer(tail.lstrip(), add_special_tokens=False)["input_ids"][:1]
        stops |= set(first) & set(tokenizer.added_tokens_decoder)
    return tuple(sorted(stops))
