"""The import path of Serve's YAML files: `deployments.openai_app:build_app`."""

from r1ray.serving.app import build_app

__all__ = ["build_app"]
