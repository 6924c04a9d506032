"""Why a model does not answer yet: what Serve says, or what its replicas wait for.

Serve itself keeps a deployment "updating" without a word, where a replica finds no room as well as
where it loads for long.
"""

from collections.abc import Mapping
from typing import Any

import ray
from ray import serve

from r1ray.config.serving import EngineConfig, list_groups

__all__ = ["deployment_name", "explain_waiting", "find_failure"]


def deployment_name(model_name: str, group: str | None = None) -> str:
    """Of the replicas of a model, or of a group of them. No model's name has the sign between."""
    return f"engine-{model_name}" if group is None else f"engine-{model_name}@{group}"


def find_failure(app_name: str) -> str | None:
    """What made the application's deployment fail for good; None where it did not."""
    application = serve.status().applications.get(app_name)
    if application is None or application.status != "DEPLOY_FAILED":
        return None
    # The application's message only names the deployments; theirs end with the traceback.
    reasons = [
        f"{name}: {item.message}" for name, item in application.deployments.items() if item.message
    ]
    return "\n".join([application.message, *reasons])


def explain_waiting(app_name: str, config: EngineConfig) -> str:
    """Why no replica of a model answers, in one line. Blocks for what Ray has to say."""
    reasons = {
        name: _explain(app_name, deployment_name(config.model_name, name), group)
        for name, group in list_groups(config).items()
    }
    return "; ".join(
        reason if name is None else f"group {name}: {reason}" for name, reason in reasons.items()
    )


def _explain(app_name: str, deployment: str, config: EngineConfig) -> str:
    application = serve.status().applications.get(app_name)
    found = None if application is None else application.deployments.get(deployment)
    if found is not None and found.message:
        return found.message.strip().splitlines()[-1].strip()
    states: Mapping[Any, int] = {} if found is None else found.replica_states
    if not states.get("STARTING"):
        return "no replica has been started"
    wanted = {
        "num_cpus_per_replica": ("CPU", config.num_cpus_per_replica),
        "num_gpus_per_replica": ("GPU", config.num_gpus_per_replica),
        **{
            f"resources_per_replica.{kind}": (kind, amount)
            for kind, amount in config.resources_per_replica.items()
        },
    }
    for key, (kind, needed) in wanted.items():
        free, there_are = (
            found.get(kind, 0) for found in (ray.available_resources(), ray.cluster_resources())
        )
        if needed > there_are:
            return (
                f"a replica needs {needed:g} {kind} and the cluster has {there_are:g}; lower "
                f"{key}, or add nodes"
            )
        if needed > free:  # which may be what this replica has taken
            return (
                f"a replica is loading the model, or waits for {needed:g} {kind} ({free:g} of "
                f"{there_are:g} are free)"
            )
    return "a replica is loading the model"
