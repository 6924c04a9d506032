"""The parsers of what others write, each with inputs for it and what must hold for any of them."""

import asyncio
import contextlib
import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml
from hypothesis import strategies as st

from r1ray.artifacts import ArtifactStore
from r1ray.config import PipelineConfig, load_config
from r1ray.config.schema import identity
from r1ray.data.sources import ROW_SCHEMA, read_file
from r1ray.errors import ArtifactError, ConfigError, ServingError
from r1ray.manifest import MANIFEST_NAME, compute_run_id
from r1ray.models.tokenizer import Tokenizer
from r1ray.serving.parsing import error_body
from tests.fakes import write_tiny_model
from tests.fuzz.inputs import Dump, nearly
from tests.unit.serving.scripted import ScriptedModel, service_over

__all__ = ["Parser", "build_parsers"]

CONFIGS: tuple[Any, ...] = (
    {
        "run": {"name": "x", "root": "runs", "seed": 1},
        "base": {"source": "model", "context": {"type": "yarn", "factor": 2}},
        "tasks": {"families": [{"name": "gcd", "options": {"a": 1}}], "system_prompt": "Think."},
        "prepare": {
            "sources": [{"type": "tasks", "num_samples": 10}, {"type": "files", "paths": ["a"]}],
            "max_tokens": 64,
            "batch_tokens": 128,
        },
        "train": {"num_steps": 20, "exchange": {"type": "stream", "local_steps": 9}},
        "compress": {},
        "evaluate": {},
        "serve": {"model_name": "x"},
    },
)
KEYS = (
    "run.name", "run.root", "run.seed", "base", "base.source", "tasks.families", "distill",
    "tasks.system_prompt", "prepare.sources", "prepare.max_tokens", "train", "train.num_steps",
    "train.learning_rate", "train.exchange", "train.resources.tiers", "serve.host", "serve.port",
    "", ".", "a.b", "run..name", "run.name.x", "train.resources.num_workers", "student",
)  # fmt: skip
YAML_TOKENS: tuple[bytes, ...] = (
    b"&a ", b"*a", b"<<: *a", b"{<<: *a}", b"&a [*a]", b"!!int ", b"!!float ", b"!!bool ", b"!!set",
    b"!!binary ", b"!!timestamp ", b"!!omap ", b"!!python/object/apply:os.system [ls]", b"!x ",
    b"? ", b"- ", b": ", b"#", b"|\n", b">-\n", b"%", b"%YAML 1.2\n---\n", b"---\n", b"...\n",
    b"'", b'"', b"\\x", b'"\\ud800"', b'"\\0"', b"{", b"}", b"[", b"]", b",", b"\t", b"\n  ",
    b"0x" + b"f" * 6000, b"9" * 5000, b"1:1:1", b"1:" * 3000 + b"1", b".nan", b"-.inf", b"1e999",
    b"2001-99-99", b"2001-01-01", b"0o7", b"0b1", b"_", b"~", b"\x00", b"\xff", b"\x85",
    b"\xe2\x80\xa8", b"\xef\xbb\xbf", b"[" * 3000, b"{" * 100, b"- " * 500,
)  # fmt: skip
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
REQUESTS: tuple[Any, ...] = (
    CHAT,
    CHAT
    | {
        "temperature": 0.5, "top_p": 0.9, "top_k": 4, "min_p": 0.1, "n": 2, "seed": 3,
        "presence_penalty": 1, "logit_bias": {"7": 3}, "stop": ["a"], "logprobs": True,
        "top_logprobs": 2, "stream": True, "stream_options": {"include_usage": True},
        "metadata": {"k": "v"}, "tools": None,
    },
    CHAT | {"response_format": {"type": "json_schema", "json_schema": {
        "name": "n", "strict": True, "schema": {"type": "object", "properties": {
            "a": {"type": "integer", "minimum": 1}, "b": {"enum": ["x", 1]},
            "c": {"type": "string", "pattern": "a+", "maxLength": 9}}, "required": ["a"]}}}},
    {"model": "tiny", "prompt": "hi", "structured_outputs": {"regex": "(a|b)*"}, "logprobs": 1},
    {"model": "tiny", "prompt": [1, 2, 3], "structured_outputs": {"choice": ["a", "b"]}},
    {"prompt": "hi"},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]},
    {"tokens": [1, 2, 3]},
)  # fmt: skip
TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"a": 1}'}}]}
ROWS: tuple[Any, ...] = (
    {"prompt": "a", "completion": "b", "system": "c"},
    {"messages": TURNS, "tools": [{"type": "function", "function": {"name": "f"}}]},
    {"messages": [TURNS[0], CALL, {"role": "tool", "content": "1", "name": "f"}, TURNS[1]]},
    {"messages": [TURNS[0], {"role": "reasoning", "content": "r"}, TURNS[1]]},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    {"problem": "a", "generations": ["b", "c"], "is_reasoning_complete": [False, True]},
    {"instruction": "a", "input": "b", "output": "c"},
)


@dataclass(frozen=True)
class Parser:
    """A parser under test.

    Attributes:
        share: of all inputs that it gets.
        inputs: batches of what `check` is called with.
        check: raises whatever is not a clean error.
    """

    name: str
    share: float
    inputs: st.SearchStrategy[list[Any]]
    check: Callable[[Any], None]


def build_parsers(work: Path) -> list[Parser]:
    """All of them; their files are in the directory `work`."""
    return [
        _config_loader(work),
        _request_schema(work),
        _manifest_reader(work),
        _jsonl_reader(work),
    ]


def _check_message(error: ConfigError | ServingError) -> None:
    """Short enough to be read, and text that can be sent."""
    message = str(error)
    assert len(message) < 50_000, f"a message of {len(message)} characters"
    if isinstance(error, ServingError):
        json.dumps(error_body(error)).encode("ascii")


def _with_each(drawn: tuple[str, list[bytes]]) -> list[tuple[str, bytes]]:
    name, batch = drawn
    return [(name, data) for data in batch]


def _to_json(tree: Any) -> bytes:
    return json.dumps(tree).encode()


def _config_loader(work: Path) -> Parser:
    path = work / "config.yaml"
    values = st.sampled_from(YAML_TOKENS) | st.binary(max_size=6)
    value = st.lists(values, max_size=3).map(lambda parts: b"".join(parts).decode("latin-1"))
    override = st.tuples(st.sampled_from(KEYS) | st.text(max_size=6), value).map("=".join)
    dump: Dump = lambda tree: yaml.safe_dump(tree, default_flow_style=True).encode()  # noqa: E731

    def check(drawn: tuple[bytes, list[str]]) -> None:
        text, overrides = drawn
        path.write_bytes(text)
        try:
            config = load_config(path, overrides)
        except ConfigError as error:
            _check_message(error)
            return
        assert isinstance(config, PipelineConfig)
        compute_run_id("train", identity(config.prepare, config.tasks, config.train), {})

    valid = dump(CONFIGS[0])
    texts = nearly(CONFIGS, dump, YAML_TOKENS).map(lambda batch: [(text, []) for text in batch])
    overrides = st.lists(st.lists(override, min_size=1, max_size=2), min_size=1, max_size=12).map(
        lambda batch: [(valid, drawn) for drawn in batch]
    )
    return Parser("config", 0.16, texts | overrides, check)


def _request_schema(work: Path) -> Parser:
    tokenizer = Tokenizer(write_tiny_model(work / "model"))
    service = service_over(tokenizer, ScriptedModel(tokenizer, "ab"))
    endpoints = {
        "chat": service.chat,
        "complete": service.complete,
        "tokenize": service.tokenize,
        "detokenize": service.detokenize,
    }
    loop = asyncio.new_event_loop()

    async def answer(name: str, body: bytes) -> None:
        found: Any = await endpoints[name](body)
        if isinstance(found, dict):
            json.dumps(found)
            return
        async with contextlib.aclosing(found):
            async for event in found:
                event.encode("ascii")

    def check(drawn: tuple[str, bytes]) -> None:
        try:
            loop.run_until_complete(answer(*drawn))
        except ServingError as error:
            _check_message(error)
            if not 400 <= error.status < 500:
                raise

    names = st.sampled_from(sorted(endpoints))
    inputs = st.tuples(names, nearly(REQUESTS, _to_json)).map(_with_each)
    return Parser("request", 0.28, inputs, check)


def _manifest_reader(work: Path) -> Parser:
    store = ArtifactStore(str(work / "runs"))

    def body(directory: Path) -> dict[str, Any]:
        (directory / "a").mkdir()
        (directory / "a" / "b.txt").write_text("b")
        (directory / "c.txt").write_text("c")
        return {"loss": 0.5, "lengths": {"1": 2}}

    made = store.run("train", {"x": 1}, {"base": "abc"}, body)
    path, run_id = made.local_dir / MANIFEST_NAME, made.manifest.run_id

    def check(data: bytes) -> None:
        path.write_bytes(data)
        try:
            found = store.find("train", run_id)
        except ArtifactError:
            return
        assert found is not None
        assert all((made.local_dir / output.path).is_file() for output in found.manifest.outputs)
        assert len(found.digest) == 64
        found.manifest.to_json().encode()

    return Parser("manifest", 0.28, nearly([json.loads(path.read_text())], _to_json), check)


def _jsonl_reader(work: Path) -> Parser:
    compress: dict[str, Callable[[bytes], bytes]] = {
        ".jsonl": bytes,
        ".jsonl.gz": lambda data: gzip.compress(data, 1),
        ".jsonl.zst": lambda data: bytes(pa.Codec("zstd").compress(data, asbytes=True)),
    }
    rows = nearly(ROWS, _to_json)
    kinds = st.sampled_from([".jsonl", ".jsonl", *compress])
    packed = st.tuples(kinds, rows).map(
        lambda drawn: [(drawn[0], compress[drawn[0]](row + b"\n" + row)) for row in drawn[1]]
    )
    damaged = st.tuples(st.sampled_from(list(compress)), rows).map(_with_each)

    def check(drawn: tuple[str, bytes]) -> None:
        suffix, data = drawn
        path = work / f"rows{suffix}"
        path.write_bytes(data)
        try:
            tables = list(read_file(str(path)))
        except ArtifactError:
            return
        for table in tables:
            assert table.schema == ROW_SCHEMA
            for row in table.to_pylist():
                assert (row["error"] is None) == (row["messages"] is not None)
                if row["error"] is None:
                    assert json.loads(row["messages"])[-1]["role"] == "assistant"

    return Parser("jsonl", 0.28, packed | packed | packed | damaged, check)
