"""The pictures of docs/inspect.md, taken of a real run: `python -m tests.screenshots`.

A cluster of one node with token auth runs the demo's pipeline, made short, and its server, both as
submitted jobs; headless Chromium looks at Ray's dashboard and at the server's page meanwhile.
"""

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.chrome.service import Service

from tests.e2e.processes import REPOSITORY, free_port

TARGET = REPOSITORY / "docs" / "inspect"
RAY = str(Path(sys.executable).with_name("ray"))
_DEADLINE_S = 900
_SIZE = (1280, 800)
_QUESTION = 'How many times does the letter "a" appear in the text: "a small demo"?'
_SHORT = (
    "train.num_steps=8",
    "prepare.sources=[{type: tasks, num_samples: 200}]",
    "evaluate.num_problems=4",
    "train.resources.num_workers=1",
)


def main() -> int:
    """Take all pictures; the exit code."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    TARGET.mkdir(exist_ok=True)
    token, serve_port = secrets.token_hex(32), free_port()
    # A socket path below the temporary directory must stay under 108 characters.
    with (
        tempfile.TemporaryDirectory(prefix="rs", dir="/tmp", ignore_cleanup_errors=True) as home,
        _cluster(home, token) as (dashboard, submit),
        _browser() as browser,
    ):

        def shoot(name: str, url: str, text: str) -> None:
            """One page, once `text` is on it."""
            browser.get(url)
            _wait(lambda: text in browser.find_element("tag name", "body").text, text)
            time.sleep(1)  # tables move while they fill
            browser.save_screenshot(str(TARGET / f"{name}.png"))

        def read(path: str) -> list[dict[str, str]]:
            request = urllib.request.Request(
                f"{dashboard}{path}", headers={"Authorization": f"Bearer {token}"}
            )
            with urllib.request.urlopen(request, timeout=30) as answer:
                found: list[dict[str, str]] = json.load(answer)
            return found

        _wait(lambda: _answers(dashboard), "the dashboard")
        browser.get(dashboard)
        browser.add_cookie({"name": "ray-authentication-token", "value": token})
        browser.refresh()
        config = ("--config", "jobs/configs/demo.yaml", f"run.root={home}/runs", *_SHORT)
        submit("demo-pipeline", "jobs.pipeline", *config)

        def has_ended() -> bool:
            (job,) = read("/api/jobs/")
            assert job["status"] != "FAILED", job["message"]
            return job["status"] == "SUCCEEDED"

        _wait(has_ended, "the pipeline")
        submit("demo-serve", "jobs.serve", *config, f"serve.port={serve_port}")
        server = f"http://127.0.0.1:{serve_port}"
        _wait(lambda: _answers(f"{server}/health"), "the server")
        job_ids = {job["submission_id"]: job["job_id"] for job in read("/api/jobs/")}
        shoot("jobs", f"{dashboard}/#/jobs", "demo-serve")
        shoot("job", f"{dashboard}/#/jobs/{job_ids['demo-pipeline']}", "Entrypoint")
        shoot("serve", f"{dashboard}/#/serve", "r1ray")
        shoot("application", f"{dashboard}/#/serve/applications/r1ray", "OpenAIIngress")
        browser.get(server)
        field = browser.find_element("tag name", "textarea")
        field.send_keys(_QUESTION + "\n")
        _wait(lambda: "tokens/s" in browser.find_element("tag name", "body").text, "an answer")
        browser.save_screenshot(str(TARGET / "playground.png"))
    return 0


@contextmanager
def _cluster(home: str, token: str) -> Iterator[tuple[str, Callable[..., None]]]:
    """A head node in `home`: the dashboard's URL, and what submits a job to it."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = inherited | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_USAGE_STATS_ENABLED": "0",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    port = free_port()
    options = [f"--port={free_port()}", f"--dashboard-port={port}", f"--temp-dir={home}"]
    options += [f"--dashboard-agent-listen-port={free_port()}", "--object-store-memory=200000000"]
    head = subprocess.Popen(
        [RAY, "start", "--head", "--block", "--num-cpus=4", *options],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    dashboard = f"http://127.0.0.1:{port}"

    def submit(name: str, job: str, *arguments: str) -> None:
        command = [RAY, "job", "submit", "--no-wait", "--address", dashboard, "--working-dir", "."]
        command += ["--submission-id", name, "--", "python", "-m", job, *arguments]
        _wait(
            lambda: (
                subprocess.run(
                    command, cwd=REPOSITORY, env=environment, capture_output=True, timeout=120
                ).returncode
                == 0
            ),
            "the cluster",
        )

    try:
        yield dashboard, submit
    finally:
        head.send_signal(signal.SIGTERM)  # with --block, the head ends what it started
        head.wait(timeout=60)


@contextmanager
def _browser() -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.add_argument(f"--window-size={_SIZE[0]},{_SIZE[1]}")
    browser = webdriver.Chrome(options=options, service=Service("/usr/bin/chromedriver"))
    try:
        yield browser
    finally:
        browser.quit()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=10):
            return True
    except (urllib.error.URLError, OSError):
        return False


def _wait(is_there: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + _DEADLINE_S
    while not is_there():
        assert time.monotonic() < deadline, f"waited {_DEADLINE_S} s for {what}"
        time.sleep(1)


if __name__ == "__main__":
    sys.exit(main())
