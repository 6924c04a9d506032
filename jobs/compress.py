"""Export the trained checkpoint as INT8."""

import sys

from jobs.cli import run_stage

if __name__ == "__main__":
    sys.exit(run_stage("compress", __doc__ or ""))
