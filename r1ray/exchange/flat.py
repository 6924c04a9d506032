"""A model's parameters as one flat vector, cut into one shard per worker.

The vector holds all matrices, then all vectors (norms, biases); each part is padded with zeros to
equal shards, those of matrices to whole codec blocks. Worker j owns shard j of both parts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from r1ray.exchange.codecs import BLOCK_SIZE

__all__ = ["FlatParameters"]


class FlatParameters:
    """Copies between parameters, or their gradients, and flat float32 vectors.

    Args:
        parameters: distinct, in the same order on every worker.
        num_shards: workers.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], num_shards: int) -> None:
        matrices = [item for item in parameters if item.dim() >= 2]
        vectors = [item for item in parameters if item.dim() < 2]
        self.num_shards = num_shards
        self.matrix_numel = sum(item.numel() for item in matrices)
        self.vector_numel = sum(item.numel() for item in vectors)
        self.matrix_shard = _shard_size(self.matrix_numel, num_shards, BLOCK_SIZE)
        self.vector_shard = _shard_size(self.vector_numel, num_shards, 1)
        self.numel = num_shards * (self.matrix_shard + self.vector_shard)
        self._slices: list[tuple[nn.Parameter, int]] = []
        for items, start in ((matrices, 0), (vectors, num_shards * self.matrix_shard)):
            for item in items:
                self._slices.append((item, start))
                start += item.numel()
        self.device = parameters[0].device

    def empty(self) -> Tensor:
        """A zero vector of the flat length."""
        return torch.zeros(self.numel, device=self.device)

    def gather(self) -> Tensor:
        """The parameters' values."""
        flat = self.empty()
        for parameter, start in self._slices:
            flat[start : start + parameter.numel()] = parameter.detach().flatten()
        return flat

    def add_gradients(self, flat: Tensor) -> None:
        """Add every parameter's gradient to `flat`; one without a gradient counts as zero."""
        for parameter, start in self._slices:
            if parameter.grad is not None:
                flat[start : start + parameter.numel()] += parameter.grad.flatten()

    def scatter(self, flat: Tensor, change: Tensor | None = None) -> None:
        """Set the parameters to the values in `flat`, plus those in `change`."""
        with torch.no_grad():
            for parameter, start in self._slices:
                part = slice(start, start + parameter.numel())
                parameter.copy_(flat[part].view_as(parameter))
                if change is not None:
                    parameter.add_(change[part].view_as(parameter))

    def shard(self, flat: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """Views of the (matrix, vector) part of `flat` that worker `index` owns."""
        vectors = self.num_shards * self.matrix_shard
        return (
            flat[index * self.matrix_shard : (index + 1) * self.matrix_shard],
            flat[vectors + index * self.vector_shard : vectors + (index + 1) * self.vector_shard],
        )

    def join(self, shards: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """The flat vector of shards that may have been cut for another number of workers."""
        flat = self.empty()
        vectors = self.num_shards * self.matrix_shard
        matrix = torch.cat([shard[0] for shard in shards])[: self.matrix_numel]
        vector = torch.cat([shard[1] for shard in shards])[: self.vector_numel]
        flat[: self.matrix_numel] = matrix.to(self.device)
        flat[vectors : vectors + self.vector_numel] = vector.to(self.device)
        return flat


def _shard_size(numel: int, num_shards: int, multiple: int) -> int:
    return -(-numel // (num_shards * multiple)) * multiple
