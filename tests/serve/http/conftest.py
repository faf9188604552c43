"""Fixtures of tests in this folder."""

import pytest

from tests.serve.http.browser import browser


@pytest.fixture(scope="module")
def chromium():
    with browser() as found:
        yield found
