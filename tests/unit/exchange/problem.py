"""A small regression that every exchange has to solve, row by row over the workers."""

import torch
from torch import nn

from r1ray.exchange import Exchange, StepOutcome, StepTotals, UpdateRule

NUM_ROWS = 8


def build_parameters() -> list[nn.Parameter]:
    """Two matrices and two vectors, the last of one element."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((24, 16), (24,), (3, 24), (1,))
    return [nn.Parameter(0.3 * torch.randn(shape, generator=generator)) for shape in shapes]


def build_rule(num_steps: int = 20, learning_rate: float = 1e-2) -> UpdateRule:
    return UpdateRule(lambda update: learning_rate, num_steps=num_steps, max_grad_norm=1e3)


def rows_of(rank: int, world_size: int) -> range:
    """The rows of one worker: uneven shares of all."""
    bounds = [
        NUM_ROWS * (index * (index + 1)) // (world_size * (world_size + 1))
        for index in range(world_size + 1)
    ]
    return range(bounds[rank], bounds[rank + 1])


def backward(parameters: list[nn.Parameter], rows: range, *, step: int = 0) -> StepTotals:
    """Summed squared error of a small network over some rows of one step's data."""
    generator = torch.Generator().manual_seed(1 + step)
    x = torch.randn(NUM_ROWS, 16, generator=generator)[rows.start : rows.stop]
    y = torch.randn(NUM_ROWS, 3, generator=generator)[rows.start : rows.stop]
    first, bias, second, scale = parameters
    loss = ((torch.tanh(x @ first.t() + bias) @ second.t() * scale - y) ** 2).sum()
    loss.backward()
    return StepTotals(loss.item(), num_targets=len(rows), num_tokens=2 * len(rows))


def take_step(
    exchange: Exchange, parameters: list[nn.Parameter], rows: range, step: int = 0
) -> StepOutcome:
    for parameter in parameters:
        parameter.grad = None
    return exchange.step(backward(parameters, rows, step=step))


def values_of(parameters: list[nn.Parameter]) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in parameters]
