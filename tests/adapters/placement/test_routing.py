"""What acts, as one object: what a block or a forward holds, for whom, and until when. No model is
needed to say it."""

import copy
import threading
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from veneer.adapters.config import LoRA
from veneer.adapters.placement.acting import Acting, BatchPart, TokenKeys, in_turn
from veneer.adapters.placement.attachment import Attachment
from veneer.adapters.placement.routing import Routing
from veneer.errors import ConfigError

A, B, C = (("a", 1.0),), (("b", 2.0),), (("c", 1.0),)
NONE = nn.Identity()


def with_three(active=()):
    routing = Routing()
    for name in "abc":
        routing.enter(NONE, name, Attachment(name, LoRA()))
    routing.active = active
    return routing


def holding(routing, active):
    return routing.held(Acting.everywhere(routing.applied(active)))


def elsewhere(ask):
    """What another thread gets."""
    found = []
    thread = threading.Thread(target=lambda: found.append(ask()))
    thread.start()
    thread.join()
    return found[0]


def test_what_is_set_within_a_block_is_this_threads_until_the_block_ends():
    routing = with_three(A)
    with routing.held():
        routing.active = B
        assert routing.active == B and elsewhere(lambda: routing.active) == A
        with routing.none():
            assert routing.active == ()
            routing.active = C
            assert routing.active == C and routing.in_use() == {"a", "b", "c"}
        assert routing.active == B and routing.is_held and routing.in_use() == {"a", "b"}
    assert routing.active == A and not routing.is_held and routing.in_use() == {"a"}


def test_what_is_set_outside_of_a_block_is_everybodys_but_theirs_who_hold_something():
    routing = with_three(A)
    with routing.held():
        elsewhere(lambda: setattr(routing, "active", B))
        assert routing.active == A and elsewhere(lambda: routing.active) == B
    assert routing.active == B


def test_one_that_a_block_around_or_another_thread_holds_does_not_leave_and_nothing_changes():
    routing = with_three((*A, *B))
    with holding(routing, A):
        assert elsewhere(lambda: routing.leave("a")) is False
        with holding(routing, (*B, *C)):
            assert routing.leave("a") is False
            assert routing.active == (*B, *C) and set(routing.attached) == {"a", "b", "c"}
            assert routing.leave("c") is True and routing.active == B
        assert routing.active == A and elsewhere(lambda: routing.active) == (*A, *B)
        assert routing.leave("a") is True and routing.active == ()
        assert elsewhere(lambda: routing.active) == B
    assert routing.active == B and set(routing.attached) == {"b"}
    with pytest.raises(KeyError):
        routing.leave("nobody")


def test_a_block_that_fails_lets_go_of_what_it_held():
    routing = with_three()
    with pytest.raises(ValueError), holding(routing, A), holding(routing, (*A, *B)):
        raise ValueError
    assert routing.in_use() == set() and not routing.is_held


def test_a_copy_has_adapters_of_its_own_what_acts_for_all_and_holds_nothing():
    routing = with_three(A)
    with holding(routing, B):
        again = copy.deepcopy(routing)
    assert again.active == A and not again.is_held
    assert again.attached["a"] is not routing.attached["a"]
    assert again.acting.adapters == [again.attached["a"]]


def test_dropout_draws_within_the_block_alone_and_for_this_thread():
    routing = with_three(A)
    assert routing.acting.keys is None
    with routing.drawing(TokenKeys(torch.arange(3), 7)):
        assert (
            routing.acting.keys is not None
            and routing.acting.keys.step == 7
            and routing.active == A
        )
        assert elsewhere(lambda: routing.acting.keys) is None
    assert routing.acting.keys is None


class Nested(nn.Module):
    """A forward within a forward of the same module."""

    def __init__(self, routing):
        super().__init__()
        self.routing, self.seen, self.fails = routing, [], False

    def forward(self, depth):
        self.seen.append(self.routing.active)
        elsewhere(lambda: setattr(self.routing, "active", C))
        if depth:
            self(depth - 1)
        self.seen.append(self.routing.active)
        if self.fails:
            raise ValueError
        return torch.zeros(1)


@pytest.mark.parametrize("fails", [False, True])
def test_a_forward_and_those_within_it_see_one_state_and_let_it_go_at_the_outermost_end(fails):
    routing = Routing()
    module = Nested(routing)
    for name in "abc":
        routing.enter(module, name, Attachment(name, LoRA()))
    routing.active = A
    module.fails = fails
    with pytest.raises(ValueError) if fails else nullcontext():
        module(2)
    assert module.seen == [A] * (4 if fails else 6)
    assert routing.active == C and not routing.is_held
    routing.active = A
    with holding(routing, B):
        module.seen.clear()
        module.fails = False
        module(1)
        assert module.seen == [B] * 4 and routing.active == B
    for name in "ab":
        assert routing.leave(name)
    assert module._forward_hooks and routing.leave("c") and not module._forward_hooks


class Leaving(nn.Module):
    """The last adapter leaves during a forward that does not use it."""

    def __init__(self, routing):
        super().__init__()
        self.routing = routing

    def forward(self):
        assert elsewhere(lambda: self.routing.leave("a"))
        return torch.zeros(1)


def test_a_forward_during_which_the_last_adapter_leaves_holds_nothing_afterwards():
    routing = Routing()
    module = Leaving(routing)
    routing.enter(module, "a", Attachment("a", LoRA()))
    module()
    assert not routing.is_held
    routing.enter(module, "b", Attachment("b", LoRA()))
    elsewhere(lambda: setattr(routing, "active", B))
    assert routing.active == B, "this thread sees what all see"
    assert routing.leave("b") and not module._forward_hooks and not module._forward_pre_hooks


# the value itself


def parts_of(acting, rows):
    return [
        (s.rows.start, s.rows.stop, [a.name for a, _ in s.adapters]) for s in acting.segments(rows)
    ]


def test_parts_follow_one_another_and_neighbours_of_the_same_adapters_are_one():
    routing = with_three()
    a, b = routing.applied(A), routing.applied(B)
    mixed = in_turn([(2, a), (3, a), (1, ()), (2, b)])
    assert parts_of(mixed, 8) == [(0, 5, ["a"]), (5, 6, []), (6, 8, ["b"])]
    assert mixed.whole is None and in_turn([(2, a), (3, a)]).whole == a
    assert parts_of(mixed.padded(24), 32)[-1] == (6, 32, ["b"])
    assert Acting.everywhere(a).padded(24).whole == a
    with pytest.raises(ValueError):
        Acting((BatchPart(2, a), BatchPart(None, b)))


def test_what_comes_after_a_choice_of_rows_knows_whose_they_are():
    routing = with_three()
    keys = TokenKeys(torch.arange(8) * 10, 1)
    mixed = in_turn([(5, routing.applied(A)), (1, ()), (2, routing.applied(B))]).drawing(keys)
    chosen = torch.tensor([1, 4, 7])
    assert parts_of(mixed.select(chosen), 3) == [(0, 2, ["a"]), (2, 3, ["b"])]
    assert mixed.select(chosen).keys.rows.tolist() == [10, 40, 70]
    assert parts_of(mixed.keeping(chosen), 3) == parts_of(mixed.select(chosen), 3)
    assert parts_of(mixed.keeping(chosen), 8) == parts_of(mixed, 8)
    assert mixed.keeping(torch.tensor([1, 7])).rows_of_parts(2) == (1, 0, 1)
    assert mixed.keeping(torch.tensor([1, 5])).rows_of_parts(2) == (1, 1, 0)
    assert parts_of(mixed.between(slice(4, 100)), 4) == [(0, 1, ["a"]), (1, 2, []), (2, 4, ["b"])]
    assert mixed.between(slice(4, 100)).keys.rows.tolist() == [40, 50, 60, 70]


def test_rows_of_which_nobody_could_say_whose_they_are_are_refused():
    routing = with_three()
    mixed = in_turn([(5, routing.applied(A)), (3, routing.applied(B))])
    with pytest.raises(ConfigError, match="a module gets 6 rows, the forward has 8"):
        mixed.segments(6)
    assert parts_of(Acting.everywhere(routing.applied(A)), 6) == [(0, 6, ["a"])]
