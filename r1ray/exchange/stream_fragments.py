"""Fragments of a model's weights for streaming: every F-th stripe of the flat parameter vector.

All fragments are of the same size but for a few elements, so that the link is used evenly; a cut by
whole layers cannot give that, since an embedding may be a fifth of a model. With several stripes a
fragment holds a part of every depth, of the embedding and of the head.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from r1ray.errors import ExchangeError

__all__ = ["Fragment", "cut_fragments", "shard_slices"]

_STRIPES = 8  # per fragment


class Fragment:
    """Slices of parameters that are exchanged together, seen as one vector.

    Args:
        slices: (parameter, start, stop) in its flattened elements.
        num_shards: parts of nearly equal size that the vector is cut into.
    """

    def __init__(self, slices: Sequence[tuple[nn.Parameter, int, int]], num_shards: int) -> None:
        self._slices = list(slices)
        self.numel = sum(stop - start for _, start, stop in slices)
        self.shards = shard_slices(self.numel, num_shards)

    def read(self) -> Tensor:
        """The weights now: float32 [numel] on the host, a copy."""
        parts = [_flat(parameter)[start:stop] for parameter, start, stop in self._slices]
        return torch.cat(parts).float().cpu()

    def add_(self, change_E: Tensor) -> None:
        """Add to the weights, in place."""
        position = 0
        for parameter, start, stop in self._slices:
            part = change_E[position : position + stop - start]
            _flat(parameter)[start:stop] += part.to(parameter.device)
            position += stop - start

    def write(self, weights_E: Tensor) -> None:
        """Replace the weights, in place."""
        position = 0
        for parameter, start, stop in self._slices:
            _flat(parameter)[start:stop] = weights_E[position : position + stop - start]
            position += stop - start


def shard_slices(numel: int, num_shards: int) -> list[slice]:
    """The elements of each shard of a vector; sizes differ by one at most."""
    edges = [numel * shard // num_shards for shard in range(num_shards + 1)]
    return [slice(start, stop) for start, stop in itertools.pairwise(edges)]


def cut_fragments(
    parameters: Sequence[nn.Parameter], num_fragments: int, num_shards: int
) -> list[Fragment]:
    """Every element of the parameters in exactly one fragment.

    Args:
        num_shards: of every fragment.
    Raises:
        ExchangeError: there are not enough elements.
    """
    total = sum(parameter.numel() for parameter in parameters)
    if total < num_fragments * _STRIPES * num_shards:
        raise ExchangeError(
            f"{total} parameters are too few for {num_fragments} fragments and {num_shards} "
            "workers; lower train.exchange.num_fragments"
        )
    num_stripes = num_fragments * _STRIPES
    edges = [total * stripe // num_stripes for stripe in range(num_stripes + 1)]
    slices: list[list[tuple[nn.Parameter, int, int]]] = [[] for _ in range(num_fragments)]
    offset = 0
    for parameter in parameters:
        for stripe in range(num_stripes):
            start = max(edges[stripe] - offset, 0)
            stop = min(edges[stripe + 1] - offset, parameter.numel())
            if start < stop:
                slices[stripe % num_fragments].append((parameter, start, stop))
        offset += parameter.numel()
    return [Fragment(part, num_shards) for part in slices]


def _flat(parameter: nn.Parameter) -> Tensor:
    return parameter.detach().view(-1)
