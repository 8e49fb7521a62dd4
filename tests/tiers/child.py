"""A process that a test kills."""

import multiprocessing
from collections.abc import Callable, Iterator
from typing import Self

processes = multiprocessing.get_context("forkserver")


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

    def receive(self) -> Iterator[object]:
        """Yield what the process sends until it ends."""
        while True:
            try:
                yield self.connection.recv()
            except EOFError:
                return
