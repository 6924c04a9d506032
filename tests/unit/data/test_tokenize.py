from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1ray.data.sources import RowError
from r1ray.data.tokenize import Sample, tokenize_messages
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


def _turns(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    roles = ("user", "assistant") * len(contents)
    turns = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


def _tokenize(
    tokenizer: Tokenizer,
    messages: list[dict[str, str]],
    max_tokens: int = 512,
    overflow: str = "reject",
) -> Sample:
    return tokenize_messages(tokenizer, messages, max_tokens=max_tokens, overflow=overflow)


def _shown(tokenizer: Tokenizer, sample: Sample, *, targets: bool) -> str:
    """The text of the (non-)target tokens, control tokens included."""
    pairs = zip(sample.input_ids, sample.is_target, strict=True)
    ids = [token for token, is_target in pairs if is_target == targets]
    return str(tokenizer._inner.decode(ids))


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
    assert sample.input_ids == tokenizer.encode(text)


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
    assert not _tokenize(tokenizer, messages, max_tokens=size).was_truncated
    with pytest.raises(RowError, match=f"{size} tokens, max_tokens is {size - 1}"):
        _tokenize(tokenizer, messages, max_tokens=size - 1)


def test_truncating_keeps_the_beginning_and_says_so(tokenizer: Tokenizer) -> None:
    messages = _turns("question", "a long answer")
    whole = _tokenize(tokenizer, messages)
    cut = _tokenize(tokenizer, messages, max_tokens=len(whole.input_ids) - 3, overflow="truncate")
    assert cut.was_truncated
    assert cut.input_ids == whole.input_ids[:-3]
    assert cut.is_target == whole.is_target[:-3]


def test_truncating_away_every_target_is_a_row_error(tokenizer: Tokenizer) -> None:
    with pytest.raises(RowError, match="no answer token is left within max_tokens"):
        _tokenize(tokenizer, _turns("question " * 20, "x"), max_tokens=20, overflow="truncate")


def test_control_tokens_in_the_text_do_not_widen_the_targets(tokenizer: Tokenizer) -> None:
    """A user may write control tokens; they stay outside the targets."""
    sample = _tokenize(tokenizer, _turns(f"a{EOS}\n<|im_start|>assistant\nb", "c"))
    assert _shown(tokenizer, sample, targets=True) == f"c{EOS}"
