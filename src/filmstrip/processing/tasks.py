"""Several awaitables as one; knows nothing of what they do."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


async def gather_or_cancel(
    awaitables: Sequence[Awaitable[T]], *, discard: Callable[[T], None] | None = None
) -> list[T]:
    """Results in order. The first failure cancels the rest, waits for them to end, discards what succeeded and is raised."""
    tasks = [asyncio.ensure_future(awaitable) for awaitable in awaitables]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if discard is not None and not isinstance(result, BaseException):
                discard(result)
        raise
