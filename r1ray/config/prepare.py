"""What `prepare` makes of which rows: sources, tasks and batches."""

import dataclasses
import math
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, FiniteFloat, model_validator
from pydantic.dataclasses import dataclass

from r1ray.config.images import ImageLimits
from r1ray.config.names import ConfiguredPath, Name

__all__ = [
    "BatchingConfig",
    "BucketsConfig",
    "FamilyConfig",
    "FileSourceConfig",
    "ImageSourceConfig",
    "LongContextSourceConfig",
    "PackingConfig",
    "PrepareConfig",
    "PrepareResources",
    "TaskSourceConfig",
    "TasksConfig",
]

_STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True)


@dataclass(frozen=True, kw_only=True, slots=True, config=_STRICT)
class FamilyConfig:
    """One reasoning-gym task family that r1ray can write traces for."""

    name: Name
    """The family's name in reasoning-gym."""
    options: dict[str, bool | int | FiniteFloat | str] = dataclasses.field(default_factory=dict)
    """Difficulty options, passed to reasoning-gym as they are."""


@dataclass(frozen=True, kw_only=True, slots=True, config=_STRICT)
class TasksConfig:
    """The verifiable tasks that training traces and held-out problems are drawn from."""

    families: Annotated[list[FamilyConfig], Field(min_length=1)]
    """Task families, drawn from in equal parts."""
    system_prompt: Annotated[str, Field(min_length=1, max_length=4000)]
    """The system turn of every training and held-out problem."""
    train_seed: Annotated[int, Field(ge=0, lt=10**6)] = 1
    """First seed of the training problems."""
    heldout_seed: Annotated[int, Field(ge=10**6, lt=2**31)] = 10**6
    """First seed of the held-out problems; training also leaves out their questions by text."""


@dataclass(frozen=True, kw_only=True, slots=True, config=_STRICT)
class FileSourceConfig:
    """Conversations, or pairs of question and answer, in JSONL or Parquet files."""

    type: Literal["files"]
    """Rows read from files."""
    paths: Annotated[list[ConfiguredPath], Field(min_length=1)]
    """Files, directories or globs; .jsonl, .jsonl.gz, .jsonl.zst and .parquet are read."""


@dataclass(frozen=True, kw_only=True, slots=True, config=_STRICT)
class TaskSourceConfig:
    """R1-style traces written by program for the families of `tasks`."""

    type: Literal["tasks"]
    """Rows written by program."""
    num_samples: Annotated[int, Field(ge=1, le=10_000_000)]
    """Training traces over all families together."""
    families: Annotated[list[Name], Field(min_length=1)] | None = None
    """Names of the families, out of those of `tasks`; null for all of them."""


@dataclass(frozen=True, kw_only=True, slots=True, config=_STRICT)
class LongContextSourceConfig:
    """Questions about long texts, and source code: what gates of sparse attention learn from."""

    type: Literal["long_context"]
    """Rows written by program, up to prepare.max_tokens long."""
    num_tasks: Annotated[int, Field(ge=0, le=1_000_000)]
    """Texts with questions, in RULER's manner: needles, variables, counts of words."""
    num_documents: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    """Windows of the source code of Python's standard library."""
    first_seed: Annotated[int, Field(ge=0, lt=2**31)] = 10**6
    """Of the texts; evaluation begins at 0."""

    @model_validator(mode="after")
    def _has_rows(self) -> "LongContextSourceConfig":
        if self.num_tasks + self.num_documents == 0:
            raise ValueError("num_tasks and num_documents are both 0; raise one of them")
        return self


@dataclass(frozen=True, kw_only=True, slots=True, config=_STRICT)
class ImageSourceConfig:
    """Conversations about images in Parquet files; the base needs a `fusion`."""

    type: Literal["images"]
    """Rows with encoded images, which come before the text of the first user turn."""
    paths: Annotated[list[ConfiguredPath], Field(min_length=1)]
    """Parquet files, directories or globs."""
    image_column: Annotated[str, Field(min_length=1, max_length=256)] = "image"
    """Bytes of a PNG, JPEG, WebP or GIF file, a struct that has them in `bytes`, or a list."""
    limits: ImageLimits = ImageLimits()
    """Rows with other images are quarantined."""


SourceConfig = Annotated[
    FileSourceConfig | TaskSourceConfig | LongContextSourceConfig | ImageSourceConfig,
    Field(discriminator="type"),
]


@dataclass(frozen=True, kw_only=True, slots=True, config=_STRICT)
class BucketsConfig:
    """Batches of samples from one bucket of similar lengths."""

    type: Literal["buckets"]
    """One sample a row."""
    pad_to: Literal["longest", "ceiling"] = "longest"
    """Columns of a batch: its longest sample, or the bucket's ceiling where few shapes matter."""
    num_buckets: Annotated[int, Field(ge=1, le=256)] = 64
    """The most length buckets; their ceilings are chosen for the least padding."""
    max_padding_share: Annotated[float, Field(gt=0, lt=1)] | None = 0.02
    """Use no more buckets than this share of padding to ceilings needs; null uses all of them."""
    fit_rows: Annotated[int, Field(ge=1, le=100_000)] | None = None
    """Fit ceilings to so many first rows, held in memory, and again on drift; null fits to all."""


@dataclass(frozen=True, kw_only=True, slots=True, config=_STRICT)
class PackingConfig:
    """Batches of one row that holds whole samples one after the other, next to no padding."""

    type: Literal["packing"]
    """Samples neither see one another nor share positions."""


BatchingConfig = Annotated[BucketsConfig | PackingConfig, Field(discriminator="type")]


@dataclass(frozen=True, kw_only=True, slots=True, config=_STRICT)
class PrepareResources:
    """Where `prepare` runs."""

    num_cpus_per_task: Annotated[float, Field(gt=0, le=64)] = 1
    """CPUs that Ray reserves for one reading or tokenizing task."""


@dataclass(frozen=True, kw_only=True, slots=True, config=_STRICT)
class PrepareConfig:
    """From rows of text to token-budget micro-batches."""

    sources: Annotated[list[SourceConfig], Field(min_length=1)]
    """Where rows come from; together they make one BatchSet, with `continual` one each."""
    max_tokens: Annotated[int, Field(ge=8, le=1_048_576)]
    """Longest sample in tokens."""
    overflow: Literal["reject", "truncate", "split"] = "reject"
    """Longer samples are quarantined, cut to max_tokens, or cut into several; all are counted."""
    batching: BatchingConfig = BucketsConfig(type="buckets")
    batch_tokens: Annotated[int, Field(ge=8, le=16_777_216)]
    """Upper bound on the cost of one micro-batch in tokens, padding included."""
    quadratic_tokens: Annotated[int, Field(ge=1)] | None = None
    """Length l at which attention costs as much as the rest: rows cost l + l²/quadratic_tokens."""
    max_quarantined_share: Annotated[float, Field(ge=0, le=1)] = 0.05
    """The stage fails when a larger share of the rows had to be quarantined."""
    resources: PrepareResources = PrepareResources()

    @property
    def has_images(self) -> bool:
        """Whether some source has images."""
        return any(source.type == "images" for source in self.sources)

    @model_validator(mode="after")
    def _no_task_twice(self) -> "PrepareConfig":
        sources = [source for source in self.sources if isinstance(source, TaskSourceConfig)]
        named = [name for source in sources for name in source.families or ()]
        has_all = any(source.families is None for source in sources)
        if len(sources) > 1 and (has_all or len(set(named)) < len(named)):
            raise ValueError(
                "sources has more than one entry of type tasks; give each its own families, or "
                "add up num_samples"
            )
        return self

    @model_validator(mode="after")
    def _batch_holds_longest_sample(self) -> "PrepareConfig":
        cost = self.max_tokens
        if self.quadratic_tokens is not None:
            cost += math.ceil(self.max_tokens**2 / self.quadratic_tokens)
        if self.batch_tokens < cost:
            costing = "" if cost == self.max_tokens else f", which cost {cost}"
            raise ValueError(
                f"batch_tokens ({self.batch_tokens}) is below max_tokens ({self.max_tokens}"
                f"{costing}); raise batch_tokens or lower max_tokens"
            )
        return self
