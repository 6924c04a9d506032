"""Kubernetes manifests: rendered, then held against schemas and rules; every check can fail.

KubeRay's CRDs are read from KUBERAY_CRD_DIR, or from `shared/kuberay-crds` beside the repository.
"""

import copy
import lzma
import os
import re
import shutil
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

import r1ray
from r1ray.config import load_config
from tests.requirements import skip_loudly
from tests.unit.k8s import manifest_rules as rules

ROOT = Path(__file__).parents[3]
CRD_DIR = Path(os.environ.get("KUBERAY_CRD_DIR") or ROOT.parent / "shared" / "kuberay-crds")
OVERLAYS = ("cpu", "gpu")
VERSION = "1.31"  # of Kubernetes
_KUSTOMIZE = re.compile(r"Kustomize Version: v(\d+)")

Document = dict[str, Any]


def _kustomize_version() -> int:
    if shutil.which("kubectl") is None:
        return 0
    command = ["kubectl", "version", "--client"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    found = _KUSTOMIZE.search(done.stdout)
    return int(found[1]) if found else 0


@pytest.fixture(scope="module")
def schemas() -> dict[str, Any]:
    if not list(CRD_DIR.glob("*.yaml.xz")):
        skip_loudly(f"NO CRDS in {CRD_DIR}: manifests are NOT VALIDATED; set KUBERAY_CRD_DIR")
    found = {}
    for path in sorted(CRD_DIR.glob("*.yaml.xz")):
        definition = yaml.load(lzma.decompress(path.read_bytes()), yaml.CSafeLoader)
        [version] = [item for item in definition["spec"]["versions"] if item["name"] == "v1"]
        schema = rules.close_schema(version["schema"]["openAPIV3Schema"])
        found[definition["spec"]["names"]["kind"]] = schema
    return found


@pytest.fixture(scope="module", params=OVERLAYS)
def documents(request: pytest.FixtureRequest) -> list[Document]:
    if _kustomize_version() < 4:
        skip_loudly("NO kubectl WITH KUSTOMIZE 4 OR NEWER: manifests are NOT RENDERED")
    overlay = str(ROOT / "k8s" / "overlays" / request.param)
    command = ["kubectl", "kustomize", overlay]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return [document for document in yaml.load_all(done.stdout, yaml.CSafeLoader) if document]


def test_rendered_manifests_keep_every_rule(
    documents: list[Document], schemas: dict[str, Any]
) -> None:
    kinds = {document["kind"] for document in documents}
    assert {"RayJob", "RayService", "RayCluster", "NetworkPolicy", "PodMonitor"} <= kinds
    for document in documents:
        name = f"{document['kind']} {document['metadata']['name']}"
        assert not [f"{name}: {complaint}" for complaint in rules.check(document, schemas)]


def test_core_kinds_are_kubernetes_own(documents: list[Document]) -> None:
    foreign = ("ray.io/", "monitoring.coreos.com/")
    core = [item for item in documents if not item["apiVersion"].startswith(foreign)]
    assert len(core) >= 5
    for document in core:
        kubernetes_validate.validate(document, VERSION, strict=True)


def test_everything_is_in_one_namespace(documents: list[Document]) -> None:
    spaces = {
        item["metadata"].get("namespace") for item in documents if item["kind"] != "Namespace"
    }
    assert spaces == {"r1ray"}


def test_what_is_mounted_or_selected_is_there(documents: list[Document]) -> None:
    names = {(item["kind"], item["metadata"]["name"]) for item in documents}
    for document in documents:
        for pod in rules.pods(document):
            for volume in pod.get("volumes", []):
                if claim := volume.get("persistentVolumeClaim"):
                    assert ("PersistentVolumeClaim", claim["claimName"]) in names
                if config := volume.get("configMap"):
                    assert ("ConfigMap", config["name"]) in names


def test_the_pipelines_configuration_loads(documents: list[Document], tmp_path: Path) -> None:
    configs = [item for item in documents if item["kind"] == "ConfigMap"]
    [config] = [item for item in configs if item["metadata"]["name"] == "r1ray-pipeline"]
    path = tmp_path / "pipeline.yaml"
    path.write_text(config["data"]["pipeline.yaml"])
    loaded = load_config(str(path))
    [job] = [item for item in documents if item["kind"] == "RayJob"]
    [service] = [item for item in documents if item["kind"] == "RayService"]
    assert "/etc/r1ray/pipeline.yaml" in job["spec"]["entrypoint"]
    model_dir = f"{loaded.run.root}/{loaded.run.name}/model"
    assert model_dir in service["spec"]["serveConfigV2"]


def test_versions_agree(documents: list[Document]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    [ray] = {
        requirement.partition("==")[2]
        for requirement in project["dependencies"]
        if requirement.startswith("ray[")
    }
    [torch] = [item for item in project["dependencies"] if item.startswith("torch==")]
    for document in documents:
        if cluster := rules.cluster_of(document):
            assert cluster["rayVersion"] == ray
            for pod in rules.pods(document):
                for container in pod["containers"]:
                    image, _, tag = container["image"].partition(":")
                    assert image == "r1ray"
                    assert tag.removesuffix("-gpu") == r1ray.__version__
    dockerfile = (ROOT / "k8s" / "Dockerfile").read_text()
    bases = re.findall(r"rayproject/ray:([\d.]+)-", dockerfile)
    assert set(bases) == {ray}
    assert torch in dockerfile
    constraints = (ROOT / "constraints.txt").read_text()
    assert f"ray=={ray}" in constraints
    assert torch in constraints


def _set(path: str, value: Any) -> Callable[[Document], None]:
    def change(document: Document) -> None:
        *before, last = path.split("/")
        found: Any = document
        for key in before:
            found = found[int(key) if key.isdigit() else key]
        found[int(last) if last.isdigit() else last] = value

    return change


JOB, SERVICE = "spec/rayClusterSpec", "spec/rayClusterConfig"
BROKEN: list[tuple[str, str, Callable[[Document], None], str]] = [
    ("a misspelt key", "RayJob", _set("spec/entrypiont", "x"), "entrypiont"),
    ("a wrong type", "RayJob", _set("spec/backoffLimit", "two"), "backoffLimit"),
    ("a wrong choice", "RayService", _set(f"{SERVICE}/authOptions/mode", "perhaps"), "perhaps"),
    ("a long name", "RayJob", _set("metadata/name", "n" * 48), "48 characters"),
    ("too few replicas", "RayJob", _set(f"{JOB}/workerGroupSpecs/0/minReplicas", 9), "minReplicas"),
    ("a busy head", "RayJob", _set(f"{JOB}/headGroupSpec/rayStartParams", {}), "num-cpus"),
    (
        "resources twice",
        "RayJob",
        _set(f"{JOB}/headGroupSpec/resources", {"CPU": "0"}),
        "rayStartParams, and resources",
    ),
    ("no token", "RayJob", _set(f"{JOB}/authOptions", {"mode": "disabled"}), "authOptions"),
    ("no autoscaler", "RayJob", _set(f"{JOB}/enableInTreeAutoscaling", False), "autoscaler"),
    (
        "no limits",
        "RayJob",
        _set(f"{JOB}/headGroupSpec/template/spec/containers/0/resources", {}),
        "limit of memory",
    ),
    (
        "a key in plain text",
        "RayService",
        _set(
            f"{SERVICE}/workerGroupSpecs/0/template/spec/containers/0/env",
            [{"name": "R1RAY_API_KEYS", "value": "abc"}],
        ),
        "take it from a secret",
    ),
    (
        "a volume that is not there",
        "RayJob",
        _set(f"{JOB}/headGroupSpec/template/spec/volumes", []),
        "mounts artifacts",
    ),
    (
        "no cluster",
        "RayJob",
        lambda document: document["spec"].pop("rayClusterSpec"),
        "exactly one",
    ),
    ("a cluster that stays", "RayJob", _set("spec/shutdownAfterJobFinishes", False), "ttl"),
    ("an unknown environment", "RayJob", _set("spec/runtimeEnvYAML", "pips: [x]"), "pips"),
    (
        "a misspelt key of Serve",
        "RayService",
        lambda document: _edit_serve(document, "route_prefix", "route_perfix"),
        "route_perfix is no key",
    ),
    (
        "a misspelt argument",
        "RayService",
        lambda document: _edit_serve(document, "max_concurrency", "max_concurency"),
        "max_concurency",
    ),
    (
        "a server that listens to itself",
        "RayService",
        lambda document: _edit_serve(document, "0.0.0.0", "127.0.0.1"),
        "loopback",
    ),
    (
        "another port",
        "RayService",
        lambda document: _edit_serve(document, "port: 8000", "port: 8001"),
        "port 8001",
    ),
]


def _edit_serve(document: Document, old: str, new: str) -> None:
    config = document["spec"]["serveConfigV2"]
    assert old in config
    document["spec"]["serveConfigV2"] = config.replace(old, new)


@pytest.mark.parametrize(
    ("kind", "change", "complaint"), [pytest.param(*rest, id=name) for name, *rest in BROKEN]
)
def test_a_broken_manifest_is_found(
    documents: list[Document],
    schemas: dict[str, Any],
    kind: str,
    change: Callable[[Document], None],
    complaint: str,
) -> None:
    [document] = [copy.deepcopy(item) for item in documents if item["kind"] == kind]
    assert not rules.check(document, schemas)
    change(document)
    assert complaint in "\n".join(rules.check(document, schemas))


def test_a_broken_core_kind_is_found(documents: list[Document]) -> None:
    [claim] = [item for item in documents if item["kind"] == "PersistentVolumeClaim"]
    broken = copy.deepcopy(claim)
    broken["spec"]["accessMode"] = ["ReadWriteMany"]
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, VERSION, strict=True)
