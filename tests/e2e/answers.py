"""Reading what a server answers."""

from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

__all__ = ["read_metric", "read_text"]


def read_text(stream: Any) -> str:
    """The whole text of a streamed chat."""
    return "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)


def read_metric(base_url: str, name: str) -> dict[tuple[str, str], float]:
    """Values by model and replica."""
    answer = httpx.get(f"{base_url}/metrics", timeout=30).raise_for_status()
    return {
        (sample.labels["model_name"], sample.labels["replica"]): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
        if sample.name == name
    }
