from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from r1ray.errors import ShapeError
from r1ray.models import Decoder
from r1ray.models.answer_lengths import AnswerLengths
from r1ray.models.batch_generation import generate_batch
from r1ray.models.config import RopeConfig
from r1ray.models.gates import attach_gates, list_attentions
from r1ray.models.generation import BatchGenerator
from r1ray.models.quantization import quantize_modules
from r1ray.models.requests import GenerationRequest, TokenEvent
from r1ray.models.sampling import SamplingParams
from r1ray.models.scheduler import Scheduler
from r1ray.ops.block_gate import BlockGate
from tests.fakes import tiny_config, tiny_model
from tests.unit.oracle import random_ids

NO_STOP: frozenset[int] = frozenset()


def _prompts(count: int) -> list[list[int]]:
    return [random_ids(3 + (5 * index) % 13, seed=index).tolist() for index in range(count)]


def _reference(model: Decoder, prompt: Sequence[int], max_new_tokens: int) -> list[int]:
    """Greedy decoding without a cache."""
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(max_new_tokens):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def _request(request_id: str, prompt: Sequence[int], **changes: Any) -> GenerationRequest:
    settings = {"max_new_tokens": 8, "stop_token_ids": NO_STOP, **changes}
    return GenerationRequest(request_id, prompt, **settings)


def _run(generator: BatchGenerator) -> dict[str, list[TokenEvent]]:
    events = defaultdict(list)
    while generator.num_waiting or generator.num_running:
        for event in generator.step():
            events[event.request_id].append(event)
    return events


@pytest.mark.parametrize("is_quantized", [False, True])
def test_batched_continuous_generation_equals_one_at_a_time(is_quantized: bool) -> None:
    model = tiny_model()
    if is_quantized:
        quantize_modules(model)
    prompts = _prompts(9)
    together = generate_batch(
        model, prompts, max_new_tokens=16, stop_token_ids=NO_STOP, max_concurrency=3
    )
    assert together == [_reference(model, prompt, 16) for prompt in prompts]


def test_rows_that_stop_early_leave_the_others_alone() -> None:
    model, prompts = tiny_model(), _prompts(8)
    references = [_reference(model, prompt, 20) for prompt in prompts]
    stops = frozenset(reference[index] for index, reference in enumerate(references))
    expected = []
    for reference in references:
        end = next((i for i, token in enumerate(reference) if token in stops), 20)
        expected.append(reference[:end])
    finished: list[int] = []
    found = generate_batch(
        model,
        prompts,
        max_new_tokens=20,
        stop_token_ids=stops,
        max_concurrency=3,
        on_finish=finished.append,
    )
    assert found == expected
    assert len(set(map(len, found))) > 3  # they did end at different times
    assert finished == list(range(1, 9))


def test_a_length_dependent_rope_gives_a_row_the_same_answer_in_any_company() -> None:
    rope = RopeConfig(
        10_000.0,
        "longrope",
        {
            "original_max_position_embeddings": 16,
            "short_factor": [1.0, 1.1, 1.2, 1.3],
            "long_factor": [1.0, 2.0, 4.0, 8.0],
        },
    )
    config = tiny_config()
    model = tiny_model()
    longer = Decoder(type(config)(**{**vars(config), "rope": rope})).eval()
    longer.load_state_dict(model.state_dict())
    prompts = [random_ids(length, seed=length).tolist() for length in (30, 4, 12, 30)]
    settings: dict[str, Any] = {"max_new_tokens": 10, "stop_token_ids": NO_STOP}
    together = generate_batch(longer, prompts, max_concurrency=4, **settings)
    alone = [
        generate_batch(longer, [prompt], max_concurrency=1, **settings)[0] for prompt in prompts
    ]
    assert together == alone


def test_a_stop_token_ends_the_sequence_and_is_not_shown() -> None:
    model, [prompt] = tiny_model(), _prompts(1)
    reference = _reference(model, prompt, 8)
    generator = BatchGenerator(model, max_concurrency=2, max_context_tokens=64)
    generator.add(_request("a", prompt, stop_token_ids=frozenset({reference[3]})))
    events = _run(generator)["a"]
    end = reference.index(reference[3])
    assert [event.token_id for event in events] == [*reference[:end], None]
    assert [event.finish_reason for event in events] == [None] * end + ["stop"]


def test_the_last_allowed_token_is_shown_with_reason_length() -> None:
    model, [prompt] = tiny_model(), _prompts(1)
    generator = BatchGenerator(model, max_concurrency=1, max_context_tokens=64)
    generator.add(_request("a", prompt, max_new_tokens=1))
    [event] = _run(generator)["a"]
    assert event == TokenEvent("a", _reference(model, prompt, 1)[0], "length")


def test_a_sequence_may_fill_the_context_to_the_last_token() -> None:
    model, [prompt] = tiny_model(), _prompts(1)
    generator = BatchGenerator(model, max_concurrency=1, max_context_tokens=len(prompt) + 8)
    generator.add(_request("a", prompt))
    assert [event.token_id for event in _run(generator)["a"]] == _reference(model, prompt, 8)


@pytest.mark.parametrize(
    ("prompt", "max_new_tokens", "complaint"),
    [
        ([5] * 10, 7, "10 prompt tokens \\+ 7 new tokens exceed the context of 16"),
        ([], 4, "at least one prompt token"),
        ([5], 0, "one new token"),
    ],
)
def test_requests_that_do_not_fit_are_refused_when_added(
    prompt: list[int], max_new_tokens: int, complaint: str
) -> None:
    generator = BatchGenerator(tiny_model(), max_concurrency=1, max_context_tokens=16)
    with pytest.raises(ShapeError, match=complaint):
        generator.add(_request("a", prompt, max_new_tokens=max_new_tokens))
    assert generator.num_waiting == 0
    assert generator.step() == []


def test_no_more_run_at_once_than_may() -> None:
    model, prompts = tiny_model(), _prompts(7)
    generator = BatchGenerator(model, max_concurrency=2, max_context_tokens=64)
    for index, prompt in enumerate(prompts):
        generator.add(_request(str(index), prompt, max_new_tokens=2 + index))
    most = 0
    while generator.num_waiting or generator.num_running:
        generator.step()
        most = max(most, generator.num_running)
    assert most == 2


def test_a_cancelled_request_stops_and_the_others_are_unchanged() -> None:
    model, prompts = tiny_model(), _prompts(4)
    generator = BatchGenerator(model, max_concurrency=3, max_context_tokens=64)
    for index, prompt in enumerate(prompts):
        generator.add(_request(str(index), prompt))
    seen = defaultdict(list)
    for _ in range(3):
        for event in generator.step():
            seen[event.request_id].append(event.token_id)
    generator.cancel("0")  # running, in a row before others
    generator.cancel("3")  # waiting
    generator.cancel("unknown")
    assert (generator.num_running, generator.num_waiting) == (2, 0)
    for request_id, events in _run(generator).items():
        seen[request_id] += [event.token_id for event in events]
    assert len(seen["0"]) == 3
    assert "3" not in seen
    for request_id in ("1", "2"):
        assert seen[request_id] == _reference(model, prompts[int(request_id)], 8)


def test_a_request_added_while_others_run_joins_them() -> None:
    model, prompts = tiny_model(), _prompts(3)
    generator = BatchGenerator(model, max_concurrency=4, max_context_tokens=64)
    seen = defaultdict(list)
    for index, prompt in enumerate(prompts):
        generator.add(_request(str(index), prompt))
        for _ in range(2):
            for event in generator.step():
                seen[event.request_id].append(event.token_id)
    for request_id, events in _run(generator).items():
        seen[request_id] += [event.token_id for event in events]
    for index, prompt in enumerate(prompts):
        assert seen[str(index)] == _reference(model, prompt, 8)


def test_a_step_has_no_more_tokens_than_it_may() -> None:
    model = tiny_model()
    generator = BatchGenerator(model, max_concurrency=8, max_context_tokens=128, max_step_tokens=70)
    for index, length in enumerate((60, 50, 6, 6)):
        generator.add(_request(str(index), random_ids(length, seed=index).tolist()))
    answered = [{event.request_id for event in generator.step()} for _ in range(2)]
    assert answered == [{"0", "2"}, {"0", "1", "2", "3"}]  # 50 of 10 tokens do not fit


def test_the_others_are_answered_while_a_long_prompt_is_read() -> None:
    model = tiny_model(max_positions=1024)
    generator = BatchGenerator(
        model, max_concurrency=3, max_context_tokens=1000, max_step_tokens=128
    )
    prompts = [random_ids(length, seed=length).tolist() for length in (5, 6, 700)]
    for index in range(2):
        generator.add(_request(str(index), prompts[index], max_new_tokens=30))
    generator.step()
    generator.add(_request("2", prompts[2], max_new_tokens=4))
    seen = [[event.request_id for event in generator.step()] for _ in range(9)]
    assert all(names == ["0", "1"] for names in seen), seen  # 64 tokens of the prompt in each
    found = [event.token_id for event in _run(generator)["2"]]
    assert found == _reference(model, prompts[2], 4)


@pytest.mark.parametrize("kv_dtype", [None, torch.int8])
@pytest.mark.parametrize("attention", ["dense", "sparse"])
def test_answers_do_not_depend_on_company_known_beginnings_or_lack_of_pages(
    attention: str, kv_dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """INT8, where a product of a row is the same in any batch."""
    for module in ("ops.block_selection", "models.sparse", "models.generation"):
        monkeypatch.setattr(f"r1ray.{module}.DENSE_BLOCKS", 3)
    monkeypatch.setattr("r1ray.ops.block_selection._MOST", 1)
    monkeypatch.setattr("r1ray.ops.block_selection._LEAST", 1)
    torch.manual_seed(0)
    model = tiny_model(max_positions=1024)
    if attention == "sparse":
        attach_gates(model)
        gate = list_attentions(model)[0].gate
        assert isinstance(gate, BlockGate)
        gate.is_marked[1] = True
    quantize_modules(model)
    shared = random_ids(300).tolist()
    ends = [random_ids(length, seed=length).tolist() for length in (3, 90, 130, 64, 1)]
    prompts = [
        shared[:length] + end for length, end in zip((300, 256, 128, 64, 64), ends, strict=True)
    ]

    def generate(names: Sequence[int], **limits: Any) -> dict[str, list[int | None]]:
        generator = BatchGenerator(
            model,
            max_context_tokens=600,
            kv_dtype=kv_dtype,
            max_step_tokens=192,
            lengths=AnswerLengths({1: 1}),  # too few: pages run out
            **limits,
        )
        for name in names:
            generator.add(_request(str(name), prompts[name], max_new_tokens=90))
        events = _run(generator)
        preempted.append(sum(item.num_preempted for item in seen))
        return {name: [event.token_id for event in found] for name, found in events.items()}

    preempted: list[int] = []
    seen: list[Any] = []
    add = Scheduler.add

    def remember(*arguments: Any) -> Any:
        seen.append(add(*arguments))
        return seen[-1]

    monkeypatch.setattr(Scheduler, "add", remember)
    alone = {
        name: tokens
        for index in range(5)
        for name, tokens in generate([index], max_concurrency=1).items()
    }
    assert generate(range(5), max_concurrency=5) == alone
    assert not any(item.num_cached for item in seen)
    assert generate(range(5), max_concurrency=2) == alone
    assert any(item.num_cached for item in seen)
    assert preempted[-1] == 0
    assert generate(range(5), max_concurrency=5, num_pages=15) == alone
    assert preempted[-1] > 0
    assert generate([4, 2, 0, 1, 3], max_concurrency=3, num_pages=12) == alone


def test_long_prompts_are_read_alone_in_chunks() -> None:
    model = tiny_model()
    prompts = [random_ids(length, seed=length).tolist() for length in (5, 90, 7, 33)]
    generator = BatchGenerator(model, max_concurrency=4, max_context_tokens=120, prefill_chunk=32)
    for index, prompt in enumerate(prompts):
        generator.add(_request(str(index), prompt))
    events = _run(generator)
    for index, prompt in enumerate(prompts):
        found = [event.token_id for event in events[str(index)]]
        assert found == _reference(model, prompt, 8)


def test_seeded_sampling_is_reproducible_and_independent_of_the_other_rows() -> None:
    model, prompts = tiny_model(), _prompts(5)
    sampling = SamplingParams(temperature=1.5, top_p=0.95, seed=7)

    def generate(company: int, beside: SamplingParams) -> list[int | None]:
        generator = BatchGenerator(model, max_concurrency=3, max_context_tokens=64)
        for index in range(company):
            generator.add(_request(f"other{index}", prompts[1 + index], sampling=beside))
        generator.add(_request("mine", prompts[0], max_new_tokens=16, sampling=sampling))
        return [event.token_id for event in _run(generator)["mine"]]

    alone = generate(0, SamplingParams())
    assert generate(0, SamplingParams()) == alone
    assert generate(2, SamplingParams()) == alone
    assert generate(4, SamplingParams(temperature=1.0, seed=3)) == alone
    assert generate(3, SamplingParams(temperature=1.0)) == alone
    assert alone != _reference(model, prompts[0], 16)


def test_no_prompts_give_no_outputs() -> None:
    assert (
        generate_batch(
            tiny_model(), [], max_new_tokens=4, stop_token_ids=NO_STOP, max_concurrency=2
        )
        == []
    )
