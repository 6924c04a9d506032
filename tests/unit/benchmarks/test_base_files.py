import json
from pathlib import Path

from jobs.benchmarks.base_files import BaseFiles
from r1ray.models import load_model
from tests.fakes import write_tiny_model


def test_files_are_made_once_and_begun_ones_anew(tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "source")
    work = tmp_path / "work"
    (work / "int8.partial").mkdir(parents=True)
    (work / "int8.partial" / "config.json").write_text("{", encoding="utf-8")  # of a killed start
    files = BaseFiles(work, str(source))
    assert load_model(files.base()).scheme is None
    assert load_model(files.int8()).scheme == "w8a8"
    ids = json.loads(files.ids().read_text(encoding="utf-8"))
    assert 1000 < len(ids) <= 40_000
    made = {path: path.stat().st_mtime_ns for path in (files.base(), files.int8(), files.ids())}
    again = BaseFiles(work, "nowhere")
    assert {path: path.stat().st_mtime_ns for path in made} == made
    assert (again.base(), again.int8(), again.ids()) == tuple(made)
