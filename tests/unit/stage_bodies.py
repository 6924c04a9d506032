"""What stages of the tests write, and where it lies."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from r1ray.artifacts import Artifact

__all__ = ["CONFIG", "INPUTS", "never", "stored", "write_files"]

CONFIG = {"size": 3}
INPUTS = {"base": "abc"}


def write_files(text: str = "hello") -> Callable[[Path], Mapping[str, Any]]:
    def write(directory: Path) -> Mapping[str, Any]:
        (directory / "deep" / "er").mkdir(parents=True)
        (directory / "deep" / "er" / "data.bin").write_bytes(bytes(range(256)))
        (directory / "text.txt").write_text(text, encoding="utf-8")
        return {"lines": 1}

    return write


def never(directory: Path) -> Mapping[str, Any]:
    raise AssertionError(f"the stage ran again in {directory}")


def stored(tmp_path: Path, artifact: Artifact) -> Path:
    """Where the artifact's files really lie, local or remote."""
    location = artifact.location
    return Path(location) if location.startswith("/") else tmp_path / "bucket" / location
