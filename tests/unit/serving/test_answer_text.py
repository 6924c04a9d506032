"""Stop strings and incremental text."""

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from r1ray.models.requests import TokenEvent
from r1ray.models.sampling import SampledToken
from r1ray.models.tokenizer import Tokenizer
from r1ray.serving.answer_text import AnswerText, StopStrings, join_pieces
from tests.fakes import EOS_ID, write_tiny_model


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path: Path = tmp_path_factory.mktemp("tiny")
    return Tokenizer(write_tiny_model(path))


def cut(text: str, stops: list[str]) -> tuple[str, bool]:
    """The oracle: the stop string that is complete first ends the text."""
    for end in range(1, len(text) + 1):
        ended = [stop for stop in stops if text[:end].endswith(stop)]
        if ended:
            return text[: end - len(max(ended, key=len))], True
    return text, False


@given(
    pieces=st.lists(st.text("ab\n", max_size=5), max_size=8),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=4),
)
def test_stop_strings_do_not_depend_on_how_the_text_is_cut(
    pieces: list[str], stops: list[str]
) -> None:
    holder = StopStrings(stops)
    released = ""
    for piece in pieces:
        released += holder.push(piece)
        assert "".join(pieces).startswith(released)
    assert (released + holder.finish(), holder.hit) == cut("".join(pieces), stops)


def test_only_a_possible_beginning_is_held_back() -> None:
    holder = StopStrings(["</think>"])
    assert holder.push("a < b") == "a < b"
    assert holder.push("c</th") == "c"
    assert holder.push("ing") == "</thing"
    assert holder.push("</think") == ""
    assert holder.push("> more") == ""
    assert holder.hit
    assert holder.finish() == ""


def test_stop_string_across_tokens_ends_the_answer(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("one két END two")
    answer = AnswerText(tokenizer, ["END"])
    text = "".join(answer.push([TokenEvent("r", token, None)]).text for token in ids)
    assert text == "one két "
    assert answer.finish_reason == "stop"
    assert answer.num_tokens < len(ids)


def test_text_held_for_a_stop_string_is_released_at_the_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("almost EN")
    answer = AnswerText(tokenizer, ["END"])
    events = [TokenEvent("r", token, None) for token in ids[:-1]]
    events.append(TokenEvent("r", ids[-1], "length"))
    assert answer.push(events).text == "almost EN"
    assert answer.finish_reason == "length"


def test_incomplete_character_is_replaced_at_the_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("é€")
    answer = AnswerText(tokenizer, [])
    text = answer.push([TokenEvent("r", token, None) for token in ids[:-1]]).text
    assert text == "é"
    text += answer.push([TokenEvent("r", None, "stop")]).text
    assert text == "é\N{REPLACEMENT CHARACTER}"
    assert answer.num_tokens == len(ids) - 1


@given(st.lists(st.integers(0, 299).filter(lambda token: token != EOS_ID), max_size=40))
@example([159, 0, 97, 159, 97])  # a control token among bytes that are no character
@example([159, 159, 97, 159, 159, 97])  # two of these, and the beginning of another
def test_pieces_add_up_to_the_decoded_whole(tokenizer: Tokenizer, ids: list[int]) -> None:
    answer = AnswerText(tokenizer, [])
    text = "".join(answer.push([TokenEvent("r", token, None)]).text for token in ids)
    text += answer.push([TokenEvent("r", None, "stop")]).text
    assert text == tokenizer.decode(ids)


def test_log_probabilities_come_with_their_tokens(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("ab END")
    events = [
        TokenEvent("r", token, None, SampledToken(token, -0.5, ((token, -0.5), (ids[0], -2.0))))
        for token in ids
    ]
    answer = AnswerText(tokenizer, ["END"])
    pieces = [answer.push([event]) for event in events]
    whole = join_pieces(pieces)
    assert whole.text == "ab "
    assert [token.text for token in whole.tokens] == [tokenizer.spell([token]) for token in ids]
    assert [token.offset for token in whole.tokens][:2] == [0, len(whole.tokens[0].text)]
    first = whole.tokens[0].text
    assert whole.tokens[1].top == ((whole.tokens[1].text, -0.5), (first, -2.0))
    assert all(piece.tokens for piece in pieces)  # also where a token's text is held back
