"""Many requests in one batch, over a simulated model (tests/support/decoding/toy_engine.py)."""

import math

import pytest

from tests.support.decoding.toy_engine import WORDS, Toy, adapter, alone, steps_until
from veneer.decoding.schedule.limits import Limits
from veneer.decoding.schedule.sequence import FinishReason, Request, SequenceState
from veneer.decoding.schedule.step_plan import SampledToken
from veneer.errors import ConfigError, DoesNotFitError, QueueFullError

A, B = adapter("a"), adapter("b")


# --- one request


@pytest.mark.parametrize("chunk", [1, 3, 4, 32])
def test_a_prompt_is_read_in_chunks_and_answered(chunk):
    toy = Toy(chunk_tokens=chunk)
    s = toy.add(range(10), 6)
    toy.finish_all()
    assert s.new == alone(s.request)
    assert s.reason is FinishReason.LENGTH
    assert toy.ended == [s]
    assert toy.computed == 10 + 5, "the last token is never read"


def test_a_stop_token_ends_an_answer_and_is_no_part_of_it():
    toy = Toy()
    first = alone(Request(prompt=(1, 2), max_new_tokens=8))
    stop = first[3]
    end = first.index(stop)
    s = toy.add([1, 2], 8, stops=frozenset([stop]))
    toy.finish_all()
    assert (s.reason, s.new, s.answer) == (FinishReason.STOP, first[: end + 1], first[:end])


def test_a_stop_token_stops_nothing_before_the_least_number_of_tokens():
    toy = Toy()
    s = toy.add([1, 2], 8, stops=frozenset(range(WORDS)), min_new_tokens=3)
    toy.finish_all()
    assert (s.reason, len(s.new), len(s.answer)) == (FinishReason.STOP, 4, 3)


def test_a_caller_says_that_a_token_is_the_last():
    toy = Toy()
    s = toy.add([1, 2], 8)
    toy.step(instead={s.number: SampledToken(5, ends=True)})
    assert (s.reason, s.answer) == (FinishReason.STOP, [5])


def test_a_request_says_everything_that_is_wrong_with_it():
    with pytest.raises(ConfigError) as caught:
        Request(
            prompt=(),
            max_new_tokens=0,
            adapter=(("x", math.nan), ("x", 1.0)),
            stops=frozenset([-1]),
        )
    said = str(caught.value)
    for fault in (
        "max_new_tokens is 0",
        "prompt is empty",
        "weight 1 is nan",
        "stops has '-1'",
        "acts twice",
    ):
        assert fault in said
    with pytest.raises(ConfigError, match="min_new_tokens 5 is above max_new_tokens 4"):
        Request(prompt=(1,), max_new_tokens=4, min_new_tokens=5)
    with pytest.raises(ConfigError, match="the prompt has 'True'"):
        Request(prompt=(True,), max_new_tokens=4)


def test_limits_leave_a_token_for_every_row():
    with pytest.raises(ConfigError, match="rows 9, step_tokens 8"):
        Limits(rows=9, step_tokens=8)


# --- many


def test_decoding_goes_on_while_a_long_prompt_is_read():
    toy = Toy(chunk_tokens=8)
    short = toy.add([1, 2], 20)
    toy.step()
    long = toy.add(range(60), 2)
    for said in range(2, 9):
        toy.step()
        assert len(short.new) == said
        assert not long.new
    toy.finish_all()


def test_of_one_adapter_single_tokens_come_before_chunks():
    toy = Toy()
    one = toy.add(range(4), 9)
    toy.step()
    urgent, two = toy.add(range(10, 14), 9, priority=1), toy.add(range(20, 23), 9, B)
    plan = toy.step()
    assert [span.sequence for span in plan.spans] == [one, urgent, two]
    toy.finish_all()


def test_a_long_prompt_leaves_room_to_short_ones_behind_it():
    toy = Toy(step_tokens=16, chunk_tokens=8)
    long, short = toy.add(range(60), 2), toy.add([1, 2, 3], 2)
    toy.step()
    assert len(short.new) == 1
    assert not long.new
    toy.finish_all()


def test_rows_of_one_adapter_stand_beside_each_other_and_the_base_comes_first():
    toy = Toy()
    for own in (B, A, (), B, A, ()):
        toy.add([1, 2, 3], 4, own, salt=str(len(toy.scheduler.waiting)))
    plan = toy.plan()
    assert [own for own, _ in plan.parts] == [(), A, B]
    assert plan.parts == (((), 6), (A, 6), (B, 6))
    toy.finish(plan, {})
    toy.finish_all()
    assert all(toy.right(s) for s in toy.ended)  # rows do not take the first adapter's answers


def test_the_oldest_goes_first_within_a_priority():
    toy = Toy(rows=1, step_tokens=8)
    late = toy.add([1], 1, arrival=2.0)
    early = toy.add([2], 1, arrival=1.0)
    urgent = toy.add([3], 1, arrival=3.0, priority=1)
    toy.finish_all()
    assert toy.ended == [urgent, early, late]


def test_a_prompt_that_many_ask_at_once_is_read_once():
    toy = Toy()
    asked = [toy.add([*range(16), own], 2) for own in range(100, 106)]
    toy.finish_all()
    assert toy.computed == 17 + 5 * 1 + 6
    assert [s.cached_tokens for s in asked] == [0, 16, 16, 16, 16, 16]


def test_cached_tokens_are_those_of_the_first_reading():
    toy = Toy()
    first = toy.add(range(10), 2)
    toy.finish_all()
    again = toy.add(range(10), 2)
    toy.finish_all()
    assert (first.cached_tokens, again.cached_tokens) == (0, 8)
    assert first.new == again.new


def test_the_same_calls_give_the_same_plans():
    def run() -> list:
        toy = Toy(blocks=9, rows=4)
        for i in range(9):
            toy.add(range(i % 4 + 1), 7, (A, (), B)[i % 3], seed=i)
        plans = []
        while not toy.scheduler.idle:
            plan = toy.step()
            plans.append(
                [(s.sequence.number, s.start, s.stop, tuple(s.sequence.new)) for s in plan.spans]
            )
        return plans

    assert run() == run()


# --- choices


def test_choices_read_their_prompt_once_and_go_on_alone():
    toy = Toy()
    request = Request(prompt=tuple(range(10)), max_new_tokens=5, choices=4)
    choices = toy.scheduler.add(request)
    plan = toy.step()
    assert plan.spans[0].draws == choices
    assert len(toy.blocks.copies) == 3
    assert len(toy.step().copies) == 3
    assert toy.step().copies == (), "once is enough"
    toy.finish_all()
    assert toy.computed == 10 + 4 * 4
    assert [s.new for s in choices] == [alone(request, i) for i in range(4)]
    assert len({tuple(s.new) for s in choices}) > 1


def test_choices_without_rows_wait_and_find_the_prompt():
    toy = Toy(rows=2)
    choices = toy.scheduler.add(Request(prompt=tuple(range(10)), max_new_tokens=5, choices=4))
    toy.step()
    assert [s.state for s in choices] == [SequenceState.RUNNING] * 2 + [SequenceState.PREEMPTED] * 2
    toy.finish_all()
    assert toy.computed == 10 + 2 * 4 + 2 * (2 + 4), (
        "the last two tokens of the prompt are read again"
    )
    assert all(toy.right(s) for s in choices)


@pytest.mark.parametrize("when", ["waiting", "reading", "during the step that draws"])
def test_the_first_choice_may_be_cancelled_without_the_others(when):
    toy = Toy(chunk_tokens=8)
    choices = toy.scheduler.add(Request(prompt=tuple(range(10)), max_new_tokens=5, choices=3))
    if when != "waiting":
        toy.step()
    if when == "during the step that draws":
        toy.step(meanwhile=lambda: toy.scheduler.cancel(choices[0]))
    toy.scheduler.cancel(choices[0])
    toy.finish_all()
    assert [s.reason for s in choices] == [
        FinishReason.CANCELLED,
        FinishReason.LENGTH,
        FinishReason.LENGTH,
    ]
    assert all(toy.right(s) for s in choices)
    assert sorted(s.number for s in toy.ended) == [0, 1, 2]


def test_a_first_choice_that_ends_at_once_leaves_its_prompt_to_the_others():
    toy = Toy()
    request = Request(prompt=tuple(range(10)), max_new_tokens=5, choices=3)
    choices = toy.scheduler.add(request)
    toy.step(instead={0: SampledToken(1, ends=True)})
    assert choices[0].state is SequenceState.FINISHED
    toy.finish_all()
    assert all(toy.right(s) for s in choices[1:])


# --- room


def test_a_prompt_that_can_never_fit_is_refused_at_once_with_both_numbers():
    toy = Toy(blocks=4)
    with pytest.raises(
        DoesNotFitError, match=r"10 tokens and 8 new ones need room for 17; .* room for 16"
    ):
        toy.add(range(10), 8)
    toy.add(range(10), 7)
    toy.finish_all()


def test_a_prompt_that_does_not_fit_beside_its_adapters_prefix_ends_alone_with_the_numbers():
    toy = Toy(blocks=4)
    toy.adapters[A] = 6
    s, other = toy.add(range(10), 2, A), toy.add(range(10), 2)
    toy.finish_all()
    assert s.reason is FinishReason.ERROR
    assert "need room for 11, its adapter's prefix for 8; there is room for 16" in str(s.error)
    assert other.reason is FinishReason.LENGTH


def test_the_youngest_goes_back_where_room_runs_out_and_says_what_it_would_have_said():
    toy = Toy(blocks=8, rows=4)
    old, young = toy.add(range(8), 20), toy.add(range(100, 108), 20)
    steps_until(toy, young, SequenceState.PREEMPTED)
    assert old.state is SequenceState.RUNNING
    said = list(young.new)
    assert said
    toy.finish_all()
    assert young.new[: len(said)] == said
    assert all(toy.right(s) for s in (old, young))
    assert toy.ended == [old, young]


def test_the_youngest_that_asks_for_room_in_vain_goes_back_itself_and_computes_nothing():
    toy = Toy(blocks=8, rows=4)
    old, young = toy.add(range(6), 18), toy.add(range(100, 107), 18)
    while young.state is not SequenceState.PREEMPTED:
        plan = toy.step()
    assert [span.sequence for span in plan.spans] == [old]
    toy.finish_all()
    assert all(toy.right(s) for s in (old, young))


def test_a_request_may_take_all_positions_and_none_more():
    toy = Toy()
    toy.scheduler.positions = 20
    s = toy.add(range(12), 8)
    toy.finish_all()
    assert s.reason is FinishReason.LENGTH and len(s.new) == 8
    with pytest.raises(DoesNotFitError):
        toy.add(range(12), 9)


def test_nobody_is_let_in_into_the_room_that_others_need_next():
    toy = Toy(blocks=4, rows=4)
    one, two = toy.add(range(7), 6), toy.add(range(100, 107), 2)
    three = toy.add([1], 2)
    toy.step()
    assert (one.state, two.state, three.state) == (
        SequenceState.RUNNING,
        SequenceState.WAITING,
        SequenceState.WAITING,
    )
    toy.finish_all()
    assert toy.ended == [one, two, three]


def test_a_sequence_that_comes_back_finds_what_is_left_of_its_blocks():
    toy = Toy(blocks=8, rows=4)
    old, young = toy.add(range(8), 13), toy.add(range(100, 108), 13)
    steps_until(toy, young, SequenceState.PREEMPTED)
    computed = toy.computed
    toy.finish_all()
    rest = (old.length + young.length) - 2 - (computed - 0)
    assert toy.computed - computed < rest + young.length
    assert young.cached_tokens == 0, "usage counts the first reading alone"


def test_shorter_ones_do_not_keep_out_a_long_one_that_waits_for_room():
    toy = Toy(blocks=8, rows=4)
    toy.add(range(12), 8)
    toy.step()
    long = toy.add(range(100, 124), 2)
    small = [toy.add([i], 2) for i in range(20)]
    toy.finish_all()
    assert toy.ended.index(long) < min(toy.ended.index(s) for s in small)


def test_a_step_that_did_not_fit_into_memory_is_planned_again_and_smaller():
    toy = Toy()
    toy.adapters[A] = 3
    choices = toy.scheduler.add(Request(prompt=tuple(range(9)), max_new_tokens=4, choices=2))
    behind = toy.add([1, 2], 4, A)
    for _ in range(20):
        if toy.scheduler.idle:
            break
        plan = toy.plan()
        toy.scheduler.undo_step()
        smaller = toy.plan(most_tokens=3)
        assert smaller.prefix_writes == plan.prefix_writes and smaller.copies == plan.copies
        toy.finish(smaller, {})
    assert all(toy.right(s) and s.reason is FinishReason.LENGTH for s in (*choices, behind))


def test_one_request_that_fails_harms_no_other():
    toy = Toy()
    one, two = toy.add([1, 2], 4), toy.add([3, 4], 4)
    fault = DoesNotFitError("out of memory drawing a token")
    toy.step(instead={one.number: fault})
    toy.finish_all()
    assert (one.reason, one.error) == (FinishReason.ERROR, fault)
    assert two.new == alone(two.request)


# --- the queue


def test_a_full_queue_says_how_many_wait():
    toy = Toy(rows=1, max_waiting=3)
    running = toy.add([1], 8)
    toy.step()
    for i in range(3):
        toy.add([i], 1)
    with pytest.raises(QueueFullError, match="3 requests are waiting, the limit is 3") as caught:
        toy.add([9], 1)
    assert (caught.value.waiting, caught.value.most) == (3, 3)
    toy.scheduler.cancel(running)
    toy.step()
    toy.add([9], 1)
    toy.finish_all()


def test_those_that_went_back_do_not_fill_the_queue():
    toy = Toy(blocks=8, rows=4, max_waiting=2)
    toy.add(range(8), 20)
    young = toy.add(range(100, 108), 20)
    steps_until(toy, young, SequenceState.PREEMPTED)
    toy.add([1], 1)
    toy.add([2], 1)
    with pytest.raises(QueueFullError, match="2 requests are waiting"):
        toy.add([3], 1)
    toy.finish_all()


def test_choices_count_one_by_one():
    toy = Toy(max_waiting=3)
    with pytest.raises(DoesNotFitError, match="4 choices requested, at most 3 can wait"):
        toy.add([1], 1, choices=4)
    assert toy.scheduler.idle
    toy.add([1], 1, choices=2)
    with pytest.raises(QueueFullError, match="2 requests are waiting, the limit is 3"):
        toy.add([1], 1, choices=2)
    toy.finish_all()


def test_a_cancelled_request_is_in_no_later_step():
    toy = Toy()
    one, two = toy.add([1, 2], 9), toy.add([3, 4], 9)
    toy.step()
    toy.step(meanwhile=lambda: toy.scheduler.cancel(one))
    assert (one.reason, len(one.new)) == (FinishReason.CANCELLED, 1), (
        "what it drew meanwhile is not told"
    )
    plan = toy.step()
    assert [span.sequence for span in plan.spans] == [two]
    toy.scheduler.cancel(one)
    three = toy.add([5], 9)
    toy.scheduler.cancel(two)
    assert two.table is None, "between steps, its blocks are free at once"
    assert toy.step().ended == (two,)
    toy.scheduler.cancel(three)
    toy.finish_all()
    assert toy.ended == [one, two, three]


def test_a_deadline_ends_what_runs_and_what_waits():
    toy = Toy(rows=1)
    runs, waits = toy.add([1, 2], 9, deadline=5.0), toy.add([3], 9, deadline=4.0)
    behind = toy.add([4], 2, deadline=100.0)
    toy.step()
    toy.now = 4.0
    assert toy.step().ended == (waits,)
    toy.now = 6.0
    assert toy.step().ended == (runs,)
    assert (runs.reason, runs.new) == (FinishReason.DEADLINE, alone(runs.request)[:2])
    toy.finish_all()
    assert behind.reason is FinishReason.LENGTH
