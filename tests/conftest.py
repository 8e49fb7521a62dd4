"""What all tests share: one server of each kind, for those that leave it in peace."""

import os
import signal
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

from .servers import SERVERS, MemcachedServer, RedisServer, StoreServer

# Shells have their background jobs ignore it, and tests' children would, too.
signal.signal(signal.SIGINT, signal.default_int_handler)
# A proxy of this machine would be asked for the tests' own servers.
for _name in ("NO_PROXY", "no_proxy"):
    os.environ[_name] = ",".join(filter(None, [os.environ.get(_name), "127.0.0.1", "localhost"]))
# How long an example takes is the machine's affair. New ones are looked for in the long tests, so
# that no change is blamed for what it didn't touch.
settings.register_profile(
    "tierserve",
    deadline=None,
    derandomize=os.environ.get("TIERSERVE_LONG") != "1",
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("tierserve")


class _ByFile(LoadFileScheduling):
    """Has a file's tests run one after another, and so those of all the real engines."""

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return "engines" if file.startswith("tests/e2e/") else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> _ByFile:
    return _ByFile(config, log)


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory) -> Iterator[RedisServer]:
    made = RedisServer(tmp_path_factory.mktemp("redis"))
    yield made
    made.kill()


@pytest.fixture(scope="session")
def memcached_server(tmp_path_factory) -> Iterator[MemcachedServer]:
    made = MemcachedServer(tmp_path_factory.mktemp("memcached"))
    yield made
    made.kill()


@pytest.fixture(params=SERVERS)
def server(request, tmp_path) -> Iterator[StoreServer]:
    """A server of its own for a test that stops it."""
    made = SERVERS[request.param](tmp_path)
    yield made
    made.kill()
