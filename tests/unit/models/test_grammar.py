"""Answers of a given form, from a model that has learned nothing."""

import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from llguidance import LLMatcher

from r1ray.errors import ShapeError
from r1ray.models.generation import BatchGenerator
from r1ray.models.grammar import FormCompiler, FormState, choice_form, json_form, regex_form
from r1ray.models.requests import GenerationRequest
from r1ray.models.sampling import SamplingParams
from r1ray.models.tokenizer import Tokenizer
from tests.fakes import EOS_ID, VOCAB_SIZE, tiny_model, write_tiny_model


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_tiny_model(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def forms(tokenizer: Tokenizer) -> FormCompiler:
    return FormCompiler(tokenizer, vocab_size=VOCAB_SIZE, stop_token_ids=[EOS_ID])


def _answer(
    tokenizer: Tokenizer, forms: FormCompiler, requests: dict[str, tuple[str | None, int]]
) -> dict[str, tuple[str, str | None]]:
    """(text, reason) of sampled answers, all in one batch."""
    generator = BatchGenerator(tiny_model(), max_concurrency=8, max_context_tokens=200, forms=forms)
    tokens: dict[str, list[int]] = {name: [] for name in requests}
    reasons: dict[str, str | None] = {}
    for name, (form, seed) in requests.items():
        sampling = SamplingParams(temperature=1.0, seed=seed)
        stops = frozenset({EOS_ID})
        generator.add(GenerationRequest(name, [5, 6, 7], 120, stops, sampling, form))
    while generator.num_running or generator.num_waiting:
        for event in generator.step():
            if event.token_id is not None:
                tokens[event.request_id].append(event.token_id)
            if event.finish_reason is not None:
                reasons[event.request_id] = event.finish_reason
    return {name: (tokenizer.decode(ids), reasons[name]) for name, ids in tokens.items()}


def test_answers_have_the_form_that_each_was_asked_for(
    tokenizer: Tokenizer, forms: FormCompiler
) -> None:
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {
            "n": {"type": "integer", "minimum": 0, "maximum": 999},
            "ok": {"type": "boolean"},
        },
        "required": ["n", "ok"],
        "additionalProperties": False,
    }
    requests: dict[str, tuple[str | None, int]] = {
        "json": (json_form(schema), 1),
        "json again": (json_form(schema), 2),
        "regex": (regex_form("(ab|c){2,5}é!"), 3),
        "choice": (choice_form(["ié", 'no "way"']), 4),
        "free": (None, 5),
    }
    found = _answer(tokenizer, forms, requests)
    for name in ("json", "json again"):
        text, reason = found[name]
        assert reason == "stop"
        value = json.loads(text)
        assert value.keys() == {"n", "ok"}
        assert 0 <= value["n"] <= 999
    assert re.fullmatch("(ab|c){2,5}é!", found["regex"][0])
    assert found["choice"] in (("ié", "stop"), ('no "way"', "stop"))
    assert _answer(tokenizer, forms, {"free": (None, 5)})["free"] == found["free"]


def test_a_pattern_that_would_fill_memory_runs_out_of_fuel(
    tokenizer: Tokenizer, forms: FormCompiler
) -> None:
    state = forms.start(regex_form("((a{1000}){1000}){1000}"))
    logits_V = torch.zeros(VOCAB_SIZE)
    state.restrict(logits_V)
    state.accept(tokenizer.encode("a")[0])
    with pytest.raises(ShapeError, match="too many expressions"):
        state.restrict(logits_V)


class WatchedCompiler(FormCompiler):
    """Notes what it compiles, which takes a while."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer, vocab_size=VOCAB_SIZE, stop_token_ids=[EOS_ID])
        self.compiled: list[str] = []

    def _compile(self, form: str) -> LLMatcher:
        self.compiled.append(form)
        time.sleep(0.05)
        return super()._compile(form)


def test_answers_of_one_form_share_its_compiling_and_nothing_else(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    forms = WatchedCompiler(tokenizer)
    a, b = tokenizer.encode("ab")

    def allowed(state: FormState) -> set[int]:
        logits_V = torch.zeros(VOCAB_SIZE)
        state.restrict(logits_V)
        return set(torch.isfinite(logits_V).nonzero().flatten().tolist())

    one, other = (forms.start(regex_form("ab")) for _ in range(2))
    one.accept(a)
    assert (b in allowed(one), b in allowed(other)) == (True, False)
    one.accept(a)  # which the form does not allow
    with pytest.raises(ShapeError):
        allowed(one)
    assert a in allowed(other)
    assert a in allowed(forms.start(regex_form("ab")))
    assert forms.compiled == [regex_form("ab")]

    monkeypatch.setattr("r1ray.models.grammar._KEPT", 2)
    for pattern in ("a", "ab", "b", "ab", "a"):  # "ab" was used last when "b" came
        forms.start(regex_form(pattern))
    assert forms.compiled == [regex_form(pattern) for pattern in ("ab", "a", "b", "a")]


def test_who_asks_for_a_form_together_waits_for_one_compiling(tokenizer: Tokenizer) -> None:
    forms = WatchedCompiler(tokenizer)
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(forms.start, [regex_form("ab")] * 8))
    assert forms.compiled == [regex_form("ab")]


@pytest.mark.parametrize(
    "form", [regex_form("[a-"), json_form({"type": "no such"}), "start: undefined", "{"]
)
def test_what_is_no_form_is_refused(forms: FormCompiler, form: str) -> None:
    with pytest.raises(ShapeError, match="no such form"):
        forms.start(form)


def test_a_token_that_the_form_does_not_allow_ends_it(
    tokenizer: Tokenizer, forms: FormCompiler
) -> None:
    state = forms.start(regex_form("ab"))
    logits = torch.zeros(VOCAB_SIZE)
    state.restrict(logits)
    allowed = torch.isfinite(logits).nonzero().flatten().tolist()
    assert {tokenizer.decode([token]) for token in allowed} <= {"a", "ab"}
    state.accept(tokenizer.encode("z")[0])
    with pytest.raises(ShapeError, match="the form: "):
        state.restrict(torch.zeros(VOCAB_SIZE))


def test_one_failed_form_ends_its_request_alone(
    forms: FormCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = BatchGenerator(tiny_model(), max_concurrency=2, max_context_tokens=64, forms=forms)
    for name, form in (("bad", regex_form("a+")), ("good", None)):
        generator.add(GenerationRequest(name, [5], 3, frozenset({EOS_ID}), SamplingParams(), form))

    def fail(*_: object) -> None:
        raise ShapeError("too complex")

    monkeypatch.setattr("r1ray.models.grammar.FormState.restrict", fail)
    events = [event for _ in range(3) for event in generator.step()]
    [failed] = [event for event in events if event.request_id == "bad"]
    assert (failed.token_id, failed.finish_reason, failed.failure) == (None, None, "too complex")
    assert [event.finish_reason for event in events if event.request_id == "good"][-1] == "length"
    assert generator.num_running == 0
