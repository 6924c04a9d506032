"""Building and starting the OpenAI-compatible server: one ingress in front of model replicas.

`build_app` is the import path of Serve's YAML; jobs call `start_server` and `stop_server`.
"""

import logging
import socket
import time
import urllib.error
import urllib.request
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, cast

import ray
from pydantic import BaseModel, ConfigDict, Field, field_validator
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig

from r1ray.config.serving import EngineConfig, ModelArgs, ServeConfig, list_groups
from r1ray.errors import ConfigError, ServingError
from r1ray.models import ModelConfig
from r1ray.serving.guard import end_guard, start_guard
from r1ray.serving.ingress import OpenAIIngress
from r1ray.serving.readiness import deployment_name, explain_waiting, find_failure
from r1ray.serving.replica import ModelReplica, check_context
from r1ray.serving.routing import PrefixRouter
from r1ray.serving.scaling import TokenScaling

__all__ = [
    "ServeArgs",
    "build_app",
    "check_port_is_free",
    "is_on_head",
    "start_server",
    "stop_server",
]

logger = logging.getLogger(__name__)

APP_NAME = "r1ray"
_GUARD_S = 60  # what its process may take to start, on a busy machine
# Refusals and health checks pass while the engines are full, so that a client sees our own 429.
HEADROOM = 64
EXPLAIN_EVERY_S = 10.0


class ServeArgs(BaseModel):
    """Arguments of `build_app`, in YAML under `args`."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    models: Annotated[list[ModelArgs], Field(min_length=1)]
    """Each answers the requests that name it."""
    playground: bool = True
    """Whether a web page at / lets people chat with the models."""
    num_cpus_for_ingress: Annotated[float, Field(ge=0, le=64)] = 0
    """CPUs that Ray reserves for the ingress, which tokenizes and speaks HTTP."""

    @field_validator("models")
    @classmethod
    def _names_differ(cls, models: list[ModelArgs]) -> list[ModelArgs]:
        names = [model.model_name for model in models]
        if len(set(names)) < len(names):
            raise ValueError(f"models {names} has a name twice; give each its own model_name")
        return models


def build_app(args: ServeArgs) -> Application:
    """The Serve application: HTTP ingress in front of every model's groups of replicas."""
    ingress = serve.deployment(
        max_ongoing_requests=sum(map(_most_requests, args.models)) + HEADROOM,
        graceful_shutdown_timeout_s=max(model.drain_s for model in args.models) + 5,
        graceful_shutdown_wait_loop_s=0.5,
        ray_actor_options={"num_cpus": args.num_cpus_for_ingress},
    )(OpenAIIngress)
    return ingress.bind(
        {model.model_name: _bind_groups(model) for model in args.models},
        args.models,
        has_playground=args.playground,
    )


def _bind_groups(args: ModelArgs) -> dict[str | None, Application]:
    return {name: _bind_replicas(group, name) for name, group in list_groups(args).items()}


def _bind_replicas(args: ModelArgs, group: str | None) -> Application:
    is_fixed = args.max_replicas is None
    scaling = None if is_fixed else _autoscaling(args, args.max_replicas or 1)
    return serve.deployment(
        name=deployment_name(args.model_name, group),
        num_replicas=args.num_replicas if is_fixed else None,
        autoscaling_config=scaling,
        max_ongoing_requests=_most_at_once(args),
        graceful_shutdown_timeout_s=args.drain_s,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_timeout_s=60,
        request_router_config=RequestRouterConfig(
            request_router_class=cast(Any, f"{PrefixRouter.__module__}:{PrefixRouter.__name__}"),
            request_router_kwargs={"max_concurrency": args.max_concurrency},
        ),
        ray_actor_options={
            "num_cpus": args.num_cpus_per_replica,
            "num_gpus": args.num_gpus_per_replica,
            "resources": args.resources_per_replica,
        },
    )(ModelReplica).bind(args, group)


def _autoscaling(args: EngineConfig, max_replicas: int) -> AutoscalingConfig:
    return AutoscalingConfig(
        min_replicas=args.num_replicas,
        max_replicas=max_replicas,
        upscale_delay_s=5,
        downscale_delay_s=120,
        look_back_period_s=10,
        policy=AutoscalingPolicy(
            policy_function=f"{TokenScaling.__module__}:{TokenScaling.__name__}",
            policy_kwargs={"tokens_per_replica": args.tokens_per_replica},
        ),
    )


def _most_at_once(args: EngineConfig) -> int:
    """Requests in one replica."""
    return args.max_open_requests + HEADROOM


def _most_requests(args: EngineConfig) -> int:
    groups = list_groups(args).values()
    return sum((item.max_replicas or item.num_replicas) * _most_at_once(item) for item in groups)


def start_server(model_dir: str, config: ServeConfig, *, timeout_s: float = 600.0) -> str:
    """Serve `model_dir` from the running Ray and return the base URL once /health answers 200.

    The server ends with this process, or with `stop_server`.

    Raises:
        ConfigError: the port is taken, the context is longer than the model's, or this is not the
            head.
        ServingError: the server did not come up.
    """
    model_dir = str(Path(model_dir).absolute())  # a link stays one, and is followed
    check_context(config.max_context_tokens, ModelConfig.load(model_dir))
    check_port_is_free(config.host, config.port)
    if not is_on_head():
        raise ConfigError(
            "the server listens on the head, and this driver is on another node; submit it without "
            "--entrypoint-num-cpus and the like, or deploy one of `deployments/*.yaml`"
        )
    _check_serve_is_ours_to_start()
    values = asdict(config)
    del values["host"], values["port"], values["playground"]
    models = [ModelArgs(model_dir=model_dir, **values)]
    app = build_app(ServeArgs(models=models, playground=config.playground))
    reachable = "127.0.0.1" if config.host in ("0.0.0.0", "::") else config.host
    url = f"http://{reachable}:{config.port}"
    http_options = {"host": config.host, "port": config.port}
    try:
        guarding = start_guard(APP_NAME)
        serve.start(proxy_location="HeadOnly", http_options=http_options)
        serve.run_many(
            [serve.RunTarget(app, name=APP_NAME, route_prefix="/")],
            wait_for_ingress_deployment_creation=False,
            wait_for_applications_running=False,
        )
        _wait_until_healthy(url, config, timeout_s)
        _check_guard(guarding)
    except BaseException:
        stop_server()
        raise
    logger.info("serving %s as %s at %s/v1", model_dir, config.model_name, url)
    return url


def _check_guard(guarding: "ray.ObjectRef[bool] | None") -> None:
    try:
        if guarding is not None:
            ray.get(guarding, timeout=_GUARD_S)
    except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as error:
        logger.warning(
            "the server will stay if this process is killed; end it then with `serve shutdown`: %s",
            error,
        )


def is_on_head() -> bool:
    """Whether this process is on the node that the server's proxy runs on."""
    own = ray.get_runtime_context().get_node_id()
    return any(
        node["NodeID"] == own and "node:__internal_head__" in node["Resources"]
        for node in ray.nodes()
    )


def stop_server() -> None:
    """Stop what `start_server` started, which is all of Serve; Ray keeps running."""
    serve.shutdown()
    if serve.status().applications:
        serve.shutdown()  # the first gives up, without a word, where the controller is busy for 5 s
    end_guard()


def _check_serve_is_ours_to_start() -> None:
    applications = serve.status().applications
    if applications:
        raise ConfigError(
            f"Serve already runs {', '.join(sorted(applications))} on this cluster; add r1ray to "
            "it with `serve deploy` and a file like deployments/serve_local.yaml"
        )


def check_port_is_free(host: str, port: int) -> None:
    """Raise ConfigError when `serve.host` and `serve.port` cannot be listened on."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"serve.host {host} port {port} cannot be listened on ({error}); "
                "choose another serve.port"
            ) from error


def _wait_until_healthy(url: str, config: EngineConfig, timeout_s: float) -> None:
    started = time.monotonic()
    explain_at = started + EXPLAIN_EVERY_S
    while True:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=10):
                return
        except (urllib.error.URLError, OSError):
            now = time.monotonic()
        failure = find_failure(APP_NAME)
        if failure is not None:
            raise ServingError(f"{config.model_name} cannot be served: {failure}", status=500)
        if now > explain_at:
            reason = explain_waiting(APP_NAME, config)
            logger.info("waiting for %s since %.0f s: %s", config.model_name, now - started, reason)
            explain_at = now + EXPLAIN_EVERY_S
        if now > started + timeout_s:
            reason = explain_waiting(APP_NAME, config)
            raise ServingError(
                f"{url}/health did not answer 200 within {timeout_s} s ({reason})", status=503
            )
        time.sleep(0.2)
