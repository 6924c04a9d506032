"""Which files the paths of a source stand for."""

import os
from pathlib import Path

import pytest

from r1ray.data.sources import list_files, read_file
from r1ray.errors import ConfigError


def test_files_directories_and_globs_are_listed_once_and_sorted(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("b.jsonl", "a.parquet", "deep/c.jsonl.gz", "d.jsonl.zst", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    names = ("a.parquet", "b.jsonl", "d.jsonl.zst", "deep/c.jsonl.gz")
    everything = [str(tmp_path / name) for name in names]
    assert list_files([str(tmp_path)]) == everything
    assert list_files([str(tmp_path / "*.jsonl"), str(tmp_path / "b.jsonl")]) == everything[1:2]
    assert list_files([f"{tmp_path}/**/*.gz"]) == everything[3:]
    assert list_files([str(tmp_path / "deep"), str(tmp_path)]) == everything


def test_linked_directories_are_followed_and_cycles_end(tmp_path: Path) -> None:
    data, other = tmp_path / "data", tmp_path / "other"
    (data / "sub").mkdir(parents=True)
    (other / "deep").mkdir(parents=True)
    (data / "a.jsonl").write_bytes(b"")
    (other / "deep" / "b.jsonl").write_bytes(b"")
    (data / "linked").symlink_to(other)
    (other / "deep" / "back").symlink_to(data)
    (data / "sub" / "self").symlink_to(data / "sub")
    (data / "gone.jsonl").symlink_to(tmp_path / "absent")
    everything = [str(data / "a.jsonl"), str(data / "linked" / "deep" / "b.jsonl")]
    assert list_files([str(data)]) == everything
    (tmp_path / "link").symlink_to(data)
    assert list_files([str(data), str(tmp_path / "link"), str(other)]) == everything


def test_uris_are_listed_like_paths(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("b.jsonl", "deep/c.jsonl.gz", "notes.txt"):
        (tmp_path / name).write_bytes(b"{}\n" if name == "b.jsonl" else b"")
    root = f"file://{tmp_path}"
    assert list_files([root]) == [f"{root}/b.jsonl", f"{root}/deep/c.jsonl.gz"]
    assert list_files([f"{root}/"]) == list_files([root])
    assert list_files([f"{root}/*.jsonl"]) == [f"{root}/b.jsonl"]
    [table] = read_file(f"{root}/b.jsonl")
    assert table.num_rows == 1
    with pytest.raises(ConfigError, match="matches no"):
        list_files([f"{root}/*.csv"])


def test_paths_that_match_nothing_or_are_of_no_known_kind_are_config_errors(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"absent\.jsonl' matches no \.jsonl"):
        list_files([str(tmp_path / "absent.jsonl")])
    with pytest.raises(ConfigError, match="matches no"):
        list_files([str(tmp_path)])
    with pytest.raises(ConfigError, match=r"notes\.txt is not one of"):
        list_files([str(tmp_path / "notes.txt")])
    os.mkfifo(tmp_path / "pipe.jsonl")  # opening it would wait forever
    with pytest.raises(ConfigError, match=r"pipe\.jsonl is not one of"):
        list_files([str(tmp_path / "pipe.jsonl")])


def test_a_file_named_in_two_ways_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / "sub" / "more.jsonl").write_text("{}\n")
    monkeypatch.chdir(tmp_path)
    found = list_files([".", "rows.jsonl", "sub/../rows.jsonl", "*"])
    assert found == [str(tmp_path / "rows.jsonl"), str(tmp_path / "sub" / "more.jsonl")]


@pytest.mark.parametrize("path", ["foo://x", "file://x", "x" * 5000])
def test_paths_that_cannot_be_listed_are_config_errors(path: str) -> None:
    with pytest.raises(ConfigError, match=r"prepare\.sources"):
        list_files([path])


def test_a_link_into_a_cache_is_read_by_its_own_name(tmp_path: Path) -> None:
    """As Hugging Face's cache has it: the file behind the link has a hash for a name."""
    blob, link = tmp_path / "blobs" / "0a1b", tmp_path / "snapshots" / "train.jsonl"
    for path in (blob, link):
        path.parent.mkdir()
    blob.write_text("{}")
    link.symlink_to(blob)

    assert list_files([str(link)]) == [str(link)]
    assert list_files([str(link.parent), str(link)]) == [str(link)]
