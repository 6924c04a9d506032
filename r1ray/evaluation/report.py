"""The report of a run: `report.md`, `report.json` and plots in the run's root directory.

Everything comes from the artifacts' manifests and files, so it can be written again at any time.
"""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from r1ray.artifacts import Artifact, ArtifactStore
from r1ray.evaluation.evaluate import EVALUATION_NAME, REPLIES_NAME
from r1ray.evaluation.plots import plot_accuracy, plot_size_latency, plot_training
from r1ray.evaluation.record import Row, build_record, render_table, write_json
from r1ray.files import TABLE_BYTES, read_json

__all__ = ["write_report"]

HISTORY_NAME = "history.json"  # of the train stage; evaluation does not import training
_EXAMPLES_PER_KIND = 2


def write_report(
    store: ArtifactStore,
    artifacts: Mapping[str, Artifact],
    *,
    name: str,
    command: str,
    serve_s: float | None = None,
) -> str:
    """Write the report of finished artifacts (stage -> artifact); returns report.md's location.

    Phases that are learned in a row are stages of their own; `prepare` and `train` are the last's.

    Args:
        name: of the run; the rows' ids begin with it.
        serve_s: seconds that serving took in this run, when it ran.
    """
    evaluated = artifacts["evaluate"].local_dir
    evaluation = read_json(evaluated / EVALUATION_NAME)
    results = evaluation["models"]
    history = read_json(artifacts["train"].local_dir / HISTORY_NAME, max_bytes=TABLE_BYTES)
    durations = {stage: artifact.manifest.duration_s for stage, artifact in artifacts.items()}
    if serve_s is not None:
        durations["serve"] = serve_s
    rows = _rows(name, evaluation, artifacts["compress"].manifest.metrics, durations)
    record = build_record(name, command, rows, evaluation["circumstances"])
    record["durations_s"] = durations
    record["stage_commits"] = {
        stage: artifact.manifest.commit for stage, artifact in artifacts.items()
    }
    with tempfile.TemporaryDirectory(prefix="r1ray-report-") as temporary:
        directory = Path(temporary)
        plot_training(history, directory / "training.png")
        plot_accuracy(results, directory / "accuracy.png")
        plot_size_latency(results, directory / "size_latency.png")
        write_json(directory / "report.json", record)
        text = _render(name, record, rows, evaluation, artifacts)
        (directory / "report.md").write_text(text, encoding="utf-8")
        store.publish(directory)
    return f"{store.path}/report.md"


def _rows(
    name: str,
    evaluation: Mapping[str, Any],
    compressed: Mapping[str, Any],
    durations: Mapping[str, float],
) -> list[Row]:
    models = evaluation["models"]
    _, _, quantized = models
    base, tuned = models["base"]["accuracy"], models["tuned"]["accuracy"]
    gain, gain_low, gain_high = (100 * value for value in evaluation["gain"])
    drop, drop_low, drop_high = (100 * value for value in evaluation["drop"])

    def accuracy(model: str, share: Mapping[str, float], bar: str | None = None) -> Row:
        interval = (share["low"], share["high"])
        return Row(f"{name}.{model}_accuracy", share["value"], "share", interval, bar=bar)

    # Families are drawn in equal parts, so the mean over problems is the mean over families.
    return [
        accuracy("base", base),
        accuracy("tuned", tuned),
        accuracy(quantized, models[quantized]["accuracy"]),
        Row(
            f"{name}.tuned_gain_points",
            gain,
            "points",
            (gain_low, gain_high),
            baseline="base model, same problems",
            baseline_value=100 * base["value"],
            bar=">= 30",
        ),
        Row(
            f"{name}.{quantized}_drop_points",
            drop,
            "points",
            (drop_low, drop_high),
            baseline="tuned model in fp32",
            baseline_value=100 * tuned["value"],
            bar="<= 2",
        ),
        Row(
            f"{name}.{quantized}_size_share",
            compressed["size_share"],
            "share",
            baseline="tuned model in fp32, bytes",
            baseline_value=compressed["float_bytes"],
            bar="<= 0.3",
        ),
        *(
            accuracy(f"{model}_image", found["accuracy"])
            for model, found in evaluation.get("images", {}).items()
        ),
        Row(f"{name}.seconds", sum(durations.values()), "s, all stages"),
    ]


def _render(
    name: str,
    record: Mapping[str, Any],
    rows: list[Row],
    evaluation: Mapping[str, Any],
    artifacts: Mapping[str, Artifact],
) -> str:
    results, images = evaluation["models"], evaluation.get("images")
    parts = [
        f"# Run `{name}`",
        _describe_machine(record),
        render_table(rows),
        "## Models",
        _model_table(results),
        "The accuracy counts a reply when the text after `</think>` gets full marks from the task "
        "family's own scorer. *Mentions* counts replies whose last line holds the expected answer "
        "in whatever form: it tells knowing the answer from keeping to the format. The base model "
        "of the demo was already rounded to 4 bits by its publisher.",
        *([] if images is None else ["## Questions about images", _image_table(images)]),
        "![Held-out problems solved](accuracy.png)",
        "![Size and latency](size_latency.png)",
        "## Training",
        _describe_training(artifacts),
        "![Training by step](training.png)",
        "## Where the time went",
        "\n".join(
            f"- {stage}: {seconds:.0f} s" for stage, seconds in record["durations_s"].items()
        ),
        "## What did not work",
        "Recipes that were tried before are in docs/experiments.md. In this run:",
        _failures(artifacts["evaluate"].local_dir / REPLIES_NAME, results),
    ]
    return "\n\n".join(parts) + "\n"


def _describe_machine(record: Mapping[str, Any]) -> str:
    hardware = record["hardware"]
    flags = ", ".join(hardware["flags"]) or "no vector flags"
    return (
        f"{record['date']}, commit {record['commit']}, `{record['command']}`, "
        f"on {hardware['cores']} cores of {hardware['cpu']} ({flags}), "
        f"{hardware['memory_gib']} GiB, GPU: {hardware['gpu'] or 'none'}."
    )


def _describe_training(artifacts: Mapping[str, Artifact]) -> str:
    trained = artifacts["train"].manifest.metrics
    prepared = artifacts["prepare"].manifest.metrics
    rate, waited = trained["tokens_per_s"], 100 * trained["exchange_wait_share"]
    phases = sum(stage.startswith("train ") for stage in artifacts)
    which = f"The last of {phases + 1} phases: " if phases else ""
    return (
        f"{which}{trained['steps']} steps over {trained['tokens']} tokens at {rate:.0f} tokens/s, "
        f"{waited:.1f}% of the time spent waiting for the exchange; "
        f"loss {trained['first_loss']:.3f} to {trained['final_loss']:.3f}. "
        f"{prepared['num_samples']} samples in {prepared['num_batches']} batches, "
        f"{100 * prepared['padding_share']:.1f}% padding, "
        f"{prepared['num_quarantined']} quarantined."
    )


def _model_table(results: Mapping[str, Any]) -> str:
    families = list(next(iter(results.values()))["by_family"])
    header = ["model", "accuracy", *families, "mentions", "perplexity", "MB", "decode ms/token"]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for model, result in results.items():
        cells = [
            model,
            _percent(result["accuracy"]),
            *(f"{100 * result['by_family'][family]['value']:.0f}%" for family in families),
            f"{100 * result['mentions_answer']['value']:.0f}%",
            "not finite" if result["perplexity"] is None else f"{result['perplexity']:.2f}",
            f"{result['weight_bytes'] / 1e6:.0f}",
            f"{result['latency']['decode_ms_per_token']:.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _image_table(images: Mapping[str, Any]) -> str:
    """Exact answers of every model: of all questions, and by their kind."""
    kinds = list(next(iter(images.values()))["by_kind"])
    lines = ["| model | accuracy | " + " | ".join(kinds) + " |", "|---" * (2 + len(kinds)) + "|"]
    for model, found in images.items():
        by_kind = (f"{100 * found['by_kind'][kind]['value']:.0f}%" for kind in kinds)
        lines.append(f"| {model} | {_percent(found['accuracy'])} | " + " | ".join(by_kind) + " |")
    return "\n".join(lines)


def _percent(share: Mapping[str, float]) -> str:
    return (
        f"{100 * share['value']:.1f}% [{100 * share['low']:.0f}, {100 * share['high']:.0f}], "
        f"n={share['count']:.0f}"
    )


def _failures(replies: Path, results: Mapping[str, Any]) -> str:
    """The tuned model's weakest families, with replies that were wrong."""
    tuned = results["tuned"]["by_family"]
    wrong: dict[str, list[dict[str, Any]]] = {family: [] for family in tuned}
    with replies.open(encoding="utf-8") as stream:
        for line in stream:
            reply = json.loads(line)
            if reply["model"] == "tuned" and not reply["is_correct"]:
                wrong[reply["family"]].append(reply)
    parts = []
    for family in sorted(tuned, key=lambda item: tuned[item]["value"]):
        if not wrong[family]:
            continue
        share, count = tuned[family], len(wrong[family])
        parts.append(f"**{family}**: {count} of {share['count']} problems failed. Examples:")
        for reply in wrong[family][:_EXAMPLES_PER_KIND]:
            shown = " ⏎ ".join(reply["reply"].splitlines())
            question = " ".join(reply["question"].split())[-160:]
            parts.append(
                f"- …{question}\n  - replied: `{shown}`\n  - expected: `{reply['expected']}`"
            )
    return "\n\n".join(parts) if parts else "Every held-out problem was solved by the tuned model."
