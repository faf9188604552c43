"""Requests for many adapters in one batch, by a model that is pretended: what other servers got
wrong."""

import pytest

from tests.support.decoding.toy_engine import BROKEN, Toy, adapter, alone, steps_until
from veneer.decoding.schedule.sequence import FinishReason, Request, SequenceState
from veneer.errors import DoesNotFitError

A, B, C = (adapter(name) for name in "abc")


def test_one_adapter_that_jams_delays_nobody():
    toy = Toy(rows=2)
    toy.adapters[A] = None
    jammed = [toy.add([i], 2, A) for i in range(5)]
    others = [toy.add([i], 2, own) for i, own in enumerate((B, (), C))]
    for _ in range(8):
        toy.step()
    assert all(s.reason is FinishReason.LENGTH for s in others)
    assert all(s.state is SequenceState.WAITING for s in jammed)
    assert toy.step().spans == ()
    toy.adapters[A] = 0
    toy.finish_all()
    assert toy.ended[3:] == jammed


def test_an_adapter_that_becomes_ready_is_the_next_to_run():
    toy = Toy(rows=1)
    toy.adapters[A] = None
    oldest = toy.add([1], 2, A)
    for i in range(20):
        toy.add([i], 2, B)
    for _ in range(6):
        toy.step()
    toy.adapters[A] = 0
    assert steps_until(toy, oldest, SequenceState.FINISHED) <= 4


def test_an_adapter_that_cannot_be_loaded_fails_its_own_sequences_alone():
    toy = Toy()
    toy.adapters[A] = BROKEN
    both = toy.scheduler.add(Request(prompt=(3,), max_new_tokens=2, adapter=A, choices=2))
    own = [toy.add([1], 2, A), toy.add([2], 2, A), *both]
    other = toy.add([1], 2, B)
    plan = toy.step()
    assert set(plan.ended) == {*own}
    assert all((s.reason, s.error) == (FinishReason.ERROR, BROKEN) for s in own)
    toy.finish_all()
    assert other.new == alone(other.request)
    assert toy.asked[A] == 1


def test_a_loader_that_fails_otherwise_loses_no_end():
    toy = Toy()
    gone, own, other = toy.add([1], 2), toy.add([2], 2, A), toy.add([3], 2)
    toy.scheduler.cancel(gone)
    toy.adapters[A] = RuntimeError("a fault of ours")
    with pytest.raises(RuntimeError):
        toy.step()
    toy.adapters[A] = 0
    toy.finish_all()
    assert toy.ended == [gone, other, own]


def test_an_adapter_that_breaks_after_it_ran_fails_what_has_gone_back():
    toy = Toy(blocks=8, rows=4)
    old, young = toy.add(range(8), 20), toy.add(range(100, 108), 20, A)
    steps_until(toy, young, SequenceState.PREEMPTED)
    toy.adapters[A] = BROKEN
    toy.finish_all()
    assert (young.reason, old.reason) == (FinishReason.ERROR, FinishReason.LENGTH)
    assert toy.right(young)


def test_two_adapters_of_one_name_share_no_cache():
    """A name is a pointer: identity is the content. So a new version finds nothing of the old
    one."""
    toy = Toy()
    old, new = (("1" * 64, 1.0),), (("2" * 64, 1.0),)
    first = toy.add(range(12), 3, old)
    toy.finish_all()
    for own, found in ((new, 0), ((("1" * 64, 0.5),), 0), (old, 8), ((), 0)):
        s = toy.add(range(12), 3, own)
        toy.finish_all()
        assert s.cached_tokens == found
        assert toy.right(s)
    assert toy.right(first)


def test_a_version_in_flight_ends_on_its_version_while_a_new_one_runs_beside_it():
    toy = Toy()
    old, new = (("1" * 64, 1.0),), (("2" * 64, 1.0),)
    first = toy.add(range(12), 9, old)
    toy.step()
    second = toy.add(range(12), 9, new)
    toy.finish_all()
    assert first.new == alone(first.request)
    assert second.new == alone(second.request)
    assert second.cached_tokens == 0


def test_an_adapter_is_unloaded_while_it_runs():
    toy = Toy()
    toy.adapters[A] = 5
    s, behind = toy.add(range(12), 9, A), toy.add(range(12), 9)
    toy.step()
    toy.blocks.forget(A[0][0])
    toy.finish_all()
    assert toy.right(s) and toy.right(behind)
    assert toy.scheduler.in_use() == {}
    toy.blocks.forget(A[0][0])
    assert toy.blocks.findable == 5, "the base's are still there"
    assert toy.blocks.forget(A[0][0]) == 0
    again = toy.add(range(12), 2, A)
    toy.step()
    assert again.cached_tokens == 0
    toy.finish_all()


def test_what_went_for_good_is_found_no_more():
    toy = Toy()
    toy.add(range(12), 2, A), toy.add(range(12), 2)
    toy.finish_all()
    found = toy.blocks.findable
    toy.gone = [A[0][0]]
    again = toy.add(range(12), 2)
    toy.finish_all()
    assert again.cached_tokens and 0 < toy.blocks.findable < found


def test_adapters_are_in_use_from_the_queue_to_the_end():
    toy = Toy(rows=1)
    toy.add([1], 2, A)
    toy.add([2], 2, A, choices=2)
    toy.add([3], 2, B)
    toy.add([4], 2)
    assert toy.scheduler.in_use() == {A: 3, B: 1, (): 1}
    assert toy.scheduler.wanted() == [A, B]
    toy.finish_all()
    assert toy.scheduler.in_use() == {}


def test_as_many_adapters_as_may_run_and_a_request_of_the_base_run_together():
    toy = Toy(rows=8, max_adapters=2)
    asked = [toy.add([1, 2], 4, own) for own in (A, B, C, ())]
    plan = toy.step()
    assert [own for own, _ in plan.parts] == [(), A, B]
    toy.finish_all()
    assert all(toy.right(s) for s in asked)


def test_more_adapters_in_a_request_than_may_run_are_refused_with_both_numbers():
    toy = Toy(max_adapters=2)
    with pytest.raises(DoesNotFitError, match="3 adapters are to act together, at most 2 can"):
        toy.add([1], 2, (*A, *B, *C))
    both = toy.add([1], 2, (*A, *B))
    toy.finish_all()
    assert toy.right(both)


@pytest.mark.parametrize("starving", [B, (*B, *C)], ids=["one", "two at once"])
def test_popular_adapters_do_not_starve_one_that_waits_for_a_place(starving):
    toy = Toy(rows=4, max_adapters=2, max_overtaken=3, max_waiting=1000)
    popular = [adapter("x"), adapter("y")]
    for i in range(4):
        toy.add([i], 4 + i, popular[i % 2])
    toy.step()
    s = toy.add([1, 2], 2, starving)
    for i in range(100):
        toy.add([i], 6, popular[i % 2])
    steps_until(toy, s, SequenceState.FINISHED, 40)
    assert s.overtaken >= 3
    assert len(toy.ended) < 20
    toy.finish_all()
    assert all(toy.right(sequence) for sequence in toy.ended)


@pytest.mark.parametrize(
    ("starving", "leaving"), [(B, "z"), ((*B, *C), "yz")], ids=["one", "two at once"]
)
def test_only_those_adapters_make_room_that_are_done_soonest(starving, leaving):
    toy = Toy(rows=8, max_adapters=3, max_overtaken=0, max_waiting=1000, blocks=400)
    names = {"x": 40, "y": 14, "z": 7}
    for name, new in names.items():
        toy.add([1], new, adapter(name))
    toy.step()
    s = toy.add([1, 2], 2, starving)
    later = [(name, toy.add([i], 3, adapter(name))) for i in range(40) for name in names]
    toy.step()
    assert {name for name, each in later if each.new} == names.keys() - set(leaving)
    steps_until(toy, s, SequenceState.FINISHED, 20)
    assert not any(each.new for name, each in later if name in leaving)
    toy.finish_all()


def test_sixteen_adapters_on_eight_places_all_begin_soon():
    """Elsewhere the first token came 150 times later than with places for all."""
    toy = Toy(rows=8, max_adapters=8, max_overtaken=8, blocks=400, max_waiting=1000)
    asked = [toy.add([i % 5], 4, adapter(f"{i % 16:x}"), arrival=float(i)) for i in range(160)]
    began: dict[int, int] = {}
    for step in range(1000):
        if toy.scheduler.idle:
            break
        for span in toy.step().spans:
            began.setdefault(span.sequence.number, step)
    fair = [number // 8 * 4 for number in range(160)]  # eight rows, four steps each
    assert max(began[s.number] - fair[s.number] for s in asked) <= 40
    assert step <= 1.5 * 160 / 8 * 4


def test_a_thousand_requests_leave_nothing_behind():
    toy = Toy(blocks=10, rows=4, max_waiting=10_000)
    for i in range(1000):
        s = toy.add([i % 7, i % 3], 1 + i % 3, (A, B, (), C)[i % 4])
        if i % 5 == 0:
            toy.scheduler.cancel(s)
        if i % 3 == 0:
            toy.step()
    toy.finish_all(3000)
    assert len(toy.ended) == 1000
    for content in "abc":
        toy.blocks.forget(content * 8)
    assert toy.scheduler.idle
    assert not any(vars(toy.scheduler)[name] for name in ("_cancelled", "_plan"))
