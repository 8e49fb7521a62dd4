"""Every option of a run, right and wrong."""

import argparse
from pathlib import Path

import pytest

from server.bench.arguments import add_bench_command
from server.bench.plan import Plan, make_plan
from server.config.base import ConfigError

URL = "http://127.0.0.1:8000"


def plan(*arguments: str) -> Plan:
    parser = argparse.ArgumentParser()
    add_bench_command(parser.add_subparsers())
    return make_plan(parser.parse_args(["bench", *arguments]))


@pytest.fixture(autouse=True)
def _no_key(monkeypatch) -> None:
    for name in ("TIERSERVE_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def test_defaults() -> None:
    made = plan(URL)
    assert (made.target.url, made.target.headers) == (URL, ())
    assert (made.workload, made.common.route, made.common.temperature) == ("search", "chat", 0)
    assert (made.load.users, made.load.rate, made.load.duration_s) == (1, None, 30)
    assert (made.cache, made.formats, made.ramp) == ("cold", (), False)


@pytest.mark.parametrize("given", [f"{URL}/", f"{URL}/v1", f"{URL}/v1/"])
def test_an_address_may_be_a_clients_base_url(given: str) -> None:
    assert plan(given).target.url == URL


def test_an_address_may_have_a_path() -> None:
    assert plan("https://host/models/v1").target.url == "https://host/models"


def test_kinds_of_load() -> None:
    load = plan(URL, "--rate", "2.5", "--arrivals", "gamma:0.5", "--requests", "7").load
    assert (load.rate, load.users, load.arrivals, load.burstiness) == (2.5, None, "gamma", 0.5)
    assert (load.duration_s, load.sessions) == (None, 7)
    load = plan(URL, "--users", "8", "--think", "0").load
    assert (load.rate, load.users, load.think_s, load.duration_s) == (None, 8, 0, 30)
    load = plan(URL, "--arrivals", "trace", "--speed", "10").load
    assert (load.rate, load.users, load.speed, load.duration_s) == (None, None, 10, None)


def test_keys_and_headers(monkeypatch) -> None:
    given = plan(URL, "--header", "X-Tenant: a b", "--header", "X-Empty:").target.headers
    assert given == (("X-Tenant", "a b"), ("X-Empty", ""))
    monkeypatch.setenv("OPENAI_API_KEY", "second")
    assert plan(URL).target.headers == (("Authorization", "Bearer second"),)
    monkeypatch.setenv("TIERSERVE_API_KEY", "first")
    assert plan(URL).target.headers == (("Authorization", "Bearer first"),)
    assert plan(URL, "--api-key", "k").target.headers == (("Authorization", "Bearer k"),)
    own = plan(URL, "--header", "authorization: Basic x").target.headers
    assert own == (("authorization", "Basic x"),)


def test_a_header_of_ones_own_may_name_any_outcome() -> None:
    given = ["--outcome-header", "X-Level", "--objective", "l2.ttft=5ms"]
    made = plan(URL, *given)
    assert made.objective is not None
    assert made.objective.limits[0].outcome == "l2"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["127.0.0.1:8000"], "URL: should be http://HOST:PORT"),
        (["ftp://host"], "URL: should be http://HOST:PORT"),
        (["http://"], "URL: should be http://HOST:PORT"),
        (["http://host:99999"], "URL: should be http://HOST:PORT"),
        (["http://host?x=1"], "URL: should be http://HOST:PORT"),
        (["http://a b"], "URL: should be http://HOST:PORT"),
        (["http://host/ä"], "URL: should be http://HOST:PORT"),
        (["http://me:pw@host"], "--api-key or --header"),
        ([URL, URL], "URL: should be one"),
        ([URL, "--rate", "0"], "--rate: should be a number greater than 0, not 0"),
        ([URL, "--rate", "nan"], "--rate: should be a number greater than 0, not nan"),
        ([URL, "--rate", "fast"], "--rate: should be a number greater than 0, not fast"),
        ([URL, "--rate", "1", "--users", "1"], "--rate: and --users"),
        ([URL, "--users", "0"], "--users: should be a whole number from 1 to 100,000, not 0"),
        ([URL, "--users", "1.5"], "--users: should be a whole number"),
        ([URL, "--rate", "1", "--arrivals", "gamma:0"], "--arrivals: should be poisson"),
        ([URL, "--rate", "1", "--arrivals", "gamma"], "--arrivals: should be poisson"),
        ([URL, "--arrivals", "constant"], "--arrivals: are of an open loop"),
        ([URL, "--rate", "1", "--arrivals", "trace"], "--arrivals: trace has its own times"),
        ([URL, "--speed", "2"], "--speed: is of --arrivals trace"),
        ([URL, "--rate", "1", "--think", "1"], "--think: is of users"),
        ([URL, "--arrivals", "trace", "--think", "1"], "--think: is of users"),
        ([URL, "--processes", "257"], "--processes: should be a whole number from 1 to 256, not"),
        ([URL, "--think", "-1"], "--think: should be a number of at least 0"),
        ([URL, "--duration", "1", "--requests", "1"], "--duration: and --requests"),
        ([URL, "--duration", "inf"], "--duration: should be a number greater than 0"),
        ([URL, "--route", "chats"], "--route: should be one of chat, completions"),
        ([URL, "--route", "embeddings", "--stream"], "--stream: doesn't go with"),
        ([URL, "--cache", "hot"], "--cache: should be one of cold, warm, steady, not 'hot'"),
        ([URL, "--seed", "-1"], "--seed: should be a whole number of at least 0"),
        ([URL, "--header", "X"], "--header: should be 'NAME: VALUE'"),
        ([URL, "--header", "a: b\r\nc: d"], "--header: should be 'NAME: VALUE'"),
        ([URL, "--header", "Host: a"], "--header: Host is set"),
        ([URL, "--api-key", "a\nb"], "--api-key: should be printable"),
        ([URL, "--outcome-header", "a b"], "--outcome-header: should be the name"),
        ([URL, "--objective", "fast"], "--objective: should be such as"),
        ([URL, "--objective", "momory.ttft=5ms"], "memory, disk"),
        ([URL, "--ramp"], "--ramp: needs an --objective"),
        ([URL, "--ramp", "--objective", "ttft=1s", "--users", "1"], "--ramp: searches a rate"),
        ([URL, "--ramp", "--objective", "ttft=1s", "--requests", "9"], "--ramp: has probes"),
        ([URL, "--fail-if", "x"], "--fail-if: is of `bench compare A B`"),
        ([URL, "--format", "vllm"], "--format: needs --out DIR"),
        ([URL, "--format", "csv", "--out", "/tmp"], "--format: should be some of"),
    ],
)
def test_wrong_options_are_named(arguments: list[str], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(*arguments)
    assert [told in mistake for mistake in caught.value.mistakes] == [True]


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        plan("host", "--rate", "0", "--seed", "x")
    assert len(caught.value.mistakes) == 3


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="--out: should be a folder that can be made"):
        plan(URL, "--out", str(tmp_path / "file" / "out"))


def test_a_folder_is_made(tmp_path: Path) -> None:
    made = plan(URL, "--out", str(tmp_path / "a" / "b"), "--format", "vllm,br")
    assert (tmp_path / "a" / "b").is_dir()
    assert made.formats == ("vllm", "br")
