"""The `prepare` stage: from rows of text to a BatchSet, on Ray Data.

1. Ray Data reads the sources, one task per file, and tokenizes blocks of 4 MiB in parallel tasks;
   rows keep their order. Generated traces and long texts enter as rows like any other.
2. The driver is the single writer: it counts, and writes bad rows into `quarantine.jsonl`.
3. Where ceilings are fitted to all rows it first streams the samples into a temporary file, so that
   the whole histogram is known; packing and `fit_rows` need one pass.
4. A planner cuts windows of samples into batches (`data.planners`, `data.batch_writer`).

Price: tokens pass through the driver once, in arrow arrays (4 bytes each, 13 million a second on
one core: docs/experiments.md). Its memory is bounded by a window and what the planner holds back
for the next; that of tasks and of the object store by blocks of 4 MiB. The tasks read the tokenizer
from `model_dir`, which every node must see.
"""

import dataclasses
import functools
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.data

from r1ray.config.prepare import (
    BucketsConfig,
    FileSourceConfig,
    ImageSourceConfig,
    LongContextSourceConfig,
    PackingConfig,
    PrepareConfig,
    TasksConfig,
    TaskSourceConfig,
)
from r1ray.data.batch_set import SUMMARY_NAME
from r1ray.data.batch_writer import BatchWriter
from r1ray.data.collector import SampleCollector
from r1ray.data.image_rows import read_image_file
from r1ray.data.length_sketch import LengthSketch
from r1ray.data.long_context import TASKS, write_conversation
from r1ray.data.planners import (
    BatchPlanner,
    FixedBuckets,
    LearnedBuckets,
    PackingPlanner,
    fit_ceilings,
)
from r1ray.data.reasoning import TRACES_NAME, Problem, build_messages, draw_training
from r1ray.data.reservoir import Replay
from r1ray.data.sources import describe_files, list_files, read_file, rows_to_table
from r1ray.data.summary import plot_summary, render_summary
from r1ray.data.tokenize_table import sample_schema, tokenize_table
from r1ray.errors import ConfigError, R1RayError
from r1ray.models.fusion_file import read_fusion
from r1ray.models.tokenizer import Tokenizer

__all__ = ["describe_sources", "prepare_batches"]

_SAMPLES_NAME = "samples.arrow.tmp"
_TRACES_PER_BLOCK, _LONG_PER_BLOCK = 1024, 16
_BLOCK_BYTES = 4 << 20  # of a block in flight: bounds the memory of a task
_BLOCKS_PER_CPU, _SPARE_BLOCKS = 4, 8  # in the object store at once


def describe_sources(prepare: PrepareConfig) -> dict[str, str]:
    """Size and time of every file that the sources name."""
    described: dict[str, str] = {}
    for source in prepare.sources:
        if isinstance(source, FileSourceConfig | ImageSourceConfig):
            described |= describe_files(source.paths)
    return described


def prepare_batches(
    config: PrepareConfig,
    tasks: TasksConfig,
    model_dir: Path,
    heldout: list[Problem],
    out_dir: Path,
    on_rows: Callable[[int], None] = lambda _: None,
    *,
    name: str = "prepare",
    replay: Replay | None = None,
) -> dict[str, Any]:
    """Write the BatchSet of `config`'s sources into `out_dir`; returns the summary's figures.

    Args:
        model_dir: holds the tokenizer; every node must be able to read it.
        heldout: problems whose questions must not be trained on.
        on_rows: called with the number of rows read so far.
        name: of the data set in Ray's dashboard and metrics.
        replay: mixes earlier samples in; its reservoir is written beside the BatchSet.
    Raises:
        ArtifactError: too large a share of the rows had to be quarantined, or none is left.
    """
    # Ray Data announces every execution plan on the console; r1ray shows its own progress.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    fusion = read_fusion(model_dir)
    if config.has_images and fusion is None:
        raise ConfigError(
            "prepare.sources has images, and the base model reads text alone; set base.fusion"
        )
    tokenize = functools.partial(
        tokenize_table,
        num_image_tokens=1 if fusion is None else fusion.num_image_tokens,
        heldout_questions=frozenset(problem.question.strip() for problem in heldout),
        tokenizer_dir=str(model_dir),
        max_tokens=config.max_tokens,
        overflow=config.overflow,
    )
    dataset = _read_sources(config, tasks, model_dir, heldout, out_dir).map_batches(
        tokenize,
        batch_format="pyarrow",
        batch_size=None,
        num_cpus=config.resources.num_cpus_per_task,
    )
    dataset.set_name(name)
    tokenized: Iterable[Any] = dataset.iter_batches(batch_size=None, batch_format="pyarrow")
    collector = SampleCollector(tokenized, out_dir, config, on_rows, replay)
    try:
        written = _write_batches(config, collector, out_dir)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, R1RayError):
            raise error.cause from None  # the cause alone, without the remote traceback
        raise
    if replay is not None:
        replay.reservoir.save(out_dir)
    summary = {
        **collector.counts,
        "ignored_fields": dict(sorted(collector.ignored.items())),
        "batching": config.batching.type,
        **written,
        "lengths": _describe_lengths(collector.sketch, config.max_tokens),
        "answer_lengths": _describe_lengths(collector.answers, config.max_tokens),
    }
    (out_dir / SUMMARY_NAME).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    (out_dir / "summary.md").write_text(render_summary(summary), encoding="utf-8")
    plot_summary(summary, out_dir / "summary.png")
    long = ("lengths", "answer_lengths")
    return {name: value for name, value in summary.items() if name not in long}


def _describe_lengths(sketch: LengthSketch, max_tokens: int) -> dict[str, int]:
    """Samples by length; where the sketch rounds up, not beyond the longest there can be."""
    lengths: Counter[int] = Counter()
    for top, count in sketch.counts.items():
        lengths[min(top, max_tokens)] += count
    return {str(top): lengths[top] for top in sorted(lengths)}


def _write_batches(
    config: PrepareConfig, collector: SampleCollector, out_dir: Path
) -> dict[str, Any]:
    """Write the batches in one pass over the samples, or in two where all ceilings come first."""
    batching = config.batching
    planner: BatchPlanner
    if isinstance(batching, PackingConfig):
        planner = PackingPlanner(config)
    elif batching.fit_rows is not None:
        planner = LearnedBuckets(config, batching)
    else:
        return _write_in_two_passes(config, batching, collector, out_dir)
    with BatchWriter(out_dir, planner, config) as writer:
        for samples in collector:
            writer.add(samples)
    return writer.summarize()


def _write_in_two_passes(
    config: PrepareConfig, batching: BucketsConfig, collector: SampleCollector, out_dir: Path
) -> dict[str, Any]:
    path = out_dir / _SAMPLES_NAME
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    with (
        pa.OSFile(str(path), "wb") as sink,
        pa.ipc.new_stream(sink, sample_schema(config), options=options) as stream,
    ):
        for samples in collector:
            stream.write_table(samples)
    planner = FixedBuckets(config, fit_ceilings(config, batching, collector.sketch))
    with BatchWriter(out_dir, planner, config) as writer, pa.OSFile(str(path)) as source:
        for batch in pa.ipc.open_stream(source):
            writer.add(pa.Table.from_batches([batch]))
    path.unlink()
    return writer.summarize()


def _read_sources(
    config: PrepareConfig,
    tasks: TasksConfig,
    model_dir: Path,
    heldout: list[Problem],
    out_dir: Path,
) -> ray.data.Dataset:
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.raise_original_map_exception = True  # an ArtifactError stays one
    context.target_max_block_size = _BLOCK_BYTES
    num_blocks = _BLOCKS_PER_CPU * ray.cluster_resources().get("CPU", 1) + _SPARE_BLOCKS
    context.execution_options.resource_limits = ray.data.ExecutionResources.for_limits(
        object_store_memory=num_blocks * _BLOCK_BYTES
    )
    parts: list[ray.data.Dataset] = []
    for source in config.sources:
        if isinstance(source, TaskSourceConfig):
            problems = draw_training(_only(tasks, source.families), source.num_samples, heldout)
            table = _write_traces(problems, tasks.system_prompt, out_dir)
            starts = range(0, table.num_rows, _TRACES_PER_BLOCK)
            blocks = [table.slice(start, _TRACES_PER_BLOCK) for start in starts]
            parts.append(ray.data.from_arrow(blocks))
        elif isinstance(source, LongContextSourceConfig):
            items = [
                {"number": source.first_seed + at, "is_task": at < source.num_tasks}
                for at in range(source.num_tasks + source.num_documents)
            ]
            blocks_of_items = -(-len(items) // _LONG_PER_BLOCK)
            parts.append(
                ray.data.from_items(items, override_num_blocks=blocks_of_items).map_batches(
                    functools.partial(_write_long, str(model_dir), config.max_tokens),
                    batch_size=_LONG_PER_BLOCK,
                    num_cpus=config.resources.num_cpus_per_task,
                )
            )
        else:
            read: Callable[[dict[str, Any]], Iterator[pa.Table]] = _read_files
            if isinstance(source, ImageSourceConfig):
                fusion = read_fusion(model_dir)
                assert fusion is not None, "there are images"
                read = functools.partial(_read_images, source, fusion.image_size)
            files = [{"path": path} for path in list_files(source.paths)]
            parts.append(
                ray.data.from_items(files, override_num_blocks=len(files)).map_batches(
                    read,
                    batch_size=1,
                    num_cpus=config.resources.num_cpus_per_task,
                    # The default; but said of these tasks alone it keeps Ray from making one of
                    # each and the tokenizing ones behind it: a core a file.
                    max_calls=0,
                )
            )
    return parts[0].union(*parts[1:]) if len(parts) > 1 else parts[0]


def _only(tasks: TasksConfig, names: list[str] | None) -> TasksConfig:
    """`tasks` with the families of these names; all of them if None."""
    if names is None:
        return tasks
    chosen = [family for family in tasks.families if family.name in names]
    return dataclasses.replace(tasks, families=chosen)


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


def _write_long(model_dir: str, max_tokens: int, batch: dict[str, Any]) -> pa.Table:
    """Long tasks and documents as rows."""
    tokenizer, rows = Tokenizer(model_dir), []
    for number, is_task in zip(batch["number"].tolist(), batch["is_task"].tolist(), strict=True):
        tasks = tuple(TASKS) if is_task else ()
        messages = write_conversation(tokenizer, number, max_tokens=max_tokens, tasks=tasks)
        source = "long_context" if is_task else "source_code"
        rows.append({"source": source, "row": number, "messages": json.dumps(messages)})
    return rows_to_table(rows)


def _read_images(source: ImageSourceConfig, size: int, batch: dict[str, Any]) -> Iterator[pa.Table]:
    for path in batch["path"]:
        yield from read_image_file(str(path), source, size)


def _read_files(batch: dict[str, Any]) -> Iterator[pa.Table]:
    for path in batch["path"]:
        yield from read_file(str(path))
