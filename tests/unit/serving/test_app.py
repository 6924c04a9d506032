"""The typed builder's arguments and the YAML files that carry them."""

import socket
from pathlib import Path
from typing import Any, cast, get_args

import pytest
import ray
import yaml
from pydantic import BaseModel, ValidationError
from ray.serve.schema import ServeDeploySchema

from r1ray.config.serving import ServeConfig
from r1ray.errors import ConfigError
from r1ray.serving.app import ServeArgs, _check_guard, start_server
from tests.fakes import write_tiny_model

DEPLOYMENTS = Path(__file__).parents[3] / "deployments"
YAML_FILES = sorted(DEPLOYMENTS.glob("*.yaml"))


def unknown_keys(schema: type[BaseModel], tree: dict[str, Any], where: str = "") -> list[str]:
    """Keys that Serve's schema does not have; Serve itself ignores them without a word."""
    unknown = []
    for key, value in tree.items():
        field = schema.model_fields.get(key)
        if field is None:
            unknown.append(where + key)
            continue
        kinds = [field.annotation, *get_args(field.annotation)]
        nested = [k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)]
        for item in value if isinstance(value, list) else [value]:
            if nested and isinstance(item, dict):
                unknown += unknown_keys(nested[0], item, f"{where}{key}.")
    return unknown


@pytest.mark.parametrize("path", YAML_FILES, ids=lambda path: path.name)
def test_yaml_has_only_keys_that_serve_and_the_builder_know(path: Path) -> None:
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert unknown_keys(ServeDeploySchema, tree) == []
    for application in ServeDeploySchema.model_validate(tree).applications:
        assert application.import_path == "deployments.openai_app:build_app"
        ServeArgs.model_validate(application.args)


def test_local_yaml_listens_on_loopback_only() -> None:
    tree = yaml.safe_load((DEPLOYMENTS / "serve_local.yaml").read_text(encoding="utf-8"))
    assert tree["http_options"]["host"] == "127.0.0.1"


@pytest.mark.parametrize(
    "tree",
    [
        {"http_option": {}},
        {"http_options": {"hosts": ""}},
        {"applications": [{"import_pat": ""}]},
        {"applications": [{"deployments": [{"nam": ""}]}]},
    ],
)
def test_misspelt_serve_keys_are_found(tree: dict[str, Any]) -> None:
    assert len(unknown_keys(ServeDeploySchema, tree)) == 1


def test_unknown_argument_of_the_builder_is_refused() -> None:
    with pytest.raises(ValidationError, match="max_concurency"):
        ServeArgs.model_validate(
            {"models": [{"model_dir": "d", "model_name": "m", "max_concurency": 1}]}
        )


def test_models_have_names_of_their_own() -> None:
    model = {"model_dir": "d", "model_name": "m"}
    with pytest.raises(ValidationError, match="has a name twice"):
        ServeArgs.model_validate({"models": [model, model]})


def test_fewer_replicas_at_most_than_at_least_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"max_replicas \(1\) is below num_replicas \(2\)"):
        ServeConfig(model_name="tiny", num_replicas=2, max_replicas=1)


def test_port_in_use_is_named_before_anything_starts(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        config = ServeConfig(model_name="tiny", port=port, max_context_tokens=64)
        with pytest.raises(ConfigError, match=f"port {port} cannot be listened on"):
            start_server(str(write_tiny_model(tmp_path)), config)


def test_context_beyond_the_model_is_named_before_anything_starts(tmp_path: Path) -> None:
    config = ServeConfig(model_name="tiny", max_context_tokens=300)
    with pytest.raises(ConfigError, match=r"max_context_tokens \(300\) is above .* 256 positions"):
        start_server(str(write_tiny_model(tmp_path)), config)


def test_a_server_that_nothing_guards_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: object, *, timeout: float) -> None:
        raise ray.exceptions.RayActorError(error_msg="no pidfd_open")

    monkeypatch.setattr(ray, "get", fail)
    _check_guard(cast(Any, object()))
    assert "end it then with `serve shutdown`" in caplog.text
    assert "no pidfd_open" in caplog.text
    caplog.clear()
    _check_guard(None)
    assert not caplog.text
