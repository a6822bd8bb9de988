"""What all tests of the chart share."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--update` writes the golden files."""
    parser.addoption("--update", action="store_true", help="write golden/ instead of comparing with it")


@pytest.fixture
def update(request: pytest.FixtureRequest) -> bool:
    """Whether golden files are to be written."""
    return bool(request.config.getoption("--update"))
