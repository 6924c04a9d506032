"""Every command of the documents: bash reads it, and each program's arguments are checked.

The blocks run for real in bash, before programs that only write down what they were called with:
loops, quotes and line breaks count as a shell counts them. Then targets, modules, configurations,
overrides, options and requests are looked up where they are defined.
"""

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlparse

import click
import pytest
from ray.scripts.scripts import cli as ray_cli
from ray.serve.scripts import cli as serve_cli

from r1ray.config import load_config
from r1ray.serving.openai_schema import ChatRequest
from r1ray.serving.openapi import describe_api

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
_BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_STUB = '#!/bin/sh\n{ printf "%s\\0" "${0##*/}" "$@"; printf "\\036"; } >> "$RECORD"\n'
_HELM = {"install"}
_KUBECTL = {"apply", "kustomize", "create", "get", "delete", "describe", "logs"}
_RAYS_API = re.compile(r"/api/(train/v2/runs/v1|data/datasets/)")


def _check_make(arguments: list[str]) -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(arguments) <= set(targets)


def _check_bash(arguments: list[str]) -> None:
    assert (ROOT / arguments[0]).exists()


def _check_python(arguments: list[str]) -> None:
    option, module, *rest = arguments
    assert option == "-m"
    assert find_spec(module) is not None, f"no module {module}"
    if module.startswith("jobs.") and "--config" in rest:
        path, *overrides = rest[rest.index("--config") + 1 :]
        load_config(ROOT / path.replace("my.yaml", "jobs/configs/demo.yaml"), overrides)


def _check_click(program: click.Command, arguments: list[str]) -> list[str]:
    """What follows the options, once every option is one of the program's."""
    context = click.Context(program, info_name=program.name)
    while isinstance(program, click.Group):
        name, *arguments = arguments
        found = program.get_command(context, name)
        assert found is not None, f"{program.name} has no {name}"
        program = found
    parsed = program.make_context(program.name, list(arguments)).params
    return list(parsed.get("entrypoint", ()))


def _check_ray(arguments: list[str]) -> None:
    if entrypoint := _check_click(ray_cli, arguments):
        CHECKS[entrypoint[0]](entrypoint[1:])


def _check_serve(arguments: list[str]) -> None:
    _check_click(serve_cli, arguments)
    assert (ROOT / arguments[-1]).exists()


def _check_kubectl(arguments: list[str]) -> None:
    words = arguments[2:] if arguments[0] == "-n" else arguments
    assert words[0] in _KUBECTL
    if "-k" in words or words[0] == "kustomize":
        assert (ROOT / words[-1] / "kustomization.yaml").exists()
    if words[0] == "create" and shutil.which("kubectl") is not None:
        dry = ["kubectl", *arguments, "--dry-run=client", "--output=name"]
        done = subprocess.run(dry, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr


def _check_docker(arguments: list[str]) -> None:
    assert arguments[0] == "build"
    assert (ROOT / arguments[arguments.index("-f") + 1]).exists()


def _check_pipx(arguments: list[str]) -> None:
    assert arguments[0] == "run"
    assert (ROOT / arguments[arguments.index("-r") + 1]).exists()


def _check_helm(arguments: list[str]) -> None:
    assert arguments[0] in _HELM


def _check_curl(arguments: list[str]) -> None:
    [url] = [argument for argument in arguments if argument.startswith("http")]
    path = urlparse(url).path
    if "-d" in arguments:
        ChatRequest.model_validate(json.loads(arguments[arguments.index("-d") + 1]))
    assert path in describe_api([])["paths"] or _RAYS_API.match(path)


CHECKS: dict[str, Callable[[list[str]], None]] = {
    "make": _check_make,
    "bash": _check_bash,
    "python": _check_python,
    "ray": _check_ray,
    "serve": _check_serve,
    "kubectl": _check_kubectl,
    "docker": _check_docker,
    "helm": _check_helm,
    "pipx": _check_pipx,
    "curl": _check_curl,
}


def _called(block: str, home: Path) -> list[list[str]]:
    """What bash would call, in order."""
    programs = home / "programs"
    programs.mkdir(exist_ok=True)
    for name in (*CHECKS, "openssl"):
        (programs / name).write_text(_STUB)
        (programs / name).chmod(0o755)
    record = home / "record"
    record.write_text("")
    done = subprocess.run(
        [shutil.which("bash") or "bash", "-eu", "-c", block],
        cwd=home,
        env={"PATH": str(programs), "RECORD": str(record), "KEY": "k", "JOB_ID": "02000000"}
        | {"RAY_AUTH_TOKEN": "t"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    calls = record.read_text().split("\036")[:-1]
    return [call.split("\0")[:-1] for call in calls]


def _blocks() -> list[tuple[str, str]]:
    return [
        (f"{document.name}-{number}", block)
        for document in DOCUMENTS
        for number, block in enumerate(_BLOCK.findall(document.read_text(encoding="utf-8")))
    ]


@pytest.mark.parametrize(("name", "block"), _blocks(), ids=lambda value: str(value)[:20])
def test_every_command_of_the_documents_can_be_called(
    name: str, block: str, tmp_path: Path
) -> None:
    calls = _called(block, tmp_path)
    assert calls, f"{name} calls nothing that is known"
    for program, *arguments in calls:
        if program != "openssl":
            CHECKS[program](arguments)


@pytest.mark.parametrize(
    "wrong",
    [
        "make demos",
        "python -m jobs.trian --config my.yaml",
        "python -m jobs.train --config my.yaml train.exchange={type:fast}",
        "ray job submit --addres http://head:8265 -- python -m jobs.train --config my.yaml",
        "ray job submit -- python -m jobs.train --config my.yaml run.nme=x",
        "kubectl apply -k k8s/overlays/tpu",
        "docker build -f Dockerfile .",
        "curl http://127.0.0.1:8000/v2/chat",
        """curl http://127.0.0.1:8000/v1/chat/completions -d '{"model": "m"}'""",
        "unheard-of --of",
        "for x in 1; do make demo",
    ],
)
def test_a_wrong_command_is_found(wrong: str, tmp_path: Path) -> None:
    with pytest.raises((Exception, SystemExit)):
        test_every_command_of_the_documents_can_be_called("wrong", wrong, tmp_path)


def test_links_between_documents_lead_somewhere() -> None:
    for document in [*DOCUMENTS, *(ROOT / "docs").glob("*/*.md")]:
        text = document.read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#\s]+)", text):
            if "://" not in target:
                assert (document.parent / target).exists(), f"{document.name}: {target}"
