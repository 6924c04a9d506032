"""Decoders run by OpenVINO, over pages of keys and values as our own: a backend of generation.

1. The decoder becomes an OpenVINO graph (`r1ray.models.openvino_graph`) and is compiled for a
   device; the plugin says what a block of keys and values is there.
2. A page of 64 tokens is two blocks of 32 on a CPU. Pages are the scheduler's: prompts' beginnings
   are shared, answers preempted and prompts read in pieces as with our own kernels.
3. Rotary tables are computed here, so every scaling of positions is supported.

Attention is dense: gates are not exported. Price: the plugin's packed copy of the weights, seconds
to compile, and a copy of the logits.

Shape legend: B rows, T new tokens, H head dimension, L tokens that something is to follow,
V vocabulary.
"""

import importlib
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from r1ray.errors import ConfigError, ShapeError
from r1ray.models.config import ModelConfig
from r1ray.models.decoder import Decoder
from r1ray.models.fusion import ImageContext
from r1ray.models.pages import count_pages
from r1ray.models.rope import RotaryCache
from r1ray.ops.block_selection import BLOCK

__all__ = ["OpenVinoBackend", "OpenVinoPool"]


class OpenVinoPool:
    """Keys and values of all layers, in tensors that the plugin reads and writes in place."""

    def __init__(self, num_pages: int, tensors: Mapping[str, Any], blocks_per_page: int) -> None:
        self.num_pages = num_pages
        self.tensors, self.blocks_per_page = tensors, blocks_per_page

    def slice(
        self,
        tables: Sequence[Sequence[int]],
        starts: Sequence[int],
        *,
        one_by_one: bool = False,  # noqa: ARG002 - dense attention is the same either way
    ) -> "_Rows":
        """Rows whose blocks are in these pages, and that have so many tokens."""
        return _Rows(self, tables, starts)


@dataclass(frozen=True)
class _Rows:
    pool: OpenVinoPool
    tables: Sequence[Sequence[int]]
    starts: Sequence[int]

    def describe(self, tokens: int) -> dict[str, np.ndarray]:
        """The graph's inputs that say where the rows are, each with `tokens` new tokens.

        Raises:
            ShapeError: a row's pages do not hold them.
        """
        per_page = self.pool.blocks_per_page
        ends = [start + tokens for start in self.starts]
        blocks: list[list[int]] = []
        for table, end in zip(self.tables, ends, strict=True):
            if count_pages(end) > len(table):
                raise ShapeError(f"{end} tokens do not fit into a row of {len(table)} pages")
            every = [page * per_page + part for page in table for part in range(per_page)]
            blocks.append(every[: -(-end * per_page // BLOCK)])
        found: dict[str, Sequence[int]] = {
            "past_lens": self.starts,
            "subsequence_begins": range(0, tokens * len(ends) + 1, tokens),
            "block_indices": list(itertools.chain.from_iterable(blocks)),
            "block_indices_begins": [0, *itertools.accumulate(map(len, blocks))],
        }
        arrays = {name: np.array(values, np.int32) for name, values in found.items()}
        return {**arrays, "max_context_len": np.array(max(ends), np.int32)}


class OpenVinoBackend:
    """A `Backend` over a compiled graph.

    Args:
        model: float32 or INT8, on the CPU; not needed any longer afterwards.
        device: as OpenVINO names it.
        num_threads: of the CPU's plugin.
        is_int8_cache: keys and values in 8 bits; else in float32.
    Raises:
        ConfigError: OpenVINO is missing, or has no such device, or cannot compile for it.
    """

    fusion = None
    is_sparse = False
    may_pad = False  # it would not make rows longer than they are for nothing

    def __init__(
        self, model: Decoder, *, num_threads: int, device: str = "CPU", is_int8_cache: bool = False
    ) -> None:
        if model.fusion is not None:
            raise ConfigError(
                "serve.backend openvino reads text alone, and this model sees images; use native"
            )
        self._openvino = _import()
        core = self._openvino.Core()
        there_are = sorted({name.partition(".")[0] for name in core.available_devices})
        if device not in there_are:
            raise ConfigError(
                f"OpenVINO sees no {device} here, but {', '.join(there_are)}; install its driver, "
                "or choose another device"
            )
        graph = importlib.import_module("r1ray.models.openvino_graph").build_graph(model)
        settings: dict[str, Any] = {"KV_CACHE_PRECISION": "u8" if is_int8_cache else "f32"}
        if device == "CPU":
            settings |= {
                "INFERENCE_NUM_THREADS": num_threads,
                "INFERENCE_PRECISION_HINT": "f32",
                "ENABLE_CPU_PINNING": False,  # two replicas would share the first cores
            }
        try:
            compiled = core.compile_model(graph, device, settings)
        except RuntimeError as error:
            raise ConfigError(
                f"OpenVINO cannot compile this model for {device} ({error}); choose another device"
            ) from error
        self.config: ModelConfig = model.config
        self._core, self._device = core, device
        self._compiled, self._request = compiled, compiled.create_infer_request()
        self._rotary = RotaryCache(model.config)
        self._pool: OpenVinoPool | None = None
        self._blocks = {
            item.any_name: (item.element_type, [size.get_length() for size in shape[1:]])
            for item in compiled.inputs
            if "_cache." in item.any_name and (shape := list(item.partial_shape))
        }
        block_tokens = self._blocks["value_cache.0"][1][1]
        self._blocks_per_page = BLOCK // block_tokens

    @property
    def page_bytes(self) -> int:
        """Memory of a page."""
        blocks = [kind.size * math.prod(shape) for kind, shape in self._blocks.values()]
        return self._blocks_per_page * sum(blocks)

    def build_pool(self, num_pages: int) -> OpenVinoPool:
        """As `Backend` has it; zeros, since what is masked must not be NaN."""
        # The request would keep the memory of the pool before.
        self._request, self._pool = self._compiled.create_infer_request(), None
        num_blocks = (num_pages + 1) * self._blocks_per_page
        tensors = {
            name: self._allocate(kind, [num_blocks, *shape])
            for name, (kind, shape) in self._blocks.items()
        }
        return OpenVinoPool(num_pages, tensors, self._blocks_per_page)

    def read(self, ids_BT: Tensor, rows: _Rows, images: ImageContext | None = None) -> None:  # noqa: ARG002
        """As `Backend` has it; the logits of one token are computed and left."""
        self.next_logits(ids_BT, rows, [0])

    def next_logits(
        self,
        ids_BT: Tensor,
        rows: _Rows,
        last: Sequence[int],
        images: ImageContext | None = None,  # noqa: ARG002
    ) -> Tensor:
        """As `Backend` has it."""
        batch, tokens = ids_BT.shape
        if rows.pool is not self._pool:
            for name, tensor in rows.pool.tensors.items():
                self._request.set_tensor(name, tensor)
            self._pool = rows.pool
        inputs = rows.describe(tokens)
        for name, table_BTH in zip(
            ("cos", "sin"), self._rotary.behind(rows.starts, tokens), strict=True
        ):
            table_BTH = table_BTH.expand(batch, -1, -1)
            inputs[name] = table_BTH.reshape(batch * tokens, 1, -1).contiguous().numpy()
        inputs["ids"] = ids_BT.reshape(-1).numpy()
        inputs["last"] = np.array(last, np.int64)
        for name, array in inputs.items():
            self._request.set_tensor(name, self._openvino.Tensor(array))
        self._request.infer()
        logits_LV = torch.from_numpy(self._request.get_output_tensor(0).data.copy())
        if len(logits_LV) != len(last):  # an operator that fails leaves what was there before
            raise RuntimeError(f"OpenVINO gave {len(logits_LV)} logits for {len(last)} tokens")
        return logits_LV

    def _allocate(self, kind: Any, shape: Sequence[int]) -> Any:
        """A tensor on the device: only there can a plugin write its inputs in place."""
        if self._device != "CPU":
            context = self._core.get_default_context(self._device)
            return context.create_tensor(kind, self._openvino.Shape(shape), {})
        tensor = self._openvino.Tensor(kind, self._openvino.Shape(shape))
        tensor.data[...] = 0
        return tensor


def _import() -> Any:
    try:
        return importlib.import_module("openvino")
    except ImportError as error:
        raise ConfigError(
            "the backend openvino needs the package of that name; install it with "
            "`pip install 'r1ray[openvino]'`, or choose the backend native"
        ) from error
