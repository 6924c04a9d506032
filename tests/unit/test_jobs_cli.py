"""What jobs share."""

import os
import subprocess
import sys


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
