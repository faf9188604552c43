"""The fields of all bodies whose answer is generated, and the request that they make."""

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field

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
from veneer.serve.protocols.body import (
    BY_TYPE,
    NO_EFFECT,
    Body,
    EmptyList,
    Length,
    NotSupported,
    Num,
    OnlyFalse,
    OnlyTrue,
)
from veneer.serve.protocols.request import GenerationRequest, Prompt
from veneer.serve.refusals import Fault

ModelName = Annotated[str, Length(1, MOST_NAME)]
NewTokens = Annotated[int, Num(NEW_TOKENS)]
TokenId = Annotated[int, Num(TOKEN)]
Stop = Annotated[str, Length(1, MOST_STOP)]
Stops = Annotated[list[Stop], Length(0, MOST_STOPS)]
Unused = Annotated[str, Length(0, 1000), NO_EFFECT]


class WeightedAdapter(Body):
    name: ModelName
    weight: Annotated[float, Num(WEIGHT)] = 1.0


class SamplingBody(Body):
    """The fields of all protocols that generate: OpenAI's, vLLM's, and our own `adapters`."""

    model: ModelName
    """the base, or an adapter: NAME, NAME@2, NAME@TAG, BASE:NAME; with --auto, auto"""
    temperature: Annotated[float, Num(TEMPERATURE)] = 1.0
    """0 takes the likeliest token; default 1"""
    top_p: Annotated[float, Num(TOP_P)] = 1.0
    """samples from the likeliest tokens whose probabilities add up to this; default 1"""
    seed: Annotated[int, Num(Number(int, -(2**63), 2**64 - 1))] | None = None
    """seed of the sampling, modulo 2^32; default: a random one"""
    stream: bool = False
    """send the answer while it is generated"""
    top_k: Annotated[int, Num(Number(int, -1, 10**9))] = 0
    """samples from this many of the likeliest tokens; 0 and -1: all"""
    min_p: Annotated[float, Num(MIN_P)] = 0.0
    """drops tokens below this fraction of the likeliest token's probability"""
    repetition_penalty: Annotated[float, Num(REPETITION)] = 1.0
    """divides logits of tokens in the prompt or the answer; default 1"""
    stop_token_ids: Annotated[list[TokenId], Length(0, MOST_STOP_TOKENS)] = Field(
        default_factory=list
    )
    """token ids that end the answer"""
    ignore_eos: bool = False
    """the answer goes on after the base's stop tokens"""
    min_tokens: Annotated[int, Num(WAITS)] = 0
    """fewest tokens of an answer; default 0"""
    cache_salt: Annotated[str, Length(1, 200)] = ""
    """cached prompts are shared only between requests of the same salt"""
    adapters: Annotated[list[WeightedAdapter], Length(1, MOST_ADAPTERS)] = Field(
        default_factory=list
    )
    """adapters to combine, each with a weight (default 1); model must be the base"""
    include_stop_str_in_output: OnlyFalse = False
    """a stop string is cut off"""
    skip_special_tokens: OnlyTrue = True
    """special tokens are not text"""
    spaces_between_special_tokens: OnlyTrue = True
    """special tokens are not text"""
    use_beam_search: OnlyFalse = False
    """tokens are sampled"""
    detokenize: OnlyTrue = True
    """answers are text"""
    return_token_ids: OnlyFalse = False
    """answers are text: see /tokenize"""
    length_penalty: Annotated[float, Num(Number(float, 1, 1)), NO_EFFECT] = 1.0
    """only for beam search"""
    bad_words: EmptyList = Field(default_factory=list)
    """use logit_bias"""
    priority: Annotated[int, Num(Number(int, 0, 0)), NO_EFFECT] = 0
    """requests are answered in order of arrival"""
    prompt_logprobs: NotSupported = None
    """use /v1/completions with echo and logprobs"""
    truncate_prompt_tokens: NotSupported = None
    """shorten the prompt"""
    logits_processors: NotSupported = None
    """the server runs no code of clients"""

    @abstractmethod
    def generation_request(self) -> GenerationRequest:
        """Returns what the body asks for. Refusal: 400."""

    def sampling(self, **settings: Any) -> Sampling:
        return Sampling(
            temperature=self.temperature,
            top_k=max(self.top_k, 0),
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            **settings,
        )

    def request_for(self, *prompts: Prompt) -> GenerationRequest:
        """Returns a request with the settings that all protocols share."""
        return GenerationRequest(
            model=self.model,
            prompts=prompts,
            adapters=tuple((adapter.name, float(adapter.weight)) for adapter in self.adapters),
            min_new_tokens=self.min_tokens,
            sampling=self.sampling(),
            seed=None if self.seed is None else self.seed % 2**32,
            stop_tokens=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            salt=self.cache_salt,
            stream=self.stream,
        )


class OpenAIBody(SamplingBody):
    """The fields of OpenAI's protocols that are accepted and not read."""

    user: Unused = ""
    metadata: Annotated[
        dict[Annotated[str, Length(0, 64)], Annotated[str, Length(0, 512)]],
        Length(0, 16),
        NO_EFFECT,
    ] = Field(default_factory=dict)
    safety_identifier: Unused = ""
    prompt_cache_key: Unused = ""
    """the cache finds prompts by their content"""
    prompt_cache_retention: Annotated[Literal["in_memory", "in-memory", "24h"], NO_EFFECT] = (
        "in_memory"
    )
    service_tier: Annotated[Literal["auto", "default"], NO_EFFECT] = "auto"
    """there is only one"""
    request_id: Annotated[str, Length(0, 200), NO_EFFECT] = ""
    """the header x-request-id is read"""


class StreamOptions(Body):
    include_usage: bool = False
    """a last chunk has the token counts"""
    include_obfuscation: OnlyFalse = False
    """chunks are not padded"""


class ChoicesBody(OpenAIBody):
    """The fields that /v1/chat/completions and /v1/completions share."""

    n: Annotated[int, Num(CHOICES)] = 1
    """answers to each prompt; default 1"""
    presence_penalty: Annotated[float, Num(PENALTY)] = 0.0
    """subtracted from the logits of tokens in the answer"""
    frequency_penalty: Annotated[float, Num(PENALTY)] = 0.0
    """subtracted from the logits of tokens for each time that they are in the answer"""
    logit_bias: Annotated[
        dict[Annotated[str, Length(1, 12)], Annotated[float, Num(BIAS)]], Length(0, MOST_BIASES)
    ] = Field(default_factory=dict)
    """token ids, and what is added to the logit of each"""
    stop: Annotated[Stop | Stops, BY_TYPE] = Field(default_factory=list)
    """texts that end the answer and are not part of it"""
    stream_options: StreamOptions | None = None
    """only with stream"""

    def conflicts(self) -> Iterator[Fault]:
        yield from super().conflicts()
        for key in self.logit_bias:
            if not (key.isascii() and key.isdigit() and TOKEN.holds(int(key))):
                yield Fault(f"logit_bias.{key[:20]}", "is not a token id")
        if self.stream_options is not None and not self.stream:
            yield Fault("stream_options", "is only for answers that are streamed: set stream")

    def sampling(self, **settings: Any) -> Sampling:
        return super().sampling(
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=tuple(sorted((int(key), float(b)) for key, b in self.logit_bias.items())),
            **settings,
        )

    def request_for(self, *prompts: Prompt) -> GenerationRequest:
        return replace(
            super().request_for(*prompts),
            choices=self.n,
            stops=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop),
            stream_usage=self.stream_options is not None and self.stream_options.include_usage,
        )
