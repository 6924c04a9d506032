"""Scenes through the whole pipeline with SmolLM2: one run, without statistics.

It shows that every stage takes images, not which fusion is better: some minutes of training on 2
cores are far too few to see with.
"""

import base64
import os
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from jobs.cli import connected_to_ray
from jobs.serve import serving
from r1ray.config import load_config
from r1ray.data.scene_files import write_scenes
from r1ray.files import read_json

__all__ = ["run_end_to_end"]

_CONFIG = "jobs/configs/scenes.yaml"
_NUM_TRAIN, _NUM_HELDOUT, _NUM_SERVED = 1600, 200, 5
_TRAIN, _HELDOUT = 10**6, 0  # first seeds


def run_end_to_end(work: Path, overrides: list[str]) -> dict[str, Any]:
    """Accuracy of base, tuned and INT8 model, and some answers of the server.

    Args:
        work: where scenes and artifacts are kept.
        overrides: of the configuration.
    """
    started = time.perf_counter()
    work.mkdir(parents=True, exist_ok=True)
    train, heldout = work.absolute() / "train.parquet", work.absolute() / "heldout.parquet"
    write_scenes(train, _NUM_TRAIN, first_seed=_TRAIN)
    write_scenes(heldout, _NUM_HELDOUT, first_seed=_HELDOUT)
    for path in (train, heldout):
        os.utime(path, (0, 0))  # of the same content as before: finished stages are found again
    config = load_config(
        _CONFIG,
        [
            f"run.root={work.absolute()}",
            f"prepare.sources=[{{type: images, paths: ['{train}']}}]",
            f"evaluate.images.paths=['{heldout}']",
            *overrides,
        ],
    )
    with connected_to_ray():
        from r1ray.pipeline import Pipeline

        pipeline = Pipeline(config)
        evaluated = read_json(pipeline.evaluate().local_dir / "evaluation.json")
        with serving(pipeline) as url:
            served = _ask(url, config.serve.model_name, heldout)
    return {
        "images": evaluated["images"],
        "served": served,
        "training": pipeline.train().manifest.metrics,
        "seconds": time.perf_counter() - started,
    }


def _ask(url: str, model: str, heldout: Path) -> list[dict[str, str]]:
    """The first questions, through the `openai` client."""
    from openai import OpenAI

    key = os.environ.get("R1RAY_API_KEYS", "not-needed").split(",")[0].strip()
    client = OpenAI(base_url=url, api_key=key, timeout=120, max_retries=0)
    found = []
    for row in pq.read_table(heldout).slice(0, _NUM_SERVED).to_pylist():
        image = f"data:image/png;base64,{base64.b64encode(row['image']).decode()}"
        answer = client.chat.completions.create(
            model=model,
            messages=[
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": image}},
                        {"type": "text", "text": row["question"]},
                    ],
                }
            ],
            max_tokens=8,
            temperature=0,
        )
        reply = answer.choices[0].message.content or ""
        found.append({"question": row["question"], "expected": row["answer"], "reply": reply})
    return found
