"""Asking a teacher about a whole BatchSet: copies of it on Ray Data, one part at a time each.

Finished parts are kept: a run that was interrupted goes on with the parts that are missing.
"""

import json
import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray.data
import torch

from r1ray.compression.logit_store import (
    INDEX_NAME,
    PART_BATCHES,
    LogitIndex,
    encode_part,
    part_name,
)
from r1ray.config.distill import DistillConfig, DistillResources, StoredLogitsConfig
from r1ray.data.batch_set import BatchSet
from r1ray.models.checkpoint import load_model
from r1ray.models.config import ModelConfig

__all__ = ["PARTS_DIR", "store_logits"]

PARTS_DIR = "parts"


class _Scorer:
    """One copy of the teacher: numbers of parts in, their files out."""

    def __init__(
        self,
        teacher_dir: str,
        batches_dir: str,
        top_k: int,
        temperature: float,
        resources: DistillResources,
    ) -> None:
        torch.set_num_threads(max(1, int(resources.num_cpus_per_teacher)))
        self._device = torch.device("cuda" if resources.use_gpu else "cpu")
        self._teacher = load_model(teacher_dir, dtype=torch.float32).to(self._device)
        self._batches = BatchSet(batches_dir)
        self._top_k, self._temperature = top_k, temperature

    def __call__(self, rows: pa.Table) -> pa.Table:
        files = []
        for part in rows.column("part").to_pylist():
            start = part * PART_BATCHES
            stop = min(start + PART_BATCHES, len(self._batches))
            batches = (self._batches.read(i).to(self._device) for i in range(start, stop))
            files.append(
                encode_part(
                    self._teacher, batches, top_k=self._top_k, temperature=self._temperature
                )
            )
        return pa.table({"part": rows.column("part"), "file": pa.array(files, pa.large_binary())})


def store_logits(
    config: DistillConfig,
    logits: StoredLogitsConfig,
    teacher_dir: Path,
    batches_dir: Path,
    out_dir: Path,
    on_batches: Callable[[int], None] = lambda _: None,
    *,
    name: str = "logits",
) -> dict[str, Any]:
    """Write the logit store of the BatchSet in `batches_dir` into `out_dir`; returns its index.

    Args:
        teacher_dir, batches_dir: every node must be able to read them.
        on_batches: called with the number of micro-batches done so far.
        name: of the data set in Ray's dashboard and metrics.
    """
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    options = ray.data.DataContext.get_current().execution_options
    options.preserve_order = False  # a part is kept as soon as it is done
    options.resource_limits = ray.data.ExecutionResources()
    batches = BatchSet(batches_dir)
    parts_dir = out_dir / PARTS_DIR
    parts_dir.mkdir(exist_ok=True)
    num_parts = -(-len(batches) // PART_BATCHES)
    missing = [part for part in range(num_parts) if not (parts_dir / part_name(part)).exists()]
    num_done = num_parts - len(missing)
    on_batches(min(num_done * PART_BATCHES, len(batches)))
    if missing:
        for row in _score(config, logits, teacher_dir, batches_dir, missing, name):
            partial = parts_dir / "partial"
            partial.write_bytes(row["file"])
            partial.rename(parts_dir / part_name(row["part"]))
            num_done += 1
            on_batches(min(num_done * PART_BATCHES, len(batches)))
    num_targets = batches.summary["num_targets"]
    size = 0
    for part in range(num_parts):
        path = (parts_dir / part_name(part)).rename(out_dir / part_name(part))
        size += path.stat().st_size
    index = LogitIndex(
        top_k=logits.top_k,
        temperature=config.temperature,
        vocab_size=ModelConfig.load(teacher_dir).vocab_size,
        num_batches=len(batches),
        num_targets=num_targets,
        bytes_per_target=size / num_targets,
    )
    (out_dir / INDEX_NAME).write_text(json.dumps(asdict(index)) + "\n", encoding="utf-8")
    return asdict(index)


def _score(
    config: DistillConfig,
    logits: StoredLogitsConfig,
    teacher_dir: Path,
    batches_dir: Path,
    parts: list[int],
    name: str,
) -> Any:
    resources = config.resources
    dataset = ray.data.from_items(
        [{"part": part} for part in parts], override_num_blocks=len(parts)
    ).map_batches(
        _Scorer,
        fn_constructor_args=(
            str(teacher_dir),
            str(batches_dir),
            logits.top_k,
            config.temperature,
            resources,
        ),
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=resources.num_cpus_per_teacher,
        num_gpus=1 if resources.use_gpu else None,
        compute=ray.data.ActorPoolStrategy(size=min(resources.num_teachers, len(parts))),
    )
    dataset.set_name(name)
    return dataset.iter_rows()
