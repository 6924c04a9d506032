"""Whatever a configuration file holds, it is a configuration or a clean error."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from r1ray.config import PipelineConfig, load_config
from r1ray.config.loader import parse_config
from r1ray.errors import ConfigError
from tests.unit.config.minimal import MINIMAL, TEXT, parse, refuse


@pytest.mark.parametrize("text", ["", "3", "[]", "null", "a", "- run", "run: [", "\x00", "&a [*a]"])
def test_text_that_is_no_configuration_is_a_config_error(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_config(text)


@pytest.mark.parametrize(
    "value", ["!!timestamp x", "!!bool x", "!!int ''", "!!float x", "!!binary ä", "2001-99-99",
              "{[1]: 2}", "{{a: 1}: 2}", "!!python/object/apply:os.system [ls]", "? ", "0x",
              "!!set {a, b}", "!!omap [1]", "!!pairs [1]"],
)  # fmt: skip
def test_values_that_yaml_cannot_build_are_config_errors(value: str) -> None:
    with pytest.raises(ConfigError):
        parse_config(TEXT + f"extra: {value}\n")


@pytest.mark.parametrize("place", ["run:\n  name: *l9", "run: *l9", "extra: *l9", "- *l9"])
def test_nested_aliases_do_not_blow_up_the_message(place: str) -> None:
    lines = ["l0: &l0 [lol, lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    for level in range(1, 10):
        lines.append(f"l{level}: &l{level} [{', '.join([f'*l{level - 1}'] * 10)}]")
    if place.startswith("-"):
        place = "all: *l9"
    with pytest.raises(ConfigError) as caught:
        parse_config("\n".join([*lines, place]))
    assert len(str(caught.value)) < 10_000


@pytest.mark.parametrize("text", ["[" * 10_000, "{a: " * 33, "- " * 33, "[" * 33 + "]" * 33])
def test_nesting_too_deep_is_a_config_error(text: str) -> None:
    with pytest.raises(ConfigError, match="nested deeper than 32 levels"):
        parse_config(text)
    with pytest.raises(ConfigError, match="nested deeper than 32 levels"):
        parse(f"run.name={text}")


def test_aliases_may_be_used_but_not_without_end() -> None:
    text = TEXT.replace("batch_tokens: 128", "batch_tokens: &most 128").replace("64", "*most")
    assert parse_config(text).prepare.max_tokens == 128
    bomb = "".join(f"l{n}: &l{n} [{f'*l{n - 1}, ' * 10 if n else 1}]\n" for n in range(6))
    with pytest.raises(ConfigError, match="more than 100000 values with all aliases"):
        parse_config(bomb)
    with pytest.raises(ConfigError, match="an alias contains itself"):
        parse_config("run: &a {name: [*a]}")


@pytest.mark.parametrize("value", ["0x" + "f" * 6000, "9" * 5000, "1" + ":59" * 3000])
def test_a_whole_number_too_long_to_be_shown_is_a_config_error(value: str) -> None:
    assert "a whole number of more than 400 digits" in refuse(f"run.seed={value}")


@pytest.mark.parametrize(
    "key",
    ["run.root", "base.source", "distill.teacher", "train.resources.tiers.directory",
     "prepare.sources"],
)  # fmt: skip
@pytest.mark.parametrize("path", ["a\\0b", "a\\nb"])
def test_a_path_with_control_characters_is_refused(key: str, path: str) -> None:
    value = f'[{{type: files, paths: ["{path}"]}}]' if key.endswith("sources") else f'"{path}"'
    more = ["train.resources.tiers={budget_mib: 64}"] if "tiers" in key else []
    assert "has the control character" in refuse(*more, f"{key}={value}")


@pytest.mark.parametrize("number", [".nan", ".inf"])
def test_options_of_tasks_are_finite(number: str) -> None:
    message = refuse(f"tasks.families=[{{name: gcd, options: {{a: {number}}}}}]")
    assert "Input should be a finite number" in message


_SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10)
_TREES = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_SCALARS, inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=80))
def test_any_text_is_a_configuration_or_a_config_error(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_config(text)


@settings(max_examples=150, deadline=None)
@given(section=st.sampled_from(sorted(MINIMAL)), tree=_TREES)
def test_any_section_is_accepted_or_a_config_error(section: str, tree: Any) -> None:
    text = yaml.safe_dump({**MINIMAL, section: tree}, allow_unicode=True)
    try:
        config = parse_config(text)
    except ConfigError:
        return
    assert isinstance(config, PipelineConfig)


@settings(max_examples=150, deadline=None)
@given(key=st.text(max_size=12), value=st.text(max_size=20))
def test_any_override_is_applied_or_a_config_error(key: str, value: str) -> None:
    try:
        parse_config(TEXT, [f"{key}={value}", f"train.{key}={value}"])
    except ConfigError:
        return


def test_an_unreadable_or_oversized_file_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml: cannot be read"):
        load_config(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("run: ä".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin\.yaml: cannot be read"):
        load_config(tmp_path / "latin.yaml")
    (tmp_path / "large.yaml").write_text("#" * (1 << 20) + "\n")
    with pytest.raises(ConfigError, match="larger than"):
        load_config(tmp_path / "large.yaml")
    with pytest.raises(ConfigError, match="larger than"):
        load_config("/dev/zero")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config("a\0b")
