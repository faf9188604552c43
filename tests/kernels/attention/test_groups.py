"""Attention of a batch of several groups: each group's rows are those of the group alone."""

import pytest
import torch

from veneer.kernels.attention.groups import grouped_attention
from veneer.kernels.attention.prefix import prefixed_attention_reference
from veneer.kernels.layout import BatchLayout, Group
from veneer.kernels.rules import AttentionRules

CPU, RULES, FILLER = torch.device("cpu"), AttentionRules(0.3), 3
GROUPS = (Group(4, (2, 5), CPU), Group(0, (3,), CPU), Group(2, (1, 1), CPU))


def layouts() -> dict[str, tuple[BatchLayout, list[int]]]:
    """Layouts of GROUPS, and the rows of filler behind each group."""
    first, others = BatchLayout(GROUPS[:1]), BatchLayout(GROUPS[1:])
    parts = [(first.rows + FILLER, first), (others.rows + FILLER, others)]
    return {
        "one batch": (BatchLayout(GROUPS), [0, 0, FILLER]),
        "joined batches": (BatchLayout.joined(parts), [FILLER, 0, FILLER]),
    }


@pytest.mark.parametrize("prefixed", [(), (1,), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("kind", layouts())
def test_each_group_is_computed_as_alone_and_filler_is_zero(kind, prefixed):
    layout, fillers = layouts()[kind]
    rows = sum(group.rows for group in GROUPS) + sum(fillers)
    draw = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(rows, heads, 8, generator=draw) for heads in (4, 2, 2))
    nothing, pair = (k[:0], v[:0]), (k[:5] + 1, v[:5] - 1)
    pairs = [pair if number in prefixed else None for number in range(len(GROUPS))]
    output, start = grouped_attention(q, k, v, layout, pairs, RULES), 0
    assert len(output) == rows
    for group, own, filler in zip(GROUPS, pairs, fillers, strict=True):
        part = slice(start, start + group.rows)
        alone = prefixed_attention_reference(
            q[part], k[part], v[part], *(own or nothing), group, RULES
        )
        torch.testing.assert_close(output[part], alone)
        start = part.stop + filler
        assert not output[part.stop : start].any()
