"""Make the BatchSet of token-budget micro-batches."""

import sys

from jobs.cli import run_stage

if __name__ == "__main__":
    sys.exit(run_stage("prepare", __doc__ or ""))
