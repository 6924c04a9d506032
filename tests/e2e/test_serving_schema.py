"""Everything that the server's own description allows, and what it does not, asked of it."""

from collections.abc import Iterator

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from r1ray.config.serving import ServeConfig
from r1ray.serving.app import start_server, stop_server
from r1ray.serving.openapi import describe_api
from tests.e2e.processes import free_port
from tests.fakes import write_tiny_model

MODEL = "tiny"
# Not `negative_data_rejection`: null, and values that ask for nothing, are taken for any field.
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]

schema = schemathesis.openapi.from_dict(describe_api([MODEL]))


@pytest.fixture(scope="module")
def base_url(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    model_dir = write_tiny_model(tmp_path_factory.mktemp("served"))
    config = ServeConfig(
        model_name=MODEL,
        port=free_port(),
        playground=False,
        max_concurrency=16,
        max_context_tokens=128,
    )
    yield start_server(str(model_dir), config)
    stop_server()


@schema.parametrize()
@settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_every_request_has_an_answer_as_described(case: schemathesis.Case, base_url: str) -> None:
    case.call_and_validate(base_url=base_url, checks=CHECKS, timeout=60)


def test_the_description_is_that_of_the_server(base_url: str) -> None:
    described = httpx.get(f"{base_url}/openapi.json", timeout=30).json()
    assert described == describe_api([MODEL])


def test_a_server_without_a_playground_has_no_page(base_url: str) -> None:
    found = httpx.get(f"{base_url}/", timeout=30)
    assert found.status_code == 404
    assert found.json()["error"]["code"] == "unknown_url"
