"""Parts of a benchmark, each stored once it has been measured, and found by the next start."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from r1ray.errors import ArtifactError, ConfigError
from r1ray.evaluation.record import describe_circumstances, write_json
from r1ray.manifest import read_commit

__all__ = ["StoredParts", "check_is_committed"]


def check_is_committed() -> None:
    """Whether a figure's commit would tell the code that measures it.

    Raises:
        ConfigError: there are uncommitted changes.
    """
    commit = str(read_commit())
    if commit.endswith("+"):
        raise ConfigError(
            f"there are changes that {commit[:-1]} does not have, and a figure is filed with the "
            "commit that measured it; commit them first"
        )


class StoredParts:
    """Results in a folder, a file each, with the commit of the code that measured it.

    Args:
        work: the folder.
        elsewhere: where what is not in `work` is looked for: parts of another machine.
    Attributes:
        commits: of the results that were asked for so far, by name.
    """

    def __init__(self, work: Path, elsewhere: Path | None = None) -> None:
        work.mkdir(parents=True, exist_ok=True)
        self._work, self._elsewhere = work, elsewhere
        self.commits: dict[str, str | None] = {}

    def once(self, name: str, measure: Callable[..., Any], *arguments: Any) -> Any:
        """The stored result `name`, or that of `measure(*arguments)`, which is stored."""
        if not self.has(name):
            self.store(name, measure(*arguments))
        return self.read(name)

    def has(self, name: str) -> bool:
        """Whether the result `name` is stored."""
        return self._path(name).exists()

    def read(self, name: str) -> Any:
        """The stored result `name`.

        Raises:
            ArtifactError: there is none.
        """
        if not self.has(name):
            raise ArtifactError(f"{name} was not measured; run the benchmark again")
        stored = json.loads(self._path(name).read_text(encoding="utf-8"))
        self.commits[name] = stored["commit"]
        return stored["result"]

    def store(self, name: str, result: Any) -> None:
        """Keep a result, in place of what there is under this name."""
        path = self._work / f"{name}.json"
        partial = path.with_suffix(".tmp")
        write_json(partial, {"commit": read_commit(), "result": result})
        partial.rename(path)

    def circumstances(self) -> dict[str, Any]:
        """Those of this process, and the commits of all results that were asked for.

        Raises:
            ArtifactError: one was measured with uncommitted changes, and cannot be measured again.
        """
        changed = sorted(name for name, commit in self.commits.items() if str(commit).endswith("+"))
        if changed:
            raise ArtifactError(
                f"{', '.join(changed)}: measured with uncommitted changes; commit them, remove "
                f"these files from {self._work}, and run the benchmark again"
            )
        return {**describe_circumstances(), "commits_of_parts": self.commits}

    def _path(self, name: str) -> Path:
        here = self._work / f"{name}.json"
        if self._elsewhere is None or here.exists():
            return here
        return self._elsewhere / f"{name}.json"
