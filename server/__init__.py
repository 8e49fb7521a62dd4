"""The process: HTTP, configuration, and the engine."""

import sys

if "redis" not in sys.modules:
    # aiocache imports redis-py if it is installed, which takes half a second. So it is hidden here:
    # `None` stands for a module that can't be imported. A configured shared tier imports redis-py
    # itself, and doesn't need `aiocache.RedisCache`, which is missing then.
    sys.modules["redis"] = None  # type: ignore[assignment]
    try:
        import aiocache  # noqa: F401
    finally:
        del sys.modules["redis"]
