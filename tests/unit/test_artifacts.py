import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from pyarrow import fs

from r1ray.artifacts import Artifact, ArtifactStore
from r1ray.errors import ArtifactError
from r1ray.manifest import MANIFEST_NAME, compute_run_id, read_commit
from tests.unit.stage_bodies import CONFIG, INPUTS, never, stored, write_files


@pytest.fixture(params=["local", "remote"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ArtifactStore:
    """A store on disk, and one behind a filesystem that is not `LocalFileSystem`."""
    if request.param == "local":
        return ArtifactStore(str(tmp_path / "runs"))
    (tmp_path / "bucket").mkdir()
    remote = fs.SubTreeFileSystem(str(tmp_path / "bucket"), fs.LocalFileSystem())
    return ArtifactStore("runs", filesystem=remote)


@pytest.fixture(autouse=True)
def _own_temp_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))


def test_a_finished_stage_is_a_no_op(store: ArtifactStore) -> None:
    first = store.run("prepare", CONFIG, INPUTS, write_files())
    again = store.run("prepare", CONFIG, INPUTS, never)
    assert again.manifest == first.manifest
    assert again.digest == first.digest
    assert (again.local_dir / "text.txt").read_text() == "hello"
    assert (again.local_dir / "deep/er/data.bin").read_bytes() == bytes(range(256))


def test_the_manifest_records_what_was_made_and_from_what(store: ArtifactStore) -> None:
    manifest = store.run("prepare", CONFIG, INPUTS, write_files()).manifest
    assert (manifest.stage, manifest.config, manifest.inputs) == ("prepare", CONFIG, INPUTS)
    assert manifest.metrics == {"lines": 1}
    assert [output.path for output in manifest.outputs] == ["deep/er/data.bin", "text.txt"]
    assert manifest.outputs[1].size_bytes == 5
    assert manifest.outputs[1].sha256.startswith("2cf24dba5fb0")  # sha256 of "hello"
    assert {"torch", "ray", "r1ray"} <= manifest.versions.keys()


@pytest.mark.parametrize(
    ("config", "inputs", "stage"),
    [
        ({"size": 4}, INPUTS, "prepare"),
        ({**CONFIG, "new": None}, INPUTS, "prepare"),
        (CONFIG, {"base": "abd"}, "prepare"),
        (CONFIG, {}, "prepare"),
        (CONFIG, INPUTS, "train"),
    ],
)
def test_a_changed_config_input_or_stage_is_a_new_run(
    config: dict[str, Any], inputs: dict[str, str], stage: str, store: ArtifactStore
) -> None:
    first = store.run("prepare", CONFIG, INPUTS, write_files())
    second = store.run(stage, config, inputs, write_files("other"))
    assert second.manifest.run_id != first.manifest.run_id
    assert store.find("prepare", first.manifest.run_id) is not None


def test_a_run_id_does_not_depend_on_the_order_of_keys() -> None:
    assert compute_run_id("s", {"a": 1, "b": 2}, {"x": "1", "y": "2"}) == compute_run_id(
        "s", {"b": 2, "a": 1}, {"y": "2", "x": "1"}
    )


def test_equal_contents_have_equal_digests(tmp_path: Path) -> None:
    first = ArtifactStore(str(tmp_path / "a")).run("s", {"size": 1}, {}, write_files())
    second = ArtifactStore(str(tmp_path / "b")).run("s", {"size": 2}, {}, write_files())
    third = ArtifactStore(str(tmp_path / "c")).run("s", {"size": 1}, {}, write_files("other"))
    assert first.digest == second.digest
    assert first.digest != third.digest


def test_a_killed_stage_leaves_no_manifest_and_the_next_run_starts_clean(
    store: ArtifactStore,
) -> None:
    def killed(directory: Path) -> Mapping[str, Any]:
        (directory / "half").mkdir()
        (directory / "half" / "written.bin").write_bytes(b"x")
        (directory / "text.txt").write_text("par")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.run("prepare", CONFIG, INPUTS, killed)
    assert store.find("prepare", compute_run_id("prepare", CONFIG, INPUTS)) is None

    def check_clean(directory: Path) -> Mapping[str, Any]:
        assert list(directory.iterdir()) == []
        return write_files()(directory)

    artifact = store.run("prepare", CONFIG, INPUTS, check_clean)
    assert [output.path for output in artifact.manifest.outputs] == ["deep/er/data.bin", "text.txt"]


def test_kept_entries_survive_a_kill_and_are_gone_at_the_end(tmp_path: Path) -> None:
    store = ArtifactStore(str(tmp_path / "runs"))

    def killed(directory: Path) -> Mapping[str, Any]:
        (directory / "checkpoints").mkdir()
        (directory / "checkpoints" / "step-1").write_text("resume me")
        (directory / "progress.json").write_text("1")
        (directory / "leftover").write_text("x")
        raise KeyboardInterrupt

    keep = ("checkpoints", "progress.json")
    with pytest.raises(KeyboardInterrupt):
        store.run("train", CONFIG, INPUTS, killed, keep=keep)

    def resume(directory: Path) -> Mapping[str, Any]:
        assert sorted(entry.name for entry in directory.iterdir()) == [*keep]
        assert (directory / "checkpoints" / "step-1").read_text() == "resume me"
        return write_files()(directory)

    artifact = store.run("train", CONFIG, INPUTS, resume, keep=keep)
    names = sorted(entry.name for entry in artifact.local_dir.iterdir())
    assert names == ["deep", MANIFEST_NAME, "text.txt"]
    assert all(output.path.split("/")[0] not in keep for output in artifact.manifest.outputs)
    assert store.run("train", CONFIG, INPUTS, never, keep=keep).digest == artifact.digest
    (artifact.local_dir / "checkpoints").mkdir()  # as whoever was killed right before the end
    with store.lock("train", artifact.manifest.run_id):  # or who is about to remove it
        store.run("train", CONFIG, INPUTS, never, keep=keep)
    assert (artifact.local_dir / "checkpoints").exists()
    store.run("train", CONFIG, INPUTS, never, keep=keep)
    assert not (artifact.local_dir / "checkpoints").exists()


def test_a_manifest_deeper_inside_is_an_output_like_any_other(store: ArtifactStore) -> None:
    def write(directory: Path) -> Mapping[str, Any]:
        (directory / "inner").mkdir()
        (directory / "inner" / MANIFEST_NAME).write_text("mine")
        return {}

    run_id = store.run("s", CONFIG, INPUTS, write).manifest.run_id
    found = store.find("s", run_id)
    assert found is not None
    assert (found.local_dir / "inner" / MANIFEST_NAME).read_text() == "mine"


def test_published_files_lie_beside_the_stages(store: ArtifactStore, tmp_path: Path) -> None:
    (tmp_path / "report").mkdir()
    for text in ("first", "second"):
        (tmp_path / "report" / "report.md").write_text(text)
        store.publish(tmp_path / "report")
    root = store.directory("s", "id").removesuffix("/s/id")
    with store.filesystem.open_input_stream(f"{root}/report.md") as stream:
        assert stream.read() == b"second"
    files = store.filesystem.get_file_info(fs.FileSelector(root))
    assert [file.base_name for file in files] == ["report.md"]


def test_unverified_reading_leaves_digests_to_the_driver(tmp_path: Path) -> None:
    store = ArtifactStore(str(tmp_path / "runs"))
    artifact = store.run("s", CONFIG, INPUTS, write_files())
    (artifact.local_dir / "text.txt").write_text("hallo")
    assert store.require("s", artifact.manifest.run_id, hint="", verify=False) is not None
    with pytest.raises(ArtifactError, match="sha256"):
        store.require("s", artifact.manifest.run_id, hint="")


def test_a_symlink_left_behind_is_removed_and_its_target_is_not(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("x")
    store = ArtifactStore(str(tmp_path / "runs"))
    directory = Path(store.directory("s", compute_run_id("s", CONFIG, INPUTS)))
    directory.mkdir(parents=True)
    (directory / "link").symlink_to(precious)
    store.run("s", CONFIG, INPUTS, write_files())
    assert (precious / "file").read_text() == "x"
    assert not (directory / "link").exists()


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda path: path.unlink(), "missing, though the manifest lists it"),
        (lambda path: path.write_bytes(b"hell"), "4 bytes, the manifest says 5"),
        (lambda path: path.write_bytes(b"hallo"), "sha256 .*, the manifest says 2cf24dba5fb0"),
    ],
    ids=["missing", "truncated", "altered"],
)
def test_a_damaged_file_is_named_with_what_does_not_agree(
    damage: Callable[[Path], object], complaint: str, tmp_path: Path
) -> None:
    store = ArtifactStore(str(tmp_path / "runs"))
    artifact = store.run("prepare", CONFIG, INPUTS, write_files())
    damage(artifact.local_dir / "text.txt")
    with pytest.raises(ArtifactError, match=complaint) as caught:
        store.run("prepare", CONFIG, INPUTS, never)
    assert str(artifact.local_dir / "text.txt") in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", "null", "{}", '{"schema_version": 1}',
     '{"schema_version": 1, "outputs": 3}', '{"schema_version": 1, "outputs": [{"path": 1}]}'],
)  # fmt: skip
def test_a_corrupt_manifest_is_named(text: str, store: ArtifactStore, tmp_path: Path) -> None:
    artifact = store.run("prepare", CONFIG, INPUTS, write_files())
    (stored(tmp_path, artifact) / MANIFEST_NAME).write_text(text)
    with pytest.raises(ArtifactError, match="not a manifest") as caught:
        store.run("prepare", CONFIG, INPUTS, never)
    assert f"{artifact.location}/{MANIFEST_NAME}" in str(caught.value)


def test_another_schema_version_is_refused(store: ArtifactStore, tmp_path: Path) -> None:
    artifact = store.run("prepare", CONFIG, INPUTS, write_files())
    path = stored(tmp_path, artifact) / MANIFEST_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": 99}))
    with pytest.raises(ArtifactError, match="schema version 99 is not 1"):
        store.find("prepare", artifact.manifest.run_id)


def test_an_output_path_cannot_leave_the_artifact(store: ArtifactStore, tmp_path: Path) -> None:
    artifact = store.run("prepare", CONFIG, INPUTS, write_files())
    path = stored(tmp_path, artifact) / MANIFEST_NAME
    raw = json.loads(path.read_text())
    for escape in ("../escaped.txt", "/etc/hostname", "//etc/hostname", "a/../../b", ".", ""):
        raw["outputs"][0]["path"] = escape
        path.write_text(json.dumps(raw))
        with pytest.raises(ArtifactError, match="leaves the directory"):
            store.find("prepare", artifact.manifest.run_id)


@pytest.mark.parametrize("name", ["a\0b", "a\nb", "\ud800", "x" * 300, "x/" * 3000 + "x"])
def test_an_output_that_no_file_can_be_is_named(
    name: str, store: ArtifactStore, tmp_path: Path
) -> None:
    artifact = store.run("prepare", CONFIG, INPUTS, write_files())
    path = stored(tmp_path, artifact) / MANIFEST_NAME
    raw = json.loads(path.read_text())
    raw["outputs"][0]["path"] = name
    path.write_text(json.dumps(raw))
    with pytest.raises(ArtifactError, match=r"control characters|cannot be|missing"):
        store.find("prepare", artifact.manifest.run_id)


def test_an_output_that_is_a_link_out_of_the_artifact_is_refused(tmp_path: Path) -> None:
    store = ArtifactStore(str(tmp_path / "runs"))
    artifact = store.run("s", CONFIG, INPUTS, write_files())
    inside = artifact.local_dir / "text.txt"
    inside.rename(tmp_path / "text.txt")
    inside.symlink_to(tmp_path / "text.txt")  # the same contents, from elsewhere
    with pytest.raises(ArtifactError, match=r"text\.txt: a symbolic link, which leads out of"):
        store.find("s", artifact.manifest.run_id)


@pytest.mark.parametrize("level", ["stage", "run"])
def test_a_link_out_of_the_root_is_neither_read_nor_emptied(level: str, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("x")
    store = ArtifactStore(str(tmp_path / "runs"), "mine")
    directory = Path(store.directory("s", compute_run_id("s", CONFIG, INPUTS)))
    link = directory if level == "run" else directory.parent
    link.parent.mkdir(parents=True)
    link.symlink_to(precious)
    with pytest.raises(ArtifactError, match=r"symbolic link leads it to .*precious.*, out of"):
        store.run("s", CONFIG, INPUTS, never)
    assert [path.name for path in precious.iterdir()] == ["file"]


def test_the_directory_of_runs_may_itself_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "disk")
    store = ArtifactStore(str(tmp_path / "runs"), "mine")
    artifact = store.run("s", CONFIG, INPUTS, write_files())
    assert (tmp_path / "disk" / "mine" / "s" / artifact.manifest.run_id / "text.txt").is_file()


def test_a_manifest_of_another_artifact_or_size_is_refused(
    store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = store.run("prepare", CONFIG, INPUTS, write_files())
    path = stored(tmp_path, artifact) / MANIFEST_NAME
    raw = json.loads(path.read_text())
    for change in ({"run_id": "../../x"}, {"stage": "train"}):
        path.write_text(json.dumps(raw | change))
        with pytest.raises(ArtifactError, match="is the manifest of"):
            store.find("prepare", artifact.manifest.run_id)
    monkeypatch.setattr("r1ray.artifacts.RECORD_BYTES", 100)
    with pytest.raises(ArtifactError, match="has more than 100 bytes, which no manifest has"):
        store.find("prepare", artifact.manifest.run_id)


def test_require_says_how_to_make_what_is_not_there(store: ArtifactStore) -> None:
    with pytest.raises(
        ArtifactError, match=r"no finished 'train' artifact at .*train/abc; run jobs"
    ):
        store.require("train", "abc", hint="run jobs.train first")


def test_a_relative_root_is_found_from_another_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store = ArtifactStore("runs", "demo")
    made = store.run("prepare", CONFIG, INPUTS, write_files())
    monkeypatch.chdir("/")
    assert store.root == str(tmp_path / "runs")
    found = ArtifactStore(store.root, store.name).find("prepare", made.manifest.run_id)
    assert found is not None
    assert found.manifest == made.manifest


def test_a_second_process_on_the_same_run_is_refused_and_destroys_nothing(tmp_path: Path) -> None:
    store = ArtifactStore(str(tmp_path))

    def body(out_dir: Path) -> dict[str, int]:
        (out_dir / "half.txt").write_text("mine")
        with pytest.raises(ArtifactError, match="another process is making it right now"):
            ArtifactStore(str(tmp_path)).run("prepare", CONFIG, INPUTS, never)
        assert (out_dir / "half.txt").read_text() == "mine"
        return {}

    made = store.run("prepare", CONFIG, INPUTS, body)
    assert [output.path for output in made.manifest.outputs] == ["half.txt"]


def test_what_another_process_finished_while_waiting_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = ArtifactStore(str(tmp_path)).run("prepare", CONFIG, INPUTS, write_files())
    late = ArtifactStore(str(tmp_path))
    find, calls = late.find, []

    def find_late(stage: str, run_id: str) -> Artifact | None:
        calls.append(run_id)
        return None if len(calls) == 1 else find(stage, run_id)

    monkeypatch.setattr(late, "find", find_late)
    assert late.run("prepare", CONFIG, INPUTS, never).manifest == made.manifest


def test_an_unusable_root_is_named() -> None:
    with pytest.raises(ArtifactError, match="'foo://x' cannot be used"):
        ArtifactStore("foo://x")


def test_a_root_below_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match=r"file/prepare.*cannot be written"):
        ArtifactStore(str(tmp_path / "file")).run("prepare", CONFIG, INPUTS, never)


def test_a_link_leads_to_the_latest_artifact(tmp_path: Path) -> None:
    store = ArtifactStore(str(tmp_path))
    for size in (1, 2):
        made = store.run("s", {"size": size}, {}, write_files(str(size)))
        store.link("model", made)
        assert (tmp_path / "model").resolve() == made.local_dir


def test_a_shipped_commit_goes_before_the_repositorys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("R1RAY_COMMIT", raising=False)
    assert read_commit() != "abc123"
    monkeypatch.setenv("R1RAY_COMMIT", "abc123")
    assert read_commit() == "abc123"
