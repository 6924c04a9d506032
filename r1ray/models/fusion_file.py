"""The fusion of a decoder: attached to it, and in a model directory.

Its shape is in `r1ray.json` and its weights are in `fusion.safetensors`, beside those of the
decoder: others read that as the text model that it is.
"""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from r1ray.config.fusion import FusionConfig
from r1ray.errors import ArtifactError
from r1ray.files import read_json
from r1ray.models.config import RECORD_NAME
from r1ray.models.decoder import Decoder
from r1ray.models.fusion import build_fusion
from r1ray.models.quantization import quantize_fusion

__all__ = [
    "FUSION_NAME",
    "attach_fusion",
    "describe_fusion",
    "is_fusion",
    "load_fusion",
    "read_fusion",
    "save_fusion",
]

FUSION_NAME = "fusion.safetensors"
_PREFIX = "fusion."
_KEY = "fusion"


def attach_fusion(model: Decoder, config: FusionConfig, *, seed: int = 0) -> None:
    """Give `model` an untrained fusion; the same `seed` gives the same weights, whoever drew.

    Raises:
        ConfigError: `config` does not fit the decoder.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fusion = build_fusion(config, model.config)
    weight = model.model.norm.weight
    model.fusion = fusion.to(device=weight.device, dtype=weight.dtype).train(model.training)


def is_fusion(name: str) -> bool:
    """Whether `name`, of a state dict, is of the fusion."""
    return name.startswith(_PREFIX)


def describe_fusion(model: Decoder) -> dict[str, Any]:
    """What `r1ray.json` says of it; empty where the model reads text."""
    return {} if model.fusion is None else {_KEY: dataclasses.asdict(model.fusion.config)}


def read_fusion(path: str | Path) -> FusionConfig | None:
    """The fusion of the model directory `path`; None where its model reads text.

    Raises:
        ArtifactError: `r1ray.json` is damaged, or describes no fusion that there can be.
    """
    file = Path(path) / RECORD_NAME
    found = read_json(file) if file.is_file() else {}
    if not isinstance(found, dict) or _KEY not in found:
        return None
    try:
        return TypeAdapter(FusionConfig).validate_python(found[_KEY])
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, (_KEY, *problem["loc"])))
        raise ArtifactError(f"{file}: {where}: {problem['msg']}") from error


def save_fusion(model: Decoder, path: Path) -> None:
    """Write the fusion's weights into the model directory `path`; none are there without one."""
    if model.fusion is None:
        (path / FUSION_NAME).unlink(missing_ok=True)
        return
    tensors = {
        name: tensor.detach().contiguous() for name, tensor in model.fusion.state_dict().items()
    }
    save_file(tensors, path / FUSION_NAME, metadata={"format": "pt"})


def load_fusion(model: Decoder, path: Path, *, dtype: torch.dtype | None = None) -> None:
    """Attach the fusion of the model directory `path`, if it has one.

    Args:
        dtype: of the floating-point tensors, as in `load_model`.
    Raises:
        ArtifactError: it is damaged, or does not fit the model.
    """
    config = read_fusion(path)
    if config is None:
        return
    file = path / FUSION_NAME
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{file}: cannot be read as safetensors ({error})") from error
    attach_fusion(model, config)
    assert model.fusion is not None
    if model.scheme is not None:
        quantize_fusion(model)
    expected = model.fusion.state_dict()
    for name in sorted(expected.keys() | tensors.keys()):
        found, wanted = (
            (tuple(of[name].shape), of[name].is_floating_point()) if name in of else None
            for of in (tensors, expected)
        )
        if found != wanted:
            raise ArtifactError(
                f"{file}: {name} is {_name(found)}, and the model's is {_name(wanted)}; the file "
                "belongs to another model"
            )
    for name, tensor in tensors.items():
        if dtype is not None and tensor.is_floating_point() and not name.endswith("_scale"):
            tensors[name] = tensor.to(dtype)
    model.fusion.load_state_dict(tensors, assign=True)


def _name(found: tuple[tuple[int, ...], bool] | None) -> str:
    if found is None:
        return "missing"
    shape, is_float = found
    return f"{'float' if is_float else 'integer'} of shape {shape}"
