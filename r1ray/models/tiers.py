"""Layered memory: which parts of a model stay on the fast tier, and where the others are.

1. A plan (`plan_placement`) keeps on the fast tier as many parts as there is room for (core). The
   others (static) stay on the slow tier, and visit the fast one in the order of a forward
   (`r1ray.models.streaming`).
2. On a CPU the fast tier is RAM under a budget, and the slow one memory-mapped files: nothing is
   copied, pages are mapped and unmapped (`MappedTier`).
3. On a GPU the fast tier is its memory, and fetching is a DMA copy out of pinned host memory, on a
   stream of its own (`DeviceTier`).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from r1ray.errors import BudgetError
from r1ray.models.mapped import MappedTensors

__all__ = [
    "Budget",
    "DeviceTier",
    "MappedTier",
    "Placement",
    "Tier",
    "plan_placement",
    "resident_bytes",
]


@dataclass(frozen=True)
class Placement:
    """Which units of a model stay on the fast tier.

    Attributes:
        core, static: names of units, in the order of a forward.
        core_bytes, static_bytes: of their weights.
    """

    core: tuple[str, ...]
    static: tuple[str, ...]
    core_bytes: int
    static_bytes: int

    def describe(self) -> str:
        """One line for people."""
        return (
            f"fast tier: {_shorten(self.core)} ({self.core_bytes / 2**20:.0f} MiB); slow tier, "
            f"streamed: {_shorten(self.static)} ({self.static_bytes / 2**20:.0f} MiB)"
        )


def plan_placement(
    unit_bytes: Mapping[str, int], budget_bytes: int, *, is_training: bool = False
) -> Placement:
    """The units that stay on the fast tier, if what is under way is to fit beside them.

    That is two of the largest units, one in use and one coming, and in training the gradient of
    one. Half of the budget is left to activations. Every step touches every unit equally often, so
    the largest number of them stays: the smallest ones.

    Args:
        unit_bytes: weights of each unit, in the order of a forward.
    Raises:
        BudgetError: what is under way does not fit.
    """
    ordered = sorted(unit_bytes.values())
    moving = sum(ordered[-2:]) + (ordered[-1] if is_training else 0)
    room = budget_bytes // 2
    if moving > room:
        raise BudgetError(
            f"the largest parts of the model take {moving / 2**20:.0f} MiB while they are in use, "
            f"above half of the budget of {budget_bytes / 2**20:.0f} MiB; raise it to at least "
            f"{-(-2 * moving // 2**20)} MiB"
        )
    room -= moving
    kept: set[str] = set()
    for name in sorted(unit_bytes, key=unit_bytes.__getitem__):
        if unit_bytes[name] <= room:
            kept.add(name)
            room -= unit_bytes[name]
    core = tuple(name for name in unit_bytes if name in kept)
    static = tuple(name for name in unit_bytes if name not in kept)
    return Placement(
        core,
        static,
        sum(unit_bytes[name] for name in core),
        sum(unit_bytes[name] for name in static),
    )


class Budget:
    """A bound on what the process's resident memory grows by, as the kernel counts it."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._baseline = resident_bytes()

    def check(self) -> None:
        """Raise BudgetError when more is resident than the budget allows."""
        grown = resident_bytes() - self._baseline
        if grown > self._limit_bytes:
            raise BudgetError(
                f"resident memory has grown by {grown / 2**20:.0f} MiB, above the budget of "
                f"{self._limit_bytes / 2**20:.0f} MiB; raise the budget or lower the tokens of a "
                "batch"
            )


def resident_bytes() -> int:
    """Anonymous and file-mapped resident memory of this process, from the kernel."""
    total = 0
    with open("/proc/self/status", encoding="ascii") as status:
        for line in status:
            if line.startswith(("RssAnon:", "RssFile:")):
                total += int(line.split()[1]) * 1024
    return total


class Tier(Protocol):
    """Where static units are while they are not in use."""

    def prefetch(self, unit: str) -> None:
        """Begin to bring `unit` closer; returns at once."""
        ...

    def fetch(self, unit: str) -> None:
        """Make `unit` usable."""
        ...

    def release(self, unit: str) -> None:
        """Give the fast tier's memory of `unit` back."""
        ...


class MappedTier:
    """Units whose tensors are views of memory-mapped files; the budget is checked at every fetch.

    Args:
        files: the file of every tensor, by its name in the state dict.
    """

    def __init__(
        self, units: Mapping[str, Sequence[str]], files: Mapping[str, MappedTensors], budget: Budget
    ) -> None:
        self._units = {
            unit: [(name, files[name]) for name in names] for unit, names in units.items()
        }
        self._budget = budget

    def prefetch(self, unit: str) -> None:
        for name, file in self._units[unit]:
            file.prefetch(name)

    def fetch(self, unit: str) -> None:  # noqa: ARG002
        self._budget.check()

    def release(self, unit: str) -> None:
        for name, file in self._units[unit]:
            file.release(name)


class DeviceTier:
    """Units whose tensors lie in pinned host memory, and visit a GPU."""

    def __init__(self, modules: Mapping[str, nn.Module], device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._tensors = {unit: list(_tensors_of(module)) for unit, module in modules.items()}
        for tensors in self._tensors.values():
            for tensor in tensors:
                tensor.data = tensor.data.pin_memory()
        self._hosts = {
            unit: [tensor.data for tensor in tensors] for unit, tensors in self._tensors.items()
        }
        self._arriving: dict[str, tuple[list[Tensor], torch.cuda.Event]] = {}

    def prefetch(self, unit: str) -> None:
        if unit in self._arriving:
            return
        with torch.cuda.stream(self._stream):
            copies = [host.to(self._device, non_blocking=True) for host in self._hosts[unit]]
            event = torch.cuda.Event()
            event.record(self._stream)
        self._arriving[unit] = (copies, event)

    def fetch(self, unit: str) -> None:
        self.prefetch(unit)
        copies, event = self._arriving.pop(unit)
        current = torch.cuda.current_stream(self._device)
        event.wait(current)
        for tensor, copy in zip(self._tensors[unit], copies, strict=True):
            copy.record_stream(current)
            tensor.data = copy

    def release(self, unit: str) -> None:
        for tensor, host in zip(self._tensors[unit], self._hosts[unit], strict=True):
            tensor.data = host


def _tensors_of(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _shorten(units: Sequence[str]) -> str:
    """Names, but of layers their number."""
    layers = [unit for unit in units if unit.startswith("layer ")]
    others = [unit for unit in units if not unit.startswith("layer ")]
    parts = [f"{len(layers)} layer{'s' * (len(layers) > 1)}"] if layers else []
    return ", ".join([*parts, *others]) or "nothing"
