"""What runs, task families and models may be called."""

from typing import Annotated

from pydantic import Field

__all__ = ["Name"]

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=64)]
