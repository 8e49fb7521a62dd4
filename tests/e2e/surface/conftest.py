"""One engine that calls tools, for all the tests of this folder."""

from collections.abc import Iterator

import pytest

from tests.e2e.conftest import Server, serving_laptop


@pytest.fixture(scope="package")
def server(tmp_path_factory) -> Iterator[Server]:
    args = {"enable_auto_tool_choice": True, "tool_call_parser": "hermes"}
    with serving_laptop(tmp_path_factory.mktemp("surface"), args) as made:
        yield made


@pytest.fixture(scope="package")
def ready(server: Server) -> Server:
    server.wait_ready()
    return server
