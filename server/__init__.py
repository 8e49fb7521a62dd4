"""The process: HTTP, configuration, and the engine."""

import sys

if "redis" not in sys.modules:
    # aiocache imports redis-py if it is installed, which takes half a second. The shared tier does
    # where it is configured, and asks for no `aiocache.RedisCache`, which isn't there then. `None`
    # stands for a module that can't be imported.
    sys.modules["redis"] = None  # type: ignore[assignment]
    try:
        import aiocache  # noqa: F401
    finally:
        del sys.modules["redis"]
