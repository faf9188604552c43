"""Names of blocks tell which adapters computed their keys and values."""

import pytest

from veneer.decoding.schedule.block_names import BlockNames, Identity

SIZE, TOKENS = 4, range(12)
ADAPTER: Identity = (("1" * 64, 1.0),)


def named(adapter: Identity, activation: int = 0) -> BlockNames:
    chain = BlockNames("base", adapter, "", SIZE, activation)
    chain.extend_to(len(TOKENS), lambda start, stop: TOKENS[start:stop])
    return chain


@pytest.mark.parametrize("activation", range(len(TOKENS) + 1))
def test_a_block_is_the_adapters_if_the_adapter_acts_on_one_of_its_tokens(activation: int) -> None:
    adapter, base = named(ADAPTER, activation), named(())
    acts = [activation < SIZE * (block + 1) for block in range(3)]
    assert [adapter.adapter_of(block) == ADAPTER for block in range(3)] == acts
    assert [own != other for own, other in zip(adapter.names, base.names, strict=True)] == acts
    other = named(ADAPTER, activation + 1)
    assert (adapter.names[2] != other.names[2]) == acts[2]
