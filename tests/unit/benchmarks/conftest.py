"""Benchmarks file nothing that uncommitted code has measured; what is tested here may be that."""

import pytest


@pytest.fixture(autouse=True)
def committed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("R1RAY_COMMIT", "abc")
