from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1ray.data.schemas import Conversation, RowError
from r1ray.data.tokenize import Sample, TokenizedRow, tokenize_rows
from r1ray.models.tokenizer import Tokenizer
from tests.fakes import CHAT_TEMPLATE, write_tiny_model

EOS = "<|im_end|>"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> Tokenizer:
    return Tokenizer(model_dir)


WithTemplate = Callable[[str], Tokenizer]


@pytest.fixture
def with_template(tmp_path: Path) -> WithTemplate:
    """The tiny tokenizer with another chat template."""

    def build(template: str) -> Tokenizer:
        path = write_tiny_model(tmp_path)
        (path / "chat_template.jinja").write_text(template)
        return Tokenizer(path)

    return build


def _turns(*contents: str, system: str | None = None) -> list[dict[str, Any]]:
    roles = ("user", "assistant") * len(contents)
    turns = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


def _row(
    tokenizer: Tokenizer,
    messages: list[dict[str, Any]],
    max_tokens: int = 512,
    overflow: Literal["reject", "truncate", "split"] = "reject",
    tools: list[dict[str, Any]] | None = None,
) -> TokenizedRow:
    """The one row, or its RowError raised."""
    conversation = Conversation(messages, tools)
    [row] = tokenize_rows(tokenizer, [conversation], max_tokens=max_tokens, overflow=overflow)
    if isinstance(row, RowError):
        raise row
    assert row.samples
    for sample in row.samples:
        assert (sample.input_ids.dtype, sample.is_target.dtype) == (np.int32, np.bool_)
        assert sample.input_ids.shape == sample.is_target.shape
        assert len(sample.input_ids) <= max_tokens
        assert sample.is_target[1:].any()
    return row


def _tokenize(tokenizer: Tokenizer, messages: list[dict[str, Any]], **options: Any) -> Sample:
    row = _row(tokenizer, messages, **options)
    assert (len(row.samples), row.num_dropped_pieces) == (1, 0)
    return row.samples[0]


def _shown(tokenizer: Tokenizer, sample: Sample, *, targets: bool) -> str:
    """The text of the (non-)target tokens, control tokens included."""
    return str(tokenizer._inner.decode(sample.input_ids[sample.is_target == targets].tolist()))


@settings(max_examples=60, deadline=None)
@given(
    question=st.text(st.characters(codec="utf-8"), min_size=1, max_size=30),
    # A leading line break would merge with the one that ends the answer's header.
    answer=st.text(st.characters(codec="utf-8"), min_size=1, max_size=30).filter(
        lambda text: not text[0].isspace()
    ),
)
def test_targets_are_exactly_the_answer_and_its_end(
    question: str, answer: str, tokenizer: Tokenizer
) -> None:
    sample = _tokenize(tokenizer, _turns(question, answer))
    assert _shown(tokenizer, sample, targets=True) == answer + EOS
    assert _shown(tokenizer, sample, targets=False) == (
        f"<|im_start|>user\n{question}{EOS}\n<|im_start|>assistant\n"
    )


def test_a_conversation_is_tokenized_like_its_whole_text(tokenizer: Tokenizer) -> None:
    messages = _turns("the sum?", "one", "and the other?", "three", system="Be brief.")
    sample = _tokenize(tokenizer, messages)
    text = tokenizer.render_chat(messages, add_generation_prompt=False).removesuffix("\n")
    assert sample.input_ids.tolist() == tokenizer.encode(text)


def test_every_answer_of_a_conversation_is_a_target(tokenizer: Tokenizer) -> None:
    sample = _tokenize(tokenizer, _turns("a?", "first", "b?", "second", "c?", "third"))
    assert _shown(tokenizer, sample, targets=True) == f"first{EOS}second{EOS}third{EOS}"
    assert "user" in _shown(tokenizer, sample, targets=False)


def test_a_template_that_strips_reasoning_keeps_it_in_the_last_answer(
    with_template: WithTemplate,
) -> None:
    strips = CHAT_TEMPLATE.replace("message['content']", "message['content'].split('</think>')[-1]")
    tokenizer = with_template(strips)
    messages = _turns("a?", "<think>\nx\n</think>\n1", "b?", "<think>\ny\n</think>\n2")
    sample = _tokenize(tokenizer, messages)
    # The earlier answer is not rendered verbatim, so it is context, not target.
    assert _shown(tokenizer, sample, targets=True) == f"<think>\ny\n</think>\n2{EOS}"


def test_an_opening_tag_in_the_answer_header_is_not_repeated(with_template: WithTemplate) -> None:
    opens = CHAT_TEMPLATE.replace("assistant\n' }}", "assistant\n<think>\n' }}")
    tokenizer = with_template(opens)
    sample = _tokenize(tokenizer, _turns("a?", "<think>\nx\n</think>\n1"))
    assert _shown(tokenizer, sample, targets=True) == f"x\n</think>\n1{EOS}"
    assert _shown(tokenizer, sample, targets=False).endswith("assistant\n<think>\n")


def test_a_template_that_refuses_is_a_row_error(with_template: WithTemplate) -> None:
    tokenizer = with_template(
        "{% if messages[0]['role'] == 'system' %}"
        "{{ raise_exception('no system turn, please') }}{% endif %}" + CHAT_TEMPLATE
    )
    with pytest.raises(RowError, match="the chat template refuses it: no system turn"):
        _tokenize(tokenizer, _turns("a", "b", system="s"))


def test_a_sample_that_just_fits_is_kept_and_one_more_token_is_rejected(
    tokenizer: Tokenizer,
) -> None:
    messages = _turns("question", "answer")
    size = len(_tokenize(tokenizer, messages).input_ids)
    for overflow in ("reject", "truncate", "split"):
        row = _row(tokenizer, messages, max_tokens=size, overflow=overflow)
        assert (len(row.samples), row.was_over_long) == (1, False)
    with pytest.raises(RowError, match=f"{size} tokens, max_tokens is {size - 1}"):
        _tokenize(tokenizer, messages, max_tokens=size - 1)


def test_truncating_keeps_the_beginning_and_says_so(tokenizer: Tokenizer) -> None:
    messages = _turns("question", "a long answer")
    whole = _tokenize(tokenizer, messages)
    max_tokens = len(whole.input_ids) - 3
    row = _row(tokenizer, messages, max_tokens=max_tokens, overflow="truncate")
    [cut] = row.samples
    assert row.was_over_long
    assert cut.input_ids.tolist() == whole.input_ids[:-3].tolist()
    assert cut.is_target.tolist() == whole.is_target[:-3].tolist()


def test_truncating_away_every_target_is_a_row_error(tokenizer: Tokenizer) -> None:
    with pytest.raises(RowError, match="no answer token is left within max_tokens"):
        _tokenize(tokenizer, _turns("question " * 20, "x"), max_tokens=20, overflow="truncate")


def test_control_tokens_in_the_text_do_not_widen_the_targets(tokenizer: Tokenizer) -> None:
    """A user may write control tokens; they stay outside the targets."""
    sample = _tokenize(tokenizer, _turns(f"a{EOS}\n<|im_start|>assistant\nb", "c"))
    assert _shown(tokenizer, sample, targets=True) == f"c{EOS}"


def test_rows_come_out_in_order_each_as_if_it_were_alone(with_template: WithTemplate) -> None:
    tokenizer = with_template(
        "{% if messages[0]['content'] == 'no' %}{{ raise_exception('no') }}{% endif %}"
        + CHAT_TEMPLATE
    )
    rows = [_turns("a", "first"), _turns("no", "x"), _turns("b " * 90, "long"), _turns("c", "last")]
    found = tokenize_rows(
        tokenizer, [Conversation(row) for row in rows], max_tokens=100, overflow="reject"
    )
    assert [isinstance(row, RowError) for row in found] == [False, True, True, False]
    assert str(found[1]) == "the chat template refuses it: no"
    assert "max_tokens is 100" in str(found[2])
    for messages, row in zip(rows[::3], found[::3], strict=True):
        assert isinstance(row, TokenizedRow)
        alone = _tokenize(tokenizer, messages)
        assert row.samples[0].input_ids.tolist() == alone.input_ids.tolist()
        assert row.samples[0].is_target.tolist() == alone.is_target.tolist()
    assert tokenize_rows(tokenizer, [], max_tokens=100, overflow="reject") == []


@settings(max_examples=100, deadline=None)
@given(
    contents=st.lists(
        st.text("the sum of\n\u00e9\u4e00", min_size=1, max_size=30), min_size=2, max_size=6
    ).filter(lambda contents: len(contents) % 2 == 0),
    max_tokens=st.integers(8, 60),
)
def test_split_pieces_predict_every_target_exactly_once(
    contents: list[str], max_tokens: int, tokenizer: Tokenizer
) -> None:
    whole = _tokenize(tokenizer, _turns(*contents))
    row = _row(tokenizer, _turns(*contents), max_tokens=max_tokens, overflow="split")
    num_tokens = len(whole.input_ids)
    assert row.was_over_long == (num_tokens > max_tokens)
    begins = range(0, num_tokens - 1, max_tokens - 1) if row.was_over_long else range(1)
    assert len(begins) == len(row.samples) + row.num_dropped_pieces
    with_targets = [
        begin for begin in begins if whole.is_target[begin + 1 : begin + max_tokens].any()
    ]
    times_predicted = np.zeros(num_tokens, dtype=int)
    for begin, piece in zip(with_targets, row.samples, strict=True):
        end = begin + len(piece.input_ids)
        assert piece.input_ids.tolist() == whole.input_ids[begin:end].tolist()
        assert not piece.is_target[0]
        times_predicted[begin:end] += piece.is_target
    assert times_predicted.tolist() == whole.is_target.astype(int).tolist()


def test_pieces_without_a_target_are_dropped_and_counted(tokenizer: Tokenizer) -> None:
    messages = _turns("question " * 20, "an answer that is long " * 5)
    row = _row(tokenizer, messages, max_tokens=20, overflow="split")
    assert row.was_over_long
    assert row.num_dropped_pieces > 2
    assert len(row.samples) > 2


def test_the_token_that_two_pieces_share_is_a_target_of_the_earlier_one(
    tokenizer: Tokenizer,
) -> None:
    messages = _turns("question", "x")
    whole = _tokenize(tokenizer, messages)
    first = int(np.flatnonzero(whole.is_target)[0])
    row = _row(tokenizer, messages, max_tokens=first + 1, overflow="split")
    assert [int(sample.is_target.sum()) for sample in row.samples] == [1, 1]
    assert row.samples[1].input_ids[0] == row.samples[0].input_ids[-1]


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), max_size=5))
def test_batched_encoding_is_the_encoding_of_each_text(
    texts: list[str], tokenizer: Tokenizer
) -> None:
    texts = [*texts, f"{EOS} the sum<|im_start|>\u00e9", "the other " * 300]
    found = tokenizer.encode_batch_with_offsets(texts)
    assert [ids.tolist() for ids, _ in found] == [tokenizer.encode(text) for text in texts]
    inner = tokenizer._inner
    for text, (_, starts) in zip(texts, found, strict=True):
        offsets = inner(text, add_special_tokens=False, return_offsets_mapping=True)
        assert starts.tolist() == [start for start, _ in offsets["offset_mapping"]]


def test_long_texts_are_encoded_in_groups(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["the sum of", "one", "", "and three " * 9, "the other"]
    whole = [ids.tolist() for ids, _ in tokenizer.encode_batch_with_offsets(texts)]
    monkeypatch.setattr("r1ray.models.tokenizer._BATCH_CHARS", 12)
    assert [ids.tolist() for ids, _ in tokenizer.encode_batch_with_offsets(texts)] == whole


REASONING = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['reasoning_content'] %}"
    "{{ '<think>\n' + message['reasoning_content'] + '\n</think>\n' }}{% endif %}"
    "{{ message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_reasoning_is_written_in_front_of_the_last_answer(tokenizer: Tokenizer) -> None:
    messages = _turns("a?", "1")
    messages[1]["reasoning_content"] = "x"
    sample = _tokenize(tokenizer, messages)
    assert _shown(tokenizer, sample, targets=True) == f"<think>\nx\n</think>\n1{EOS}"


def test_earlier_reasoning_is_left_to_the_template(
    tokenizer: Tokenizer, with_template: WithTemplate
) -> None:
    messages = _turns("a?", "1", "b?", "2")
    messages[1]["reasoning_content"] = "x"
    dropped = _tokenize(tokenizer, messages)  # so it is context, not target
    assert _shown(tokenizer, dropped, targets=True) == f"2{EOS}"
    assert "x" not in _shown(tokenizer, dropped, targets=False)
    kept = _tokenize(with_template(REASONING), messages)
    assert _shown(tokenizer, kept, targets=True) == f"<think>\nx\n</think>\n1{EOS}2{EOS}"


CALLING = (
    "{% if tools %}{{ 'tools: ' + (tools | tojson) + '\n' }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
    "{% for call in message['tool_calls'] %}"
    "{{ '<call>' + call.function.name + (call.function.arguments | tojson) }}{% endfor %}"
    "{{ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]


def _call(content: str = "", **more: Any) -> dict[str, Any]:
    calls = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
    return {"role": "assistant", "content": content, "tool_calls": calls, **more}


def test_tool_calls_are_targets_as_the_template_writes_them(with_template: WithTemplate) -> None:
    tokenizer = with_template(CALLING)
    sample = _tokenize(tokenizer, [*_turns("a?"), _call("Let me see.")], tools=TOOLS)
    assert _shown(tokenizer, sample, targets=True) == f'Let me see.<call>add{{"a": 1}}{EOS}'
    assert '"name": "add"' in _shown(tokenizer, sample, targets=False)


def test_earlier_tool_calls_are_targets_and_results_are_not(with_template: WithTemplate) -> None:
    tokenizer = with_template(CALLING)
    result = {"role": "tool", "content": "2", "tool_call_id": "7"}
    messages = [*_turns("a?"), _call(), result, {"role": "assistant", "content": "two"}]
    sample = _tokenize(tokenizer, messages, tools=TOOLS)
    assert _shown(tokenizer, sample, targets=True) == f'<call>add{{"a": 1}}{EOS}two{EOS}'
    assert "tool\n2" in _shown(tokenizer, sample, targets=False)


def test_an_end_of_turn_that_the_template_leaves_out_is_added(with_template: WithTemplate) -> None:
    tokenizer = with_template(CALLING.replace("{{ '<|im_end|>\n' }}", "{{ '\n' }}"))
    sample = _tokenize(tokenizer, [*_turns("a?"), _call()])
    assert _shown(tokenizer, sample, targets=True) == f'<call>add{{"a": 1}}{EOS}'


def test_reasoning_before_a_tool_call_stays_a_target(with_template: WithTemplate) -> None:
    tokenizer = with_template(CALLING)
    sample = _tokenize(tokenizer, [*_turns("a?"), _call(reasoning_content="x")])
    assert _shown(tokenizer, sample, targets=True) == (
        f'<think>\nx\n</think>\n<call>add{{"a": 1}}{EOS}'
    )


@pytest.mark.parametrize("is_last", [True, False])
def test_tool_calls_that_the_template_leaves_out_are_a_row_error(
    is_last: bool, with_template: WithTemplate
) -> None:
    later = [] if is_last else _turns("b?", "2")
    for template in (CHAT_TEMPLATE, "{{ tools | tojson }}" + CHAT_TEMPLATE):
        tokenizer = with_template(template)
        with pytest.raises(RowError, match="template does not render tool_calls"):
            _tokenize(tokenizer, [*_turns("a?"), _call(), *later], tools=TOOLS)


def test_tool_calls_in_another_turn_than_the_prompts_are_a_row_error(
    with_template: WithTemplate,
) -> None:
    opens = CALLING.replace("assistant\n' }}", "assistant\n<think>\n' }}")
    with pytest.raises(RowError, match="does not continue its prompt with the tool_calls"):
        _tokenize(with_template(opens), [*_turns("a?"), _call()])
    silent = CALLING.replace(" + message['content'] }}", " }}").replace(
        "'\n' }}{% for", "'\n' }}{{ '' if message['tool_calls'] else message['content'] }}{% for"
    )
    with pytest.raises(RowError, match="does not render the content beside tool_calls"):
        _tokenize(with_template(silent), [*_turns("a?"), _call("Let me see.")])


def test_a_conversation_that_the_assistant_begins_is_kept(tokenizer: Tokenizer) -> None:
    messages = [{"role": "assistant", "content": "Hi"}, *_turns("a?", "1")]
    sample = _tokenize(tokenizer, messages)
    assert _shown(tokenizer, sample, targets=True) == f"1{EOS}"
    with pytest.raises(RowError, match="the chat template refuses it"):
        _tokenize(tokenizer, messages[:1])
