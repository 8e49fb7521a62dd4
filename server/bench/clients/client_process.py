"""A client process: offers its part of the load, and tells the parent how far it is.

The parent speaks first, always: it sends when to begin (a float), `REPORT` or `STOP`. So no message
of ours ever waits for a parent that does something else. Rows go through a file.
"""

import asyncio
import gc
import signal
from dataclasses import fields
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import numpy as np
import uvloop

from server.bench.clients.client import Client, Part, Report
from server.bench.records import ClientLoad, Records

REPORT, STOP, READY = "report", "stop", "ready"
# Objects made since the last collection before the collector looks at them, and how often it then
# looks at older ones: a look at all takes milliseconds.
_COLLECT_AFTER = (50_000, 50, 100)


class Ended(NamedTuple):
    """The last message: what came of the part."""

    load: ClientLoad
    outcomes: list[str]
    report: Report
    file: Path
    """Holds the columns."""


class Failed(NamedTuple):
    """The last message of a process that can't go on."""

    text: str


def work(part: Part, pipe: "Connection[object, object]", folder: Path) -> None:
    """Do a part, as a process of its own.

    Args:
        part: what to do.
        pipe: to the parent.
        folder: for the rows.
    """
    # A terminal sends it to us as well; the parent tells us what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            last: object = runner.run(_run(part, pipe, folder))
    except Exception as exc:  # noqa: BLE001
        last = Failed(f"{type(exc).__name__}: {exc}")
    try:
        pipe.send(last)
    except OSError:
        # The parent has ended.
        return


def load_records(ended: Ended) -> Records:
    """Return the rows that a process has left."""
    with np.load(ended.file) as columns:
        return Records(**columns, outcomes=ended.outcomes)


async def _run(part: Part, pipe: "Connection[object, object]", folder: Path) -> Ended:
    loop = asyncio.get_running_loop()
    client = Client(part)
    began: asyncio.Future[float] = loop.create_future()

    def on_message() -> None:
        try:
            message = pipe.recv()
        except (EOFError, OSError):
            loop.remove_reader(pipe.fileno())
            message = STOP
        if isinstance(message, float):
            began.set_result(message)
        elif message == REPORT:
            pipe.send(client.report())
        else:
            client.stop()
            if not began.done():
                began.set_result(loop.time())

    loop.add_reader(pipe.fileno(), on_message)
    # What the workload holds stays, and the collector needn't look at it again.
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_COLLECT_AFTER)
    pipe.send(READY)
    at = await began
    records, load = await client.run(at)
    loop.remove_reader(pipe.fileno())
    file = folder / f"{part.process}.npz"
    columns = {f.name: getattr(records, f.name) for f in fields(Records) if f.name != "outcomes"}
    np.savez(file, allow_pickle=False, **columns)
    return Ended(load, records.outcomes, client.report(), file)
