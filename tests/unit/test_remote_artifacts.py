"""Artifacts behind a filesystem that is not this machine's."""

import shutil
from pathlib import Path

import pytest
from pyarrow import fs

from r1ray.artifacts import ArtifactStore
from r1ray.errors import ArtifactError
from tests.unit.stage_bodies import CONFIG, INPUTS, never, stored, write_files


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> fs.FileSystem:
    """Not `LocalFileSystem`; downloads come into a temporary directory of this test's own."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "bucket").mkdir()
    return fs.SubTreeFileSystem(str(tmp_path / "bucket"), fs.LocalFileSystem())


def test_a_remote_artifact_is_uploaded_and_downloaded(
    remote: fs.FileSystem, tmp_path: Path
) -> None:
    written = ArtifactStore("runs", filesystem=remote).run("prepare", CONFIG, INPUTS, write_files())
    uploaded = tmp_path / "bucket" / "runs" / "prepare" / written.manifest.run_id
    assert (uploaded / "deep/er/data.bin").read_bytes() == bytes(range(256))
    found = ArtifactStore("runs", filesystem=remote).find("prepare", written.manifest.run_id)
    assert found is not None
    assert not found.local_dir.is_relative_to(tmp_path / "bucket")
    assert (found.local_dir / "deep/er/data.bin").read_bytes() == bytes(range(256))


def test_a_remote_file_cut_short_is_named(remote: fs.FileSystem, tmp_path: Path) -> None:
    store = ArtifactStore("runs", filesystem=remote)
    artifact = store.run("prepare", CONFIG, INPUTS, write_files())
    shutil.rmtree(artifact.local_dir)  # the copy that run() left for reading
    (stored(tmp_path, artifact) / "text.txt").write_text("hel")
    with pytest.raises(ArtifactError, match=r"text\.txt: 3 bytes, the manifest says 5"):
        store.find("prepare", artifact.manifest.run_id)


def test_a_remote_file_that_is_gone_is_named(remote: fs.FileSystem, tmp_path: Path) -> None:
    store = ArtifactStore("runs", filesystem=remote)
    artifact = store.run("prepare", CONFIG, INPUTS, write_files())
    shutil.rmtree(artifact.local_dir)  # the copy that run() left for reading
    (stored(tmp_path, artifact) / "text.txt").unlink()
    with pytest.raises(ArtifactError, match=r"text\.txt"):
        store.find("prepare", artifact.manifest.run_id)


def test_a_damaged_download_is_fetched_again(remote: fs.FileSystem) -> None:
    store = ArtifactStore("runs", filesystem=remote)
    run_id = store.run("prepare", CONFIG, INPUTS, write_files()).manifest.run_id
    first = store.find("prepare", run_id)
    assert first is not None
    (first.local_dir / "text.txt").write_text("hallo")  # the right size, the wrong contents
    second = store.find("prepare", run_id)
    assert second is not None
    assert (second.local_dir / "text.txt").read_text() == "hello"


def test_a_uri_and_a_path_name_the_same_artifact(tmp_path: Path) -> None:
    by_path = ArtifactStore(str(tmp_path / "runs")).run("s", CONFIG, INPUTS, write_files())
    by_uri = ArtifactStore(f"file://{tmp_path}/runs").run("s", CONFIG, INPUTS, never)
    assert by_uri.digest == by_path.digest
