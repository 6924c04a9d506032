"""What the stages exchange: directories of files with a `manifest.json`, written last.

1. A stage's run id is the hash of its name, its resolved config and the digests of its inputs, so
   a changed config or input is a new directory and a finished stage is found again.
2. The stage writes into `<root>/<stage>/<run_id>/` (or, when the root is remote, into a temporary
   directory that is uploaded). While there is no manifest the directory counts as unfinished: the
   next run empties it, except for the entries that the stage resumes from.
3. The manifest lists every output with its size and sha256, and is put in place by a rename.
4. Reading an artifact checks sizes and digests and names the first file that does not agree.

Price: one sha256 pass over the outputs when written and when read (about 1 GB/s per core).

Paths go through `pyarrow.fs`: `runs`, `/data/runs`, `s3://bucket/runs` look the same.
"""

import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pyarrow import fs

from r1ray.errors import ArtifactError

__all__ = [
    "MANIFEST_NAME",
    "Artifact",
    "ArtifactStore",
    "Manifest",
    "OutputFile",
    "compute_run_id",
    "digest_path",
]

logger = logging.getLogger(__name__)

MANIFEST_NAME = "manifest.json"
SCHEMA_VERSION = 1
_CHUNK_BYTES = 1 << 22
_FIX = "remove the directory and run the stage again"
_VERSIONED_PACKAGES = ("r1ray", "torch", "ray", "transformers", "pyarrow")


@dataclass(frozen=True)
class OutputFile:
    """One file of an artifact: path relative to its directory, size in bytes, sha256 in hex."""

    path: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a finished stage wrote, from which config and inputs (name -> digest), and metrics."""

    stage: str
    run_id: str
    schema_version: int
    config: dict[str, Any]
    inputs: dict[str, str]
    outputs: tuple[OutputFile, ...]
    metrics: dict[str, Any]
    versions: dict[str, str]
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
            raw = json.loads(text)
            if raw["schema_version"] != SCHEMA_VERSION:
                raise ArtifactError(
                    f"{where}: schema version {raw['schema_version']} is not {SCHEMA_VERSION}; "
                    "remove the directory and run the stage again"
                )
            raw["outputs"] = tuple(OutputFile(**output) for output in raw["outputs"])
            for output in raw["outputs"]:
                parts = PurePosixPath(output.path).parts
                if ".." in parts or "/" in parts or not parts:
                    raise ValueError(f"output path {output.path!r} leaves the directory")
            return cls(**raw)
        except (ValueError, TypeError, KeyError) as error:
            raise ArtifactError(
                f"{where}: not a manifest ({error!r}); remove the directory and run the stage again"
            ) from error


@dataclass(frozen=True)
class Artifact:
    """A finished artifact: its manifest, its URI-like location and a local directory to read."""

    manifest: Manifest
    location: str
    local_dir: Path

    @property
    def digest(self) -> str:
        return self.manifest.digest


def compute_run_id(stage: str, config: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """The first 12 hex digits of the sha256 over stage, schema, config and input digests."""
    identity = [stage, SCHEMA_VERSION, dict(config), dict(inputs)]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]


def digest_path(path: Path) -> str:
    """sha256 over the contents of a file, or over names and contents of all files below it."""
    if path.is_file():
        return _sha256(path)
    lines = [f"{output.path} {output.sha256}" for output in _list_outputs(path, skip=())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


class ArtifactStore:
    """The artifacts under one root directory or URI.

    Args:
        root: a local path or a URI that `pyarrow.fs.FileSystem.from_uri` reads.
        filesystem: used instead of the one that `root` names; `root` is then a path inside it.
    """

    def __init__(self, root: str, filesystem: fs.FileSystem | None = None) -> None:
        self.root = root
        if filesystem is not None:
            self._fs, self._root = filesystem, root.rstrip("/")
        elif "://" in root:
            self._fs, self._root = fs.FileSystem.from_uri(root)
        else:
            self._fs, self._root = fs.LocalFileSystem(), str(Path(root).absolute())
        self._is_local = isinstance(self._fs, fs.LocalFileSystem)

    @property
    def filesystem(self) -> fs.FileSystem:
        return self._fs

    def directory(self, stage: str, run_id: str) -> str:
        """The path of an artifact's directory inside `filesystem`."""
        return f"{self._root}/{stage}/{run_id}"

    def find(self, stage: str, run_id: str, *, verify: bool = True) -> Artifact | None:
        """The finished artifact, or None while its manifest is missing.

        Args:
            verify: check every file's size and digest; workers leave it to their driver.
        Raises:
            ArtifactError: a listed file is missing, truncated or altered.
        """
        directory = self.directory(stage, run_id)
        manifest_path = f"{directory}/{MANIFEST_NAME}"
        if self._fs.get_file_info(manifest_path).type != fs.FileType.File:
            return None
        with self._fs.open_input_stream(manifest_path) as stream:
            manifest = Manifest.from_json(
                stream.read().decode("utf-8", "replace"), where=manifest_path
            )
        if self._is_local:
            local_dir = Path(directory)
            if verify:
                _verify(local_dir, manifest)
        else:
            local_dir = self._download(directory, manifest, verify)
        return Artifact(manifest=manifest, location=directory, local_dir=local_dir)

    def require(self, stage: str, run_id: str, *, hint: str, verify: bool = True) -> Artifact:
        """The artifact, or an ArtifactError that says how to make it (`hint`)."""
        artifact = self.find(stage, run_id, verify=verify)
        if artifact is None:
            raise ArtifactError(
                f"no finished {stage!r} artifact at {self.directory(stage, run_id)}; {hint}"
            )
        return artifact

    def run(
        self,
        stage: str,
        config: Mapping[str, Any],
        inputs: Mapping[str, str],
        body: Callable[[Path], Mapping[str, Any]],
        *,
        keep: Sequence[str] = (),
    ) -> Artifact:
        """The artifact of this stage, config and inputs; `body` runs only when it is not there yet.

        Args:
            body: writes the outputs into the directory that it is given and returns the metrics.
            keep: entries of an unfinished directory that `body` resumes from; they are no outputs
                and are removed once the artifact is finished.
        """
        run_id = compute_run_id(stage, config, inputs)
        existing = self.find(stage, run_id)
        if existing is not None:
            logger.info("%s %s: finished earlier, nothing to do", stage, run_id)
            return existing
        work_dir = self._begin(stage, run_id, keep)
        started = time.monotonic()
        metrics = dict(body(work_dir))
        manifest = Manifest(
            stage=stage,
            run_id=run_id,
            schema_version=SCHEMA_VERSION,
            config=dict(config),
            inputs=dict(inputs),
            outputs=_list_outputs(work_dir, skip=keep),
            metrics=metrics,
            versions=_versions(),
            finished_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            duration_s=time.monotonic() - started,
        )
        self._commit(work_dir, manifest, keep)
        return Artifact(manifest, self.directory(stage, run_id), work_dir)

    def link(self, name: str, artifact: Artifact) -> None:
        """Let `<root>/<name>` lead to `artifact`, where the root is a local directory.

        Deployments need a path that stays when the run id changes.
        """
        if not self._is_local:
            return
        link = Path(self._root) / name
        temporary = link.with_name(f"{name}.tmp")
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(artifact.local_dir.relative_to(self._root), target_is_directory=True)
        temporary.replace(link)

    def publish(self, directory: Path) -> None:
        """Put the files in the local `directory` beside the stages, each replaced as a whole."""
        self._fs.create_dir(self._root, recursive=True)
        for path in sorted(item for item in directory.iterdir() if item.is_file()):
            target = f"{self._root}/{path.name}"
            with self._fs.open_output_stream(f"{target}.tmp") as stream:
                stream.write(path.read_bytes())
            self._fs.move(f"{target}.tmp", target)

    def _begin(self, stage: str, run_id: str, keep: Sequence[str]) -> Path:
        if not self._is_local:
            return Path(tempfile.mkdtemp(prefix=f"r1ray-{stage}-"))
        directory = Path(self.directory(stage, run_id))
        directory.mkdir(parents=True, exist_ok=True)
        for entry in directory.iterdir():
            if entry.name in keep:
                continue
            logger.info("%s %s: removing unfinished %s", stage, run_id, entry.name)
            _remove(entry)
        return directory

    def _commit(self, work_dir: Path, manifest: Manifest, keep: Sequence[str]) -> None:
        directory = self.directory(manifest.stage, manifest.run_id)
        if self._is_local:
            _write_atomically(work_dir / MANIFEST_NAME, manifest.to_json())
        else:
            for output in manifest.outputs:
                target = f"{directory}/{output.path}"
                self._fs.create_dir(os.path.dirname(target), recursive=True)
                fs.copy_files(
                    str(work_dir / output.path),
                    target,
                    source_filesystem=fs.LocalFileSystem(),
                    destination_filesystem=self._fs,
                )
            with self._fs.open_output_stream(f"{directory}/{MANIFEST_NAME}") as stream:
                stream.write(manifest.to_json().encode())
        for name in keep:
            _remove(work_dir / name)

    def _download(self, directory: str, manifest: Manifest, verify: bool) -> Path:
        local_dir = Path(tempfile.gettempdir()) / "r1ray-artifacts" / manifest.digest[:24]
        local_dir.mkdir(parents=True, exist_ok=True)
        for output in manifest.outputs:
            target = local_dir / output.path
            if _mismatch(target, output, check_digest=verify) is None:
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            source = f"{directory}/{output.path}"
            # Under a name of its own, so that another process never reads half a file.
            fresh = target.with_name(f"{target.name}.{os.getpid()}.tmp")
            try:
                fs.copy_files(
                    source,
                    str(fresh),
                    source_filesystem=self._fs,
                    destination_filesystem=fs.LocalFileSystem(),
                )
            except OSError as error:
                raise ArtifactError(f"{source}: cannot be fetched ({error})") from error
            problem = _mismatch(fresh, output)
            if problem is not None:
                fresh.unlink(missing_ok=True)
                raise ArtifactError(f"{source}: {problem}; {_FIX}")
            fresh.replace(target)
        return local_dir


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _list_outputs(directory: Path, *, skip: Sequence[str]) -> tuple[OutputFile, ...]:
    outputs = []
    for path in sorted(directory.rglob("*")):
        relative = path.relative_to(directory)
        is_manifest = relative.as_posix() == MANIFEST_NAME
        if not path.is_file() or relative.parts[0] in skip or is_manifest:
            continue
        outputs.append(OutputFile(relative.as_posix(), path.stat().st_size, _sha256(path)))
    return tuple(outputs)


def _verify(directory: Path, manifest: Manifest) -> None:
    for output in manifest.outputs:
        problem = _mismatch(directory / output.path, output)
        if problem is not None:
            raise ArtifactError(f"{directory / output.path}: {problem}; {_FIX}")


def _mismatch(path: Path, output: OutputFile, *, check_digest: bool = True) -> str | None:
    """How the file at `path` differs from what the manifest lists; None when it does not."""
    if not path.is_file():
        return "missing, though the manifest lists it"
    size_bytes = path.stat().st_size
    if size_bytes != output.size_bytes:
        return f"{size_bytes} bytes, the manifest says {output.size_bytes}"
    digest = _sha256(path) if check_digest else output.sha256
    if digest != output.sha256:
        return f"sha256 {digest[:12]}…, the manifest says {output.sha256[:12]}…"
    return None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def _versions() -> dict[str, str]:
    found = {}
    for package in _VERSIONED_PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
