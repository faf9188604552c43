"""The books of blocks and the traffic of requests, for longer than tests/test_decoding_*.py has
time for."""

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.decoding.schedule.test_blocks import Books
from tests.decoding.schedule.test_traffic import Traffic
from tests.soak.counts import rounds


@pytest.mark.parametrize("machine", [Books, Traffic])
def test_any_calls_in_any_order_leave_the_books_right(machine):
    longer = settings(
        max_examples=len(rounds("decoding", ci=3)),
        stateful_step_count=100,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(machine, settings=longer)
