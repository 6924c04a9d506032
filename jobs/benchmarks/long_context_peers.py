"""SmolLM2 in other engines: prefill and decoding at a depth, each in an environment of its own.

1. A virtual environment with the peer's pinned requirements, made under the work folder, or found.
2. For every length a process in it (`long_context_peer_child`): load, read, answer, end.

All read the same token ids. llama.cpp and OpenVINO read one GGUF file, in two manners each, so that
the faster counts.
"""

import json
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from jobs.benchmarks.peer_environments import (
    REQUIREMENTS,
    PeerFailedError,
    ask_child,
    describe_gguf,
    make_environment,
)
from r1ray.errors import ConfigError

__all__ = ["PEERS", "Peer", "find_best", "measure_peer"]


@dataclass(frozen=True)
class Peer:
    """An engine, as it is asked.

    Attributes:
        environment: key of `REQUIREMENTS`, and of the engine in the child.
        options: of the engine, for the child.
        reads_gguf: or the model directory, in float32.
    """

    environment: str
    options: Mapping[str, Any] = field(default_factory=dict)
    reads_gguf: bool = True


PEERS: dict[str, Peer] = {
    "llama_cpp": Peer("llama_cpp", {"flash_attn": False}),  # llama-cpp-python's default
    "llama_cpp_flash": Peer("llama_cpp", {"flash_attn": True}),
    "openvino": Peer("openvino", {"attention": "PA"}),  # paged attention, OpenVINO GenAI's default
    "openvino_sdpa": Peer("openvino", {"attention": "SDPA"}),
    "transformers": Peer("transformers", reads_gguf=False),
}

_INDISPENSABLE = {"llama_cpp", "openvino"}
_CHILD = Path(__file__).with_name("long_context_peer_child.py")
_BUDGET_S = 150.0  # of one length: repetitions that would start later are left out


def measure_peer(
    name: str,
    model_dir: Path,
    gguf: Path,
    work: Path,
    token_ids: Sequence[int],
    *,
    lengths: Sequence[int] = (8000,),
    new_tokens: int = 32,
    repeats: int = 3,
    num_threads: int = 2,
    timeout_s: float = 1800.0,
) -> dict[str, Any]:
    """What the peer takes to read prompts of `lengths` tokens, and to go on from there.

    Args:
        model_dir: the float model, for transformers; `gguf` is for the others.
        work: where environments are made, and found again if their requirements are the same.
        token_ids: `max(lengths) + repeats - 1` or more; repetition r reads from the r-th on.
        timeout_s: of each length, loading included.
    Returns:
        `name`, `weights`, `requirements`, and `error` if the environment could not be made.
        Otherwise `lengths`: from number of tokens, as text -> `prefill_s` and `decode_tokens_per_s`
        (medians), the single times, `peak_resident_bytes` since loading, the greedy `answer`,
        `version` and `settings`; or an `error`. What follows a failed length is not tried.
    Raises:
        ConfigError: an unknown peer, or too few tokens.
    """
    if name not in PEERS:
        raise ConfigError(f"peer {name!r} is not one of {', '.join(PEERS)}")
    wanted = max(lengths) + repeats - 1
    if len(token_ids) < wanted:
        raise ConfigError(f"{len(token_ids)} token ids are fewer than the {wanted} to be read")
    peer = PEERS[name]
    result: dict[str, Any] = {
        "name": name,
        "weights": describe_gguf(gguf) if peer.reads_gguf else "float32",
        "requirements": list(REQUIREMENTS[peer.environment]),
    }
    try:
        python = make_environment(peer.environment, work)
    except PeerFailedError as error:
        return result | {"error": str(error)}
    ids_path = work / "prompt_ids.json"
    ids_path.write_text(json.dumps(list(token_ids[:wanted])), encoding="utf-8")
    task = {
        "peer": peer.environment,
        "model": str((gguf if peer.reads_gguf else model_dir).resolve()),
        "ids": str(ids_path.resolve()),
        "new_tokens": new_tokens,
        "repeats": repeats,
        "num_threads": num_threads,
        "budget_s": _BUDGET_S,
        **peer.options,
    }
    measured: dict[str, Any] = {}
    failed = None
    for length in sorted(lengths):
        if failed is not None:
            measured[str(length)] = {"error": f"not tried after {failed} tokens failed"}
            continue
        try:
            found = ask_child(
                python, _CHILD, task | {"num_tokens": length}, work, timeout_s=timeout_s
            )
            measured[str(length)] = _summarize(found)
        except PeerFailedError as error:
            failed = length
            measured[str(length)] = {"error": str(error)}
    return result | {"lengths": measured}


def find_best(
    results: Iterable[Mapping[str, Any]],
    length: int,
    figure: Literal["prefill_s", "decode_tokens_per_s"],
    environments: Collection[str] = tuple(REQUIREMENTS),
) -> tuple[str, float] | None:
    """Name and figure of the fastest peer of `environments` at `length` tokens.

    None if llama.cpp or OpenVINO is among `environments` and was measured in neither manner: a bar
    against the best then does not count.
    """
    found = {
        result["name"]: result["lengths"][str(length)][figure]
        for result in results
        if figure in result.get("lengths", {}).get(str(length), {})
        and PEERS[result["name"]].environment in environments
    }
    measured = {PEERS[name].environment for name in found}
    if not found or not _INDISPENSABLE & set(environments) <= measured:
        return None
    choose = min if figure == "prefill_s" else max
    name = choose(found, key=lambda name: found[name])
    return name, found[name]


def _summarize(found: dict[str, Any]) -> dict[str, Any]:
    return {
        "prefill_s": statistics.median(found["prefill_runs_s"]),
        "decode_tokens_per_s": 1 / statistics.median(found["decode_runs_s"]),
    } | found
