"""What loading a model and one forward add to a process that has imported everything.

python -m jobs.benchmarks.resident_child MODEL_DIR
"""

import json
import sys
import tempfile
from pathlib import Path

import torch

from jobs.benchmarks.kernel_memory import read_peak, reset_peak
from jobs.benchmarks.layers_child import write_model
from r1ray.models import load_model
from r1ray.models.quantization import quantize_modules

__all__: list[str] = []
_NUM_TOKENS = 16


@torch.inference_mode()
def main(model_dir: Path) -> None:
    ids = torch.arange(_NUM_TOKENS)[None]
    with tempfile.TemporaryDirectory(prefix="r1ray-warm-") as directory:
        write_model(Path(directory), 1)
        small = load_model(directory)
        small(ids)
        quantize_modules(small)
        small(ids)
        del small
    baseline = reset_peak()
    load_model(model_dir)(ids)
    print(json.dumps({"grown_bytes": read_peak() - baseline}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
