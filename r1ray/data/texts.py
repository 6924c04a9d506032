"""Text that every Python carries: its documentation in English, and its source code."""

import functools
import pydoc_data.topics
import sysconfig
from pathlib import Path

__all__ = ["read_english", "read_source_code"]


def read_english() -> str:
    """The documentation topics, one after the other in the order of their names."""
    topics = pydoc_data.topics.topics
    return "\n\n".join(topics[name] for name in sorted(topics))


@functools.cache
def read_source_code() -> str:
    """The modules of the standard library, one after the other in the order of their names."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return "\n\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files)
