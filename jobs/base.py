"""Write the base checkpoint."""

import sys

from jobs.cli import run_stage

if __name__ == "__main__":
    sys.exit(run_stage("base", __doc__ or ""))
