import json
import os
from pathlib import Path
from typing import Any

import pytest

from r1ray.errors import ArtifactError
from r1ray.files import (
    MAX_JSON_DEPTH,
    check_file,
    is_inside,
    own_temp_dir,
    parse_json,
    read_json,
    read_text,
)


def _nested(depth: int, kind: str = "list") -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value] if kind == "list" else {"a": value}
    return value


@pytest.mark.parametrize("kind", ["list", "dict"])
def test_json_may_be_as_deep_as_the_limit_and_no_deeper(kind: str) -> None:
    deepest = _nested(MAX_JSON_DEPTH, kind)
    assert parse_json(json.dumps(deepest)) == deepest
    with pytest.raises(ValueError, match="nested deeper than 64 levels"):
        parse_json(json.dumps(_nested(MAX_JSON_DEPTH + 1, kind)))


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "9" * 5000, "[1", ""])
def test_json_that_cannot_be_read_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - json's own messages
        parse_json(text)


def test_brackets_within_text_and_beside_one_another_are_not_depth() -> None:
    wide = [[] for _ in range(1000)] + ["[" * 1000]
    assert parse_json(json.dumps(wide)) == wide


def test_a_file_above_its_limit_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('"abc"')
    assert read_json(path, max_bytes=5) == "abc"
    with pytest.raises(ArtifactError, match=r"a\.json: has 5 bytes, and the most .* is 4"):
        read_json(path, max_bytes=4)


@pytest.mark.parametrize("kind", ["pipe", "device", "directory", "missing", "null"])
def test_only_regular_files_are_read(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a"
    if kind == "pipe":
        os.mkfifo(path)  # opening it would wait forever
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "directory":
        path.mkdir()
    elif kind == "null":
        path = tmp_path / "a\0b"
    for read in (lambda: check_file(path, max_bytes=1), lambda: read_text(path, max_bytes=1)):
        with pytest.raises(ArtifactError, match=r"no regular file|cannot be read"):
            read()


def test_text_that_is_no_utf8_or_no_json_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"\xff")
    with pytest.raises(ArtifactError, match=r"a\.json: cannot be read \('utf-8' codec"):
        read_json(path)
    path.write_bytes(b"{")
    with pytest.raises(ArtifactError, match=r"a\.json: cannot be read as JSON"):
        read_json(path)


def test_links_are_followed_to_say_what_is_inside(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "out").symlink_to(tmp_path)
    (tmp_path / "root" / "in").symlink_to(tmp_path / "root")
    (tmp_path / "root" / "loop").symlink_to("loop")
    assert is_inside(tmp_path / "root" / "in" / "x", tmp_path / "root")
    assert is_inside(tmp_path / "root" / "loop", tmp_path / "root")
    assert not is_inside(tmp_path / "root" / "out" / "x", tmp_path / "root")
    assert not is_inside(tmp_path / "rootless", tmp_path / "root")


def test_a_temporary_directory_that_others_can_write_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    directory = own_temp_dir("mine")
    assert own_temp_dir("mine") == directory
    assert directory.stat().st_mode & 0o777 == 0o700
    directory.chmod(0o777)
    with pytest.raises(ArtifactError, match="no directory that this user alone can write"):
        own_temp_dir("mine")
    directory.rmdir()
    directory.symlink_to(tmp_path)
    with pytest.raises(ArtifactError, match="no directory that this user alone can write"):
        own_temp_dir("mine")
