"""Counts a step of a base once for all tests of a process, as commands do that remember."""

import json
import os
from contextlib import contextmanager
from copy import deepcopy

import pytest

from veneer.files.remembered import ABOUT_PLACES, READS, remember
from veneer.kernels.bindings import library as native
from veneer.plan.simulation import remembered

_KNOWN = {}
COUNTS = ("step", "whole")
"""Kinds of entries that are kept: what a training step and its base take."""


def _remember(kind, key, value_type, make):
    if kind not in COUNTS:
        return remember(kind, key, value_type, make)
    variables = {
        name: value
        for name, value in os.environ.items()
        if name.startswith(READS) and name not in ABOUT_PLACES
    }
    here = native.level(), native.has_bf16(), native.has_amx()
    name = json.dumps([kind, key, variables, here], sort_keys=True, default=str)
    if name not in _KNOWN:
        _KNOWN[name] = make()
    return deepcopy(_KNOWN[name])


@contextmanager
def counted_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remembered, "remember", _remember)
        yield
