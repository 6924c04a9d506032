"""Serve the INT8 model over HTTP until Ctrl-C; whatever is missing before it is made first."""

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from jobs.cli import connected_to_ray, run_job
from r1ray.config import PipelineConfig

if TYPE_CHECKING:
    from r1ray.pipeline import Pipeline


@contextmanager
def serving(pipeline: "Pipeline") -> Iterator[str]:
    """The base URL of the running endpoint; it is shut down afterwards."""
    from r1ray.observability.progress import StageProgress
    from r1ray.serving.app import start_server, stop_server

    config = pipeline.config.serve
    model_dir = str(pipeline.served_dir())
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    with StageProgress("serve", "replicas ready", config.num_replicas) as progress:
        url = start_server(model_dir, config)
        progress.update(config.num_replicas)
    try:
        yield f"{url}/v1"
    finally:
        stop_server()


def ask_heldout_questions(pipeline: "Pipeline", url: str) -> None:
    """Send the first held-out problem of each family through the `openai` client.

    Prints what each thinks and answers as it streams, and the expected answer behind it.
    """
    from openai import OpenAI

    from r1ray.data.reasoning import build_messages

    config = pipeline.config
    first = {problem.family: problem for problem in reversed(pipeline.heldout_problems())}
    key = os.environ.get("R1RAY_API_KEYS", "not-needed").split(",")[0].strip()
    client = OpenAI(base_url=url, api_key=key, timeout=120, max_retries=0)
    print(f"\nasking {config.serve.model_name} at {url}")
    for family in (item.name for item in config.tasks.families if item.name in first):
        print(f"\n{family}: {first[family].question.strip()}\n")
        stream = client.chat.completions.create(
            model=config.serve.model_name,
            messages=cast(Any, build_messages(first[family], config.tasks.system_prompt)),
            max_tokens=config.evaluate.max_new_tokens,
            temperature=0,
            stream=True,
        )
        label = None
        for chunk in stream:
            delta = chunk.choices[0].delta
            thought = getattr(delta, "reasoning_content", None)  # not a field of OpenAI's own
            for name, text in (("thinks", thought), ("answers", delta.content)):
                if text and name != label:
                    print(f"\n{name}:" if label else f"{name}:")
                    label = name
                print(text or "", end="", flush=True)
        print(f"\n(expected: {first[family].answer})\n")


def serve(config: PipelineConfig) -> None:
    """Keep the endpoint running until SIGINT or SIGTERM."""
    with connected_to_ray():
        from r1ray.pipeline import Pipeline
        from r1ray.serving.app import check_port_is_free

        check_port_is_free(config.serve.host, config.serve.port)  # not after all the stages
        with serving(Pipeline(config)) as url:
            name = config.serve.model_name
            print(f"serving {name} at {url}; stop with Ctrl-C. Try:\n")
            print(
                f"  curl {url}/chat/completions -H 'Content-Type: application/json' -d "
                f'\'{{"model": "{name}", "messages": [{{"role": "user", "content": "Hi"}}]}}\'\n'
            )
            stopped = threading.Event()
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, lambda *_: stopped.set())
            stopped.wait()
            print("shutting down")


if __name__ == "__main__":
    sys.exit(run_job("serve", __doc__ or "", serve))
