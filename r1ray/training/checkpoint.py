"""Training checkpoints: a model directory plus what else a resumed run needs.

Price: 12 bytes per parameter (weights and two Adam moments in float32).
"""

import json
import pickle
from dataclasses import asdict
from pathlib import Path

import torch

from r1ray.errors import ArtifactError
from r1ray.models.checkpoint import load_model, save_model
from r1ray.training.step import StepRecord, TrainState

__all__ = ["load_checkpoint", "load_history", "save_checkpoint"]

STATE_NAME = "state.pt"
HISTORY_NAME = "history.json"


def save_checkpoint(
    directory: Path, state: TrainState, history: list[StepRecord], world_size: int
) -> None:
    """Write weights, optimizer, exchange state, the data cursor's step, and the history."""
    save_model(state.model, directory)
    torch.save({**state.state_dict(), "world_size": world_size}, directory / STATE_NAME)
    records = [asdict(record) for record in history]
    (directory / HISTORY_NAME).write_text(
        json.dumps(records, allow_nan=False) + "\n", encoding="utf-8"
    )


def load_checkpoint(directory: Path, state: TrainState, world_size: int) -> list[StepRecord]:
    """Put `state` back to the checkpoint in `directory`; returns the history up to it.

    Raises:
        ArtifactError: the checkpoint is damaged.
    """
    stored = load_model(directory).state_dict()
    state.model.load_state_dict(stored)
    try:
        values = torch.load(directory / STATE_NAME, weights_only=True, map_location="cpu")
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise ArtifactError(
            f"{directory / STATE_NAME}: no readable training state ({type(error).__name__}); "
            "remove the checkpoint"
        ) from error
    state.load_state_dict(values, world_size_changed=values["world_size"] != world_size)
    return load_history(directory)


def load_history(directory: Path) -> list[StepRecord]:
    """The records of all steps up to the checkpoint in `directory`."""
    path = directory / HISTORY_NAME
    try:
        return [StepRecord(**record) for record in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError) as error:
        raise ArtifactError(f"{path}: cannot be read ({error})") from error
