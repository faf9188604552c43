"""The fields that every endpoint with drawn tokens has: their table, and what of Asked they are."""

from __future__ import annotations

from typing import Any

from veneer.bounds import (
    BIAS,
    CHOICES,
    MIN_P,
    NEW_TOKENS,
    PENALTY,
    REPETITION,
    TEMPERATURE,
    TOKEN,
    TOP_P,
    WAITS,
    WEIGHT,
    Number,
)
from veneer.decoding.sampling.sampling import Sampling
from veneer.serve.limits import (
    MOST_ADAPTERS,
    MOST_BIASES,
    MOST_NAME,
    MOST_STOP,
    MOST_STOP_TOKENS,
    MOST_STOPS,
)
from veneer.serve.protocols.fields import (
    Either,
    Field,
    Flag,
    Listed,
    Mapped,
    Num,
    Only,
    Refused,
    Table,
    Text,
)
from veneer.serve.refusals import Fault, refuse

MODEL = Field(
    "model",
    Text(MOST_NAME, 1),
    "the base, or an adapter: NAME, NAME@2, NAME@TAG, BASE:NAME",
    required=True,
)
SEED = Number(int, -(2**63), 2**64 - 1)
TOP_K = Number(int, -1, 10**9)
STREAM = (
    Field("stream", Flag(), "send the answer as it is made"),
    Field(
        "stream_options",
        Table(
            (
                Field("include_usage", Flag(), "a last chunk with the counts of tokens"),
                Field(
                    "include_obfuscation",
                    Only((False,), "chunks are not padded"),
                    "",
                    no_effect=True,
                ),
            )
        ),
        "only with stream",
    ),
)
TEMPERATURE_FIELD = Field("temperature", Num(TEMPERATURE), "0 takes the likeliest token; default 1")
TOP_P_FIELD = Field(
    "top_p", Num(TOP_P), "of the likeliest tokens, as many as make up this share; default 1"
)
NEW = Num(NEW_TOKENS)

OPENAI = (
    Field("n", Num(CHOICES), "answers to each prompt; default 1"),
    TEMPERATURE_FIELD,
    TOP_P_FIELD,
    Field("presence_penalty", Num(PENALTY), "taken from tokens that the answer has"),
    Field("frequency_penalty", Num(PENALTY), "taken from tokens as often as the answer has them"),
    Field(
        "logit_bias",
        Mapped(Text(12, 1), Num(BIAS), MOST_BIASES),
        "from ids of tokens to what is added to each",
    ),
    Field(
        "seed", Num(SEED), "of the draws, modulo 2^32; without one every request draws otherwise"
    ),
    Field(
        "stop",
        Either((Text(MOST_STOP, 1), Listed(Text(MOST_STOP, 1), MOST_STOPS))),
        "texts that end the answer and are not part of it",
    ),
)
"""As OpenAI has them."""

OTHERS = (
    Field("top_k", Num(TOP_K), "of the likeliest tokens, so many; 0 and -1: all"),
    Field("min_p", Num(MIN_P), "no token below this share of the likeliest one's chance"),
    Field(
        "repetition_penalty",
        Num(REPETITION),
        "divides logits of tokens that prompt or answer have; default 1",
    ),
    Field("stop_token_ids", Listed(Num(TOKEN), MOST_STOP_TOKENS), "ids that end the answer"),
    Field("ignore_eos", Flag(), "the base's own stop tokens do not end the answer"),
    Field("min_tokens", Num(WAITS), "nothing ends the answer before; default 0"),
    Field("cache_salt", Text(200, 1), "prompts are found again only by requests of the same salt"),
    Field(
        "adapters",
        Listed(
            Table(
                (
                    Field("name", Text(MOST_NAME, 1), "as in model", required=True),
                    Field("weight", Num(WEIGHT), "what its update is multiplied by; default 1"),
                )
            ),
            MOST_ADAPTERS,
            1,
        ),
        "several adapters together, each with a weight; model is the base then",
    ),
    Field(
        "include_stop_str_in_output", Only((False,), "a stop string is cut off"), "", no_effect=True
    ),
    Field("skip_special_tokens", Only((True,), "special tokens are no text"), "", no_effect=True),
    Field(
        "spaces_between_special_tokens",
        Only((True,), "special tokens are no text"),
        "",
        no_effect=True,
    ),
    Field("use_beam_search", Only((False,), "tokens are drawn"), "", no_effect=True),
    Field("detokenize", Only((True,), "answers are text"), "", no_effect=True),
    Field("prompt_logprobs", Refused("prompts' chances are not kept"), ""),
    Field(
        "return_token_ids", Only((False,), "answers are text: see /tokenize"), "", no_effect=True
    ),
    Field("truncate_prompt_tokens", Refused("shorten the prompt"), ""),
    Field("length_penalty", Only((1, 1.0), "it belongs to beam search"), "", no_effect=True),
    Field("bad_words", Only(([],), "give logit_bias"), "", no_effect=True),
    Field("logits_processors", Refused("no code from outside runs here"), ""),
    Field("priority", Only((0,), "requests are answered in their order"), "", no_effect=True),
)
"""vLLM's, and our own `adapters`."""

WITHOUT_EFFECT = (
    Field("user", Text(1000), "", no_effect=True),
    Field("metadata", Mapped(Text(64), Text(512), 16), "", no_effect=True),
    Field("safety_identifier", Text(1000), "", no_effect=True),
    Field(
        "prompt_cache_key", Text(1000), "prompts are found again by their content", no_effect=True
    ),
    Field("prompt_cache_retention", Only(("in_memory", "in-memory", "24h")), "", no_effect=True),
    Field("service_tier", Only(("auto", "default"), "there is one"), "", no_effect=True),
    Field("request_id", Text(200), "the header x-request-id is read", no_effect=True),
)


DRAWN = ("top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
"""Called here as in Sampling."""


def sampled(values: dict[str, Any], *, logprobs: int | None = None) -> dict[str, Any]:
    """What of Asked the fields of this file are. logprobs: Sampling's."""
    faults = []
    names = {
        "n": "choices",
        "ignore_eos": "ignore_eos",
        "min_tokens": "min_new_tokens",
        "cache_salt": "salt",
        "stream": "stream",
    }
    found: dict[str, Any] = {ours: values[name] for name, ours in names.items() if name in values}
    if "seed" in values:
        found["seed"] = values["seed"] % 2**32
    if "stop" in values:
        found["stops"] = (
            (values["stop"],) if isinstance(values["stop"], str) else tuple(values["stop"])
        )
    found["stop_tokens"] = tuple(int(token) for token in values.get("stop_token_ids", ()))
    bias = []
    for key, value in values.get("logit_bias", {}).items():
        if key.isascii() and key.isdigit() and TOKEN.holds(int(key)):
            bias.append((int(key), float(value)))
        else:
            faults.append(Fault(f"logit_bias.{key[:20]}", "is no token's id"))
    if "adapters" in values:
        found["adapters"] = tuple(
            (each["name"], _weight(each.get("weight"))) for each in values["adapters"]
        )
    options = values.get("stream_options")
    if options is not None and not values.get("stream"):
        faults.append(Fault("stream_options", "is only for answers that are streamed: set stream"))
    found["stream_usage"] = bool(options and options.get("include_usage"))
    if faults:
        raise refuse(faults)
    found["sampling"] = Sampling(
        temperature=values.get("temperature", 1.0),
        top_k=max(values.get("top_k", 0), 0),
        logit_bias=tuple(sorted(bias)),
        logprobs=logprobs,
        **{name: values[name] for name in DRAWN if name in values},
    )
    return found


def _weight(given: float | None) -> float:
    return 1.0 if given is None else float(given)
