"""Fixtures of tests in this folder."""

import sys
from types import ModuleType, SimpleNamespace

import pytest

import veneer
from tests.support.commands import SUMMARY, StandInBase


@pytest.fixture
def api(monkeypatch):
    """veneer.api, replaced; `calls` are the arguments of each function called."""
    module = ModuleType("veneer.api")
    module.base, module.calls = StandInBase(), []

    def returns(name, value):
        def function(*positional, **named):
            module.calls.append((name, positional, named))
            return value() if callable(value) else value

        setattr(module, name, function)

    returns("train_run", SUMMARY)
    returns("load", lambda: module.base)
    returns("merge_adapters", lambda: SimpleNamespace(to_dict=dict))
    returns("check_data", lambda: module.checked)
    returns("evaluate", lambda: module.evaluated)
    monkeypatch.setitem(sys.modules, "veneer.api", module)
    monkeypatch.setattr(veneer, "api", module, raising=False)
    for name in ("refuse_unknown", "refuse_missing"):  # bases and rows of these names are nowhere
        monkeypatch.setattr(f"veneer.cli.early.{name}", lambda named: None)
    return module
