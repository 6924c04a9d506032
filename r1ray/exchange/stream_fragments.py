"""Fragments of a model's weights for streaming: every F-th stripe of the flat parameter vector.

All fragments are of the same size but for a few elements, which a cut by whole layers cannot give (an
embedding may be a fifth of a model): the link is used evenly. With several stripes a fragment holds
a part of every depth, and of the embedding and the head.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["Fragment", "cut_fragments"]

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
        edges = [self.numel * shard // num_shards for shard in range(num_shards + 1)]
        self.shards = [slice(start, stop) for start, stop in zip(edges, edges[1:], strict=False)]

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


def cut_fragments(
    parameters: Sequence[nn.Parameter], num_fragments: int, num_shards: int
) -> list[Fragment]:
    """Every element of the parameters in exactly one fragment.

    Args:
        num_shards: of every fragment.
    """
    total = sum(parameter.numel() for parameter in parameters)
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
