"""Work on a request's bytes: at once while it is short, and beside the event loop where it is long.

64 KiB are parsed or converted in a millisecond or two; more would stop all other requests.
"""

import asyncio
from collections.abc import Callable
from typing import ParamSpec, TypeVar

_INLINE_BYTES = 64 * 1024

_Args = ParamSpec("_Args")
_Result = TypeVar("_Result")


async def offload(
    size: int, work: Callable[_Args, _Result], *args: _Args.args, **kwargs: _Args.kwargs
) -> _Result:
    """Return what `work` returns, whose time goes by `size`, in bytes; raise what it raises."""
    if size <= _INLINE_BYTES:
        return work(*args, **kwargs)
    return await asyncio.to_thread(work, *args, **kwargs)
