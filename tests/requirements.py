"""What some tests need of the machine: where it is missing they skip, and say what was not tested.

With R1RAY_REQUIRE_ALL in the environment they fail instead.
"""

import os
from typing import NoReturn

import pytest

__all__ = ["needs", "skip_loudly"]


def skip_loudly(reason: str) -> NoReturn:
    """Skip the test, or fail where everything has to be there."""
    if os.environ.get("R1RAY_REQUIRE_ALL"):
        pytest.fail(reason)
    pytest.skip(reason)


def needs(is_there: bool, reason: str) -> pytest.MarkDecorator:
    """A mark: the test is skipped where something is not there, or runs, and fails, regardless."""
    is_required = bool(os.environ.get("R1RAY_REQUIRE_ALL"))
    return pytest.mark.skipif(not is_there and not is_required, reason=reason)
