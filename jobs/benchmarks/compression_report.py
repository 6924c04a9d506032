"""The page docs/benchmarks/compression.md."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs.benchmarks.compression_models import NUM_PROBLEMS
from jobs.benchmarks.compression_rows import Results, list_students, quantization_arms
from jobs.benchmarks.compression_students import STUDENT_STEPS
from r1ray.evaluation.accuracy import proportion
from r1ray.evaluation.record import Row, describe_run, render_table

__all__ = ["write_report"]


def write_report(
    record: Mapping[str, Any], rows: Sequence[Row], results: Results, target: Path
) -> str:
    """Write the page beside the record; returns its table of rows."""
    table = render_table(rows)
    text = (
        f"# Compression\n\n{describe_run(record)}\n\n"
        f"{_render_arms(results)}\n{_render_students(results)}\n{table}\n"
        f"{_render_placements(results)}\n{_NOTES}"
    )
    (target / "compression.md").write_text(text, encoding="utf-8")
    return table


def _render_placements(results: Results) -> str:
    """Where the parts of the largest models were, and what their steps took."""
    lines = ["Placement under the budget; every step touches every part once:", ""]
    for task in ("train", "serve"):
        found = results[f"layers_{task}"]
        for size, layers in (("tiered", "plain_layers"), ("largest", "tiered_layers")):
            warm, cold = found[size], found[f"{size}_cold"]
            lines.append(
                f"- {task}, {found[layers]} layers: {warm['placement']}; "
                f"{warm['seconds']:.2f} s, with a cold page cache {cold['seconds']:.2f} s"
            )
    return "\n".join(lines) + "\n"


def _render_arms(results: Results) -> str:
    lines = [
        "| model | accuracy | task perplexity | English | MB on disk | MB resident | ms a token |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, arm in quantization_arms(results).items():
        share = proportion(arm["is_correct"])
        resident = arm["resident_bytes"]
        low, high = 100 * share.low, 100 * share.high
        lines.append(
            f"| {name} | {100 * share.value:.1f}% [{low:.1f}, {high:.1f}] | "
            f"{arm['task_perplexity']:.4f} | {arm['english_perplexity']:.2f} | "
            f"{arm['weight_bytes'] / 1e6:.0f} | "
            f"{'' if resident is None else f'{resident / 1e6:.0f}'} | "
            f"{statistics.median(arm['decode_ms']):.1f} |"
        )
    return "\n".join(lines) + "\n"


def _render_students(results: Results) -> str:
    """Teacher and students, with the device that they were trained and judged on."""
    hardware = results["teacher"]["circumstances"]["hardware"]
    lines = [
        f"Students and their teacher, on {hardware['gpu'] or 'the same processor'}:",
        "",
        "| model | tokens | accuracy | task perplexity |",
        "|---|---|---|---|",
    ]
    for name, arm, tokens in list_students(results):
        share = proportion(arm["is_correct"])
        lines.append(
            f"| {name} | {tokens:,.0f} | {100 * share.value:.1f}% "
            f"[{100 * share.low:.1f}, {100 * share.high:.1f}] | {arm['task_perplexity']:.4f} |"
        )
    return "\n".join(lines) + "\n"


_NOTES = f"""
- {NUM_PROBLEMS} held-out problems, greedy; drops are paired, with a bootstrapped 95% interval.
  Every quantization arm trains 100 steps on the same batches from SmolLM2-135M-Instruct, which is
  itself rounded to 4 bits in groups of 32. bf16: weights and activations.
- Rotated arms, int8_qat among them, are rounded in another basis (docs/adr/0018-rotation.md). When
  rounding begins in training, and that there is a basis, were chosen by results on these problems
  and this text.
- Arms that trained through rounding cost what the same format costs without: resident memory and
  times in the table are those. Times of a row and of fp32 were taken in turns, those of different
  rows at different times: the shares below compare, the table's milliseconds do not.
- Task perplexity: target tokens of the held-out problems' own traces. English: 16,384 tokens of
  Python's documentation.
- Resident: what loading and one forward of 16 tokens add at their peak to a process that has
  imported everything and run a small model (the kernel's VmHWM).
- Codebooks against uniform: float activations; scales, codebooks and outliers counted, the same
  outliers, and groups so small that uniform never has fewer bits. Uniform ranges are clipped to the
  least squared error of each group; symmetric and with an offset, the better one is the baseline.
- Students: 10 of the 30 layers (a third of the parameters outside of embeddings); taught ones (kd)
  for {STUDENT_STEPS} steps with a teacher beside them, the others (sft) for as many more as have
  the operations of the teacher's forward. The teacher is tuned on the same device, as the demo does
  it (100 steps). On a GPU, float32 products are rounded to TF32. Intervals: seeds, as far as
  measured.
- Latency: the text of 40 answers of the tuned model, decoded token by token by each model in turn;
  the student there is one as it is cut, since a token costs the same whatever the weights hold.
- KL errors: |KL - dense KL| of single targets, over the mean dense KL, between the tuned model
  and its four-bit one; from logits as they are stored (16 bits).
- Layers: SmolLM2's widths, a vocabulary of 4,096, random weights; 4 x 64 tokens a step, AdamW in
  float32; or a prompt of 32 tokens and 8 more, float32 weights. Peaks are the kernel's VmHWM above
  the process's baseline; the page cache, up to 16 bytes a parameter, is not in them. Sizes are
  searched up to six times the untiered one. Times: medians of five after a warm-up, at the largest
  size that fits without tiers.
"""
