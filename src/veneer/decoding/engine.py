"""Answers many requests, each with its own adapters, in the same forwards.

    add        queues a request
    step       computes one plan: writes prefixes, copies blocks, runs the spans' tokens through the
               model, and draws a token for each
    cancel     ends an answer with the tokens it has
    run        steps until nothing is left

The scheduler (decoding/schedule/scheduler.py) decides about order, room and sharing. The engine
knows nothing of texts. One thread calls it.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from veneer.adapters.methods.new_tokens import width_of
from veneer.decoding.draws import ChoiceSampler, draw, prompt_chances
from veneer.decoding.guesses import Draw, check_guesses
from veneer.decoding.lanes import Lanes
from veneer.decoding.proof import decodes_packed, prove_decoding
from veneer.decoding.sampling.sampling import TokenChance
from veneer.decoding.schedule.adapters import AdapterSource
from veneer.decoding.schedule.blocks import BlockManager
from veneer.decoding.schedule.limits import Limits
from veneer.decoding.schedule.lookup import Lookup, LookupMode, check_lookup
from veneer.decoding.schedule.scheduler import Scheduler
from veneer.decoding.schedule.sequence import Request, SequenceState
from veneer.decoding.schedule.sequence import Sequence as Answer
from veneer.decoding.schedule.step_plan import SampleResult, Span, StepPlan, StepResult
from veneer.errors import ConfigError, DoesNotFitError, is_out_of_memory
from veneer.execution.decode_step import DecodeStep
from veneer.execution.states import StateLayers, StateSlots, layers_without_keys, state_layers
from veneer.model_record import record_of
from veneer.models.capacity import capacity_of, read_alike
from veneer.models.frozen_base import FrozenBase

PromptScores = dict[int, list[TokenChance]]
"""Probabilities of prompt tokens, by the answer's number."""
_Results = tuple[dict[int, StepResult], PromptScores]
BLOCK_SLOTS = 16
"""Tokens per block, as kernels expect."""


class Engine:
    """A base's engine.

    budget_bytes  memory of keys and values, and of states (execution/states.py), which take at most
                  half of it: else fewer answers run at a time
    adapters      what requests may name
    lookup        "auto": next tokens are guessed from the answers' own texts (schedule/lookup.py),
                  where a row has the same bits in every step, so that guesses change no text

    Raises ConfigError if decoding by blocks is not proven on the base (decoding/proof.py).
    """

    def __init__(
        self,
        base: FrozenBase,
        *,
        budget_bytes: int,
        adapters: AdapterSource,
        limits: Limits | None = None,
        lookup: LookupMode = "auto",
    ) -> None:
        check_lookup(lookup)
        if not decodes_packed(base):
            with base.routing.none():
                reason = prove_decoding(base.model)
            raise ConfigError(
                "this base cannot answer several requests in one step",
                [reason] if reason else [],
                "Use base.generate.",
            )
        self.base, self._adapters = base, adapters
        states, limits = states_of(base), limits or Limits()
        if states is not None:
            limits = _with_states(limits, states, budget_bytes // 2)
            budget_bytes -= states.bytes_of(limits.rows)
        blocks = BlockManager(
            base=base.fingerprint().digest,
            budget_bytes=budget_bytes,
            bytes_per_token=bytes_per_token(base),
            tokens_per_block=BLOCK_SLOTS,
            shares=states is None,
        )
        self.decode_step = decode_step_of(base)
        slots = None if states is None else StateSlots(states, limits.rows)
        self.lanes = Lanes(base, blocks, adapters, self.decode_step, slots)
        self.scheduler = Scheduler(
            blocks,
            limits,
            adapters,
            positions=read_alike(base.config),
            lookup=Lookup(self.lanes.keeps_bits) if lookup == "auto" else None,
        )
        self._samplers: dict[int, ChoiceSampler] = {}
        with base.routing.none():
            self._ids = capacity_of(base).tokens

    def add(self, request: Request) -> tuple[Answer, ...]:
        """Queues a request. Raises ConfigError for an id without a row, and the errors of
        AdapterSource.expect and Scheduler.add. Ids of requests with adapters are not checked.
        """
        ids = (*request.prompt, *(token for token, _ in request.sampling.logit_bias))
        if self._ids is not None and not request.adapter and (most := max(ids)) >= self._ids:
            raise ConfigError(
                f"the request holds token {most}, and the model has rows for {self._ids:,}"
            )
        if request.adapter:
            self._adapters.expect(request.adapter)
        return self.scheduler.add(request)

    def cancel(self, answer: Answer) -> None:
        """Ends an answer with the tokens it has. The next step reports it."""
        self.scheduler.cancel(answer)

    def run(self) -> list[Answer]:
        """Steps until nothing is left. Returns all answers in the order in which they ended."""
        ended: list[Answer] = []
        while not self.scheduler.idle:
            ended += self.step(0.0)
        return ended

    @torch.no_grad()
    def step(self, now: float) -> list[Answer]:
        """Computes one step and returns the answers that have ended.

        If it is out of memory, it tries fewer tokens; an answer that fails with a single token
        ends. After another error each span is computed alone, and answers that fail again end.
        """
        ended: list[Answer] = []
        most: int | None = None
        while True:
            plan = self.scheduler.step(now, most_tokens=most)
            ended += plan.ended
            try:
                results = self._results(plan)
            except Exception as fault:
                self._undo()
                return self._drop_ended([*ended, *self._each_alone(plan, fault)])
            except BaseException:  # the next step begins as if this one had not
                self._undo()
                raise
            if results is not None:
                return self._drop_ended([*ended, *self._finish(plan, results)])
            self._undo()
            tokens = sum(span.rows for span in plan.spans)
            most = max(1, tokens // 2)
            if tokens == 1:
                self.scheduler.fail(plan.spans[0].sequence, _no_memory())

    def _undo(self) -> None:
        self.scheduler.undo_step()
        self.lanes.forget()
        self._samplers.clear()  # some may have counted discarded tokens

    def _each_alone(self, failed: StepPlan, fault: Exception) -> list[Answer]:
        """Computes each span of a failed plan alone. A span that fails again ends its answer, which
        the next step reports. Returns answers that end meanwhile."""
        ended: list[Answer] = []
        if len(failed.spans) == 1:
            self.scheduler.fail(failed.spans[0].sequence, fault)
            return ended
        for span in failed.spans:
            if span.sequence.state is not SequenceState.RUNNING:
                continue  # it was preempted meanwhile
            plan = self.scheduler.step_alone(span.sequence)
            ended += plan.ended
            try:
                results = self._results(plan)
            except Exception as span_fault:
                self._undo()
                self.scheduler.fail(span.sequence, span_fault)
                continue
            if results is None:
                self._undo()
                self.scheduler.fail(span.sequence, _no_memory())
            else:
                ended += self._finish(plan, results)
        return ended

    def _finish(self, plan: StepPlan, results: _Results) -> tuple[Answer, ...]:
        self.lanes.finish(plan)
        return self.scheduler.finish_step(*results)

    def _results(self, plan: StepPlan) -> _Results | None:
        """Returns what each answer draws, by number, and the probabilities of prompt tokens. None
        if out of memory."""
        self.lanes.keep_states({answer.number for answer in self.scheduler.running})
        try:
            computed = self.lanes.logits(plan) if plan.spans else []
        except Exception as fault:
            if not is_out_of_memory(fault):
                raise
            return None
        results: dict[int, StepResult] = {}
        scores: PromptScores = {}
        for numbers, logits in computed:
            spans = [plan.spans[n] for n in numbers]
            scores |= self._score_prompts(spans, logits)
            results |= self._draw_spans(spans, logits)
        return results, scores

    def _score_prompts(self, spans: Sequence[Span], logits: Tensor) -> PromptScores:
        """Returns the probabilities of the prompt tokens that these spans score."""
        scores: PromptScores = {}
        row = 0
        for span in spans:
            if tokens := span.scored:
                answer, rows = span.sequence, logits[row : row + len(tokens)]
                if self._ids is not None and logits.shape[1] > self._ids:
                    rows = rows[:, : self._width(answer, self._ids)]
                alternatives = answer.request.sampling.logprobs or 0
                scores[answer.number] = prompt_chances(rows, tokens, alternatives)
            row += span.logits
        return scores

    def _draw_spans(self, spans: Sequence[Span], logits: Tensor) -> dict[int, StepResult]:
        """Draws for the answers of these spans from their logits (rows, V)."""
        draws: list[Draw] = []
        row = 0
        for span in spans:
            row += span.logits
            draws += [(answer, answer.new, row - 1 - len(span.guesses)) for answer in span.draws]
        if not draws:
            return {}
        drawn = self._draw(logits, draws)
        first = {answer.number: result for (answer, _, _), result in zip(draws, drawn, strict=True)}
        return first | check_guesses(spans, first, partial(self._draw, logits))

    def _draw(self, logits: Tensor, draws: Sequence[Draw]) -> list[SampleResult]:
        """Draws for each answer from its own ids, without the new tokens of other adapters."""
        rows = [row for _, _, row in draws]
        if rows != list(range(len(logits))):
            logits = logits[rows]
        samplers = [(self._sampler(answer), new) for answer, new, _ in draws]
        if self._ids is None or logits.shape[1] <= self._ids:
            return draw(logits, samplers)
        results: dict[int, SampleResult] = {}
        widths = [self._width(answer, self._ids) for answer, _, _ in draws]
        for width in sorted(set(widths)):
            numbers = [n for n, answer_width in enumerate(widths) if answer_width == width]
            chosen_logits = logits if len(numbers) == len(draws) else logits[numbers]
            drawn = draw(chosen_logits[:, :width], [samplers[n] for n in numbers])
            results |= dict(zip(numbers, drawn, strict=True))
        return [results[n] for n in range(len(draws))]

    def _width(self, answer: Answer, base_ids: int) -> int:
        applied = self._adapters.applied(answer.request.adapter) if answer.request.adapter else ()
        return width_of(applied, base_ids)

    def _sampler(self, answer: Answer) -> ChoiceSampler:
        sampler = self._samplers.get(answer.number)
        if sampler is None:
            sampler = self._samplers[answer.number] = ChoiceSampler(
                answer.request, answer.choice, answer.new
            )
        return sampler

    def _drop_ended(self, ended: list[Answer]) -> list[Answer]:
        for answer in ended:
            self._samplers.pop(answer.number, None)
        if ended:  # their adapters may be dropped
            self.lanes.let_go(
                {s.request.adapter for s in self.scheduler.running if s.request.adapter}
            )
        return ended


def _no_memory() -> DoesNotFitError:
    return DoesNotFitError(
        "out of memory while answering", next_step="Send fewer requests at once, or cancel some."
    )


def decode_step_of(base: FrozenBase) -> DecodeStep:
    """Returns the decoding step of this base, built once."""

    def find() -> DecodeStep:
        with base.routing.none():
            return DecodeStep(base.model)

    return record_of(base.model).part(DecodeStep, find)


def states_of(base: FrozenBase) -> StateLayers | None:
    """Returns the states that layers pass from token to token; None if none does."""
    with base.routing.none():
        layers = state_layers(base.model)
    return layers if layers.states else None


def _with_states(limits: Limits, states: StateLayers, room_bytes: int) -> Limits:
    """Returns limits with at most so many rows that the states fit. DoesNotFitError: none does."""
    rows = min(limits.rows, states.texts_in(room_bytes))
    if not rows:
        raise DoesNotFitError(
            f"the states of one answer take {states.bytes_of(1):,} bytes, {room_bytes:,} are given",
            next_step="Give keys and values more bytes.",
        )
    return replace(limits, rows=rows)


def bytes_per_token(base: FrozenBase) -> int:
    """Returns the bytes of one token's keys and values in all layers that have them; these may have
    heads of different sizes (Gemma 4)."""
    layers, without = (
        base.config.get_text_config().per_layer_config,
        layers_without_keys(base.config),
    )
    widths = [_key_width(layer) for number, layer in enumerate(layers) if number not in without]
    return int(2 * base.dtype.itemsize * sum(widths)) or 1


def _key_width(layer: PreTrainedConfig) -> int:
    """Values of one token's keys in a layer with this config."""
    heads: int = getattr(layer, "num_key_value_heads", None) or layer.num_attention_heads
    size: int = getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads
    return heads * size
