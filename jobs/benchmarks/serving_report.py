"""Rows of the serving record, and its tables."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from r1ray.evaluation.record import Row

__all__ = ["condense", "engine_rows", "find_strongest", "render_engines", "serving_rows"]

_INDISPENSABLE = {"llama_cpp", "openvino"}
_BARS = {"1x64": (">= 0.9", 1), "8x64": (">= 1.0", 8), "32x64": (">= 1.2", 32)}
_CORES = 2


def find_strongest(peers: Iterable[Mapping[str, Any]], scenario: str) -> Mapping[str, Any] | None:
    """The peer that r1ray's engine, as it was at the time, did worst against.

    None where llama.cpp or OpenVINO was not measured: a bar against the best then does not count.
    """
    found = [peer for peer in peers if scenario in peer.get("scenarios", {})]
    names = [peer["name"] for peer in found]
    if not all(any(name.startswith(needed) for name in names) for needed in _INDISPENSABLE):
        return None
    return min(
        found, key=lambda peer: statistics.median(peer["own"][scenario]) / _rate(peer, scenario)
    )


def _rate(engine: Mapping[str, Any], scenario: str) -> float:
    return statistics.median(engine["scenarios"][scenario]["tokens_per_s"])


def engine_rows(peers: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Decoding against the best peer, by the number of streams."""
    rows = []
    for scenario, (bar, streams) in _BARS.items():
        name, peer = f"serving.decode_{streams}_vs_best_peer", find_strongest(peers, scenario)
        if peer is None:
            rows.append(Row(name, None, "x", bar=bar))
            continue
        rate, runs = _rate(peer, scenario), peer["own"][scenario]
        rows.append(
            Row(
                name,
                statistics.median(runs) / rate,
                "x",
                (min(runs) / rate, max(runs) / rate),
                baseline=f"{peer['name']}, tokens/s",
                baseline_value=rate,
                bar=bar,
            )
        )
    return rows


def serving_rows(
    *,
    prefix: Mapping[str, Any],
    interference: Mapping[str, Any],
    admission: Mapping[str, Any],
    http: Sequence[Mapping[str, float]],
    soak: Mapping[str, Any],
) -> list[Row]:
    """All others."""
    cold, warm = (statistics.median(prefix[kind]) for kind in ("cold_s", "warm_s"))
    alone, reading, share = _delays(interference["sparse"])
    _, _, dense_share = _delays(interference["dense"])
    predicted, worst = (statistics.median(admission[kind]) for kind in ("predicted", "worst_case"))
    overhead = [_http_overhead(pair) for pair in http]
    pages = soak["held"]["r1ray:kv_cache_usage_perc"]
    return [
        Row(
            "serving.shared_prefix_ttft_gain",
            cold / warm,
            "x",
            baseline="4,096 new tokens, s",
            baseline_value=cold,
            bar=">= 10",
        ),
        Row(
            "serving.p99_itl_share_of_limit",
            share,
            "share",
            baseline="p99 of 7 streams alone, s",
            baseline_value=alone,
            bar="<= 1",
        ),
        Row("serving.p99_itl_s", reading, "s", baseline="alone", baseline_value=alone),
        Row("serving.p99_itl_share_of_limit_dense", dense_share, "share"),
        Row(
            "serving.predicted_admission_gain",
            predicted / worst,
            "x",
            baseline="worst-case reservation, tokens/s",
            baseline_value=worst,
            bar=">= 1.2",
        ),
        Row(
            "serving.http_overhead",
            statistics.median(overhead),
            "share",
            (min(overhead), max(overhead)),
            baseline="the engine alone, s",
            baseline_value=statistics.median(pair["engine_s"] for pair in http),
            bar="<= 0.15",
        ),
        Row("serving.soak_leaked_pages", pages, "share of a pool", bar="= 0"),
        Row("serving.soak_lost_requests", len(soak["lost"]), "requests", bar="= 0"),
        Row("serving.soak_requests", sum(soak["ends"].values()), "requests"),
        Row("serving.soak_memory_growth", _memory_growth(soak), "x", baseline="the first third"),
    ]


def _delays(found: Mapping[str, Any]) -> tuple[float, float, float]:
    """p99 alone, p99 while a prompt is read, and that as a share of what it may be; seconds."""
    alone, reading = (float(np.percentile(found[kind], 99)) for kind in ("alone_s", "reading_s"))
    return alone, reading, reading / max(0.1, 3 * alone)


def _http_overhead(pair: Mapping[str, float]) -> float:
    """Share of the engine's throughput that is lost, the client's own part not counted."""
    return 1 - pair["engine_s"] / (pair["seconds"] - pair["client_cpu_s"] / _CORES)


def _memory_growth(soak: Mapping[str, Any]) -> float:
    """Of the replica that was there throughout: its memory at the end, over that at a third."""
    readings = soak["memory"]
    early, late = readings[len(readings) // 3]["resident_bytes"], readings[-1]["resident_bytes"]
    [survivor] = early.keys() & late.keys()
    return float(late[survivor] / early[survivor])


def condense(engine: Mapping[str, Any]) -> dict[str, Any]:
    """An engine's measurements with percentiles in place of the wait for each token."""
    found = dict(engine)
    if "scenarios" in engine:
        found["scenarios"] = {
            name: {**item, "next_s": _percentiles(item["next_s"])}
            for name, item in engine["scenarios"].items()
        }
    return found


def _percentiles(runs: Iterable[Iterable[float]]) -> dict[str, float]:
    """Of all runs together."""
    values = [value for run in runs for value in run]
    p50, p90, p99 = map(float, np.percentile(values, [50, 90, 99]))
    return {"p50": p50, "p90": p90, "p99": p99, "max": max(values)}


def render_engines(engine: Mapping[str, Any], peers: Sequence[Mapping[str, Any]]) -> str:
    """A table of all engines and scenarios."""
    lines = [
        "| engine | weights | streams x prompt | decode tokens/s | first token, s | "
        "next token p50, p99, ms | peak MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    own = {"name": "r1ray", "weights": "int8", **engine}
    for item in (own, *peers):
        if "scenarios" not in item:
            lines.append(f"| {item['name']} | | | {item['error'].splitlines()[0][:80]} | | | |")
            continue
        for name, found in item["scenarios"].items():
            next_s = _percentiles(found["next_s"])
            first_s = statistics.median(max(run) for run in found["first_s"])
            rate = statistics.median(found["tokens_per_s"])
            peak = found["peak_resident_bytes"] / 2**20
            lines.append(
                f"| {item['name']} | {item['weights']} | {name} | {rate:.0f} | {first_s:.2f} | "
                f"{1e3 * next_s['p50']:.1f}, {1e3 * next_s['p99']:.1f} | {peak:.0f} |"
            )
    return "\n".join(lines) + "\n"
