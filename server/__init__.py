"""The process: HTTP, configuration, and the engine."""

import sys

if "redis" not in sys.modules:
    # aiocache imports redis-py if it is installed, which takes half a second. The shared tier does
    # where it is configured. `None` stands for a module that isn't there.
    sys.modules["redis"] = None  # type: ignore[assignment]
    import aiocache  # noqa: F401

    del sys.modules["redis"]
