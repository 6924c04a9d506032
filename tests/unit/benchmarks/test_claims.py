"""The table of claims: verdicts from records, and README and docs in step with them."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from jobs.benchmarks import claims
from r1ray.evaluation.record import Row, build_record

ROOT = Path(__file__).parents[3]
HARDWARE = {"cpu": "a CPU", "flags": ["avx2"], "cores": 2, "memory_gib": 24, "gpu": None}


def _write(folder: Path, topic: str, *rows: Row) -> None:
    where: dict[str, Any] = {"hardware": HARDWARE, "commit": "abc", "date": "2026-01-01"}
    record = build_record(topic, f"python -m jobs.bench_{topic}", rows, where)
    (folder / f"{topic}.json").write_text(json.dumps(record))


def test_verdicts_are_those_of_the_records(tmp_path: Path) -> None:
    met = Row("precision.throughput_vs_fp32", 1.6, "x", (1.5, 1.7), "fp32", 100.0, ">= 1.4")
    missed = Row("exchange.delta4_bytes_share", 0.2, "share", bar="<= 0.125")
    absent = Row("long_context.prefill_exponent", None, "", bar="<= 1.35")
    _write(tmp_path, "precision", met)
    _write(tmp_path, "exchange", missed)
    _write(tmp_path, "long_context", absent)
    findings = {finding.id: finding for finding in claims.find(tmp_path)}
    assert findings[met.id].verdict == "met"
    assert findings[missed.id].verdict == "not met"
    assert findings[absent.id].verdict == "not measured"
    assert findings["fusion.mid_vs_best_other"].verdict == "not measured"
    table = claims.render(list(findings.values()), links_to="there/")
    assert "[1.6 [1.5, 1.7] x](there/precision.md) | fp32 | >= 1.4 | met |" in table
    assert all(line.split("|")[-2].strip() in claims.VERDICTS for line in table.splitlines()[2:])
    page = claims.render_page(list(findings.values()))
    assert "`python -m jobs.bench_exchange` | 2 cores of a CPU (avx2), 24 GiB | abc |" in page
    measured_twice = {**findings[met.id].record, "commits_of_parts": {"one": "b", "other": "a"}}
    page = claims.render_page([dataclasses.replace(findings[met.id], record=measured_twice)])
    assert "24 GiB | a, b |" in page
    claims.plot(list(findings.values()), tmp_path / "claims.png")
    assert (tmp_path / "claims.png").stat().st_size > 1000


def test_readme_and_page_say_what_the_records_say() -> None:
    findings = claims.find(ROOT / "docs" / "benchmarks")
    assert any(finding.verdict == "met" for finding in findings)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = claims.render(findings, links_to="docs/benchmarks/")
    assert claims.replace_table(readme, table) == readme, "run `make claims`"
    page = (ROOT / "docs" / "claims.md").read_text(encoding="utf-8")
    assert claims.render_page(findings) == page, "run `make claims`"


def test_a_text_without_marks_is_refused() -> None:
    with pytest.raises(ValueError, match="between"):
        claims.replace_table("# README", "| a |\n")
