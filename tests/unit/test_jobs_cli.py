"""What jobs share."""

import os
import subprocess
import sys

import pytest

from jobs.cli import run_guarded
from r1ray.errors import ConfigError, ForgettingError, R1RayError


def test_rays_settings_are_there_before_ray_is_imported() -> None:
    code = (
        "import os, sys, jobs.cli\n"
        "assert 'ray' not in sys.modules, 'too late: Ray reads its authentication mode on import'\n"
        "print(os.environ['RAY_AUTH_MODE'])"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    finished = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert finished.stdout.strip() == "token"


@pytest.mark.parametrize(("error", "code"), [(ForgettingError, 3), (ConfigError, 2)])
def test_a_refused_update_can_be_told_from_a_failure(
    error: type[R1RayError], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def body() -> None:
        raise error("it is so")

    assert run_guarded(body) == code
    assert capsys.readouterr().err == "error: it is so\n"
