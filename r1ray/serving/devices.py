"""Where replicas compute: all that differs between devices when a model is loaded to be served.

A backend and a device name a loader in `_LOADERS`; what it returns computes like any other
(`r1ray.models.backend`). A new device is a name in `r1ray.config.serving` and a line here. Which of
Ray's resources a replica takes is the configuration's to say.
"""

import logging
from collections.abc import Callable

import torch

from r1ray.config.serving import BackendKind, DeviceKind, EngineConfig
from r1ray.errors import ConfigError
from r1ray.models import ModelConfig, load_model
from r1ray.models.backend import Backend, DecoderBackend
from r1ray.models.decoder import Decoder
from r1ray.models.gates import set_attention
from r1ray.models.kv_cache import page_bytes
from r1ray.models.openvino import OpenVinoBackend
from r1ray.models.pages import count_pages
from r1ray.models.quantization import tie_head
from r1ray.models.tiered import load_to_serve, move_to_device

__all__ = ["load_backend", "plan_pages"]

logger = logging.getLogger(__name__)


def load_backend(model_dir: str, config: EngineConfig) -> Backend:
    """The model in `model_dir`, ready to compute on the device that `config` names.

    Raises:
        ConfigError: the device or its package is missing, or memory is too small.
    """
    device = _resolve(config)
    return _LOADERS[config.backend, device](model_dir, config)


def plan_pages(config: EngineConfig, size: int) -> int:
    """Pages of `size` bytes that a replica's pool has.

    Raises:
        ConfigError: fewer than one request may need.
    """
    one = count_pages(config.max_context_tokens)
    if config.kv_cache_mib is None:
        return config.max_concurrency * one
    if (found := (config.kv_cache_mib << 20) // size) < one:
        raise ConfigError(
            f"serve.kv_cache_mib ({config.kv_cache_mib}) is below the {one * size / 2**20:.1f} MiB "
            f"of one request of max_context_tokens ({config.max_context_tokens}); raise it or "
            "lower that"
        )
    return found


def _resolve(config: EngineConfig) -> DeviceKind:
    has_gpu = torch.cuda.is_available()
    if config.device == "cuda" and not has_gpu:
        raise ConfigError(
            "device cuda: torch sees no GPU in this replica; install a CUDA build of torch on the "
            "nodes with GPUs, or choose device cpu"
        )
    if config.device != "auto":
        return config.device
    return "cuda" if has_gpu and config.backend == "native" else "cpu"


def _decoder(model: Decoder, config: EngineConfig) -> DecoderBackend:
    set_attention(model, config.attention)
    return DecoderBackend(model, torch.int8 if config.kv_cache == "int8" else None)


def _load_on_cpu(model_dir: str, config: EngineConfig) -> DecoderBackend:
    if config.budget_mib is None:
        return _decoder(load_model(model_dir), config)
    model_config = ModelConfig.load(model_dir)
    dtype = torch.int8 if config.kv_cache == "int8" else torch.float32
    size = page_bytes(model_config, dtype)
    kv_bytes = plan_pages(config, size) * size
    budget_bytes = config.budget_mib << 20
    if kv_bytes >= budget_bytes:
        raise ConfigError(
            f"serve.budget_mib ({config.budget_mib}) is below the {kv_bytes / 2**20:.0f} MiB "
            "of keys and values; raise it, or lower kv_cache_mib, max_concurrency or "
            "max_context_tokens"
        )
    tiered = load_to_serve(model_dir, budget_bytes=budget_bytes, reserved_bytes=kv_bytes)
    return _decoder(tiered.model, config)


def _load_on_cuda(model_dir: str, config: EngineConfig) -> DecoderBackend:
    model = load_model(model_dir)
    if config.budget_mib is not None:
        move_to_device(model, torch.device("cuda"), budget_bytes=config.budget_mib << 20)
    else:
        model = model.to("cuda")
        tie_head(model)
    return _decoder(model, config)


def _load_openvino(name: str) -> Callable[[str, EngineConfig], Backend]:
    def load(model_dir: str, config: EngineConfig) -> OpenVinoBackend:
        return OpenVinoBackend(
            load_model(model_dir),
            device=name,
            num_threads=max(1, int(config.num_cpus_per_replica)),
            is_int8_cache=config.kv_cache == "int8",
        )

    return load


_LOADERS: dict[tuple[BackendKind, DeviceKind], Callable[[str, EngineConfig], Backend]] = {
    ("native", "cpu"): _load_on_cpu,
    ("native", "cuda"): _load_on_cuda,
    ("openvino", "cpu"): _load_openvino("CPU"),
    ("openvino", "intel_gpu"): _load_openvino("GPU"),
    ("openvino", "intel_npu"): _load_openvino("NPU"),
}
