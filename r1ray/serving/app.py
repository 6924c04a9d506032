"""Building and starting the OpenAI-compatible server: one ingress, `num_replicas` model replicas.

`build_app` is the import path of Serve's YAML; jobs call `start_server` and `stop_server`.
"""

import logging
import socket
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve import Application

from r1ray.config.schema import AttentionKind, ServeConfig
from r1ray.errors import ConfigError, ServingError
from r1ray.models import ModelConfig
from r1ray.serving.ingress import OpenAIIngress
from r1ray.serving.replica import ModelReplica, check_context

__all__ = ["ServeArgs", "build_app", "check_port_is_free", "start_server", "stop_server"]

logger = logging.getLogger(__name__)

APP_NAME = "r1ray"
# Refusals and health checks pass while the engines are full, so that a client sees our own 429.
HEADROOM = 64


class ServeArgs(BaseModel):
    """Arguments of `build_app`, in YAML under `args`; the fields of ServeConfig that it needs."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    model_dir: Annotated[str, Field(min_length=1)]
    """Model directory, at the same absolute path on every node that runs a replica."""
    model_name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=64)]
    """The name that requests carry in `model`."""
    num_replicas: Annotated[int, Field(ge=1, le=1024)] = 1
    """Engine replicas."""
    num_cpus_per_replica: Annotated[float, Field(gt=0, le=256)] = 1
    """CPUs that Ray reserves for one replica; also its number of torch threads."""
    num_gpus_per_replica: Annotated[float, Field(ge=0, le=8)] = 0
    """GPUs that Ray reserves for one replica."""
    num_cpus_for_ingress: Annotated[float, Field(ge=0, le=64)] = 0
    """CPUs that Ray reserves for the ingress, which tokenizes and speaks HTTP."""
    max_concurrency: Annotated[int, Field(ge=1, le=1024)] = 8
    """Requests decoded together in one replica."""
    max_queued_requests: Annotated[int, Field(ge=1, le=100_000)] = 64
    """Requests waiting in one replica before further ones are answered 429."""
    max_context_tokens: Annotated[int, Field(ge=16, le=1_048_576)] = 2048
    """Prompt and answer of one request together."""
    max_step_tokens: Annotated[int, Field(ge=64, le=1_048_576)] = 256
    """Tokens that one step computes: how long a prompt being read delays the others' tokens."""
    attention: AttentionKind = "auto"
    """auto: block-sparse beyond 2,048 tokens if the model has gates; sparse: without them, too."""
    kv_cache: Literal["float", "int8"] = "float"
    """How keys and values are kept: as the weights' floating point, or in a quarter of float32."""
    budget_mib: Annotated[int, Field(ge=1, le=2**24)] | None = None
    """What a replica may take of memory (of the GPU's, for its weights); the rest is streamed."""


def build_app(args: ServeArgs) -> Application:
    """The Serve application: HTTP ingress in front of the model replicas."""
    per_replica = args.max_concurrency + args.max_queued_requests + HEADROOM
    replica = serve.deployment(
        num_replicas=args.num_replicas,
        max_ongoing_requests=per_replica,
        ray_actor_options={
            "num_cpus": args.num_cpus_per_replica,
            "num_gpus": args.num_gpus_per_replica,
        },
    )(ModelReplica)
    ingress = serve.deployment(
        max_ongoing_requests=args.num_replicas * per_replica + HEADROOM,
        ray_actor_options={"num_cpus": args.num_cpus_for_ingress},
    )(OpenAIIngress)
    replicas = replica.bind(
        args.model_dir,
        max_concurrency=args.max_concurrency,
        max_queued_requests=args.max_queued_requests,
        max_context_tokens=args.max_context_tokens,
        max_step_tokens=args.max_step_tokens,
        attention=args.attention,
        kv_cache=args.kv_cache,
        budget_mib=args.budget_mib,
        num_threads=max(1, int(args.num_cpus_per_replica)),
    )
    return ingress.bind(
        replicas,
        model_dir=args.model_dir,
        model_name=args.model_name,
        max_context_tokens=args.max_context_tokens,
    )


def start_server(model_dir: str, config: ServeConfig, *, timeout_s: float = 120.0) -> str:
    """Serve `model_dir` from the running Ray and return the base URL once /health answers 200.

    Raises:
        ConfigError: the port is taken, or the context is longer than the model's.
        ServingError: the server did not come up.
    """
    model_dir = str(Path(model_dir).resolve())
    check_context(config.max_context_tokens, ModelConfig.load(model_dir))
    check_port_is_free(config.host, config.port)
    _check_serve_is_ours_to_start()
    args = ServeArgs(
        model_dir=model_dir,
        model_name=config.model_name,
        num_replicas=config.num_replicas,
        num_cpus_per_replica=config.num_cpus_per_replica,
        num_gpus_per_replica=config.num_gpus_per_replica,
        max_concurrency=config.max_concurrency,
        max_queued_requests=config.max_queued_requests,
        max_context_tokens=config.max_context_tokens,
        max_step_tokens=config.max_step_tokens,
        attention=config.attention,
        kv_cache=config.kv_cache,
        budget_mib=config.budget_mib,
    )
    serve.start(proxy_location="HeadOnly", http_options={"host": config.host, "port": config.port})
    reachable = "127.0.0.1" if config.host in ("0.0.0.0", "::") else config.host
    url = f"http://{reachable}:{config.port}"
    try:
        _deploy(args)
        _wait_until_healthy(url, timeout_s)
    except BaseException:
        stop_server()
        raise
    logger.info("serving %s as %s at %s/v1", model_dir, config.model_name, url)
    return url


def stop_server() -> None:
    """Stop what `start_server` started, which is all of Serve; Ray keeps running."""
    serve.shutdown()


def _check_serve_is_ours_to_start() -> None:
    applications = serve.status().applications
    if applications:
        raise ConfigError(
            f"Serve already runs {', '.join(sorted(applications))} on this cluster; add r1ray to "
            "it with `serve deploy` and a file like deployments/serve_local.yaml"
        )


def _deploy(args: ServeArgs) -> None:
    try:
        serve.run(build_app(args), name=APP_NAME, route_prefix="/")
    except RuntimeError as error:
        # Serve's own message only names the deployments; theirs end with the traceback.
        deployments = serve.status().applications[APP_NAME].deployments
        reasons = [f"{name}: {item.message}" for name, item in deployments.items() if item.message]
        raise ServingError(
            "\n".join([f"{args.model_dir} cannot be served ({error})", *reasons]), status=500
        ) from error


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


def _wait_until_healthy(url: str, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=10):
                return
        except (urllib.error.URLError, OSError) as error:
            if time.monotonic() > deadline:
                raise ServingError(
                    f"{url}/health did not answer 200 within {timeout_s} s ({error})", status=503
                ) from error
        time.sleep(0.2)
