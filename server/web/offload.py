"""Work on a request's bytes: inline while it is short, in a thread where it is long.

64 KiB take a millisecond or two; more would block all other requests. Python code in a thread lets
the event loop run every few milliseconds, and `hashlib` does while it hashes. One call of orjson or
of `json` holds the GIL to its end, some milliseconds for each MiB, in a thread as well.
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
    """Return what `work` returns, or raise what it raises; its time grows with `size`, in bytes."""
    if size <= _INLINE_BYTES:
        return work(*args, **kwargs)
    return await asyncio.to_thread(work, *args, **kwargs)
