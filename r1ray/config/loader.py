"""YAML plus dotted overrides -> `PipelineConfig`, with every mistake reported at once.

Imports neither torch nor ray: `python -m jobs.<stage> --help` answers in well under a second.
"""

import difflib
import reprlib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from r1ray.config.schema import PipelineConfig
from r1ray.errors import ConfigError

__all__ = ["describe_fields", "load_config", "parse_config"]

_MAX_BYTES = 1 << 20
_MAX_DEPTH = 32
_MAX_NODES = 100_000  # each as often as aliases repeat it
_MAX_DIGITS = 400  # of a whole number: more cannot even be shown
# PyYAML's constructors let the last five out for tags whose value they cannot read.
_YAML_ERRORS = (
    yaml.YAMLError,
    RecursionError,
    ValueError,
    AttributeError,
    IndexError,
    KeyError,
    TypeError,
)


class _StrictLoader(yaml.SafeLoader):
    """YAML without what no configuration needs.

    YAML forbids a key twice in one mapping; PyYAML would keep the last one without a word. Aliases
    can make a short text as large as one likes, and endless.
    """

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self._depth += 1
        if self._depth > _MAX_DEPTH:  # also keeps PyYAML's scanner from quadratic time
            raise yaml.composer.ComposerError(
                None, None, f"nested deeper than {_MAX_DEPTH} levels", self.peek_event().start_mark
            )
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None and _count_nodes(node, {}) > _MAX_NODES:
            raise yaml.composer.ComposerError(
                None, None, f"more than {_MAX_NODES} values with all aliases", node.start_mark
            )
        return node

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        if len(node.value) > _MAX_DIGITS:
            raise yaml.constructor.ConstructorError(
                None, None, f"a whole number of more than {_MAX_DIGITS} digits", node.start_mark
            )
        return super().construct_yaml_int(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = (key_node.tag, str(key_node.value))
            if key in seen and key_node.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key_node.value!r} occurs twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


_StrictLoader.add_constructor("tag:yaml.org,2002:int", _StrictLoader.construct_yaml_int)


def _count_nodes(node: yaml.Node, counts: dict[int, int | None]) -> int:
    """How many values there are at and below `node`, those behind aliases each time anew."""
    known = counts.get(id(node), 0)
    if known is None:
        raise yaml.composer.ComposerError(None, None, "an alias contains itself", node.start_mark)
    if known == 0 and isinstance(node, yaml.CollectionNode):
        counts[id(node)] = None
        pairs = isinstance(node, yaml.MappingNode)
        inner = [part for pair in node.value for part in pair] if pairs else node.value
        known = 1 + sum(_count_nodes(part, counts) for part in inner)
        counts[id(node)] = known
    return known or 1


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> PipelineConfig:
    """The configuration in the YAML file `path`, changed by `section.key=value` overrides.

    Raises:
        ConfigError: the file cannot be read, is not YAML, or any key or value is wrong; all
            wrong keys are listed with their dotted paths.
    """
    path = Path(path)
    try:
        with path.open("rb") as stream:  # also a pipe: `--config <(...)`
            data = stream.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise ConfigError(f"{path}: larger than {_MAX_BYTES} bytes; this is no configuration")
        text = data.decode("utf-8")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a null byte in the path
        raise ConfigError(f"{path}: cannot be read ({error})") from error
    return parse_config(text, overrides, where=str(path))


def parse_config(
    text: str, overrides: Sequence[str] = (), *, where: str = "config"
) -> PipelineConfig:
    """As `load_config`, from the YAML in `text`; `where` names it in errors."""
    try:
        tree = yaml.load(text, _StrictLoader)  # a SafeLoader
    except _YAML_ERRORS as error:
        raise ConfigError(f"{where}: not valid YAML ({error})") from error
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{where}: expected sections such as `run:` and `train:`, found {_shorten(tree)}"
        )
    for override in overrides:
        _apply_override(tree, override)
    try:
        return TypeAdapter(PipelineConfig).validate_python(tree)
    except ValidationError as error:
        lines = [f"  {_describe(item)}" for item in error.errors(include_url=False)]
        raise ConfigError(f"{where}: {len(lines)} problem(s)\n" + "\n".join(lines)) from error


def describe_fields() -> str:
    """One line per configuration key, with type and meaning, for `--help`."""
    return "\n".join(
        f"  {path:<40} {meaning}" for path, meaning in _walk(PipelineConfig, prefix="")
    )


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {override!r} is not of the form section.key=value")
    *parents, last = key.split(".")
    node: Any = tree
    for depth, parent in enumerate(parents):
        node = node.setdefault(parent, {}) if isinstance(node, dict) else None
        if not isinstance(node, dict):
            raise ConfigError(
                f"override {override!r}: {'.'.join(parents[: depth + 1])} is not a section; "
                "override the whole value instead"
            )
    try:
        node[last] = yaml.load(value, _StrictLoader)
    except _YAML_ERRORS as error:
        raise ConfigError(
            f"override {override!r}: the value is not valid YAML ({error})"
        ) from error


def _describe(item: Mapping[str, Any]) -> str:
    parts = _drop_tags(item["loc"])
    path = ".".join(str(part) for part in parts) or "(top level)"
    if item["type"] == "unexpected_keyword_argument":
        return f"{path}: unknown key{_suggest(parts)}"
    if item["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return f"{path}: required key is missing"
    if item["type"] in ("dataclass_type", "dataclass_exact_type"):
        return f"{path}: expected a section with keys, got {_shorten(item['input'])}"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error":
        return f"{path}: {message}"
    return f"{path}: {message}, got {_shorten(item['input'])}"


def _suggest(location: Sequence[Any]) -> str:
    known = [path for path, _ in _walk(PipelineConfig, prefix="")]
    sections = {path.rsplit(".", 1)[0] for path in known if "." in path}
    path = ".".join(str(part) for part in location if not isinstance(part, int))
    close = difflib.get_close_matches(path, [*known, *sections], n=1, cutoff=0.7)
    return f"; did you mean {close[0]}?" if close and close[0] != path else ""


def _drop_tags(location: Sequence[Any]) -> list[Any]:
    """The keys of `location`, without the variant's tag that pydantic puts after a union's key."""
    kinds: list[Any] = [PipelineConfig]
    parts = []
    for part in location:
        if chosen := [kind for kind in kinds if _tag(kind) == part]:
            kinds = chosen
            continue
        parts.append(part)
        if isinstance(part, str):
            types_of = [
                field.type for kind in kinds for field in fields(kind) if field.name == part
            ]
            kinds = [kind for item in types_of for kind in _nested(item)]
    return parts


def _tag(kind: Any) -> str | None:
    """The value of `type` that selects this variant."""
    literals = [field.type for field in fields(kind) if field.name == "type"]
    return typing.get_args(literals[0])[0] if literals else None


def _shorten(value: Any) -> str:
    text = reprlib.repr(value)  # bounded also for nested YAML aliases
    return text if len(text) <= 80 else text[:77] + "..."


def _walk(cls: type, prefix: str) -> Iterator[tuple[str, str]]:
    documented = {  # pydantic reads the docstrings of a class's own fields only
        name: info.description
        for kind in cls.__mro__
        for name, info in getattr(kind, "__pydantic_fields__", {}).items()
        if info.description is not None
    }
    for field in fields(cls):
        nested = _nested(field.type)
        if not nested:
            yield prefix + field.name, documented.get(field.name, "")
        for kind in nested:
            yield from _walk(kind, prefix=f"{prefix}{field.name}.")


def _nested(annotation: Any) -> list[type]:
    """The dataclasses in `annotation`; what pydantic keeps beside a type is an instance of one."""
    return [kind for kind in _flatten(annotation) if isinstance(kind, type) and is_dataclass(kind)]


def _flatten(annotation: Any) -> Iterator[Any]:
    origin = typing.get_origin(annotation)
    if origin in (typing.Annotated, typing.Union, types.UnionType, list):
        for argument in typing.get_args(annotation):
            yield from _flatten(argument)
    else:
        yield annotation
