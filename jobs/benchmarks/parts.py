"""Parts of a benchmark, each stored once it has been measured, and found by the next start."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from r1ray.evaluation.record import write_json
from r1ray.manifest import read_commit

__all__ = ["StoredParts"]


class StoredParts:
    """Results in a folder, a file each, with the commit of the code that measured it.

    Attributes:
        commits: of the results that were asked for so far, by name.
    """

    def __init__(self, work: Path) -> None:
        work.mkdir(parents=True, exist_ok=True)
        self._work = work
        self.commits: dict[str, str | None] = {}

    def once(self, name: str, measure: Callable[..., Any], *arguments: Any) -> Any:
        """The stored result `name`, or that of `measure(*arguments)`, which is stored."""
        path = self._work / f"{name}.json"
        if not path.exists():
            result = {"commit": read_commit(), "result": measure(*arguments)}
            partial = path.with_suffix(".tmp")
            write_json(partial, result)
            partial.rename(path)
        return self.read(name)

    def has(self, name: str) -> bool:
        """Whether the result `name` is stored."""
        return (self._work / f"{name}.json").exists()

    def read(self, name: str) -> Any:
        """The stored result `name`."""
        path = self._work / f"{name}.json"
        stored = json.loads(path.read_text(encoding="utf-8"))
        self.commits[name] = stored["commit"]
        return stored["result"]
