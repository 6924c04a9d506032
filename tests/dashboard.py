"""Grafana's dashboard as the tests see it."""

import json
import re
from pathlib import Path
from typing import Any

__all__ = ["named_metrics", "read_panels"]

_PATH = Path(__file__).parents[1] / "k8s" / "base" / "dashboards" / "r1ray.json"
_NAME = re.compile(r"\b(?:r1ray:|ray_)\w+")


def read_panels() -> list[dict[str, Any]]:
    panels: list[dict[str, Any]] = json.loads(_PATH.read_text(encoding="utf-8"))["panels"]
    return panels


def named_metrics() -> list[set[str]]:
    """The metrics of every query."""
    queries = [target["expr"] for panel in read_panels() for target in panel.get("targets", [])]
    return [set(_NAME.findall(query)) for query in queries]
