"""One engine that calls tools, for all the tests of this folder."""

from collections.abc import Callable, Iterator
from typing import TypeVar

import pytest

from tests.e2e.conftest import Server, serving_laptop
from tests.waiting import HANGS_S

T = TypeVar("T")


def kept(ask: Callable[[], T], status: Callable[[T], str]) -> T:
    """Ask again until the answer is kept, and no longer that of the flight before.

    A Response is kept once its engine has been seen to go on.
    """
    while "collapsed" in status(said := ask()):
        pass
    return said


@pytest.fixture(scope="package")
def server(tmp_path_factory) -> Iterator[Server]:
    # Answers are compared to the last digit, which depends on what is computed together.
    args = {"enable_auto_tool_choice": True, "tool_call_parser": "hermes", "max_num_seqs": 1}
    folder = tmp_path_factory.mktemp("surface")
    with serving_laptop(folder, args, keeps_prefixes=False, wait_s=HANGS_S) as made:
        yield made


@pytest.fixture(scope="package")
def ready(server: Server) -> Server:
    server.wait_ready()
    return server
