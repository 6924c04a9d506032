"""Fine-tune on Ray Train; a killed run resumes."""

import sys

from jobs.cli import run_stage

if __name__ == "__main__":
    sys.exit(run_stage("train", __doc__ or ""))
