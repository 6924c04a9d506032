"""The playground in headless Chromium, before a server whose answers are written down here."""

import json
import shutil
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

from r1ray.serving.playground import read_page
from tests.requirements import skip_loudly

DELTAS: list[dict[str, Any]] = [
    {"reasoning_content": "<b>two</b> and "},
    {"reasoning_content": "two"},
    {"content": "It is "},
    {"content": "<i>4</i>."},
]
USAGE = {
    "prompt_tokens": 200,
    "completion_tokens": 40,
    "prompt_tokens_details": {"cached_tokens": 128},
}


class Server(ThreadingHTTPServer):
    """Answers everybody the same; a question of "endless" has no end, one of "wrong" an error.

    Attributes:
        bodies: of the chats that were asked for.
        was_left: set when a reader of an endless answer is gone.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.bodies: list[dict[str, Any]] = []
        self.was_left = threading.Event()
        self.paths: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}/"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.paths.append(self.path)
        if self.path == "/":
            text, headers = read_page()
            self._reply(200, text, "text/html", headers)
        elif self.path == "/v1/models":
            self._reply(200, json.dumps({"data": [{"id": "first"}, {"id": "second"}]}))
        elif self.path == "/metrics":
            lines = [
                f'r1ray:sparse_kv_share{{model_name="{name}"}} 0.25' for name in ("first", "x")
            ]
            self._reply(200, "\n".join(lines))
        else:
            self._reply(404, "{}")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        question = body["messages"][-1]["content"]
        if question == "wrong":
            self._reply(429, json.dumps({"error": {"message": "come back later"}}))
            return
        self._reply(200, None, "text/event-stream")
        for delta in DELTAS:
            self._send({"choices": [{"delta": delta}]})
            time.sleep(0.05)
        try:
            while question == "endless":
                self._send({"choices": [{"delta": {"content": " on and on"}}]})
                time.sleep(0.05)
        except OSError:
            self.server.was_left.set()
            return
        self._send({"choices": [], "usage": USAGE})
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *_: Any) -> None:
        """Nothing."""

    def _reply(
        self,
        status: int,
        text: str | None,
        kind: str = "application/json",
        headers: dict[str, str] | None = None,
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if text is not None:
            self.wfile.write(text.encode())

    def _send(self, chunk: dict[str, Any]) -> None:
        # In two parts: lines come as the network has them.
        text = f"data: {json.dumps(chunk)}\n\n".encode()
        for part in (text[:9], text[9:]):
            self.wfile.write(part)
            self.wfile.flush()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def chrome() -> Iterator[webdriver.Chrome]:
    driver, browser = shutil.which("chromedriver"), shutil.which("chromium")
    if driver is None or browser is None:
        skip_loudly("NO CHROMIUM: the playground is NOT TESTED; install chromium, chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = webdriver.Chrome(options=options, service=Service(driver))
    yield chrome
    chrome.quit()


@pytest.fixture
def page(chrome: webdriver.Chrome, server: Server) -> webdriver.Chrome:
    chrome.get_log("browser")  # of the test before
    chrome.set_window_size(1000, 800)
    chrome.get(server.url)
    _wait(chrome, lambda: len(chrome.find_elements(By.CSS_SELECTOR, "#model option")) == 2)
    return chrome


def _wait(chrome: webdriver.Chrome, condition: Any) -> None:
    WebDriverWait(chrome, 20, poll_frequency=0.05).until(lambda _: condition())


def _find(chrome: webdriver.Chrome, selector: str) -> list[WebElement]:
    return chrome.find_elements(By.CSS_SELECTOR, selector)


def _ask(chrome: webdriver.Chrome, text: str) -> None:
    chrome.switch_to.active_element.send_keys(text, Keys.ENTER)


def test_a_question_is_answered_with_its_reasoning_folded(
    page: webdriver.Chrome, server: Server
) -> None:
    _ask(page, "2 + 2?")  # the question's field has the focus from the start
    _wait(page, lambda: _find(page, ".figures"))
    assert [item.text for item in _find(page, "li > .text")] == ["2 + 2?", "It is <i>4</i>."]
    [fold] = _find(page, "details")
    assert fold.get_attribute("open") is None
    [thought] = _find(page, "details .text")
    assert not thought.is_displayed()
    assert thought.get_attribute("textContent") == "<b>two</b> and two"
    [figures] = _find(page, ".figures")
    for part in ("40 tokens", "tokens/s", "128 of 200 prompt tokens cached", "25% of the context"):
        assert part in figures.text
    [body] = server.bodies
    assert body["model"] == "first"
    assert body["stream_options"] == {"include_usage": True}

    _ask(page, "And more?")
    _wait(page, lambda: len(_find(page, ".figures")) == 2)
    roles = [message["role"] for message in server.bodies[1]["messages"]]
    assert roles == ["user", "assistant", "user"]


def test_escape_stops_an_answer_and_its_request(page: webdriver.Chrome, server: Server) -> None:
    _ask(page, "endless")
    _wait(page, lambda: any("on and on" in item.text for item in _find(page, "li > .text")))
    assert _find(page, "#send")[0].text == "Stop"
    page.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert server.was_left.wait(10)
    _wait(page, lambda: [item.text for item in _find(page, ".failure")] == ["Stopped."])
    assert _find(page, "#send")[0].text == "Send"


def test_a_new_chat_leaves_the_answer_under_way(page: webdriver.Chrome, server: Server) -> None:
    _ask(page, "endless")
    _wait(page, lambda: any("on and on" in item.text for item in _find(page, "li > .text")))
    _find(page, "#clear")[0].click()
    assert not _find(page, "li")
    _ask(page, "hello")  # the field has the focus again
    assert server.was_left.wait(10)
    _wait(page, lambda: _find(page, ".figures"))
    assert _find(page, "#send")[0].text == "Send"
    assert [message["content"] for message in server.bodies[1]["messages"]] == ["hello"]


def test_an_error_is_shown_and_the_question_may_be_asked_again(
    page: webdriver.Chrome, server: Server
) -> None:
    _ask(page, "wrong")
    _wait(page, lambda: [item.text for item in _find(page, ".failure")] == ["come back later"])
    _ask(page, "right")
    _wait(page, lambda: _find(page, ".figures"))
    assert [message["content"] for message in server.bodies[1]["messages"]] == ["right"]


def test_the_keyboard_reaches_everything_and_breaks_lines(
    page: webdriver.Chrome, server: Server
) -> None:
    field = page.switch_to.active_element
    field.send_keys("one", Keys.SHIFT, Keys.ENTER, Keys.NULL, "two")
    assert field.get_attribute("value") == "one\ntwo"
    assert not server.bodies
    reached = set()
    for _ in range(8):
        page.switch_to.active_element.send_keys(Keys.TAB)
        reached.add(page.switch_to.active_element.get_attribute("id"))
    assert {"model", "temperature", "key", "clear", "question", "send"} <= reached


@pytest.mark.parametrize("width", [360, 1000])
def test_it_fits_a_phone(page: webdriver.Chrome, width: int) -> None:
    metrics = {"width": width, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        _ask(page, "w" * 200)
        _wait(page, lambda: _find(page, ".figures"))
        wide = page.execute_script("return document.documentElement.scrollWidth")
        assert wide <= width
        assert _find(page, "#question")[0].rect["width"] > width / 2
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_nothing_comes_from_elsewhere_and_nothing_is_refused(
    page: webdriver.Chrome, server: Server
) -> None:
    _ask(page, "hello")
    _wait(page, lambda: _find(page, ".figures"))
    assert set(server.paths) <= {"/", "/v1/models", "/metrics"}
    urls = page.execute_script("return performance.getEntriesByType('resource').map((e) => e.name)")
    assert all(url.startswith(server.url) for url in urls)
    severe = [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE"]
    assert not severe  # such as what the content security policy refuses
