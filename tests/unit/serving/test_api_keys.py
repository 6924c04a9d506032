"""Who is answered."""

from typing import Any

import httpx
import pytest
from fastapi import Depends, FastAPI
from fastapi.testclient import TestClient

from r1ray.errors import ConfigError, ServingError
from r1ray.serving import api_keys
from r1ray.serving.api_keys import ENVIRONMENT_NAME, check_key, read_keys, require_key
from r1ray.serving.ingress import app as served_app
from r1ray.serving.responses import add_error_handlers


def test_without_keys_everybody_is_answered() -> None:
    assert read_keys(None) == frozenset()
    check_key(None, frozenset())
    check_key("Bearer anything", frozenset())


@pytest.mark.parametrize("header", ["Bearer one", "bearer two", "Bearer  one "])
def test_any_of_the_keys_will_do(header: str) -> None:
    check_key(header, read_keys(" one, two ,,"))


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer ", "Bearer three", "Basic one", "one", "Bearer one,two"]
)
def test_others_are_refused(header: str | None) -> None:
    with pytest.raises(ServingError, match="Authorization: Bearer KEY") as caught:
        check_key(header, read_keys("one,two"))
    assert (caught.value.status, caught.value.code) == (401, "invalid_api_key")
    assert "three" not in str(caught.value)


@pytest.mark.parametrize("text", ["", " , ,"])
def test_a_variable_without_a_key_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="R1RAY_API_KEYS is set, but holds no key"):
        read_keys(text)


def test_keys_guard_a_route(monkeypatch: pytest.MonkeyPatch) -> None:
    app = FastAPI()
    add_error_handlers(app)

    @app.get("/guarded", dependencies=[Depends(require_key)])
    async def guarded() -> str:
        return "yes"

    monkeypatch.setenv(ENVIRONMENT_NAME, "ключ,key")
    api_keys._own_keys.cache_clear()
    try:
        client: httpx.Client = TestClient(app)
        assert client.get("/guarded", headers={"authorization": "Bearer key"}).json() == "yes"
        there = {"authorization": "Bearer ключ".encode()}  # as curl sends it
        assert client.get("/guarded", headers=there).json() == "yes"
        refused = client.get("/guarded")
        assert refused.status_code == 401
        assert refused.headers["www-authenticate"] == "Bearer"
        assert refused.json()["error"]["code"] == "invalid_api_key"
        assert refused.json()["error"]["type"] == "invalid_request_error"
    finally:
        api_keys._own_keys.cache_clear()


def test_every_route_but_the_page_and_those_for_monitors_is_guarded() -> None:
    routes: list[Any] = [
        route
        for included in served_app.routes  # as `serve.ingress` leaves them
        for route in included.original_router.routes  # type: ignore[attr-defined]
    ]
    unguarded = [
        route.path
        for route in routes
        if require_key not in [item.call for item in route.dependant.dependencies]
    ]
    assert unguarded == ["/", "/health", "/metrics", "/openapi.json"]
    assert len(routes) > 5
