import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from r1ray.data.summary import plot_summary, render_summary


def _summary(**changes: Any) -> dict[str, Any]:
    """As `prepare` writes it, for buckets with three ceilings."""
    summary: dict[str, Any] = {
        "num_rows": 12_345,
        "num_samples": 12_400,
        "num_quarantined": 17,
        "num_over_long": 29,
        "num_dropped_pieces": 3,
        "ignored_fields": {"turn.id": 1_200, "turn.weight": 4},
        "batching": "buckets",
        "num_batches": 1_050,
        "num_tokens": 2_000_000,
        "num_targets": 500_000,
        "padding_share": 0.0234,
        "max_batch_tokens": 4_096,
        "batches_per_ceiling": {"64": 50, "256": 600, "2048": 400},
        "fits": [{"first_sample": 0, "ceilings": [64, 256, 2048], "distance": None}],
        "lengths": {"10": 6_000, "200": 5_000, "1100": 1_399, "2048": 1},
    }
    return {**summary, **changes}


def _packing() -> dict[str, Any]:
    ceilings = {str(top): 1 + top % 7 for top in range(3_520, 4_097, 64)}
    return _summary(batching="packing", fits=[], batches_per_ceiling=ceilings)


def _tables(text: str) -> list[dict[str, str]]:
    """Each Markdown table as {first cell: second cell}."""
    tables = []
    for block in text.strip().split("\n\n"):
        head, rule, *lines = block.splitlines()
        assert re.fullmatch(r"\|-+\|-+:\|", rule)
        assert {len(line) for line in lines} == {len(head)} == {len(rule)}
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
        tables.append(dict(cells))
    return tables


def test_the_tables_show_the_figures() -> None:
    figures, ceilings = _tables(render_summary(_summary()))
    assert figures == {
        "rows read": "12,345",
        "quarantined": "17",
        "over-long (by prepare.overflow)": "29",
        "pieces without a target, dropped": "3",
        "samples": "12,400",
        "tokens": "2,000,000",
        "targets among them": "25.0%",
        "length: median, 90%, longest": "200, 1,100, 2,048",
        "batches": "1,050 (buckets)",
        "largest batch": "4,096 tokens",
        "padding": "2.34% of the computed tokens",
        "ignored field turn.id": "1,200 rows",
        "ignored field turn.weight": "4 rows",
    }
    assert ceilings == {"64": "50", "256": "600", "2,048": "400"}


def test_refitted_ceilings_are_mentioned() -> None:
    fits = [{"first_sample": row, "ceilings": [64], "distance": None} for row in (0, 4_096, 9_000)]
    figures, _ = _tables(render_summary(_summary(fits=fits)))
    assert figures["ceilings fitted anew"] == "2 times"


@pytest.mark.parametrize("num_ceilings", [1, 24, 25, 60, 1_000])
def test_many_ceilings_are_thinned_out_and_no_batch_is_lost(num_ceilings: int) -> None:
    ceilings = {str(64 * number): number for number in range(1, num_ceilings + 1)}
    _, table = _tables(render_summary(_summary(batches_per_ceiling=ceilings)))
    assert len(table) <= 24
    assert num_ceilings > 24 or len(table) == num_ceilings
    counts = [int(count.replace(",", "")) for count in table.values()]
    assert sum(counts) == sum(ceilings.values())
    edges = [int(edge.replace(",", "")) for name in table for edge in name.split(" to ")]
    assert edges == sorted(edges)
    assert (edges[0], edges[-1]) == (64, 64 * num_ceilings)


# Those of a PNG, and of an image in it that is not of one colour: it shrinks less.
_SIGNATURE, _MIN_BYTES = b"\x89PNG\r\n\x1a\n", 10_000


@pytest.mark.parametrize(
    "summary",
    [
        _summary(),
        _packing(),
        _summary(lengths={"7": 5}, fits=[], batches_per_ceiling={"64": 1}),
        _summary(lengths={"1": 5, "1048576": 1}),
    ],
    ids=["buckets", "packing", "one length", "all lengths"],
)
def test_the_picture_has_two_plots_with_something_in_them(
    summary: dict[str, Any], tmp_path: Path
) -> None:
    from matplotlib import pyplot as plt

    path = tmp_path / "summary.png"
    plot_summary(summary, path)
    data = path.read_bytes()
    assert data.startswith(_SIGNATURE)
    assert len(data) > _MIN_BYTES
    pixels = plt.imread(path)[:, :, :3]
    for half in np.array_split(pixels, 2):
        is_blank = (half == 1).all(axis=-1)
        assert 0.3 < is_blank.mean() < 0.99
    assert plt.get_fignums() == []


def test_the_same_summary_gives_the_same_picture(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        plot_summary(_summary(), tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
