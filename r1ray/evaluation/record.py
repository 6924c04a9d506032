"""The benchmark record: measured values with baseline, bar and verdict, and where they ran."""

import datetime
import json
import math
import operator
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from r1ray.manifest import find_versions, read_commit
from r1ray.ops import native

__all__ = [
    "Row",
    "build_record",
    "describe_circumstances",
    "describe_hardware",
    "describe_run",
    "list_commits",
    "render_table",
    "write_json",
]

_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
_COMPARISONS = {
    ">": operator.gt,
    ">=": operator.ge,
    "<=": operator.le,
    "<": operator.lt,
    "=": operator.eq,
}


@dataclass(frozen=True)
class Row:
    """One value, measured or to be measured.

    Attributes:
        id: dotted name, stable over time.
        value: None where it was not measured.
        interval: 95% interval or (min, max), where there is one.
        bar: such as ">= 30"; None for a figure without one. It is fixed before the run.
        min_interval_low: what the interval's lower end must reach besides, where the bar asks it.
    """

    id: str
    value: float | None
    unit: str
    interval: tuple[float, float] | None = None
    baseline: str | None = None
    baseline_value: float | None = None
    bar: str | None = None
    min_interval_low: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the value meets the bar, and the interval its own; None without either."""
        if self.bar is None or self.value is None:
            return None
        low = -math.inf if self.interval is None else self.interval[0]
        if self.min_interval_low is not None and low < self.min_interval_low:
            return False
        sign, limit = self.bar.split()
        return bool(_COMPARISONS[sign](self.value, float(limit)))


def build_record(
    topic: str, command: str, rows: Sequence[Row], circumstances: Mapping[str, Any]
) -> dict[str, Any]:
    """The record of `rows`; `circumstances` are those of the measurement, not of the writing."""
    return {
        "topic": topic,
        "command": command,
        **circumstances,
        "results": [{**asdict(row), "met": row.met} for row in rows],
    }


def describe_circumstances() -> dict[str, Any]:
    """Date, commit, hardware and versions of this process."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": read_commit(),
        "hardware": describe_hardware(),
        "versions": find_versions(),
    }


def describe_run(record: Mapping[str, Any]) -> str:
    """What a record was measured with, on what, from which code and when: a line of Markdown.

    Args:
        record: as `build_record` has it, with `commits_of_parts` (part -> commit).
    """
    hardware = record["hardware"]
    flags = ", ".join(hardware["flags"]) or "no vector flags"
    return (
        f"`{record['command']}` on {hardware['cores']} cores of {hardware['cpu']} ({flags}; native "
        f"kernels: {hardware['native_kernels'] or 'none'}), {hardware['memory_gib']} GiB, commits "
        f"{', '.join(list_commits(record))}, {record['date']}."
    )


def list_commits(record: Mapping[str, Any]) -> list[str]:
    """Of the code that measured a record's parts; the record's own where it has none."""
    parts = record.get("commits_of_parts")
    return sorted(
        {str(commit) for commit in ([record["commit"]] if parts is None else parts.values())}
    )


def render_table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    lines = ["| id | value | baseline | bar | met |", "|---|---|---|---|---|"]
    for row in rows:
        interval = (
            "" if row.interval is None else f" [{row.interval[0]:.4g}, {row.interval[1]:.4g}]"
        )
        known = "" if row.baseline_value is None else f": {row.baseline_value:.4g}"
        baseline = "" if row.baseline is None else f"{row.baseline}{known}"
        met = {None: "", True: "met", False: "**not met**"}[row.met]
        value = "not measured" if row.value is None else f"{row.value:.4g} {row.unit}{interval}"
        lines.append(f"| `{row.id}` | {value} | {baseline} | {row.bar or ''} | {met} |")
    return "\n".join(lines) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Write `value` as strict JSON: NaN and infinity, which JSON lacks, become null."""
    text = json.dumps(_finite(value), indent=2, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def describe_hardware() -> dict[str, Any]:
    """Processor, the instruction sets that matter here, cores, memory and GPU of this machine."""
    capabilities = torch.cpu.get_capabilities()
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": capabilities.get("cpu_name") or platform.processor() or platform.machine(),
        "flags": [flag for flag in _FLAGS if capabilities.get(flag.replace("avx512f", "avx512_f"))],
        "cores": os.cpu_count(),
        "memory_gib": round(memory_bytes / 2**30),
        "native_kernels": native.ISA_NAMES[native.best_isa()] if native.is_available() else None,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
