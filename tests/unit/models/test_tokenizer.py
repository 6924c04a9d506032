import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders

from r1ray.errors import ArtifactError
from r1ray.models import save_model
from r1ray.models.tokenizer import StreamDecoder, Tokenizer
from tests.fakes import EOS_ID, VOCAB_SIZE, tiny_model, write_tiny_model


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_tiny_model(tmp_path_factory.mktemp("tiny")))


_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@settings(max_examples=100, deadline=None)
@given(text=_TEXT)
def test_any_text_survives_encoding_and_decoding(text: str, tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=100, deadline=None)
@given(text=_TEXT)
def test_streamed_pieces_join_to_the_decoded_text(text: str, tokenizer: Tokenizer) -> None:
    ids, stream = tokenizer.encode(text), StreamDecoder(tokenizer)
    pieces = [stream.push(token_id) for token_id in ids]
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces) or (
        "\N{REPLACEMENT CHARACTER}" in text
    )
    assert "".join(pieces) + stream.finish() == tokenizer.decode(ids)


@settings(max_examples=100, deadline=None)
@given(ids=st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=30))
def test_streaming_any_tokens_loses_and_repeats_nothing(
    ids: list[int], tokenizer: Tokenizer
) -> None:
    """Also for bytes that are no UTF-8: what differs is only how broken bytes are shown."""
    stream = StreamDecoder(tokenizer)
    streamed = "".join([stream.push(token_id) for token_id in ids]) + stream.finish()
    shown = tokenizer.decode(ids)
    assert streamed.replace("\ufffd", "") == shown.replace("\ufffd", "")


def test_incomplete_characters_are_held_back_and_finished_as_replacement(
    tokenizer: Tokenizer,
) -> None:
    ids = tokenizer.encode("a€")
    assert len(ids) == 4  # three bytes of the euro sign
    stream = StreamDecoder(tokenizer)
    assert [stream.push(token_id) for token_id in ids] == ["a", "", "", "€"]
    cut = StreamDecoder(tokenizer)
    assert [cut.push(token_id) for token_id in ids[:3]] == ["a", "", ""]
    assert "\N{REPLACEMENT CHARACTER}" in cut.finish()


class _ByteFallback:
    """SentencePiece's way: what the vocabulary lacks is a token a byte."""

    def __init__(self) -> None:
        self._pieces = [*(f"<0x{byte:02X}>" for byte in range(256)), *"▁abchi", "<end>"]
        self._decoder = decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )

    def encode(self, text: str) -> list[int]:
        found = []
        for char in f"▁{text}".replace(" ", "▁"):
            if char in self._pieces:
                found.append(self._pieces.index(char))
            else:
                found += char.encode()
        return found

    def decode(self, ids: Sequence[int]) -> str:
        pieces = [self._pieces[index] for index in ids]
        return str(self._decoder.decode([piece for piece in pieces if piece != "<end>"]))


_BYTES = st.text(st.sampled_from("abchi é€😀 "), max_size=20)


@settings(max_examples=200, deadline=None)
@given(text=_BYTES)
def test_characters_of_several_byte_tokens_follow_one_another(text: str) -> None:
    tokenizer = _ByteFallback()
    ids, stream = tokenizer.encode(text), StreamDecoder(tokenizer)  # type: ignore[arg-type]
    streamed = "".join([stream.push(token_id) for token_id in ids])
    assert streamed == tokenizer.decode(ids) == text
    assert stream.finish() == ""


def test_broken_bytes_do_not_break_what_follows() -> None:
    tokenizer = _ByteFallback()
    stream = StreamDecoder(tokenizer)  # type: ignore[arg-type]
    ids = [*tokenizer.encode("hi"), *[0x9F] * 7, *"😀".encode(), *tokenizer.encode(" a")]
    streamed = "".join([stream.push(token_id) for token_id in ids]) + stream.finish()
    assert streamed.replace("\ufffd", "").endswith("😀  a")
    assert streamed.startswith("hi\ufffd")


def test_tokens_without_text_are_not_read_again_and_again(tokenizer: Tokenizer) -> None:
    lengths: list[int] = []

    class Counting:
        def decode(self, ids: Sequence[int]) -> str:
            lengths.append(len(ids))
            return tokenizer.decode(ids)

    stream = StreamDecoder(Counting())  # type: ignore[arg-type]
    euro = tokenizer.encode("€")
    assert stream.push(euro[0]) == ""
    for _ in range(200):
        assert stream.push(EOS_ID) == ""
        stream.push(euro[1])
    assert max(lengths) <= 12  # however long the answer is


def test_offsets_give_each_tokens_first_character(tokenizer: Tokenizer) -> None:
    text = "the sum, the other"
    [(ids, starts)] = tokenizer.encode_batch_with_offsets([text])
    assert ids.tolist() == tokenizer.encode(text)
    pieces = [text[a:b] for a, b in zip(starts, [*starts[1:], len(text)], strict=True)]
    assert [tokenizer.decode([int(token_id)]) for token_id in ids] == pieces


def test_control_tokens_are_read_but_not_decoded(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("<|im_end|>") == [EOS_ID]
    assert tokenizer.eos_token_id == EOS_ID
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.decode([*tokenizer.encode("hello"), EOS_ID]) == "hello"
    assert tokenizer.vocab_size == VOCAB_SIZE


def test_the_chat_template_is_applied(tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.render_chat(messages, add_generation_prompt=True) == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_directory_without_a_tokenizer_or_template_is_named(tmp_path: Path) -> None:
    save_model(tiny_model(), tmp_path / "bare")
    with pytest.raises(ArtifactError, match="bare: no usable tokenizer"):
        Tokenizer(tmp_path / "bare")
    path = write_tiny_model(tmp_path / "plain")
    (path / "chat_template.jinja").unlink()
    with pytest.raises(ArtifactError, match="no chat template"):
        Tokenizer(path)


def test_a_damaged_tokenizer_is_named(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "damaged")
    (path / "tokenizer.json").write_text("{")
    with pytest.raises(ArtifactError, match="damaged: no usable tokenizer"):
        Tokenizer(path)


def test_code_that_comes_with_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path)
    config = json.loads((path / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    (path / "evil.py").write_text(f"open({str(path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    with pytest.raises(ArtifactError, match=r"no usable tokenizer .* contains custom code"):
        Tokenizer(path)
    assert not (path / "ran").exists()


@pytest.mark.parametrize(
    "template", ["{{ ''.__class__.__mro__ }}", "{% for i in range(999999999) %}{% endfor %}"]
)
def test_a_chat_template_runs_in_a_sandbox(template: str, tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path)
    (path / "chat_template.jinja").write_text(template)
    with pytest.raises(Tokenizer.template_errors):
        Tokenizer(path).render_chat([], add_generation_prompt=True)


def test_a_tokenizer_that_is_a_pipe_is_refused(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path)
    (path / "tokenizer_config.json").unlink()
    os.mkfifo(path / "tokenizer_config.json")
    with pytest.raises(ArtifactError, match=r"tokenizer_config\.json: is no regular file"):
        Tokenizer(path)
