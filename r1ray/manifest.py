"""Manifests: what a finished stage wrote, from what, and where; and checking files against them."""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import TypeAdapter

from r1ray.errors import ArtifactError
from r1ray.files import parse_json

__all__ = [
    "FIX",
    "MANIFEST_NAME",
    "SCHEMA_VERSION",
    "Manifest",
    "OutputFile",
    "compute_run_id",
    "digest_path",
    "find_mismatch",
    "find_versions",
    "list_outputs",
    "read_commit",
]

MANIFEST_NAME = "manifest.json"
SCHEMA_VERSION = 1
FIX = "remove the directory and run the stage again"
_CHUNK_BYTES = 1 << 22
_VERSIONED_PACKAGES = ("r1ray", "torch", "ray", "transformers", "pyarrow", "reasoning-gym")


@dataclass(frozen=True)
class OutputFile:
    """One file of an artifact: path relative to its directory, size in bytes, sha256 in hex."""

    path: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a finished stage wrote, from which config and inputs, where and how.

    Attributes:
        inputs: digests of what the stage read, by name.
        metrics: figures of the stage; plain JSON values.
        commit: of the r1ray that ran, ending in `+` when it had uncommitted changes; None outside
            a git checkout.
        duration_s: wall time of the run that finished the stage.
    """

    stage: str
    run_id: str
    schema_version: int
    config: dict[str, Any]
    inputs: dict[str, str]
    outputs: tuple[OutputFile, ...]
    metrics: dict[str, Any]
    versions: dict[str, str]
    commit: str | None
    finished_at: str
    duration_s: float

    @property
    def digest(self) -> str:
        """sha256 over the outputs' paths and digests: equal exactly when the contents are equal."""
        lines = sorted(f"{output.path} {output.sha256}" for output in self.outputs)
        return hashlib.sha256("\n".join([self.stage, *lines]).encode()).hexdigest()

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str, *, where: str) -> "Manifest":
        """The manifest in `text`.

        Raises:
            ArtifactError: `text` is not a manifest of this schema version; `where` is named.
        """
        try:
            raw = parse_json(text)
            if raw["schema_version"] != SCHEMA_VERSION:
                raise ArtifactError(
                    f"{where}: schema version {raw['schema_version']!r:.40} is not "
                    f"{SCHEMA_VERSION}; {FIX}"
                )
            manifest = TypeAdapter(cls).validate_python(raw)
            for output in manifest.outputs:
                _check_output_path(output.path)
            return manifest
        except (ValueError, TypeError, KeyError) as error:
            raise ArtifactError(f"{where}: not a manifest ({error!r}); {FIX}") from error


def _check_output_path(text: str) -> None:
    """Raise ValueError unless `text` names something below the directory that it is joined to."""
    path = PurePosixPath(text)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise ValueError(f"output path {text!r:.80} leaves the directory")
    if not text.isprintable():  # lines of digests are made of paths, and files are named by them
        raise ValueError(f"output path {text!r:.80} has control characters")


def compute_run_id(stage: str, config: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """The first 12 hex digits of the sha256 over stage, schema, config and input digests."""
    identity = [stage, SCHEMA_VERSION, dict(config), dict(inputs)]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]


def digest_path(path: Path) -> str:
    """sha256 over the contents of a file, or over names and contents of all files below it."""
    if path.is_file():
        return _sha256(path)
    lines = [f"{output.path} {output.sha256}" for output in list_outputs(path, skip=())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def list_outputs(directory: Path, *, skip: Sequence[str]) -> tuple[OutputFile, ...]:
    outputs = []
    for path in sorted(directory.rglob("*")):
        relative = path.relative_to(directory)
        is_manifest = relative.as_posix() == MANIFEST_NAME
        if not path.is_file() or relative.parts[0] in skip or is_manifest:
            continue
        outputs.append(OutputFile(relative.as_posix(), path.stat().st_size, _sha256(path)))
    return tuple(outputs)


def find_mismatch(path: Path, output: OutputFile, *, check_digest: bool = True) -> str | None:
    """How the file at `path` differs from what the manifest lists; None when it does not."""
    try:
        if not path.is_file():
            return "missing, though the manifest lists it"
        size_bytes = path.stat().st_size
        if size_bytes != output.size_bytes:
            return f"{size_bytes} bytes, the manifest says {output.size_bytes}"
        digest = _sha256(path) if check_digest else output.sha256
    except OSError as error:
        return f"cannot be read ({error})"
    if digest != output.sha256:
        return f"sha256 {digest[:12]}…, the manifest says {output.sha256[:12]}…"
    return None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def find_versions() -> dict[str, str]:
    found = {}
    for package in _VERSIONED_PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def read_commit() -> str | None:
    """The git commit of this r1ray, with `+` behind it when there are uncommitted changes.

    The environment's R1RAY_COMMIT goes before: where r1ray was shipped without its repository, as
    in a container or by `ray job submit`, only it can tell.
    """
    if shipped := os.environ.get("R1RAY_COMMIT"):
        return shipped
    try:
        shown, status = (
            subprocess.run(
                ["git", *arguments],
                cwd=Path(__file__).parent,
                capture_output=True,
                text=True,
                timeout=10,
                check=True,
            ).stdout.strip()
            for arguments in (
                ["rev-parse", "--short=12", "HEAD"],
                ["status", "--porcelain", "--untracked-files=no"],
            )
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return shown + ("+" if status else "")
