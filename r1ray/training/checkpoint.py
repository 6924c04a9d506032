"""Training checkpoints: a model directory plus what else a resumed run needs.

Every worker writes its part of the exchange's state, and rank 0 the rest; Ray Train puts the files
of all workers into one directory.

Price: 4 bytes per parameter for the weights, and what the exchange keeps (dense: 8 for Adam's
moments; delta4: 12 for the shards of all workers together, and 4 for each worker's residual).
"""

import json
import pickle
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from r1ray.errors import ArtifactError
from r1ray.files import TABLE_BYTES, read_json
from r1ray.models.checkpoint import load_model, save_model
from r1ray.training.step import StepRecord, TrainState

__all__ = ["is_whole", "load_checkpoint", "load_history", "save_checkpoint"]

STATE_NAME = "state.pt"
HISTORY_NAME = "history.json"


def exchange_name(rank: int) -> str:
    """File of one worker's part of the exchange's state."""
    return f"exchange-{rank:04d}.pt"


def save_checkpoint(
    directory: Path, state: TrainState, history: list[StepRecord], *, rank: int, world_size: int
) -> None:
    """Write this worker's part: rank 0's holds weights, the data cursor's step and the history.

    Nothing may be under way in the exchange: the last step was run with `flush`.
    """
    torch.save(state.exchange.state_dict(), directory / exchange_name(rank))
    if rank == 0:
        _save_shared(directory, state, history, world_size)
    state.exchange.release_memory()


def _save_shared(
    directory: Path, state: TrainState, history: list[StepRecord], world_size: int
) -> None:
    save_model(state.model, directory)
    shared = {**state.shared_state_dict(), "world_size": world_size}
    torch.save(shared, directory / STATE_NAME)
    records = [asdict(record) for record in history]
    (directory / HISTORY_NAME).write_text(
        json.dumps(records, allow_nan=False) + "\n", encoding="utf-8"
    )


def load_checkpoint(directory: Path, state: TrainState) -> list[StepRecord]:
    """Put `state` back to the checkpoint in `directory`; returns the history up to it.

    Raises:
        ArtifactError: the checkpoint is damaged.
    """
    stored = load_model(directory).state_dict()
    state.model.load_state_dict(stored)
    shared = _load(directory / STATE_NAME)
    ranks = range(shared["world_size"])
    is_mapped = state.exchange.copies_state
    parts = [_load(directory / exchange_name(rank), is_mapped=is_mapped) for rank in ranks]
    state.load_state_dict(shared, parts)
    state.exchange.release_memory()
    return load_history(directory)


def is_whole(directory: Path) -> bool:
    """Whether `load_checkpoint` can read everything in `directory`."""
    try:
        load_model(directory)
        for rank in range(_load(directory / STATE_NAME)["world_size"]):
            _load(directory / exchange_name(rank))
        load_history(directory)
    except ArtifactError:
        return False
    return True


def load_history(directory: Path) -> list[StepRecord]:
    """The records of all steps up to the checkpoint in `directory`."""
    path = directory / HISTORY_NAME
    try:
        return [StepRecord(**record) for record in read_json(path, max_bytes=TABLE_BYTES)]
    except TypeError as error:
        raise ArtifactError(f"{path}: cannot be read ({error})") from error


def _load(path: Path, *, is_mapped: bool = False) -> dict[str, Any]:
    """What was saved; `is_mapped`: as views of the file, which must not outlive it."""
    try:
        return torch.load(path, weights_only=True, map_location="cpu", mmap=is_mapped)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise ArtifactError(
            f"{path}: no readable training state ({type(error).__name__}); remove the checkpoint"
        ) from error
