"""A sample of all data seen so far, from which earlier samples are replayed.

1. Algorithm R: sample number t (from 0) takes place t while places are free; later a place drawn
   evenly from 0 to t, if there is such a place. Every sample so far is then kept with the same
   chance, whatever the order in which data sets came.
2. Each sample costs one draw, so that the outcome does not depend on how tables are cut; draws are
   seeded by the number of samples seen before, so that a killed stage makes the same again.
3. `Replay` puts kept samples between new ones as they stream by, all of them equally often.

Price: the tokens of `capacity` samples in memory, once; one random number a sample.

Source: Vitter 1985, "Random sampling with a reservoir".
"""

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from r1ray.data.batch_set import BATCHES_NAME
from r1ray.data.tokenize_table import SAMPLE_SCHEMA
from r1ray.errors import ArtifactError, ConfigError
from r1ray.models.memory import RESERVOIR_NAME, memory_path

__all__ = ["Replay", "Reservoir", "read_samples"]

logger = logging.getLogger(__name__)

_KEY = b"r1ray.reservoir"


class Reservoir:
    """At most `capacity` samples out of `num_seen`.

    Args:
        kept: rows of SAMPLE_SCHEMA that a reservoir held after `num_seen` samples.
        seed: of the draws from here on, together with `num_seen`.
    """

    def __init__(
        self, capacity: int, *, seed: int, kept: pa.Table | None = None, num_seen: int = 0
    ) -> None:
        self.capacity, self.num_seen = capacity, num_seen
        self._rng = np.random.default_rng([seed, num_seen])
        self._rows: list[pa.Table] = []  # of one row each
        if kept is not None:
            self._rows = [kept.slice(at, 1) for at in range(kept.num_rows)]

    def add(self, samples: pa.Table) -> None:
        """Take in a table of SAMPLE_SCHEMA."""
        numbers = self.num_seen + np.arange(samples.num_rows)
        drawn = (self._rng.random(samples.num_rows) * (numbers + 1)).astype(np.int64)
        places = np.where(numbers < self.capacity, numbers, drawn)
        for row in np.flatnonzero(places < self.capacity):
            # `take` copies: a slice would keep the whole table in memory.
            one, place = samples.take([row]), places[row]
            if place == len(self._rows):
                self._rows.append(one)
            else:
                self._rows[place] = one
        self.num_seen += samples.num_rows

    def samples(self) -> pa.Table:
        """What is kept: a table of SAMPLE_SCHEMA."""
        return pa.concat_tables([SAMPLE_SCHEMA.empty_table(), *self._rows]).combine_chunks()

    def save(self, directory: Path) -> None:
        """Write it into the memory of `directory`."""
        path = memory_path(directory, RESERVOIR_NAME)
        path.parent.mkdir(parents=True, exist_ok=True)
        record = {"capacity": self.capacity, "num_seen": self.num_seen}
        schema = SAMPLE_SCHEMA.with_metadata({_KEY: json.dumps(record).encode()})
        pq.write_table(self.samples().cast(schema), path, compression="zstd")

    @classmethod
    def recall(cls, directory: Path, capacity: int, *, seed: int) -> "Reservoir":
        """The reservoir in the memory of `directory`, as `load` has it; an empty one if none is.

        Raises:
            ArtifactError, ConfigError: as `load`.
        """
        path = memory_path(directory, RESERVOIR_NAME)
        if not path.is_file():
            return cls(capacity, seed=seed)
        return cls.load(path, capacity, seed=seed)

    @classmethod
    def load(cls, path: Path, capacity: int, *, seed: int) -> "Reservoir":
        """What `save` wrote to the file `path`, to go on from; if it holds more, an even choice.

        Raises:
            ArtifactError: the file is damaged.
            ConfigError: the capacity is larger, and what would belong there was not kept.
        """
        try:
            table = pq.read_table(path)
            record = json.loads((table.schema.metadata or {})[_KEY])
            held, num_seen = int(record["capacity"]), int(record["num_seen"])
            kept = table.cast(SAMPLE_SCHEMA)
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
            raise ArtifactError(f"{path}: no readable reservoir ({error})") from error
        if capacity > held and num_seen > held:
            raise ConfigError(
                f"continual.replay.reservoir_rows ({capacity}) is above the {held} of the "
                f"reservoir that this run continues, which has let go of {num_seen - held} "
                "samples; lower it"
            )
        if kept.num_rows > capacity:
            order = np.random.default_rng([seed, num_seen, 1]).permutation(kept.num_rows)
            kept = kept.take(order[:capacity])
        return cls(capacity, seed=seed, kept=kept, num_seen=num_seen)


def read_samples(directory: Path) -> Iterator[pa.Table]:
    """The samples of the BatchSet in `directory`, in tables of SAMPLE_SCHEMA.

    For a BatchSet that was made without a reservoir.
    """
    with pq.ParquetFile(directory / BATCHES_NAME) as file:
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, columns=["lengths", *SAMPLE_SCHEMA.names])
            table = table.combine_chunks()
            lengths = table["lengths"].chunk(0).flatten().to_numpy()
            offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
            columns = [
                pa.ListArray.from_arrays(offsets, table[name].chunk(0).flatten())
                for name in SAMPLE_SCHEMA.names
            ]
            yield pa.Table.from_arrays(columns, schema=SAMPLE_SCHEMA)


class Replay:
    """Mixes what a reservoir held at the beginning into new samples, which it takes in.

    Args:
        share: of the samples that come out, those that are replayed.
        max_tokens: longer kept samples are left out.

    Attributes:
        num_replayed: so far.
    """

    def __init__(self, reservoir: Reservoir, share: float, *, seed: int, max_tokens: int) -> None:
        self.reservoir, self.num_replayed = reservoir, 0
        kept = reservoir.samples()
        fitting = kept.filter(pc.less_equal(pc.list_value_length(kept["input_ids"]), max_tokens))
        if fitting.num_rows < kept.num_rows:
            logger.warning(
                "%d of %d kept samples are longer than prepare.max_tokens (%d) and not replayed",
                *(kept.num_rows - fitting.num_rows, kept.num_rows, max_tokens),
            )
        order = np.random.default_rng([seed, reservoir.num_seen, 2]).permutation(fitting.num_rows)
        self._kept = fitting.take(order)
        self._per_new = share / (1 - share) if self._kept.num_rows else 0.0
        self._num_new = 0

    def mix(self, samples: pa.Table) -> pa.Table:
        """`samples` and the replayed ones that are due with them."""
        self.reservoir.add(samples)
        self._num_new += samples.num_rows
        due = round(self._num_new * self._per_new) - self.num_replayed
        if due == 0:
            return samples
        places = np.arange(self.num_replayed, self.num_replayed + due) % self._kept.num_rows
        self.num_replayed += due
        return pa.concat_tables([samples, self._kept.take(places)])
