"""Model directories: `config.json`, `*.safetensors`, tokenizer files and `r1ray.json`.

A plain Hugging Face checkpoint is a model directory. `r1ray.json` is there when r1ray quantized the
weights, and names the scheme (`r1ray.models.quantization`), or where the model sees images
(`r1ray.models.fusion_file`). Gates of block-sparse attention, what images are seen with, and
adapters that are not merged yet lie beside the weights (`r1ray.models.gates`, `lora`).
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from r1ray.config.schema import Scheme
from r1ray.errors import ArtifactError
from r1ray.files import read_json
from r1ray.models.config import CONFIG_NAME, RECORD_NAME, ModelConfig
from r1ray.models.decoder import Decoder
from r1ray.models.fusion_file import describe_fusion, is_fusion, load_fusion, save_fusion
from r1ray.models.gates import is_gate, load_gates, save_gates
from r1ray.models.lora import is_adapter, load_adapters, save_adapters
from r1ray.models.quantization import (
    SCHEMES,
    pack_tensors,
    quantize_modules,
    tie_head,
    unpack_tensors,
)
from r1ray.models.tokenizer import TOKENIZER_FILES

__all__ = [
    "WEIGHTS_NAME",
    "assign_weights",
    "copy_tokenizer",
    "list_shards",
    "load_model",
    "read_scheme",
    "save_model",
]

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"


def load_model(path: str | Path, *, dtype: torch.dtype | None = None) -> Decoder:
    """The decoder stored in the directory `path`, in eval mode, on the CPU.

    Args:
        path: a directory with `config.json` and safetensors, sharded or not, quantized or not.
        dtype: of the floating-point tensors; None keeps the stored one. Scales stay float32.
    Raises:
        ArtifactError: a file is missing or damaged, or the tensors do not fit the configuration.
    """
    path = Path(path)
    config = ModelConfig.load(path)
    scheme = read_scheme(path)
    with torch.device("meta"):
        model = Decoder(config)
        if scheme is not None:
            quantize_modules(model, scheme)
    tensors = _read_tensors(path)
    if scheme is not None:
        tensors = unpack_tensors(tensors, scheme, model.state_dict())
    for name, tensor in tensors.items():
        if dtype is not None and tensor.is_floating_point() and not name.endswith("_scale"):
            tensors[name] = tensor.to(dtype)
    assign_weights(model, tensors, where=path)
    load_gates(model, path)
    load_adapters(model, path)
    load_fusion(model, path, dtype=dtype)
    return model.eval()


def save_model(
    model: Decoder, path: str | Path, *, provenance: Mapping[str, Any] | None = None
) -> None:
    """Write `model` as a model directory that transformers (when not quantized) loads as well.

    Args:
        provenance: written into `r1ray.json` beside the scheme; quantized models only.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.detach().contiguous()
        for name, tensor in model.state_dict().items()
        if not (model.config.tie_embeddings and name.startswith("lm_head."))
        and not is_gate(name)
        and not is_adapter(name)
        and not is_fusion(name)
    }
    if model.scheme is not None:
        tensors = pack_tensors(tensors, model.scheme)
    save_file(tensors, path / WEIGHTS_NAME, metadata={"format": "pt"})
    save_gates(model, path)
    save_adapters(model, path)
    save_fusion(model, path)
    config = model.config.to_hf()
    config["torch_dtype"] = str(model.model.norm.weight.dtype).removeprefix("torch.")
    _write_json(path / CONFIG_NAME, config)
    record = describe_fusion(model)
    if model.scheme is not None:
        record |= {"quantization": {"scheme": model.scheme}, "provenance": dict(provenance or {})}
    if record:
        _write_json(path / RECORD_NAME, record)


def copy_tokenizer(source: str | Path, target: str | Path) -> None:
    """Copy the tokenizer files of one model directory into another."""
    for name in TOKENIZER_FILES:
        if (Path(source) / name).is_file():
            shutil.copyfile(Path(source) / name, Path(target) / name)


def read_scheme(path: Path) -> Scheme | None:
    """How the weights in the model directory `path` are quantized; None in float.

    Raises:
        ArtifactError: `r1ray.json` is damaged or names another scheme.
    """
    record_path = path / RECORD_NAME
    if not record_path.is_file():
        return None
    try:
        record = read_json(record_path)
        if "quantization" not in record and "fusion" in record:
            return None
        scheme = record["quantization"]["scheme"]
    except (ArtifactError, KeyError, TypeError) as error:
        raise ArtifactError(f"{record_path}: no quantization scheme in it ({error!r})") from error
    for known in SCHEMES:
        if scheme == known:
            return known
    raise ArtifactError(f"{record_path}: scheme {scheme!r} is none of {', '.join(SCHEMES)}")


def list_shards(path: Path) -> list[Path]:
    """The safetensors files of the model directory `path`.

    Raises:
        ArtifactError: there are none, or their index is damaged.
    """
    index_path = path / INDEX_NAME
    if (path / WEIGHTS_NAME).is_file():
        return [path / WEIGHTS_NAME]
    if not index_path.is_file():
        raise ArtifactError(f"{path}: neither {WEIGHTS_NAME} nor {INDEX_NAME} is there")
    try:
        weight_map = read_json(index_path)["weight_map"]
        names = sorted(set(weight_map.values()))
        is_plain = all(name and Path(name).name == name for name in names)
    except (KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{index_path}: not a safetensors index ({error!r})") from error
    if not is_plain:
        raise ArtifactError(f"{index_path}: shard names must be plain file names, got {names}")
    return [path / name for name in names]


def _read_tensors(path: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for shard in list_shards(path):
        try:
            with safe_open(shard, framework="pt") as stream:
                tensors.update({name: stream.get_tensor(name) for name in stream.keys()})  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ArtifactError(f"{shard}: cannot be read as safetensors ({error})") from error
    return tensors


def assign_weights(model: Decoder, tensors: dict[str, Tensor], *, where: Path) -> None:
    """Give `model`'s parameters and buffers the tensors themselves, without a copy."""
    if model.config.tie_embeddings:
        for name in [name for name in tensors if name.startswith("lm_head.")]:
            del tensors[name]
    expected = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not (model.config.tie_embeddings and name.startswith("lm_head."))
    }
    # Old checkpoints carry precomputed rotary frequencies, which the configuration determines.
    found = {name for name in tensors if not name.endswith("rotary_emb.inv_freq")}
    problems = [f"missing {name}" for name in sorted(expected.keys() - found)]
    problems += [f"unexpected {name}" for name in sorted(found - expected.keys())]
    problems += [
        f"{name} has shape {tuple(tensors[name].shape)}, the configuration says "
        f"{tuple(expected[name].shape)}"
        for name in sorted(expected.keys() & found)
        if tensors[name].shape != expected[name].shape
    ]
    problems += [
        f"{name} is {tensors[name].dtype}, not {expected[name].dtype}"
        for name in sorted(expected.keys() & found)
        if not _fits(tensors[name].dtype, expected[name].dtype)
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ArtifactError(f"{where}: weights do not fit: {'; '.join(problems[:5])}{more}")
    model.load_state_dict({name: tensors[name] for name in expected}, strict=False, assign=True)
    tie_head(model)


def _fits(found: torch.dtype, expected: torch.dtype) -> bool:
    """Floats may be of another width, integers may not."""
    return found == expected or (found.is_floating_point and expected.is_floating_point)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
