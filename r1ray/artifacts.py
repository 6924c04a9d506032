"""What the stages exchange: directories of files with a `manifest.json`, written last.

1. A stage's run id is the hash of its name, its resolved config and the digests of its inputs, so
   a changed config or input is a new directory and a finished stage is found again.
2. The stage writes into `<root>/<stage>/<run_id>/` (or, when the root is remote, into a temporary
   directory that is uploaded). While there is no manifest the directory counts as unfinished: the
   next run empties it, except for the entries that the stage resumes from.
3. The manifest lists every output with its size and sha256, and is put in place by a rename.
4. Reading an artifact checks sizes and digests and names the first file that does not agree.
5. Nothing outside of the root is written, emptied or read, wherever symbolic links in it lead.

Price: one sha256 pass over the outputs when written and when read (about 1 GB/s per core).

Paths go through `pyarrow.fs`: `runs`, `/data/runs`, `s3://bucket/runs` look the same.
"""

import contextlib
import datetime
import fcntl
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs

from r1ray.errors import ArtifactError
from r1ray.files import RECORD_BYTES, is_inside, own_temp_dir
from r1ray.manifest import (
    FIX,
    MANIFEST_NAME,
    SCHEMA_VERSION,
    Manifest,
    compute_run_id,
    find_mismatch,
    find_versions,
    list_outputs,
    read_commit,
)

__all__ = ["Artifact", "ArtifactStore"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Artifact:
    """A finished artifact: its manifest, its URI-like location and a local directory to read."""

    manifest: Manifest
    location: str
    local_dir: Path

    @property
    def digest(self) -> str:
        return self.manifest.digest


class ArtifactStore:
    """The artifacts under one root directory or URI.

    Args:
        root: a local path or a URI that `pyarrow.fs.FileSystem.from_uri` reads.
        name: a directory below it.
        filesystem: used instead of the one that `root` names; `root` is then a path inside it.

    Attributes:
        root, name: what the store can be opened with again, from any working directory.
    """

    def __init__(
        self, root: str, name: str | None = None, *, filesystem: fs.FileSystem | None = None
    ) -> None:
        is_path = filesystem is None and "://" not in root
        self.root, self.name = str(Path(root).absolute()) if is_path else root, name
        if filesystem is not None:
            self._fs, path = filesystem, root
        elif is_path:
            self._fs, path = fs.LocalFileSystem(), self.root
        else:
            try:
                self._fs, path = fs.FileSystem.from_uri(root)
            except (OSError, pa.ArrowException) as error:
                raise ArtifactError(f"artifact root {root!r} cannot be used ({error})") from error
        self._path = path.rstrip("/") + ("" if name is None else f"/{name}")
        self._is_local = isinstance(self._fs, fs.LocalFileSystem)

    @property
    def path(self) -> str:
        """The store's directory inside `filesystem`."""
        return self._path

    @property
    def filesystem(self) -> fs.FileSystem:
        return self._fs

    def directory(self, stage: str, run_id: str) -> str:
        """The path of an artifact's directory inside `filesystem`."""
        return f"{self._path}/{stage}/{run_id}"

    def find(self, stage: str, run_id: str, *, verify: bool = True) -> Artifact | None:
        """The finished artifact, or None while its manifest is missing.

        Args:
            verify: check every file's size and digest; workers leave it to their driver.
        Raises:
            ArtifactError: a listed file is missing, truncated or altered, or lies elsewhere.
        """
        directory = self.directory(stage, run_id)
        self._check_confined(directory)
        manifest_path = f"{directory}/{MANIFEST_NAME}"
        if self._fs.get_file_info(manifest_path).type != fs.FileType.File:
            return None
        with self._fs.open_input_stream(manifest_path) as stream:
            text = stream.read(RECORD_BYTES + 1)
        if len(text) > RECORD_BYTES:
            raise ArtifactError(
                f"{manifest_path}: has more than {RECORD_BYTES} bytes, which no manifest has; {FIX}"
            )
        manifest = Manifest.from_json(text.decode("utf-8", "replace"), where=manifest_path)
        if (manifest.stage, manifest.run_id) != (stage, run_id):
            raise ArtifactError(
                f"{manifest_path}: is the manifest of {manifest.stage!r:.40} "
                f"{manifest.run_id!r:.40}; {FIX}"
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

    def find_all(self, stage: str) -> list[Artifact]:
        """The finished artifacts of a stage, the oldest first; their files are not looked at."""
        selector = fs.FileSelector(f"{self._path}/{stage}", allow_not_found=True)
        found = [
            self.find(stage, info.base_name, verify=False)
            for info in self._fs.get_file_info(selector)
            if info.type == fs.FileType.Directory
        ]
        artifacts = [artifact for artifact in found if artifact is not None]
        return sorted(artifacts, key=lambda artifact: artifact.manifest.finished_at)

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
            self._forget_leftovers(stage, run_id, keep)
        else:
            with self.lock(stage, run_id):
                existing = self.find(stage, run_id)  # another process may have been quicker
                if existing is None:
                    with self._work_dir(stage, run_id, keep) as work_dir:
                        return self._make(work_dir, stage, run_id, config, inputs, body, keep)
        logger.info("%s %s: finished earlier, nothing to do", stage, run_id)
        return existing

    def _make(
        self,
        work_dir: Path,
        stage: str,
        run_id: str,
        config: Mapping[str, Any],
        inputs: Mapping[str, str],
        body: Callable[[Path], Mapping[str, Any]],
        keep: Sequence[str],
    ) -> Artifact:
        started = time.monotonic()
        metrics = dict(body(work_dir))
        manifest = Manifest(
            stage=stage,
            run_id=run_id,
            schema_version=SCHEMA_VERSION,
            config=dict(config),
            inputs=dict(inputs),
            outputs=list_outputs(work_dir, skip=keep),
            metrics=metrics,
            versions=find_versions(),
            commit=read_commit(),
            finished_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            duration_s=time.monotonic() - started,
        )
        self._commit(work_dir, manifest, keep)
        if self._is_local:
            return Artifact(manifest, self.directory(stage, run_id), work_dir)
        return self.require(stage, run_id, hint="it was there a moment ago")

    def link(self, name: str, artifact: Artifact) -> None:
        """Let `<root>/<name>` lead to `artifact`, where the root is a local directory.

        Deployments need a path that stays when the run id changes.
        """
        if not self._is_local:
            return
        link = Path(self._path) / name
        if link.is_dir() and not link.is_symlink():
            raise ArtifactError(f"{link}: is a directory where a link belongs; move it away")
        temporary = link.with_name(f"{name}.tmp")
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(artifact.local_dir.relative_to(self._path), target_is_directory=True)
        temporary.replace(link)

    def linked(self, name: str) -> Path | None:
        """The directory that `link` let `<root>/<name>` lead to; None where it leads nowhere."""
        link = Path(self._path) / name
        if not self._is_local or not link.is_symlink() or not link.is_dir():
            return None
        self._check_confined(str(link))
        return link.resolve()

    def publish(self, directory: Path) -> None:
        """Put the files in the local `directory` beside the stages, each replaced as a whole."""
        self._fs.create_dir(self._path, recursive=True)
        for path in sorted(item for item in directory.iterdir() if item.is_file()):
            target = f"{self._path}/{path.name}"
            with self._fs.open_output_stream(f"{target}.tmp") as stream:
                stream.write(path.read_bytes())
            self._fs.move(f"{target}.tmp", target)

    @contextmanager
    def lock(self, stage: str, run_id: str) -> Iterator[None]:
        """Hold the run's advisory lock, which the kernel drops when the process ends.

        Raises:
            ArtifactError: another process holds it.

        The lock file stays: removing it would let two processes hold locks on different files of
        the same name. Remote roots have no lock.
        """
        if not self._is_local:
            yield
            return
        directory = Path(self.directory(stage, run_id))
        self._check_confined(str(directory))
        try:
            directory.parent.mkdir(parents=True, exist_ok=True)
            lock = directory.with_name(f"{run_id}.lock").open("a")
        except OSError as error:
            raise ArtifactError(f"{directory}: cannot be written ({error})") from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ArtifactError(
                    f"{directory}: another process is making it right now; wait for it, or stop it"
                ) from error
            yield

    def _check_confined(self, path: str) -> None:
        """Raise ArtifactError where a symbolic link below the root leads `path` out of it."""
        if self._is_local and not is_inside(path, self._path):
            raise ArtifactError(
                f"{path}: a symbolic link leads it to {os.path.realpath(path)}, out of "
                f"{self._path}; remove the link, or set run.root to where the artifacts are to be"
            )

    @contextmanager
    def _work_dir(self, stage: str, run_id: str, keep: Sequence[str]) -> Iterator[Path]:
        """A local directory for the outputs, empty but for `keep`."""
        if not self._is_local:
            with tempfile.TemporaryDirectory(prefix=f"r1ray-{stage}-") as temporary:
                yield Path(temporary)
            return
        directory = Path(self.directory(stage, run_id))
        directory.mkdir(parents=True, exist_ok=True)
        for entry in directory.iterdir():
            if entry.name in keep:
                continue
            logger.info("%s %s: removing unfinished %s", stage, run_id, entry.name)
            _remove(entry)
        yield directory

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
            unnamed = f"{directory}/{MANIFEST_NAME}.tmp"
            with self._fs.open_output_stream(unnamed) as stream:
                stream.write(manifest.to_json().encode())
            self._fs.move(unnamed, f"{directory}/{MANIFEST_NAME}")
        self._forget_kept(manifest.stage, manifest.run_id, keep)

    def _forget_leftovers(self, stage: str, run_id: str, keep: Sequence[str]) -> None:
        """Remove what whoever finished the artifact was killed before removing."""
        directory = self.directory(stage, run_id)
        kinds = [self._fs.get_file_info(f"{directory}/{name}").type for name in keep]
        if any(kind != fs.FileType.NotFound for kind in kinds):
            # Without the lock, another process is doing it.
            with contextlib.suppress(ArtifactError), self.lock(stage, run_id):
                self._forget_kept(stage, run_id, keep)

    def _forget_kept(self, stage: str, run_id: str, keep: Sequence[str]) -> None:
        for name in keep:
            path = f"{self.directory(stage, run_id)}/{name}"
            kind = self._fs.get_file_info(path).type
            if kind == fs.FileType.Directory:
                self._fs.delete_dir(path)
            elif kind == fs.FileType.File:
                self._fs.delete_file(path)

    def _download(self, directory: str, manifest: Manifest, verify: bool) -> Path:
        local_dir = own_temp_dir("r1ray-artifacts") / manifest.digest[:24]
        local_dir.mkdir(exist_ok=True)
        for output in manifest.outputs:
            target = local_dir / output.path
            if find_mismatch(target, output, check_digest=verify) is None:
                continue
            source = f"{directory}/{output.path}"
            # Under a name of its own, so that another process never reads half a file.
            fresh = target.with_name(f"{target.name}.{os.getpid()}.tmp")
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                fs.copy_files(
                    source,
                    str(fresh),
                    source_filesystem=self._fs,
                    destination_filesystem=fs.LocalFileSystem(),
                )
            except OSError as error:
                raise ArtifactError(f"{source}: cannot be fetched ({error})") from error
            problem = find_mismatch(fresh, output)
            if problem is not None:
                fresh.unlink(missing_ok=True)
                raise ArtifactError(f"{source}: {problem}; {FIX}")
            fresh.replace(target)
        return local_dir


def _verify(directory: Path, manifest: Manifest) -> None:
    for output in manifest.outputs:
        problem = find_mismatch(directory / output.path, output)
        if problem is None and not is_inside(directory / output.path, directory):
            problem = "a symbolic link, which leads out of the artifact"
        if problem is not None:
            raise ArtifactError(f"{directory / output.path}: {problem}; {FIX}")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)
