"""Reasoning and answer told apart, however a reply is cut."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1ray.serving.reasoning import ReasoningSplitter, opens_reasoning

CASES = [
    ("<think>\na < b\n</think>\n42", False, "a < b\n", "42"),
    ("  <think>x</think>\n\n42 <think>y</think>", False, "x", "42 <think>y</think>"),
    ("plain </think> text", False, "", "plain </think> text"),
    ("\n<thin air", False, "", "\n<thin air"),
    ("<think>never ends </thi", False, "never ends </thi", ""),
    ("\nso be it</think>yes", True, "so be it", "yes"),
    ("<think>", False, "", ""),
    ("", True, "", ""),
    ("<thi", False, "", "<thi"),
]


@pytest.mark.parametrize(("reply", "is_open", "reasoning", "content"), CASES)
@given(data=st.data())
def test_cuts_change_nothing(
    reply: str, is_open: bool, reasoning: str, content: str, data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(reply)), max_size=6)))
    splitter = ReasoningSplitter(is_open=is_open)
    pieces = [
        splitter.push(reply[start:stop])
        for start, stop in zip([0, *cuts], [*cuts, len(reply)], strict=True)
    ]
    pieces.append(splitter.finish())
    assert "".join(piece.reasoning for piece in pieces) == reasoning
    assert "".join(piece.content for piece in pieces) == content


def test_text_is_not_held_longer_than_a_tag_may_take() -> None:
    splitter = ReasoningSplitter(is_open=False)
    splitter.push("<think>")
    assert splitter.push("one </th").reasoning == "one "
    assert splitter.push("ree").reasoning == "</three"
    assert splitter.push("</think>\nb").content == "b"
    assert splitter.push("</think>").content == "</think>"


def test_a_prompt_may_open_the_reasoning() -> None:
    assert opens_reasoning("user\nhi\nassistant\n<think>\n")
    assert not opens_reasoning("user\n<think>\nassistant\n")
