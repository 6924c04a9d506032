"""How long answers are, to reserve memory for them: a sample that the latest answers renew.

1. The sample starts as what the training data says (`ANSWER_LENGTHS_FILE` of a model directory),
   if anything.
2. Every answer that ends takes the place of the oldest in the sample: the prediction follows what
   is asked. One that was cut off counts as what it would probably have become.
3. An answer's predicted length is the mean of those in the sample that are longer than it is now.

Price: O(size of the sample) a prediction; one is made a request, and one more each 64 tokens.
"""

import json
from collections import deque
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from r1ray.errors import ArtifactError
from r1ray.files import TABLE_BYTES, read_json

__all__ = ["ANSWER_LENGTHS_FILE", "AnswerLengths", "read_answer_lengths", "write_answer_lengths"]

ANSWER_LENGTHS_FILE = "answer_lengths.json"
"""In a model directory: how many answers of the training data have which length, in tokens."""
_SAMPLE = 256


class AnswerLengths:
    """Not thread-safe.

    Args:
        counts: answers by length in tokens, at least 1; none where nothing is known.
    """

    def __init__(self, counts: Mapping[int, int] | None = None) -> None:
        self._sample: deque[int] = deque(maxlen=_SAMPLE)
        if counts:
            lengths = np.array(sorted(counts))
            ends = np.cumsum([counts[length] for length in lengths])
            ranks = (np.arange(_SAMPLE) + 0.5) / _SAMPLE * ends[-1]
            self._sample.extend(lengths[np.searchsorted(ends, ranks)].tolist())

    def predict(self, num_written: int, max_new_tokens: int) -> int:
        """The length of an answer that has `num_written` tokens and goes on; all it may have where
        the sample has none that is as long."""
        longer = [min(length, max_new_tokens) for length in self._sample if length > num_written]
        return round(sum(longer) / len(longer)) if longer else max_new_tokens

    def observe(self, num_written: int, *, was_cut: bool) -> None:
        """Note an answer that ended, or that was cut off at its limit."""
        longer = [length for length in self._sample if length > num_written]
        is_guess = was_cut and longer
        self._sample.append(round(sum(longer) / len(longer)) if is_guess else num_written)


def write_answer_lengths(model_dir: str | Path, counts: Mapping[str, int]) -> None:
    """Keep `counts`, as `read_answer_lengths` has them, in a model directory."""
    (Path(model_dir) / ANSWER_LENGTHS_FILE).write_text(json.dumps(counts) + "\n", encoding="utf-8")


def read_answer_lengths(model_dir: str | Path) -> dict[int, int]:
    """Those of a model directory; empty where it does not say.

    Raises:
        ArtifactError: the file is not what it should be.
    """
    path = Path(model_dir) / ANSWER_LENGTHS_FILE
    if not path.exists():
        return {}
    try:
        found = read_json(path, max_bytes=TABLE_BYTES)
        counts = {int(length): int(count) for length, count in found.items()}
    except (ArtifactError, ValueError, TypeError, AttributeError, OverflowError) as error:
        raise ArtifactError(
            f"{path} is not a JSON object of lengths and counts ({error}); export the model anew"
        ) from error
    if not all(length > 0 and count > 0 for length, count in counts.items()):
        raise ArtifactError(f"{path} has a length or a count below 1; export the model anew")
    return counts
