"""What rendered manifests must keep: KubeRay's schemas, and what these do not say.

Each rule is a function from one document to complaints; none where it is fine or says nothing of
such a document.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jsonschema
import pydantic
import yaml
from ray.runtime_env import RuntimeEnv
from ray.serve.schema import ServeDeploySchema

from r1ray.serving.app import ServeArgs

__all__ = ["RULES", "check", "close_schema", "cluster_of", "pod_names", "pods"]

Document = Mapping[str, Any]

LONGEST_NAME = 47  # KubeRay makes names of 63 characters of it
_SECRET = re.compile(r"KEY|TOKEN|PASSWORD|SECRET", re.IGNORECASE)
_CLUSTERS = {
    "RayCluster": ("spec",),
    "RayJob": ("spec", "rayClusterSpec"),
    "RayService": ("spec", "rayClusterConfig"),
}


def close_schema(schema: Any) -> Any:
    """A CRD's schema as JSON Schema that refuses unknown keys.

    Kubernetes' own extensions become what they mean; keys with a default may be left out.
    """
    if isinstance(schema, list):
        return [close_schema(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: close_schema(value) for key, value in schema.items()}
    properties = schema.get("properties")
    if isinstance(properties, dict):
        with_default = {
            name
            for name, item in properties.items()
            if isinstance(item, dict) and "default" in item
        }
        if isinstance(schema.get("required"), list):
            found["required"] = [name for name in schema["required"] if name not in with_default]
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            found.setdefault("additionalProperties", False)
        if "metadata" in properties and properties["metadata"] == {"type": "object"}:
            found["properties"]["metadata"] = {"type": "object"}
    if schema.get("x-kubernetes-int-or-string"):
        found.pop("type", None)
        found["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    if schema.get("nullable") and isinstance(schema.get("type"), str):
        found["type"] = [schema["type"], "null"]
    return found


def check(document: Document, schemas: Mapping[str, Any]) -> list[str]:
    """All complaints about one document.

    Args:
        schemas: closed ones of KubeRay's kinds; others are not looked at by schema.
    """
    found = []
    if schema := schemas.get(document["kind"]):
        validator = jsonschema.Draft202012Validator(schema)
        found += [
            f"{error.json_path}: {error.message}" for error in validator.iter_errors(document)
        ]
    for rule in RULES:
        found += rule(document)
    return found


def name_is_short(document: Document) -> Iterator[str]:
    """Longer ones make names that Kubernetes refuses."""
    name = document["metadata"]["name"]
    if document["kind"] in _CLUSTERS and len(name) > LONGEST_NAME:
        yield f"metadata.name {name!r} has {len(name)} characters; at most {LONGEST_NAME}"


def groups_have_room(document: Document) -> Iterator[str]:
    """min <= replicas <= max, and no group's name twice."""
    groups = cluster_of(document).get("workerGroupSpecs", [])
    names = [group["groupName"] for group in groups]
    if len(set(names)) < len(names):
        yield f"workerGroupSpecs {names} has a name twice"
    for group in groups:
        sizes = [group.get(key, 0) for key in ("minReplicas", "replicas", "maxReplicas")]
        if sizes != sorted(sizes):
            yield f"group {group['groupName']}: minReplicas, replicas, maxReplicas are {sizes}"


def head_runs_no_work(document: Document) -> Iterator[str]:
    """Whatever fills the head's memory ends the cluster."""
    cluster = cluster_of(document)
    if cluster and cluster["headGroupSpec"]["rayStartParams"].get("num-cpus") != "0":
        yield 'headGroupSpec.rayStartParams has no num-cpus: "0"'


def resources_are_said_once(document: Document) -> Iterator[str]:
    """KubeRay refuses groups that have them in `rayStartParams` and in `resources`."""
    cluster = cluster_of(document)
    groups = [cluster["headGroupSpec"], *cluster.get("workerGroupSpecs", [])] if cluster else []
    for group in groups:
        twice = {"num-cpus", "num-gpus", "memory", "resources"} & group["rayStartParams"].keys()
        if group.get("resources") and twice:
            yield f"{sorted(twice)} in rayStartParams, and resources besides"


def cluster_asks_for_a_token(document: Document) -> Iterator[str]:
    """Without it, whoever reaches the dashboard runs what they like."""
    cluster = cluster_of(document)
    if cluster and cluster.get("authOptions", {}).get("mode") != "token":
        yield "authOptions.mode is not token"


def autoscaler_is_the_second(document: Document) -> Iterator[str]:
    """Where groups may grow, Ray's own autoscaler has to be there, in its second version."""
    cluster = cluster_of(document)
    grows = any(
        group.get("maxReplicas", 0) > group.get("minReplicas", 0)
        for group in cluster.get("workerGroupSpecs", [])
    )
    if grows and not (
        cluster.get("enableInTreeAutoscaling")
        and cluster.get("autoscalerOptions", {}).get("version") == "v2"
    ):
        yield "groups may grow, but there is no autoscaler v2"


def containers_have_limits(document: Document) -> Iterator[str]:
    """Ray takes a container's limits for its resources; without them, those of the whole node."""
    for container in _containers(document):
        resources = container.get("resources", {})
        for kind in ("cpu", "memory"):
            if kind not in resources.get("limits", {}) or kind not in resources.get("requests", {}):
                yield f"container {container['name']} has no request and limit of {kind}"


def secrets_are_references(document: Document) -> Iterator[str]:
    """No key, token or password is written down."""
    for container in _containers(document):
        for variable in container.get("env", []):
            if _SECRET.search(variable["name"]) and "value" in variable:
                yield f"env {variable['name']} has a value; take it from a secret"
    password = cluster_of(document).get("gcsFaultToleranceOptions", {}).get("redisPassword", {})
    if "value" in password:
        yield "redisPassword has a value; take it from a secret"


def volumes_are_there(document: Document) -> Iterator[str]:
    """What containers mount is among their pod's volumes."""
    for pod in pods(document):
        volumes = {volume["name"] for volume in pod.get("volumes", [])}
        for container in pod["containers"]:
            for mount in container.get("volumeMounts", []):
                if mount["name"] not in volumes:
                    yield f"{container['name']} mounts {mount['name']}, which is not there"


def job_is_whole(document: Document) -> Iterator[str]:
    """Of a RayJob: what its schema does not see."""
    if document["kind"] != "RayJob":
        return
    spec = document["spec"]
    if ("rayClusterSpec" in spec) == ("clusterSelector" in spec):
        yield "exactly one of rayClusterSpec and clusterSelector has to be there"
    if "ttlSecondsAfterFinished" in spec and not spec.get("shutdownAfterJobFinishes"):
        yield "ttlSecondsAfterFinished needs shutdownAfterJobFinishes"
    try:
        environment = yaml.safe_load(spec.get("runtimeEnvYAML", "")) or {}
        RuntimeEnv(**environment)
    except (TypeError, ValueError, yaml.YAMLError) as error:
        yield f"runtimeEnvYAML: {error}"
    else:
        if unknown := environment.keys() - RuntimeEnv.known_fields:
            yield f"runtimeEnvYAML: {sorted(unknown)} are no fields of a runtime environment"


def serve_config_is_known(document: Document) -> Iterator[str]:
    """serveConfigV2 is a string to Kubernetes, and Serve takes keys that it does not know."""
    if document["kind"] != "RayService":
        return
    try:
        config = yaml.safe_load(document["spec"]["serveConfigV2"])
        parsed = ServeDeploySchema.model_validate(config)
    except (yaml.YAMLError, pydantic.ValidationError, ValueError) as error:
        yield f"serveConfigV2: {error}"
        return
    yield from (f"serveConfigV2: {path} is no key of Serve" for path in _unknown(config, parsed))
    for application in config["applications"]:
        try:
            ServeArgs.model_validate(application.get("args", {}))
        except pydantic.ValidationError as error:
            yield f"serveConfigV2: args of {application['name']}: {error}"
    if parsed.http_options.host in ("127.0.0.1", "localhost"):
        yield "serveConfigV2: http_options.host is loopback, which no other pod reaches"
    ports = [
        port["containerPort"]
        for container in _containers(document)
        for port in container.get("ports", [])
        if port["name"] == "serve"
    ]
    if set(ports) != {parsed.http_options.port}:
        yield f"serveConfigV2: port {parsed.http_options.port}, but containers have {ports}"


RULES: tuple[Callable[[Document], Iterator[str]], ...] = (
    name_is_short,
    groups_have_room,
    head_runs_no_work,
    resources_are_said_once,
    cluster_asks_for_a_token,
    autoscaler_is_the_second,
    containers_have_limits,
    secrets_are_references,
    volumes_are_there,
    job_is_whole,
    serve_config_is_known,
)


def cluster_of(document: Document) -> dict[str, Any]:
    """The specification of the Ray cluster that a document has; empty where it has none."""
    found: Any = document
    for key in _CLUSTERS.get(document["kind"], ("",)):
        found = found.get(key, {})
    return dict(found)


def pods(document: Document) -> Iterator[dict[str, Any]]:
    cluster = cluster_of(document)
    if not cluster:
        return
    for group in (cluster["headGroupSpec"], *cluster.get("workerGroupSpecs", [])):
        yield group["template"]["spec"]
    if submitter := document["spec"].get("submitterPodTemplate"):
        yield submitter["spec"]


def pod_names(document: Document) -> set[str]:
    """What the pods of a document are called by their label."""
    cluster = cluster_of(document)
    groups = [cluster["headGroupSpec"], *cluster.get("workerGroupSpecs", [])] if cluster else []
    return {group["template"]["metadata"]["labels"]["app.kubernetes.io/name"] for group in groups}


def _containers(document: Document) -> Iterator[dict[str, Any]]:
    for pod in pods(document):
        yield from pod["containers"]


def _unknown(given: Any, parsed: pydantic.BaseModel, path: str = "") -> Iterator[str]:
    """Keys of `given` that the model does not have, at any depth."""
    for key, value in given.items():
        here = f"{path}{key}"
        if key not in type(parsed).model_fields:
            yield here
            continue
        field = getattr(parsed, key)
        if isinstance(field, pydantic.BaseModel) and isinstance(value, dict):
            yield from _unknown(value, field, f"{here}.")
        elif isinstance(field, list):
            for index, (item, model) in enumerate(zip(value, field, strict=False)):
                if isinstance(model, pydantic.BaseModel):
                    yield from _unknown(item, model, f"{here}[{index}].")
