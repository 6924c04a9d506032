"""Models under a memory budget: loaded without being read, and streamed where they do not fit.

Price: see `r1ray.models.streaming`; to train, a float32 copy of the weights on disk.
"""

import logging
from collections.abc import Mapping
from pathlib import Path

import torch

from r1ray.config.schema import Scheme
from r1ray.errors import ArtifactError
from r1ray.models.checkpoint import assign_weights, list_shards, read_scheme
from r1ray.models.config import ModelConfig
from r1ray.models.decoder import Decoder
from r1ray.models.mapped import MappedTensors
from r1ray.models.quantization import fake_quantize_modules, quantize_modules
from r1ray.models.streaming import EMBEDDING, HEAD, list_units, stream_units
from r1ray.models.tiers import Budget, DeviceTier, MappedTier, Placement, plan_placement

__all__ = ["load_to_serve", "load_to_train", "move_to_device"]

logger = logging.getLogger(__name__)


def load_to_serve(path: str | Path, *, budget_bytes: int) -> tuple[Decoder, Placement]:
    """The model in the directory `path`, as `load_model` has it, with its weights mapped.

    Raises:
        ArtifactError: as `load_model`; also for weights that have to be decoded first.
        BudgetError: the largest parts of the model do not fit; in a forward, the budget is spent.
    """
    path = Path(path)
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
    placement = _stream(model.eval(), files, budget, budget_bytes)
    return model, placement


def load_to_train(
    path: str | Path, directory: Path, *, budget_bytes: int, fake_quant: Scheme | None = None
) -> tuple[Decoder, MappedTensors, Placement]:
    """The float model in the directory `path`, with float32 weights in a file of their own.

    Args:
        directory: on a disk; the file `weights` in it holds the weights as they train.
        fake_quant: scheme whose rounding it trains through.
    Returns:
        The model, that file, and what stays resident.
    Raises:
        ArtifactError, BudgetError: as `load_to_serve`.
    """
    path = Path(path)
    budget = Budget(budget_bytes)
    if (scheme := read_scheme(path)) is not None:
        raise ArtifactError(f"{path}: is {scheme}; training starts from a float model")
    with torch.device("meta"):
        model = Decoder(ModelConfig.load(path))
    sources = [MappedTensors.open(shard) for shard in list_shards(path)]
    expected = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not (model.config.tie_embeddings and name.startswith("lm_head."))
    }
    weights = MappedTensors.create(directory / "weights", expected)
    found = {}
    for source in sources:
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
    placement = _stream(model, dict.fromkeys(weights, weights), budget, budget_bytes)
    return model, weights, placement


def move_to_device(model: Decoder, device: torch.device, *, budget_bytes: int) -> Placement:
    """Put what fits the budget on a GPU, and stream the rest from pinned host memory, in place.

    Raises:
        BudgetError: the largest parts of the model do not fit.
    """
    units = list_units(model)
    unit_bytes = {
        unit: sum(_num_bytes(tensor) for tensor in module.state_dict().values())
        for unit, module in units.items()
    }
    placement = plan_placement(unit_bytes, budget_bytes)
    for unit in placement.core:
        units[unit].to(device)
    modules = {unit: units[unit] for unit in placement.static}
    stream_units(model, placement.static, DeviceTier(modules, device))
    logger.info("%s", placement.describe())
    return placement


def _stream(
    model: Decoder, files: Mapping[str, MappedTensors], budget: Budget, budget_bytes: int
) -> Placement:
    names = {module: name for name, module in model.named_modules(remove_duplicate=False)}
    units = {
        unit: [f"{names[module]}.{name}" for name in module.state_dict()]
        for unit, module in list_units(model).items()
    }
    is_tied = model.config.tie_embeddings
    if is_tied:  # one unit by its bytes, two by its visits
        units[HEAD] = units[EMBEDDING]
    unit_bytes = {
        unit: sum(_num_bytes(files[name][name]) for name in tensors)
        for unit, tensors in units.items()
        if not (is_tied and unit == HEAD)
    }
    placement = plan_placement(unit_bytes, budget_bytes)
    static = list(placement.static)
    if is_tied and EMBEDDING in static:
        static.append(HEAD)
    stream_units(model, static, MappedTier(units, files, budget))
    logger.info("%s", placement.describe())
    return placement


def _num_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
