"""Tokens are drawn as is asked, each row by itself, and from the distribution that is meant."""

import math

import numpy as np
import pytest
import torch

from veneer.decoding import draws
from veneer.decoding.draws import ChoiceSampler, draw, draw_reference, sampled
from veneer.decoding.sampling.sampling import Sampling, TokenChance, seed_of, uniform
from veneer.decoding.schedule.sequence import Request
from veneer.decoding.schedule.step_plan import SampledToken
from veneer.errors import ConfigError, DataError, DivergedError
from veneer.kernels.bindings import draw_calls
from veneer.kernels.bindings import library as native

V = 40
CUTS = [
    {},
    {"top_k": 3},
    {"top_p": 0.8},
    {"min_p": 0.2},
    {"top_k": 9, "top_p": 0.7},
    {"top_k": 9, "min_p": 0.05, "top_p": 0.5},
    {"top_k": 10**6, "top_p": 0.999},
    {"min_p": 1.0},
]


def logits_of(rows, ids=V, seed=0, spread=2.0):
    return spread * torch.randn(rows, ids, generator=torch.Generator().manual_seed(seed))


needs_kernels = pytest.mark.skipif(native.library() is None, reason="no compiled kernels here")


def asked(sampling=None, *, seed=0, choice=0, **fields):
    request = Request(
        prompt=(1, 2, 2), max_new_tokens=99, sampling=sampling or Sampling(), seed=seed, **fields
    )
    return ChoiceSampler(request, choice)


def edited(logits_V, drawing, new):
    found = logits_V.float().clone()
    drawing.edit(found, new)
    return found


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("ids", [V, 700, 3000])
def test_many_rows_are_drawn_as_the_reference_draws_each(cut, ids):
    """700 and 3,000 ids are more than the candidates; nearly flat rows have more of them left than
    that."""
    samplings = [Sampling(temperature=t, **cut) for t in (0.2, 1.0, 5.0, 100.0)] * 10
    logits = logits_of(len(samplings), ids)
    numbers = [uniform(7, 0, row) for row in range(len(samplings))]
    found = sampled(logits, samplings, numbers, cut=bool(cut)).tolist()
    expected = [
        draw_reference(row, s, u) for row, s, u in zip(logits, samplings, numbers, strict=True)
    ]
    assert found == expected


def tied_logits(rows, ids):
    """Rows of a few different values, negative ones and both zeros among them."""
    logits = logits_of(rows, ids).round()
    logits[0, : ids // 2] *= -1  # -0.0 equals 0.0
    return logits


@pytest.mark.parametrize("cut", CUTS[1:], ids=str)
@pytest.mark.parametrize("ids", [V, 700, 3000])
def test_of_equal_chances_the_smallest_ids_are_the_likeliest(cut, ids):
    samplings = [Sampling(temperature=t, **cut) for t in (0.2, 1.0, 5.0, 100.0)] * 5
    logits = tied_logits(len(samplings), ids)
    numbers = [uniform(7, 0, row) for row in range(len(samplings))]
    found = sampled(logits, samplings, numbers, cut=True).tolist()
    assert found == [
        draw_reference(row, s, u) for row, s, u in zip(logits, samplings, numbers, strict=True)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ids", [V, 3000])
def test_equal_alternatives_are_in_the_order_of_ids_whatever_the_other_rows_ask(dtype, ids):
    logits, counts = tied_logits(12, ids).to(dtype), [0, 1, 2, 3, 5, 20] * 2
    rows = [(asked(Sampling(logprobs=count)), []) for count in counts]
    together = draw(logits, rows)
    assert together == [draw(logits[n : n + 1], [row])[0] for n, row in enumerate(rows)]
    for values, count, answer in zip(logits.tolist(), counts, together, strict=True):
        order = sorted(range(ids), key=lambda i, values=values: (-values[i], i))
        assert [token for token, _ in answer.chance.alternatives] == order[:count]
        assert answer.token == order[0]
    scored = draws.prompt_chances(logits, [7] * len(logits), 3)
    for answer, chance in zip(together, scored, strict=True):
        own = answer.chance.alternatives[:3]
        assert chance.alternatives[: len(own)] == own


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("ids", [V, 700, 3000])
def test_the_compiled_draw_is_the_reference_with_any_instructions(dtype, cut, ids):
    """Of rows that lie apart, with ids that nothing may follow and ones that are alike."""
    samplings = [Sampling(temperature=t, **cut) for t in (0.0, 0.2, 1.0, 5.0, 100.0)] * 8
    logits = logits_of(len(samplings), ids + 9).to(dtype)[:, :ids]
    logits[::3, 5:30] = -math.inf
    logits[1::3, 3] = logits[1::3].amax(1)
    rows = [asked(sampling, seed=n) for n, sampling in enumerate(samplings)]
    hows = [draws._draw_settings((row, []), ids) for row in rows]
    expected = [
        draw_reference(row.float(), s, uniform(n, 0, 0))
        for n, (row, s) in enumerate(zip(logits, samplings, strict=True))
    ]
    for level in (0, 2, 3):
        assert draw_calls.draw(logits, hows, level=level) == expected
    assert draw(logits, [(row, []) for row in rows]) == expected


@needs_kernels
def test_every_number_has_the_ids_that_the_reference_gives_it():
    """Numbers from end to end, so that each boundary between two ids is passed; the last takes none
    that was cut."""
    (logits,) = logits_of(1, 600)
    numbers = [n / 4000 for n in range(4001)]
    for cut in CUTS:
        sampling = Sampling(temperature=0.9, **cut)
        hows = [
            (u, 0.9, float(sampling.top_k or 600), sampling.top_p, sampling.min_p) for u in numbers
        ]
        found = draw_calls.draw(logits.expand(len(hows), -1), hows)
        assert found == [draw_reference(logits, sampling, u) for u in numbers]


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_what_is_drawn_follows_the_distribution_that_is_meant(cut):
    """Chi square of 20,000 draws over the ids that may come, 5 deviations wide; none of the others
    comes."""
    count, sampling = 20_000, Sampling(temperature=1.3, **cut)
    (logits,) = logits_of(1, 12)
    rows = draw(logits.expand(count, -1), [(asked(sampling, seed=n), []) for n in range(count)])
    chances = torch.softmax(logits.double() / 1.3, -1)
    order = chances.argsort(descending=True)
    kept = [i for i in order.tolist() if chances[i] >= cut.get("min_p", 0) * chances.max()][
        : cut.get("top_k") or 12
    ]
    total, before = float(chances[kept].sum()), 0.0
    left = []
    for i in kept:
        if not left or before < cut.get("top_p", 1) * total:
            left.append(i)
        before += float(chances[i])
    expected = {i: count * float(chances[i] / chances[left].sum()) for i in left}
    assert set(rows) <= set(left)
    square = sum((rows.count(i) - count) ** 2 / count for i, count in expected.items())
    assert square < len(left) + 5 * math.sqrt(2 * len(left))


def test_a_row_draws_the_same_whatever_is_beside_it_and_another_choice_or_place_draws_otherwise():
    logits = logits_of(6, 3000)
    settings = [
        {},
        {"top_p": 0.9},
        {"top_k": 700},
        {"min_p": 0.01},
        {"top_k": 5},
        {"presence_penalty": 1.0},
    ]
    rows = [
        (asked(Sampling(temperature=2.0, **setting), seed=3), [4] * n)
        for n, setting in enumerate(settings)
    ]
    together = draw(logits, rows)
    assert together == [draw(logits[n : n + 1], rows[n : n + 1])[0] for n in range(6)]
    assert together[::-1] == draw(logits.flip(0), rows[::-1])
    numbers = {
        uniform(*each)
        for each in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1), (11, 1, 1), (1, 11, 1)]
    }
    assert len(numbers) == 7 and all(0 <= u < 1 for u in numbers)
    assert seed_of(2**32 - 1, 2) == (2**32 - 1 + 2 * 0x9E3779B1) % 2**32
    assert seed_of(5, 0) == 5 and len({seed_of(2**32 - 1, n) for n in range(1000)}) == 1000


def test_the_likeliest_token_is_taken_where_nothing_is_left_to_chance():
    logits = logits_of(5)
    settings = [
        {},
        {"temperature": 1e-9},
        {"temperature": 1.0, "top_p": 0},
        {"temperature": 1.0, "top_k": 1},
    ]
    settings.append({"temperature": 1.0, "top_p": 1e-30})
    rows = [(asked(Sampling(**setting)), []) for setting in settings]
    assert draw(logits, rows) == logits.argmax(-1).tolist()
    assert draw(logits.bfloat16(), rows[:1] * 5) == logits.bfloat16().argmax(-1).tolist()


def test_a_setting_is_greedy_only_if_it_leaves_a_single_token():
    cold = [{}, {"temperature": 1e-9}, {"top_p": 0}, {"top_k": 1}]
    assert all(Sampling(**{"temperature": float(n > 1), **s}).greedy for n, s in enumerate(cold))
    warm = [{}, {"top_k": 2}, {"top_p": 0.1}, {"min_p": 0.9}]
    assert not any(Sampling(temperature=1.0, **setting).greedy for setting in warm)


def test_a_draw_that_rounds_up_to_the_very_end_takes_a_token_that_was_kept():
    logits = torch.tensor([[0.0, 3.0, 1.0, -float("inf")]])
    for cut, expected in (({}, 2), ({"top_p": 0.4}, 1), ({"top_k": 2}, 2)):
        settings = [Sampling(temperature=1.0, **cut)]
        assert sampled(logits, settings, [1.0], cut=bool(cut)).tolist() == [expected]


def test_penalties_count_what_has_been_there():
    logits = torch.tensor([1.0, -1.0, 2.0, 0.5, -2.0] + [0.0] * (V - 5))
    new = [2, 3, 3, 4]
    repeated = edited(logits, asked(Sampling(repetition_penalty=2.0)), new)
    assert repeated[:5].tolist() == [
        1.0,
        -2.0,
        1.0,
        0.25,
        -4.0,
    ]  # 1 and 2 are in the prompt, 0 is nowhere
    taken = edited(logits, asked(Sampling(presence_penalty=0.5, frequency_penalty=0.25)), new)
    assert (logits - taken)[:6].tolist() == [0, 0, 0.75, 1.0, 0.75, 0]
    drawing = asked(
        Sampling(frequency_penalty=1.0)
    )  # counted as the answer grows, from wherever it is asked first
    for length in (0, 1, 3, 4):
        grown = edited(logits, drawing, new[:length])
    assert torch.equal(grown, edited(logits, asked(Sampling(frequency_penalty=1.0)), new))


def test_biases_constraints_and_stop_tokens_that_come_too_early():
    class Even:
        def allowed(self, new):
            return np.arange(20) % 2 == len(new) % 2

        def ended(self, new):
            return len(new) == 3

    logits = torch.zeros(V)
    biased = asked(Sampling(logit_bias=((7, 3.0), (9, -100.0), (10**6, 5.0))))
    assert edited(logits, biased, [])[[6, 7, 9]].tolist() == [0, 3, -100]
    early = asked(stops=frozenset([5, 300]), min_new_tokens=2)
    assert [edited(logits, early, [0] * n)[5].item() for n in (0, 1, 2)] == [
        -math.inf,
        -math.inf,
        0,
    ]
    assert early.edits([]) and not early.edits([0, 0])
    constrained = asked(constraints=Even)
    allowed = edited(logits, constrained, [1]).isfinite().nonzero()[:, 0].tolist()
    assert allowed == list(range(1, 20, 2))  # ids behind what it knows are not allowed
    assert draw(logits[None], [(constrained, [0, 1])]) == [SampledToken(0, ends=True)]


def test_a_check_is_told_each_token_once_and_ends_the_answer():
    told = []
    drawing = asked(checks=lambda: lambda token: told.append(token) or token == 4)
    logits = torch.nn.functional.one_hot(torch.tensor([3, 4]), V).float()
    assert draw(logits[:1], [(drawing, [])]) == [3]
    assert draw(logits[1:], [(drawing, [3])]) == [SampledToken(4, ends=True)]
    assert told == [3, 4]


def test_chances_are_those_of_the_model_before_anything_is_done_to_them():
    logits = logits_of(3)
    logs = torch.log_softmax(logits, -1)
    forced = Sampling(temperature=2.0, top_k=2, logit_bias=((7, 100.0),), logprobs=3)
    rows = [(asked(forced), []), (asked(), []), (asked(Sampling(logprobs=0)), [])]
    told, plain, own = draw(logits, rows)
    best = logs[0].topk(3)
    assert told.token == 7 and told.chance.logprob == pytest.approx(logs[0, 7].item())
    assert told.chance.alternatives == tuple(
        zip(best.indices.tolist(), best.values.tolist(), strict=True)
    )
    assert plain == logits[1].argmax() and own == SampledToken(
        int(logits[2].argmax()),
        chance=TokenChance(int(logits[2].argmax()), pytest.approx(logs[2].max().item())),
    )


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_numbers_that_are_none_and_masks_that_allow_nothing_end_their_own_row_alone(temperature):
    class Nothing:
        def allowed(self, new):
            return torch.zeros(V, dtype=torch.bool)

        def ended(self, new):
            raise AssertionError

    logits = logits_of(5)
    logits[0, 3], logits[1, 3], logits[2] = math.nan, math.inf, -math.inf
    sampling = Sampling(temperature=temperature, logprobs=2)
    rows = [(asked(sampling), [])] * 3 + [
        (asked(sampling, constraints=Nothing), []),
        (asked(sampling), []),
    ]
    *broken, forbidden, right = draw(logits, rows)
    assert all(isinstance(fault, DivergedError) for fault in broken)
    assert isinstance(forbidden, ConfigError) and right == draw(logits[4:], rows[4:])[0]


@pytest.mark.parametrize("fails", ["allowed", "ended"])
def test_a_constraint_that_fails_ends_its_own_row_alone(fails):
    class Fails:
        def __getattr__(self, name):
            def answer(new):
                if name == fails:
                    raise DataError("no grammar")
                return np.ones(V, dtype=bool)

            return answer

    logits = logits_of(2)
    broken, right = draw(logits, [(asked(constraints=Fails), []), (asked(), [])])
    assert isinstance(broken, DataError) and right == logits[1].argmax()


def test_the_greedy_draw_of_many_rows_is_one_search_for_the_largest(monkeypatch):
    monkeypatch.setattr(draws, "_draw_changed", None)
    monkeypatch.setattr(torch, "log_softmax", None)
    logits = logits_of(4)
    assert draw(logits, [(asked(), [])] * 4) == logits.argmax(-1).tolist()


def test_numbers_that_mean_nothing_are_refused_together():
    with pytest.raises(ConfigError) as caught:
        Sampling(
            temperature=math.nan,
            top_k=-1,
            top_p=2,
            logprobs=21,
            logit_bias=((-1, 0.0), (2, math.inf), (2, 1.0)),
        )
    assert len(caught.value.faults) == 7
