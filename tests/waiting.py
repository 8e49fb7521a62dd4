"""How long tests wait, and what they have to wait for that has no event."""

import asyncio

HANGS_S = 240
"""What must come and has not after so long never does: a crowded machine may stand still for more
than a minute."""


async def until_accepted() -> None:
    """Wait until each connection that this loop has accepted has a transport; then close servers.

    asyncio makes the transport in a task. Where its server is closed before, that fails, and the
    collector finds an unclosed transport in some other test.
    """
    while tasks := [
        task
        for task in asyncio.all_tasks()
        if getattr(task.get_coro(), "__name__", "") == "_accept_connection2"
    ]:
        await asyncio.wait(tasks)
