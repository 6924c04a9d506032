"""Several streams read at once."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TypeVar

__all__ = ["merge_streams"]

Value = TypeVar("Value")


async def merge_streams(
    streams: Sequence[AsyncGenerator[Value]],
) -> AsyncGenerator[tuple[int, Value]]:
    """(number of the stream, what it gave), as it comes and is asked for.

    The first error ends all of them; so does closing this one.
    """
    if len(streams) == 1:
        async with aclosing(streams[0]) as stream:
            async for value in stream:
                yield 0, value
        return
    arrived: asyncio.Queue[tuple[int, Value] | Exception | None] = asyncio.Queue(maxsize=1)

    async def read(index: int) -> None:
        try:
            async with aclosing(streams[index]) as stream:
                async for value in stream:
                    await arrived.put((index, value))
            await arrived.put(None)
        except Exception as error:
            await arrived.put(error)

    readers = [asyncio.create_task(read(index)) for index in range(len(streams))]
    try:
        left = len(streams)
        while left:
            item = await arrived.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                left -= 1
            else:
                yield item
    finally:
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)
