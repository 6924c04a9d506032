"""The work of one tokenizing task: a table of rows in, a table of samples and bad rows out."""

import functools
import json
import os
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from r1ray.config.prepare import PrepareConfig
from r1ray.data.schemas import Conversation, RowError
from r1ray.data.tokenize import Overflow, OverLongError, TokenizedRow, tokenize_rows
from r1ray.models.tokenizer import Tokenizer

__all__ = ["IMAGES", "RESULT_SCHEMA", "SAMPLE_SCHEMA", "sample_schema", "tokenize_table"]

SAMPLE_SCHEMA = pa.schema(
    [("input_ids", pa.list_(pa.int32())), ("is_target", pa.list_(pa.bool_()))]
)
IMAGES = pa.field("images", pa.list_(pa.binary()))  # PNG files, in the order of their places
RESULT_SCHEMA = pa.schema(
    [
        *SAMPLE_SCHEMA,  # null where error is set
        IMAGES,  # or null
        ("piece", pa.int32()),  # number of a sample within its row
        ("was_over_long", pa.bool_()),
        ("num_dropped_pieces", pa.int32()),
        ("ignored", pa.list_(pa.string())),
        ("source", pa.string()),
        ("row", pa.int64()),
        ("error", pa.string()),
        ("excerpt", pa.string()),
    ]
)


def sample_schema(config: PrepareConfig) -> pa.Schema:
    """Of the samples of this configuration: with their images where there are any."""
    return SAMPLE_SCHEMA.append(IMAGES) if config.has_images else SAMPLE_SCHEMA


@functools.lru_cache(maxsize=1)
def _load_tokenizer(path: str) -> Tokenizer:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a task has the CPUs that Ray gave it
    return Tokenizer(path)


def tokenize_table(
    table: pa.Table,
    *,
    tokenizer_dir: str,
    max_tokens: int,
    overflow: Overflow,
    heldout_questions: frozenset[str],
    num_image_tokens: int = 1,
) -> pa.Table:
    """Rows of ROW_SCHEMA as samples: one, several pieces, or an error where they have none.

    Args:
        num_image_tokens: positions that an image takes.
    """
    rows = table.to_pylist()
    outcomes: list[TokenizedRow | RowError | None] = [None] * len(rows)
    usable, conversations = [], []
    for index, row in enumerate(rows):
        if row["error"] is not None:
            continue
        tools = json.loads(row["tools"]) if row["tools"] else None
        messages, num_images = json.loads(row["messages"]), len(row["images"] or ())
        conversation = Conversation(messages, tools, num_images=num_images)
        if _is_held_out(conversation, heldout_questions):
            outcomes[index] = RowError("the question is held out for evaluation")
            continue
        usable.append(index)
        conversations.append(conversation)
    tokenized = tokenize_rows(
        _load_tokenizer(tokenizer_dir),
        conversations,
        max_tokens=max_tokens,
        overflow=overflow,
        num_image_tokens=num_image_tokens,
    )
    for index, outcome in zip(usable, tokenized, strict=True):
        outcomes[index] = outcome
    return _build_results(rows, outcomes)


def _is_held_out(conversation: Conversation, questions: frozenset[str]) -> bool:
    return any(
        message["role"] == "user" and message["content"].strip() in questions
        for message in conversation.messages
    )


def _build_results(
    rows: list[dict[str, Any]], outcomes: list[TokenizedRow | RowError | None]
) -> pa.Table:
    records: list[dict[str, Any]] = []
    input_ids: list[NDArray[np.int32] | None] = []
    is_target: list[NDArray[np.bool_] | None] = []
    for row, outcome in zip(rows, outcomes, strict=True):
        if isinstance(outcome, TokenizedRow):
            for piece, sample in enumerate(outcome.samples):
                records.append(
                    {
                        "piece": piece,
                        "was_over_long": outcome.was_over_long and piece == 0,
                        "num_dropped_pieces": 0 if piece else outcome.num_dropped_pieces,
                        "ignored": None if piece else row["ignored"],
                        "images": row["images"],
                    }
                )
                input_ids.append(sample.input_ids)
                is_target.append(sample.is_target)
            continue
        error = row["error"] if outcome is None else str(outcome)
        excerpt = row["excerpt"] if outcome is None else row["messages"][:200]
        places = {"piece": 0, "source": row["source"], "row": row["row"]}
        is_over_long = isinstance(outcome, OverLongError)
        records.append(
            {**places, "error": error, "excerpt": excerpt, "was_over_long": is_over_long}
        )
        input_ids.append(None)
        is_target.append(None)
    others = pa.Table.from_pylist(
        records, schema=pa.schema(list(RESULT_SCHEMA)[len(SAMPLE_SCHEMA) :])
    )
    samples = [
        pa.array(values, field.type)
        for values, field in zip((input_ids, is_target), SAMPLE_SCHEMA, strict=True)
    ]
    return pa.Table.from_arrays([*samples, *others.columns], schema=RESULT_SCHEMA)
