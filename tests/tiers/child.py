"""A process that a test kills, forked from a server that has imported everything once."""

import multiprocessing
from collections.abc import Callable, Iterator
from typing import Self

_TESTS = ("disk.test_crash", "disk.test_marks", "prefix_kv.test_crash", "prefix_kv.test_faults",
          "prefix_kv.test_folder", "prefix_kv.test_maintenance", "prefix_kv.test_store_machine",
          "singleflight.test_leases")  # fmt: skip
"""Whose functions run in such processes."""
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload([f"tests.tiers.{name}" for name in _TESTS])


class Child:
    """A process that runs `work(connection, *args)`; leaving it kills it with -9."""

    def __init__(self, work: Callable[..., None], *args: object) -> None:
        self.connection, theirs = processes.Pipe()
        self.process = processes.Process(target=work, args=(theirs, *args), daemon=True)
        self.process.start()
        theirs.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()

    def receive(self) -> Iterator[object]:
        """Yield what the process sends until it ends."""
        while True:
            try:
                yield self.connection.recv()
            except EOFError:
                return
