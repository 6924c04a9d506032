"""Models under a memory budget: loaded without being read, and streamed where they do not fit.

Price: see `r1ray.models.streaming`; to train, a float32 copy of the weights on disk.
"""

import logging
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from r1ray.config.schema import Scheme
from r1ray.errors import ArtifactError, ConfigError
from r1ray.models.checkpoint import assign_weights, list_shards, read_scheme
from r1ray.models.config import ModelConfig
from r1ray.models.decoder import Decoder
from r1ray.models.fusion_file import read_fusion
from r1ray.models.gates import load_gates
from r1ray.models.mapped import MappedTensors
from r1ray.models.quantization import fake_quantize_modules, quantize_modules, tie_head
from r1ray.models.streaming import EMBEDDING, HEAD, list_units, stream_units
from r1ray.models.tiers import Budget, DeviceTier, MappedTier, Placement, plan_placement

__all__ = [
    "TieredModel",
    "check_is_on_disk",
    "load_to_serve",
    "load_to_train",
    "move_to_device",
]

logger = logging.getLogger(__name__)

_IN_MEMORY = ("tmpfs", "ramfs")


@dataclass(frozen=True)
class TieredModel:
    """A model and what it runs under.

    Attributes:
        files: the file of every weight, by its name in the state dict.
        budget: checked in every forward.
    """

    model: Decoder
    files: Mapping[str, MappedTensors]
    placement: Placement
    budget: Budget


def load_to_serve(path: str | Path, *, budget_bytes: int, reserved_bytes: int = 0) -> TieredModel:
    """The model in the directory `path`, as `load_model` has it, with its weights mapped.

    Args:
        reserved_bytes: of the budget, for what else is to be kept, such as a KV cache.
    Raises:
        ArtifactError: as `load_model`; also for weights that have to be decoded first, and models
            that see images.
        BudgetError: the largest parts of the model do not fit; in a forward, the budget is spent.
    """
    path = Path(path)
    _check_reads_text(path)
    budget = Budget(budget_bytes)
    scheme = read_scheme(path)
    if scheme not in (None, "w8a8"):
        raise ArtifactError(
            f"{path}: {scheme} weights are decoded when they are loaded, and cannot be streamed "
            "from disk; compress with scheme w8a8"
        )
    with torch.device("meta"):
        model = Decoder(ModelConfig.load(path))
        if scheme is not None:
            quantize_modules(model, scheme)
    files = {name: file for file in map(MappedTensors.open, list_shards(path)) for name in file}
    assign_weights(model, {name: file[name] for name, file in files.items()}, where=path)
    placement = _plan(model, max(0, budget_bytes - reserved_bytes), is_training=False)
    tiered = _stream(model.eval(), files, placement, budget)
    load_gates(model, path)  # small, and never streamed
    return tiered


def load_to_train(
    path: str | Path,
    directory: str | Path | None,
    *,
    budget_bytes: int,
    fake_quant: Scheme | None = None,
) -> TieredModel:
    """The float model in the directory `path`, with float32 weights in a file of their own.

    Args:
        directory: on a disk, for that file; None for the system's temporary directory.
        fake_quant: scheme whose rounding it trains through.
    Raises:
        ArtifactError, BudgetError: as `load_to_serve`.
        ConfigError: `directory` is in memory.
    """
    path = Path(path)
    _check_reads_text(path)
    check_is_on_disk(str(directory or tempfile.gettempdir()))
    budget = Budget(budget_bytes)
    if (scheme := read_scheme(path)) is not None:
        raise ArtifactError(f"{path}: is {scheme}; training starts from a float model")
    with torch.device("meta"):
        model = Decoder(ModelConfig.load(path))
    expected = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not (model.config.tie_embeddings and name.startswith("lm_head."))
    }
    weights = MappedTensors.create(directory, expected)
    found = {}
    for source in map(MappedTensors.open, list_shards(path)):
        for name in source:
            found[name] = source[name]
            if name in expected and found[name].shape == expected[name].shape:
                weights[name].copy_(found[name])
                found[name] = weights[name]
                weights.release(name)
            source.release(name)
    assign_weights(model, found, where=path)
    if fake_quant is not None:
        fake_quantize_modules(model, fake_quant)
    placement = _plan(model, budget_bytes, is_training=True)
    return _stream(model, dict.fromkeys(weights, weights), placement, budget)


def move_to_device(model: Decoder, device: torch.device, *, budget_bytes: int) -> Placement:
    """Put what fits the budget on a GPU, and stream the rest from pinned host memory, in place.

    Raises:
        BudgetError: the largest parts of the model do not fit.
    """
    units = list_units(model)
    placement = _plan(model, budget_bytes, is_training=False)
    static = _list_static(model, placement)
    for unit, module in units.items():
        if unit not in static:
            module.to(device)
    if EMBEDDING not in static:
        tie_head(model)
    stream_units(model, static, DeviceTier({unit: units[unit] for unit in static}, device))
    logger.info("%s", placement.describe())
    return placement


def _check_reads_text(path: Path) -> None:
    if read_fusion(path) is not None:
        raise ArtifactError(
            f"{path}: sees images, and such a model is not streamed; leave the budget out"
        )


def check_is_on_disk(directory: str) -> None:
    """Raise ConfigError where files in `directory` are kept in memory."""
    place, kind, longest = str(Path(directory).resolve()), "", -1
    for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines():
        _, mount, fstype, *_ = line.split()
        is_above = place == mount or place.startswith(mount.rstrip("/") + "/")
        if is_above and len(mount) > longest:
            kind, longest = fstype, len(mount)
    if kind in _IN_MEMORY:
        raise ConfigError(
            f"train.resources.tiers.directory {directory!r} is in memory ({kind}), which is no "
            "slow tier; name a directory on a disk"
        )


def _plan(model: Decoder, budget_bytes: int, *, is_training: bool) -> Placement:
    """The placement of the model's units; tied ends are one unit, the embedding."""
    unit_bytes = {
        unit: sum(tensor.numel() * tensor.element_size() for tensor in _tensors_of(module))
        for unit, module in list_units(model).items()
        if not (model.config.tie_embeddings and unit == HEAD)
    }
    return plan_placement(unit_bytes, budget_bytes, is_training=is_training)


def _tensors_of(module: nn.Module) -> Any:
    return module.state_dict().values()


def _list_static(model: Decoder, placement: Placement) -> list[str]:
    """The static units, a tied head among them where the embedding is."""
    is_tied = model.config.tie_embeddings and EMBEDDING in placement.static
    return [*placement.static, *([HEAD] if is_tied else [])]


def _stream(
    model: Decoder, files: Mapping[str, MappedTensors], placement: Placement, budget: Budget
) -> TieredModel:
    modules = list_units(model)
    names = {module: name for name, module in model.named_modules(remove_duplicate=False)}
    tensors = {
        unit: [f"{names[module]}.{name}" for name in module.state_dict()]
        for unit, module in modules.items()
    }
    if model.config.tie_embeddings:
        tensors[HEAD] = tensors[EMBEDDING]
    static = _list_static(model, placement)
    stream_units(model, static, MappedTier(tensors, files, budget))
    for unit, module in modules.items():
        if unit not in static:
            module.register_forward_hook(lambda *_: budget.check())
    logger.info("%s", placement.describe())
    return TieredModel(model, files, placement, budget)
