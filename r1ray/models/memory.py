"""What a model remembers of the data it has seen: files in `memory/` beside its weights.

They are no part of the model: whoever reads it alone finds a plain directory. Training on further
data begins with them (`r1ray.training.continual`, `r1ray.data.reservoir`).
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

__all__ = ["FISHER_NAME", "RESERVOIR_NAME", "copy_memory", "memory_path"]

FISHER_NAME = "fisher.safetensors"
RESERVOIR_NAME = "reservoir.parquet"
_DIR = "memory"


def memory_path(model_dir: Path, name: str) -> Path:
    """Where the memory of that name lies, or would lie, in a model directory."""
    return model_dir / _DIR / name


def copy_memory(
    source: Path, target: Path, names: Sequence[str] = (FISHER_NAME, RESERVOIR_NAME)
) -> None:
    """Copy what the model in `source` remembers into the model directory `target`."""
    for name in names:
        found = memory_path(source, name)
        if found.is_file():
            memory_path(target, name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(found, memory_path(target, name))
