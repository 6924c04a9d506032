"""`prepare` on 200,000 and on 2 million rows: throughput, and how much its memory grows.

The rows are real text in Parquet files of 100,000 rows, with log-normal lengths; they are read,
tokenized, planned and written like any other data set.
"""

import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jobs.benchmarks.memory import run_measured

__all__ = ["measure_scale"]

_FILE_ROWS = 100_000
_MEDIAN_WORDS = 14
_TIMEOUT_S = 3600
_TEXT = (
    "the sum of two numbers is less than ten so we count how many letters are in this word and "
    "then reverse the list before we answer because every step must follow from the one above"
)


def measure_scale(num_rows: int, work: Path) -> dict[str, Any]:
    """Seconds, rows and tokens a second, and memory peaks of one `prepare` run in `work`."""
    rows_dir = work / f"rows_{num_rows}"
    _write_rows(num_rows, rows_dir)
    name = f"scale_{num_rows}"
    command = [sys.executable, "-m", "jobs.prepare", "--config", "jobs/configs/demo.yaml"]
    overrides = [
        f"run.root={work}",
        f"run.name={name}",
        f"prepare.sources=[{{type: files, paths: ['{rows_dir}']}}]",
        "prepare.max_tokens=1024",
        "prepare.batch_tokens=16384",
        "prepare.batching={type: buckets}",
    ]
    base = [part if part != "jobs.prepare" else "jobs.base" for part in command]
    run_measured([*base, *overrides], timeout_s=_TIMEOUT_S)
    peaks = run_measured([*command, *overrides], timeout_s=_TIMEOUT_S)
    summary = _read_summary(work / name)
    shutil.rmtree(work / name)
    shutil.rmtree(rows_dir)
    return {
        **asdict(peaks),
        "num_rows": num_rows,
        "rows_per_s": num_rows / peaks.seconds,
        "tokens_per_s": summary["num_tokens"] / peaks.seconds,
        "num_batches": summary["num_batches"],
        "padding_share": summary["padding_share"],
    }


def _write_rows(num_rows: int, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    rng, vocabulary = np.random.default_rng(0), _TEXT.split()
    for number, start in enumerate(range(0, num_rows, _FILE_ROWS)):
        count = min(_FILE_ROWS, num_rows - start)
        lengths = np.clip(rng.lognormal(np.log(_MEDIAN_WORDS), 0.8, count), 2, 400).astype(int)
        words = rng.integers(0, len(vocabulary), lengths.sum())
        texts, begin = [], 0
        for length in lengths.tolist():
            texts.append(" ".join([vocabulary[word] for word in words[begin : begin + length]]))
            begin += length
        prompts = [f"Question {start + row}?" for row in range(count)]
        table = pa.table({"prompt": prompts, "completion": texts})
        pq.write_table(table, directory / f"rows_{number:04}.parquet", row_group_size=10_000)


def _read_summary(run: Path) -> dict[str, Any]:
    path = next((run / "prepare").glob("*/manifest.json"))
    return dict(json.loads(path.read_text(encoding="utf-8"))["metrics"])
