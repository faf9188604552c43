"""The memory of jobs that train together, as the plan counts it."""

from veneer.training.budget import FREE_SHARE, JobMemory, has_room, plan_jobs

SMALL = JobMemory(peak=900, step=200, tokens=20, values=8, optimizer=8)
LARGE = JobMemory(peak=1500, step=800, tokens=40, values=40, optimizer=40)


def test_a_job_alone_is_planned_as_it_is():
    assert plan_jobs([LARGE], None).peak == LARGE.peak


def test_all_jobs_in_one_forward_hold_their_tokens_and_their_values():
    planned = plan_jobs([SMALL, LARGE], None)
    assert planned.tokens is None
    assert planned.peak == 900 - 200 + 16 * 5 + (20 + 40) * 20  # 20 bytes a token


def test_free_memory_bounds_the_tokens_of_a_forward_by_the_largest_cost_of_a_token():
    free = 1000
    planned = plan_jobs([SMALL, LARGE], free)
    assert planned.tokens == int((FREE_SHARE * free - 8 * 6) / 20) == 37
    assert planned.peak == 900 - 200 + 16 * 5 + LARGE.step  # which is computed by itself


def test_without_free_memory_jobs_are_computed_one_by_one():
    planned = plan_jobs([SMALL, LARGE], 10)
    assert planned.tokens == 0
    assert planned.peak == 900 - 200 + 16 * 5 + LARGE.step


def test_another_job_has_room_if_its_values_and_the_largest_step_fit():
    held = SMALL.values + SMALL.optimizer + 2 * (LARGE.values + LARGE.optimizer) + LARGE.step
    assert has_room([SMALL, LARGE], None)
    assert has_room([SMALL, LARGE], round(held / FREE_SHARE) + 1)
    assert not has_room([SMALL, LARGE], round(held / FREE_SHARE) - 1)
