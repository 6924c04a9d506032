"""What the source article claims, and what was measured here: the table and the picture of it.

Everything is read from the records under docs/benchmarks/: nothing is typed in by hand.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from r1ray.evaluation.record import list_commits

__all__ = [
    "CLAIMS",
    "VERDICTS",
    "Claim",
    "Finding",
    "find",
    "plot",
    "render",
    "render_page",
    "replace_table",
]

Verdict = Literal["met", "not met", "not measured"]
VERDICTS = get_args(Verdict)

BEGIN, END = "<!-- claims: `make claims` writes what follows -->", "<!-- claims end -->"
_COLORS = {"met": "#2e7d4f", "not met": "#b3261e", "not measured": "#9a9a9a"}


@dataclass(frozen=True)
class Claim:
    """One statement of the article.

    Attributes:
        ids: of the rows, in a record of docs/benchmarks/, that have to be met for it to hold.
    """

    text: str
    ids: tuple[str, ...]


CLAIMS = (
    Claim("Dynamic mixed precision: 40% more throughput", ("precision.throughput_vs_fp32",)),
    Claim(
        "Sparse attention: 65% less memory at 1,024 tokens",
        ("long_context.attention_memory_share_1024",),
    ),
    Claim("Sparse attention: time grows like n log n", ("long_context.prefill_exponent",)),
    Claim("Compressed gradients: 1/8 of the traffic", ("exchange.delta4_bytes_share",)),
    Claim(
        "Asynchronous exchange: 3x on slow links",
        ("exchange.time_to_loss_vs_ddp_fp32_200mbit",),
    ),
    Claim(
        "Quantization-aware training: within 1%",
        ("compression.int8_qat_accuracy_drop", "compression.int8_qat_perplexity_ratio"),
    ),
    Claim(
        "Layered memory: models 3x as large",
        ("compression.layered_trainable_factor", "compression.layered_servable_factor"),
    ),
    Claim("Dynamic batching: 50% more throughput", ("batching.tokens_per_s_vs_random",)),
    Claim(
        "Distilled and INT8: 95% of the accuracy, 120 → 35 ms",
        (
            "compression.distilled_int8_accuracy_kept",
            "compression.distilled_int8_latency_share",
        ),
    ),
    Claim("Long texts in chunks: 4x", ("long_context.chunked_32k_vs_dense",)),
    Claim("Fusion of modalities: best in the middle", ("fusion.mid_vs_best_other",)),
    Claim("Co-design with hardware: 2 to 3x", ("hardware.native_vs_torch",)),
)


@dataclass(frozen=True)
class Finding:
    """A row of the table.

    Attributes:
        row: of the record; None where the claim's row was not filed.
        record: that the row is in.
    """

    claim: Claim
    id: str
    row: Mapping[str, Any] | None
    record: Mapping[str, Any]

    @property
    def verdict(self) -> Verdict:
        """Whether the row meets its bar."""
        if self.row is None or self.row["value"] is None:
            return "not measured"
        return "met" if self.row["met"] else "not met"


def find(folder: Path) -> list[Finding]:
    """What the records in `folder` say of every claim."""
    records = [
        json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))
    ]
    rows = {row["id"]: (row, record) for record in records for row in record["results"]}
    return [
        Finding(claim, id_, *rows.get(id_, (None, {}))) for claim in CLAIMS for id_ in claim.ids
    ]


def render(findings: Sequence[Finding], *, links_to: str) -> str:
    """A Markdown table.

    Args:
        links_to: where the records lie, as seen from the text that has the table.
    """
    lines = ["| claim | measured | against | bar | |", "|---|---|---|---|---|"]
    before = ""
    for finding in findings:
        text = finding.claim.text if finding.claim.text != before else ""
        before = finding.claim.text
        row = finding.row
        if row is None:
            lines.append(f"| {text} | | `{finding.id}` | | not measured |")
            continue
        topic = finding.id.partition(".")[0]
        lines.append(
            f"| {text} | [{_describe(row)}]({links_to}{topic}.md) | {row['baseline'] or ''} | "
            f"{row['bar']} | {finding.verdict} |"
        )
    return "\n".join(lines) + "\n"


def render_page(findings: Sequence[Finding]) -> str:
    """docs/claims.md: the table, and how to get each figure again."""
    lines = ["| figure | command | hardware | commit |", "|---|---|---|---|"]
    for finding in findings:
        if finding.row is None:
            continue
        record = finding.record
        hardware = record["hardware"]
        machine = hardware["gpu"] or f"{hardware['cores']} cores of {hardware['cpu']}"
        flags = ", ".join(hardware["flags"])
        lines.append(
            f"| `{finding.id}` | `{record['command']}` | {machine} ({flags}), "
            f"{hardware['memory_gib']} GiB | {', '.join(list_commits(record))} |"
        )
    table = "\n".join(lines)
    return (
        "# What the article claims, and what was measured\n\n"
        "Written by `make claims` from the records in [benchmarks/](benchmarks/).\n\n"
        f"{render(findings, links_to='benchmarks/')}\n![claims](claims.png)\n\n"
        f"## How to measure again\n\n{table}\n"
    )


def replace_table(text: str, table: str) -> str:
    """`text` with `table` between its marks.

    Raises:
        ValueError: the marks are not there.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"no {BEGIN} ... {END} to write the table between")
    return f"{before}{BEGIN}\n{table}{END}{after}"


def plot(findings: Sequence[Finding], path: Path) -> None:
    """How far each figure is from its bar, in times: right of the line it is met."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(11, 0.42 * len(findings) + 1.2))
    for at, finding in enumerate(reversed(findings)):
        margin, color = _margin(finding), _COLORS[finding.verdict]
        if margin is not None:
            axes.plot([1, margin], [at, at], color=color, linewidth=2)
            axes.plot([margin], [at], "o", color=color)
            text = _describe(finding.row or {})
        else:
            text = "not measured"
        axes.annotate(
            text, (margin or 1, at), (8, 0), textcoords="offset points", va="center", fontsize=8
        )
    axes.axvline(1, color="#333333", linewidth=1)
    axes.set_xscale("log")
    labels = [f"{item.claim.text}\n{item.id}" for item in reversed(findings)]
    axes.set_yticks(range(len(findings)), labels, fontsize=7)
    axes.set_ylim(-0.7, len(findings) - 0.3)
    axes.set_xlabel("better than the bar, times (cut off at 10)")
    axes.set_xlim(0.08, 60)
    axes.set_xticks([0.1, 0.2, 0.5, 1, 2, 5, 10], ["0.1", "0.2", "0.5", "1", "2", "5", "10"])
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _describe(row: Mapping[str, Any]) -> str:
    if row["value"] is None:
        return "not measured"
    text = _number(row["value"])
    if row["interval"] is not None:
        text += f" [{', '.join(map(_number, row['interval']))}]"
    return f"{text} {row['unit']}".strip()


def _number(value: float) -> str:
    return f"{round(value, 4):.3g}"


def _margin(finding: Finding) -> float | None:
    """The value over its bar, or the other way round where less is better."""
    if finding.verdict == "not measured" or finding.row is None:
        return None
    sign, limit = finding.row["bar"].split()
    value, bar = float(finding.row["value"]), float(limit)
    if value <= 0 or bar <= 0:  # such as a drop that is none
        return 10.0 if finding.verdict == "met" else 0.1
    return min(10.0, max(0.1, value / bar if sign.startswith(">") else bar / value))
