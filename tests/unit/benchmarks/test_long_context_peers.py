"""Other engines in processes of their own: what is asked of them, and what becomes of failures."""

import ast
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from jobs.benchmarks import long_context_peer_child as child
from jobs.benchmarks import long_context_peers as peers
from jobs.benchmarks import peer_environments as environments
from r1ray.errors import ConfigError

_TASK = {"num_tokens": 6, "new_tokens": 3, "repeats": 3, "budget_s": 60.0}
_ANSWERS = """
print("loading")
print(json.dumps({"prefill_runs_s": [3.0, 9.0, 2.0], "decode_runs_s": [0.5, 0.25, 0.25], **task}))
"""

Child = Callable[[str], None]


@pytest.fixture
def fake_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Child:
    """A function that replaces the child by a script, which finds its task as `task`."""

    def replace(body: str) -> None:
        path = tmp_path / "fake_child.py"
        opening = "import json, sys\ntask = json.load(open(sys.argv[1]))\n"
        path.write_text(opening + body, encoding="utf-8")
        monkeypatch.setattr(peers, "_CHILD", path)
        monkeypatch.setattr(peers, "make_environment", lambda *_: Path(sys.executable))

    return replace


def _measure(tmp_path: Path, **options: Any) -> dict[str, Any]:
    return peers.measure_peer(
        "transformers", tmp_path, tmp_path / "no.gguf", tmp_path, range(100), **options
    )


def test_every_length_is_asked_for_and_medians_stand_first(
    tmp_path: Path, fake_child: Child
) -> None:
    fake_child(_ANSWERS)
    found = _measure(tmp_path, lengths=(50, 20), repeats=2)
    assert found["weights"] == "float32"
    assert list(found["lengths"]) == ["20", "50"]
    for length, measured in found["lengths"].items():
        assert measured["num_tokens"] == int(length)
        assert measured["prefill_s"] == 3.0
        assert measured["decode_tokens_per_s"] == 4.0
        assert json.loads(Path(measured["ids"]).read_text()) == list(range(51))


def test_a_failure_is_recorded_bounded_and_without_addresses(
    tmp_path: Path, fake_child: Child
) -> None:
    failure = 'sys.exit("no https://example.org/simple/ " + 5000 * "x" + " wheel")'
    fake_child(f'if task["num_tokens"] > 10: {failure}\n{_ANSWERS}')
    found = _measure(tmp_path, lengths=(10, 20, 30))["lengths"]
    assert found["10"]["prefill_s"] == 3.0
    text = found["20"]["error"]
    assert text.startswith("exit status 1: no (address) xxx")
    assert text.endswith("x wheel")
    assert len(text) < 2100
    assert found["30"] == {"error": "not tried after 20 tokens failed"}


def test_output_without_a_result_is_a_failure(tmp_path: Path, fake_child: Child) -> None:
    fake_child('print("bye")')
    found = _measure(tmp_path, lengths=(10,))["lengths"]["10"]
    assert found == {"error": "no line is a JSON object: bye"}


def test_what_takes_too_long_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    with pytest.raises(environments.PeerFailedError, match=r"^ended after 0.4 s: started"):
        environments._run(
            ["sh", "-c", f"sleep 60 & echo $! > {path}; echo started; wait"], timeout_s=0.4
        )
    assert _is_gone(int(path.read_text()))


def test_a_peer_that_cannot_be_installed_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(environments.REQUIREMENTS, "transformers", ("./no-such-directory-here",))
    monkeypatch.setattr(environments, "_run", _refuse)
    found = _measure(tmp_path, lengths=(10,))
    assert found["error"] == "exit status 1: no such package"
    assert found["requirements"] == ["./no-such-directory-here"]
    assert "lengths" not in found


def test_an_environment_is_made_again_when_its_requirements_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = []

    def run(command: list[str], *, timeout_s: float) -> str:
        commands.append(command)
        (tmp_path / "environments" / "openvino").mkdir(exist_ok=True)
        return ""

    monkeypatch.setattr(environments, "_run", run)
    for requirement, expected in (("a==1", 2), ("a==1", 2), ("a==2", 4)):
        monkeypatch.setitem(environments.REQUIREMENTS, "openvino", (requirement,))
        python = environments.make_environment("openvino", tmp_path)
        assert len(commands) == expected
        assert commands[-1][0] == str(python)
        assert commands[-1][-1] == requirement


def _result(name: str, prefill_s: float | None) -> dict[str, Any]:
    if prefill_s is None:
        return {"name": name, "lengths": {"8000": {"error": "exit status 1"}}}
    measured = {"prefill_s": prefill_s, "decode_tokens_per_s": prefill_s}
    return {"name": name, "lengths": {"8000": measured}}


def test_the_best_peer_counts_only_beside_llama_cpp_and_openvino() -> None:
    results = [
        _result("llama_cpp", 50.0),
        _result("llama_cpp_flash", 40.0),
        _result("openvino", 11.5),
        _result("openvino_sdpa", None),
        _result("transformers", 20.0),
    ]
    assert peers.find_best(results, 8000, "prefill_s") == ("openvino", 11.5)
    best = peers.find_best(results, 8000, "decode_tokens_per_s", ["llama_cpp"])
    assert best == ("llama_cpp", 50.0)
    assert peers.find_best(results, 16_000, "prefill_s") is None
    results[2] = {"name": "openvino", "error": "no such package"}
    assert peers.find_best(results, 8000, "prefill_s") is None
    assert peers.find_best(results, 8000, "prefill_s", ["transformers"]) == ("transformers", 20.0)


def test_what_cannot_be_asked_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="100 token ids are fewer than the 101"):
        _measure(tmp_path, lengths=(99,), repeats=3)
    with pytest.raises(ConfigError, match="'vllm' is not one of llama_cpp, "):
        peers.measure_peer("vllm", tmp_path, tmp_path, tmp_path, range(9))


def test_types_of_weights_are_read_from_the_file(tmp_path: Path) -> None:
    path = tmp_path / "some.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    matrix, kind = np.zeros((4, 32), dtype=np.float32), gguf.GGMLQuantizationType.Q8_0
    for name in ("a", "b"):
        writer.add_tensor(name, gguf.quants.quantize(matrix, kind), raw_dtype=kind)
    writer.add_tensor("c", matrix.astype(np.float16))
    writer.add_tensor("norm", matrix[0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert environments.describe_gguf(path) == "Q8_0, F16 (1)"


class _FakePeer:
    package = "none"

    def __init__(self, seconds: float = 0.0) -> None:
        self.settings: dict[str, Any] = {}
        self.asked: list[tuple[list[int], int]] = []
        self._seconds = seconds

    def answer(self, ids: list[int], num_tokens: int) -> child.Answer:
        self.asked.append((ids, num_tokens))
        time.sleep(self._seconds)
        return list(range(num_tokens)), [0.5 * n for n in range(num_tokens)]


def test_no_repetition_begins_as_another_did() -> None:
    peer = _FakePeer()
    found = child.time_peer(peer, list(range(8)), _TASK)
    warm_up, *prefills, decoding = peer.asked
    assert warm_up[1] == 2
    assert prefills == [(list(range(n, n + 6)), 1) for n in range(3)]
    assert decoding == (list(range(6)), 4)
    assert len(found["prefill_runs_s"]) == 3
    assert found["decode_runs_s"] == [0.5, 0.5, 0.5]
    assert found["answer"] == [0, 1, 2, 3]
    assert found["peak_resident_bytes"] > 0


def test_no_repetition_starts_beyond_the_budget() -> None:
    found = child.time_peer(_FakePeer(0.02), list(range(8)), {**_TASK, "budget_s": 0.01})
    assert len(found["prefill_runs_s"]) == 1


def test_an_answer_of_another_length_is_refused() -> None:
    peer = _FakePeer()
    peer.answer = lambda ids, num_tokens: ([1], [0.0])  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="1 tokens were answered, 4 were wanted"):
        child.time_peer(peer, list(range(8)), _TASK)


def test_the_child_needs_the_standard_library_alone() -> None:
    tree = ast.parse(Path(child.__file__).read_text(encoding="utf-8"))
    modules = {
        name.split(".")[0]
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in (
            [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else [alias.name for alias in node.names]
        )
    }
    assert modules <= set(sys.stdlib_module_names)


def _refuse(command: list[str], *, timeout_s: float) -> str:
    raise environments.PeerFailedError("exit status 1: no such package")


def _is_gone(pid: int) -> bool:
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":  # ended, and its new parent has not asked yet
            return True
        time.sleep(0.01)
    return False
