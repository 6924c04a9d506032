"""What runs, task families and models may be called, and what a path may look like."""

from typing import Annotated

from pydantic import AfterValidator, Field

__all__ = ["ConfiguredPath", "Name"]

_FIRST_PRINTABLE = " "

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=64)]


def _check_characters(path: str) -> str:
    if control := [character for character in path if character < _FIRST_PRINTABLE]:
        raise ValueError(f"a path has the control character {control[0]!r}; remove it")
    return path


ConfiguredPath = Annotated[
    str, Field(min_length=1, max_length=4096), AfterValidator(_check_characters)
]
"""A path or URI that the configuration names; it may be anywhere (docs/adr/0014)."""
