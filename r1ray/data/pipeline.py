"""The `prepare` stage: from rows of text to a BatchSet, on Ray Data.

1. Ray Data reads the sources, one task per file, and tokenizes in parallel tasks; rows keep their
   order. Generated task traces enter as rows like any other.
2. The driver is the single writer: it streams the tokenized rows into a Parquet file, bad rows into
   `quarantine.jsonl`, and counts lengths.
3. Bucket ceilings are fitted to the whole histogram; then windows of rows are sorted inside their
   buckets and cut into micro-batches (`data.bucketing`).

Price: tokens pass through the driver once (4 bytes each); memory is bounded by one window. The
tasks read the tokenizer from `model_dir`, which every node must see.
"""

import functools
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
import ray.data

from r1ray.config.schema import PrepareConfig, TasksConfig, TaskSourceConfig
from r1ray.data.batch_set import (
    BATCH_SCHEMA,
    BATCHES_NAME,
    ROW_GROUP_BATCHES,
    SUMMARY_NAME,
)
from r1ray.data.bucketing import fit_histogram_ceilings, plan_batches
from r1ray.data.reasoning import Problem, build_messages, draw_training
from r1ray.data.sources import ROW_SCHEMA, RowError, list_files, read_file, rows_to_table
from r1ray.data.tokenize import tokenize_messages
from r1ray.errors import ArtifactError, R1RayError
from r1ray.models.tokenizer import Tokenizer

__all__ = ["prepare_batches"]

logger = logging.getLogger(__name__)

QUARANTINE_NAME = "quarantine.jsonl"
TRACES_NAME = "traces.jsonl"
_WINDOW_ROWS = 8192
_TOKENIZED_NAME = "tokenized.parquet.tmp"
_TOKENIZED_SCHEMA = pa.schema(
    [("input_ids", pa.list_(pa.int32())), ("is_target", pa.list_(pa.bool_()))]
)
_RESULT_SCHEMA = pa.schema([*_TOKENIZED_SCHEMA, *ROW_SCHEMA, ("was_truncated", pa.bool_())])


def prepare_batches(
    config: PrepareConfig,
    tasks: TasksConfig,
    model_dir: Path,
    heldout: list[Problem],
    out_dir: Path,
    on_rows: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:
    """Write the BatchSet of `config`'s sources into `out_dir`; returns the summary's figures.

    Args:
        model_dir: holds the tokenizer; every node must be able to read it.
        heldout: problems whose questions must not be trained on.
        on_rows: called with the number of rows read so far.
    Raises:
        ArtifactError: too large a share of the rows had to be quarantined, or none is left.
    """
    # Ray Data announces every execution plan on the console; r1ray shows its own progress.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    rows = _read_sources(config, tasks, heldout, out_dir)
    tokenize = functools.partial(
        _tokenize_table,
        heldout_questions=frozenset(problem.question.strip() for problem in heldout),
        tokenizer_dir=str(model_dir),
        max_tokens=config.max_tokens,
        overflow=config.overflow,
    )
    tokenized = rows.map_batches(
        tokenize,
        batch_format="pyarrow",
        batch_size=256,
        num_cpus=config.resources.num_cpus_per_task,
    )
    try:
        counts, lengths = _collect(tokenized, out_dir, on_rows)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, R1RayError):
            raise error.cause from None  # the cause alone, without the remote traceback
        raise
    _check_counts(counts, config.max_quarantined_share, out_dir)
    ceilings = fit_histogram_ceilings(lengths, config.num_buckets)
    summary = {
        **counts,
        "ceilings": ceilings,
        "lengths": {str(length): lengths[length] for length in sorted(lengths)},
        **_write_batches(out_dir, ceilings, config.batch_tokens),
    }
    (out_dir / _TOKENIZED_NAME).unlink()
    (out_dir / SUMMARY_NAME).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return {name: value for name, value in summary.items() if name != "lengths"}


def _read_sources(
    config: PrepareConfig, tasks: TasksConfig, heldout: list[Problem], out_dir: Path
) -> ray.data.Dataset:
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.raise_original_map_exception = True  # an ArtifactError stays one
    parts: list[ray.data.Dataset] = []
    for source in config.sources:
        if isinstance(source, TaskSourceConfig):
            problems = draw_training(tasks, source.num_samples, heldout)
            parts.append(ray.data.from_arrow(_write_traces(problems, tasks.system_prompt, out_dir)))
        else:
            files = [{"path": path} for path in list_files(source.paths)]
            parts.append(
                ray.data.from_items(files, override_num_blocks=len(files)).map_batches(
                    _read_files, batch_size=1, num_cpus=config.resources.num_cpus_per_task
                )
            )
    return parts[0].union(*parts[1:]) if len(parts) > 1 else parts[0]


def _write_traces(problems: list[Problem], system_prompt: str, out_dir: Path) -> pa.Table:
    """The traces as rows; also appended to `traces.jsonl` for people to read."""
    rows = []
    with (out_dir / TRACES_NAME).open("a", encoding="utf-8") as stream:
        for number, problem in enumerate(problems):
            messages = build_messages(problem, system_prompt)
            messages.append({"role": "assistant", "content": problem.trace()})
            text = json.dumps(messages, ensure_ascii=False)
            stream.write(f'{{"family": "{problem.family}", "messages": {text}}}\n')
            rows.append({"source": problem.family, "row": number, "messages": text})
    return rows_to_table(rows)


def _read_files(batch: dict[str, Any]) -> Iterator[pa.Table]:
    for path in batch["path"]:
        yield from read_file(str(path))


@functools.lru_cache(maxsize=1)
def _load_tokenizer(path: str) -> Tokenizer:
    return Tokenizer(path)


def _tokenize_table(
    table: pa.Table,
    *,
    tokenizer_dir: str,
    max_tokens: int,
    overflow: str,
    heldout_questions: frozenset[str],
) -> pa.Table:
    """Rows of ROW_SCHEMA with token ids added, or an error where they cannot be used."""
    tokenizer = _load_tokenizer(tokenizer_dir)
    results = []
    for row in table.to_pylist():
        result = {**row, "input_ids": None, "is_target": None, "was_truncated": False}
        if row["error"] is None:
            try:
                messages = json.loads(row["messages"])
                _refuse_heldout(messages, heldout_questions)
                sample = tokenize_messages(
                    tokenizer,
                    messages,
                    max_tokens=max_tokens,
                    overflow=overflow,
                )
                result.update(vars(sample))
            except RowError as error:
                result.update(error=str(error), excerpt=row["messages"][:200])
        results.append(result | {"messages": None})
    return pa.Table.from_pylist(results, schema=_RESULT_SCHEMA)


def _refuse_heldout(messages: list[dict[str, str]], questions: frozenset[str]) -> None:
    for message in messages:
        if message["role"] == "user" and message["content"].strip() in questions:
            raise RowError("the question is held out for evaluation")


def _collect(
    tokenized: ray.data.Dataset, out_dir: Path, on_rows: Callable[[int], None]
) -> tuple[dict[str, int], Counter[int]]:
    """Stream usable rows into a Parquet file and bad ones into quarantine; count both."""
    counts = Counter(num_rows=0, num_samples=0, num_quarantined=0, num_truncated=0)
    lengths: Counter[int] = Counter()
    with (
        pq.ParquetWriter(out_dir / _TOKENIZED_NAME, _TOKENIZED_SCHEMA) as writer,
        (out_dir / QUARANTINE_NAME).open("w", encoding="utf-8") as quarantine,
    ):
        tables: Iterable[pa.Table] = tokenized.iter_batches(batch_size=2048, batch_format="pyarrow")
        for table in tables:
            bad = table.filter(pc.is_valid(table["error"]))
            for row in bad.select(["source", "row", "error", "excerpt"]).to_pylist():
                quarantine.write(json.dumps(row, ensure_ascii=False) + "\n")
            good = table.filter(pc.is_null(table["error"]))
            lengths.update(pc.list_value_length(good["input_ids"]).to_pylist())
            counts["num_truncated"] += pc.sum(good["was_truncated"]).as_py() or 0
            counts["num_rows"] += table.num_rows
            counts["num_samples"] += good.num_rows
            counts["num_quarantined"] += bad.num_rows
            writer.write_table(good.select(_TOKENIZED_SCHEMA.names).cast(_TOKENIZED_SCHEMA))
            on_rows(counts["num_rows"])
    return dict(counts), lengths


def _check_counts(counts: dict[str, int], max_quarantined_share: float, out_dir: Path) -> None:
    bad, rows = counts["num_quarantined"], counts["num_rows"]
    where = f"reasons are in {out_dir / QUARANTINE_NAME}"
    if bad:
        logger.warning("%d of %d rows quarantined; %s", bad, rows, where)
    if counts["num_samples"] == 0:
        raise ArtifactError(f"prepare: none of {rows} rows is usable; {where}")
    if bad > max_quarantined_share * rows:
        raise ArtifactError(
            f"prepare: {bad} of {rows} rows quarantined, above prepare.max_quarantined_share "
            f"({max_quarantined_share}); {where}"
        )


def _write_batches(out_dir: Path, ceilings: list[int], batch_tokens: int) -> dict[str, Any]:
    """Cut windows of the tokenized rows into micro-batches; returns counts and padding share."""
    computed = real = targets = num_batches = 0
    per_bucket: Counter[int] = Counter()
    source = pq.ParquetFile(out_dir / _TOKENIZED_NAME)
    with pq.ParquetWriter(out_dir / BATCHES_NAME, BATCH_SCHEMA) as writer:
        for window in source.iter_batches(batch_size=_WINDOW_ROWS):
            samples = window.to_pylist()
            lengths = [len(sample["input_ids"]) for sample in samples]
            batches = [
                _join(ceiling, [samples[index] for index in rows])
                for ceiling, rows in plan_batches(lengths, ceilings, batch_tokens)
            ]
            for batch in batches:
                computed += batch["ceiling"] * len(batch["lengths"])
                real += len(batch["input_ids"])
                targets += sum(batch["is_target"])
                per_bucket[batch["ceiling"]] += 1
            num_batches += len(batches)
            table = pa.Table.from_pylist(batches, schema=BATCH_SCHEMA)
            writer.write_table(table, row_group_size=ROW_GROUP_BATCHES)
    return {
        "num_batches": num_batches,
        "num_tokens": real,
        "num_targets": targets,
        "padding_share": 1.0 - real / computed,
        "batches_per_ceiling": {str(top): per_bucket[top] for top in ceilings},
    }


def _join(ceiling: int, samples: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "ceiling": ceiling,
        "lengths": [len(sample["input_ids"]) for sample in samples],
        "input_ids": [token for sample in samples for token in sample["input_ids"]],
        "is_target": [flag for sample in samples for flag in sample["is_target"]],
    }
