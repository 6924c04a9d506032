"""Parts of a benchmark: measured once, found here or elsewhere, and only from committed code."""

from pathlib import Path

import pytest

from jobs.benchmarks.parts import StoredParts, check_is_committed
from r1ray.errors import ArtifactError, ConfigError


def _never() -> int:
    raise AssertionError("measured again")


def test_a_part_is_measured_once_and_found_by_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("R1RAY_COMMIT", "abc")
    assert StoredParts(tmp_path).once("speed", lambda value: {"ms": value}, 3) == {"ms": 3}
    monkeypatch.setenv("R1RAY_COMMIT", "def")
    again = StoredParts(tmp_path)

    assert again.once("speed", _never) == {"ms": 3}
    assert again.circumstances()["commits_of_parts"] == {"speed": "abc"}


def test_a_part_of_another_machine_counts_until_it_is_measured_here(tmp_path: Path) -> None:
    StoredParts(tmp_path / "there").store("speed", 1)
    parts = StoredParts(tmp_path / "here", tmp_path / "there")
    assert parts.once("speed", _never) == 1

    parts.store("speed", 2)

    assert parts.once("speed", _never) == 2
    assert StoredParts(tmp_path / "there").read("speed") == 1


def test_what_failed_while_it_was_measured_is_not_stored(tmp_path: Path) -> None:
    parts = StoredParts(tmp_path)
    with pytest.raises(AssertionError, match="measured again"):
        parts.once("speed", _never)

    with pytest.raises(ArtifactError, match="speed was not measured"):
        parts.read("speed")


def test_a_record_of_uncommitted_code_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("R1RAY_COMMIT", "abc+")
    parts = StoredParts(tmp_path)
    parts.once("speed", lambda: 1)

    with pytest.raises(ArtifactError, match="speed: measured with uncommitted changes"):
        parts.circumstances()


def test_figures_are_not_filed_with_a_commit_that_lacks_what_measured_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("R1RAY_COMMIT", "abc")
    check_is_committed()
    monkeypatch.setenv("R1RAY_COMMIT", "abc+")
    with pytest.raises(ConfigError, match="changes that abc does not have"):
        check_is_committed()
