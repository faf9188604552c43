"""Every cell of method x weight format x family, on either pretended device: a few at random, or
all of them."""

import random

import pytest

from tests.adapters.test_methods import METHODS
from tests.models.test_accelerator import (
    DEVICE_BASES,
    DEVICES,
    base_on,
    on,
    trains_evaluates_and_decodes,
)
from tests.models.test_accelerator import _whatever_this_machine_has as _no_kernels  # noqa: F401
from tests.soak.counts import chosen
from tests.support.tiny import FAMILIES
from veneer.errors import ConfigError

FORMATS = {
    **DEVICE_BASES,
    **{family: (family, DEVICE_BASES["llama float32"][1]) for family in FAMILIES},
}
CELLS = [(device, method, base) for device in DEVICES for base in FORMATS for method in METHODS]
CHOSEN = chosen(random.Random(0).sample(CELLS, len(CELLS)), "accelerator", ci=5)


@pytest.mark.parametrize(("device", "method", "base"), CHOSEN, ids=map("-".join, CHOSEN))
def test_it_trains_evaluates_and_decodes_there(device, method, base):
    with on(device) as there:
        family, dtype = FORMATS[base]
        base = base_on(there, family, dtype)
        try:
            trains_evaluates_and_decodes(there, base, METHODS[method].config, family)
        except ConfigError as refused:  # a method that does not fit this family says so by name
            pytest.skip(str(refused).splitlines()[0])
