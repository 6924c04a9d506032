"""Rows, their verdicts and the record around them."""

import pytest

from r1ray.evaluation.record import Row, build_record, describe_circumstances, render_table


@pytest.mark.parametrize(
    ("value", "bar", "met"),
    [
        (30.0, ">= 30", True),
        (29.99, ">= 30", False),
        (2.0, "<= 2", True),
        (2.01, "<= 2", False),
        (0.99, "< 1", True),
        (1.0, "< 1", False),
        (0.0, "= 0", True),
        (1.0, None, None),
        (None, "<= 2", None),
    ],
)
def test_a_bar_is_met_exactly_where_the_value_says_so(
    value: float | None, bar: str | None, met: bool | None
) -> None:
    assert Row("a.b", value, "x", bar=bar).met is met


def test_the_record_keeps_missed_bars_and_where_it_was_measured() -> None:
    rows = [
        Row("a.b", 1.0, "points", (0.5, 1.5), "base", 0.0, ">= 30"),
        Row("a.c", 2.0, "s", baseline="a word"),
        Row("a.d", None, "x", bar="< 1"),
    ]
    measured = describe_circumstances()
    record = build_record("a", "python -m jobs.a", rows, measured)
    assert [row["met"] for row in record["results"]] == [False, None, None]
    assert record["results"][0]["interval"] == (0.5, 1.5)
    assert {name: record[name] for name in measured} == measured
    assert record["hardware"]["cores"] >= 1
    table = render_table(rows)
    assert "| `a.b` | 1 points [0.5, 1.5] | base: 0 | >= 30 | **not met** |" in table
    assert "| `a.c` | 2 s | a word |  |  |" in table
    assert "| `a.d` | not measured |  | < 1 |  |" in table
