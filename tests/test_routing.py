"""What acts, as one object: what a block or a forward holds, for whom, and until when. No model is needed to say it."""

import copy
import threading

import pytest
import torch
from torch import nn

from veneer.adapters.routing import Routing

A, B, C = (("a", 1.0),), (("b", 2.0),), (("c", 1.0),)


class Attached:
    def __init__(self):
        self.layers = {}


def elsewhere(ask):
    """What another thread gets."""
    found = []
    thread = threading.Thread(target=lambda: found.append(ask()))
    thread.start()
    thread.join()
    return found[0]


def test_what_is_set_within_a_block_is_this_threads_until_the_block_ends():
    routing = Routing(A)
    with routing.held():
        routing.active = B
        assert routing.active == B and elsewhere(lambda: routing.active) == A
        with routing.none():
            assert routing.active == ()
            routing.active = C
            assert routing.active == C
            assert routing.in_use() == {"a", "b", "c"} and elsewhere(
                lambda: routing.in_use(by_others=True)
            ) == {"b", "c"}
            assert routing.in_use(by_others=True) == set()
        assert routing.active == B and routing.is_held
    assert routing.active == A and not routing.is_held and routing.in_use() == {"a"}


def test_what_is_set_outside_of_a_block_is_everybodys_but_theirs_who_hold_something():
    routing = Routing(A)
    with routing.held():
        elsewhere(lambda: setattr(routing, "active", B))
        assert routing.active == A and elsewhere(lambda: routing.active) == B
    assert routing.active == B


def test_one_that_a_block_around_or_another_thread_holds_is_not_dropped_and_nothing_changes():
    routing = Routing((*A, *B))
    with routing.held(A):
        assert elsewhere(lambda: routing.drop("a")) is False
        with routing.held((*B, *C)):
            assert routing.drop("a") is False
            assert routing.active == (*B, *C)
            assert routing.drop("c") is True and routing.active == B
        assert routing.active == A and elsewhere(lambda: routing.active) == (*A, *B)
        assert routing.drop("a") is True and routing.active == ()
        assert elsewhere(lambda: routing.active) == B
    assert routing.active == B
    assert routing.drop("nobody") is True and routing.active == B


def test_what_acts_by_object_is_what_acts_by_name_of_those_still_there():
    routing, one, other = Routing(), Attached(), Attached()
    routing.attached |= {"a": one, "b": other}
    routing.active = (*A, *B, *C)
    assert routing.acting == ((one, 1.0), (other, 2.0))
    with routing.held(B):
        assert routing.acting == ((other, 2.0),) and len(elsewhere(lambda: routing.acting)) == 2
        with routing.none():
            assert routing.acting == ()
        assert routing.acting == ((other, 2.0),)
        routing.active = A
        assert routing.acting == ((one, 1.0),)
        routing.drop("a")
        assert routing.acting == ()
    assert routing.acting == ((other, 2.0),)


def test_a_copy_has_what_acts_for_all_and_neither_holds_nor_adapters():
    routing, one = Routing(A), Attached()
    routing.attached["a"] = one
    with routing.held(B):
        again = copy.deepcopy(routing)
    assert again.active == A and not again.is_held and not again.attached


def test_rows_and_the_step_are_the_keys_of_dropout_and_without_rows_there_are_none():
    routing = Routing()
    assert routing.keys is None
    routing.rows, routing.step = torch.arange(3), 7
    assert routing.keys is not None and routing.keys.step == 7 and routing.keys.rows is routing.rows


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
    routing = Routing(A)
    module = Nested(routing)
    undo = routing.hold_in_forwards(module)
    module.fails = fails
    try:
        module(2)
    except ValueError:
        assert fails
    assert module.seen == [A] * (4 if fails else 6)
    assert routing.active == C and not routing.is_held
    routing.active = A
    with routing.held(B):
        module.seen.clear()
        module.fails = False
        module(1)
        assert module.seen == [B] * 4 and routing.active == B
    undo()
    module.seen.clear()
    routing.active = A
    module(0)
    assert module.seen == [A, C]
