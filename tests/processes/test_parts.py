"""What a run on several processes is made of, without any."""

import math

import pytest
import torch

from veneer.errors import ConfigError
from veneer.training.processes.assignment import assign_by_cost
from veneer.training.processes.reduce import ExactSum, PlainSum
from veneer.training.processes.world import ALONE, World, world_of

SET = {
    "WORLD_SIZE": "4",
    "RANK": "3",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "host",
    "MASTER_PORT": "29500",
}


def norm_of(reduce):
    return reduce.norm(reduce.measured().item())


def summed(parts):
    gradient = torch.zeros(parts.shape[1])
    exact = ExactSum(gradient, ALONE, apart=False)
    exact.begin()
    for part in parts:
        gradient += part
        exact.add()
    exact.finish()
    return gradient


def test_exact_sums_are_the_true_ones_rounded_once_in_any_order():
    draw = torch.Generator().manual_seed(0)
    parts = torch.randn(9, 500, generator=draw) * 2.0 ** torch.randint(
        -24, 18, (9, 500), generator=draw
    )
    found = summed(parts)
    true = torch.tensor([math.fsum(column) for column in parts.T.tolist()], dtype=torch.float64)
    assert found.equal(true.float())
    assert all(summed(parts[torch.randperm(9, generator=draw)]).equal(found) for _ in range(5))


def test_exact_sums_are_not_finite_where_a_part_is_not():
    for wrong in (math.nan, math.inf, -math.inf, 3e38):
        parts = torch.ones(3, 4)
        parts[1, 2] = wrong
        assert summed(parts).isfinite().tolist() == [True, True, False, True]


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e8])
def test_the_exact_norm_is_the_true_one_in_any_order(scale):
    draw = torch.Generator().manual_seed(0)
    gradient = torch.randn(3_000_000, generator=draw) * 2.0 ** torch.randint(
        -40, 1, (3_000_000,), generator=draw
    )
    gradient *= scale
    true = math.sqrt(math.fsum(value * value for value in gradient.tolist()))
    found = norm_of(ExactSum(gradient, ALONE, apart=False))
    assert found == pytest.approx(true, rel=1e-12)
    assert norm_of(ExactSum(gradient.flip(0), ALONE, apart=False)) == found
    assert norm_of(ExactSum(torch.zeros(3), ALONE, apart=False)) == 0
    assert not math.isfinite(
        norm_of(ExactSum(torch.tensor([1.0, math.nan, 3.0]), ALONE, apart=False))
    )
    assert norm_of(ExactSum(torch.tensor([1.0, -math.inf]), ALONE, apart=False)) == math.inf


def test_the_plain_norm_of_many_values_is_the_true_one_but_for_rounding():
    draw = torch.Generator().manual_seed(0)
    gradient = torch.randn(3_000_300, generator=draw) * 1e-3
    true = gradient.double().norm().item()
    assert norm_of(PlainSum(gradient, ALONE, apart=False)) == pytest.approx(true, rel=1e-6)
    assert norm_of(PlainSum(gradient[:3], ALONE, apart=False)) == pytest.approx(
        gradient[:3].double().norm().item()
    )
    gradient[-1] = math.nan
    assert math.isnan(norm_of(PlainSum(gradient, ALONE, apart=False)))


class Alike(World):
    """Each of two processes, which compute the same."""

    def sum(self, values):
        values *= 2


@pytest.mark.parametrize("kind", [PlainSum, ExactSum])
def test_a_gradient_that_all_hold_is_summed_over_the_processes_once(kind):
    gradient = torch.zeros(3)
    reduce = kind(gradient, Alike(rank=1, size=2, local_rank=1), apart=False)
    reduce.begin()
    for part in (torch.tensor([1.0, 2.0, -3.0]), torch.tensor([0.5, 0.25, 4.0])):
        gradient += part
        reduce.add()
    reduce.finish()
    assert gradient.tolist() == [3.0, 4.5, 2.0]


def test_the_norm_is_of_all_rows_where_each_process_holds_its_own():
    class Told(Alike):
        def sum(self, values):
            pytest.fail("it is summed already")

        def summed(self, values):
            return [2 * value for value in values]

    whole, part = (
        PlainSum(torch.tensor([3.0, 4.0]), Told(rank=1, size=2, local_rank=1), apart=apart)
        for apart in (False, True)
    )
    part.finish()
    assert norm_of(whole) == 5.0
    assert norm_of(part) == pytest.approx(math.sqrt(50))


def test_micro_batches_go_to_whoever_has_least_and_the_same_plan_is_made_everywhere():
    assert assign_by_cost([5, 1, 4, 3, 3], 2) in ([0, 0, 1, 1, 0], [0, 1, 1, 1, 0])
    costs = [7, 7, 7, 2, 9, 1, 30]
    owners = assign_by_cost(costs, 3)
    shares = [
        sum(c for c, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(3)
    ]
    assert max(shares) == 30 and sum(shares) == sum(costs)
    assert assign_by_cost(costs, 1) == [0] * 7
    assert sorted(assign_by_cost([3, 3], 5)) == [0, 1]


def test_a_launchers_variables_say_which_process_this_is():
    assert world_of({}) == world_of({"WORLD_SIZE": "1", "RANK": "0"}) == ALONE
    assert world_of(SET) == World(rank=3, size=4, local_rank=1)


@pytest.mark.parametrize(
    ("changed", "faults"),
    [
        ({"RANK": ""}, ["RANK is not set", "RANK is '', not a whole number"]),
        ({"MASTER_PORT": ""}, ["MASTER_PORT is not set"]),
        ({"RANK": "4"}, ["RANK is 4, but there are 4 processes"]),
        ({"WORLD_SIZE": "two"}, ["WORLD_SIZE is 'two', not a whole number"]),
        ({"WORLD_SIZE": "99999999999"}, None),
    ],
)
def test_variables_that_are_not_right_are_all_told(changed, faults):
    with pytest.raises(ConfigError) as told:
        world_of({**SET, **changed})
    assert faults is None or told.value.faults == faults
