"""What a worker is told at its start, and how many workers there are."""

from contextlib import ExitStack
from io import BytesIO
from math import inf
from pathlib import Path

import orjson
import pytest
import yaml

from server.auth.tenants import TenantRecord
from server.config.load import load
from server.config.reference import reference
from server.config.schema import Config
from server.engine import threads
from server.engine.followed import ModelReport, UpstreamReport
from server.engine.supervisor import EngineState
from server.workers.setup import Setup, dump_records, load_records
from server.workers.sockets import bind
from tests.server.config.test_reference import uncommented

FOUR = {"engine": {"args": {"tensor_parallel_size": 4}}}


def test_a_worker_has_the_configuration_of_its_master(tmp_path: Path) -> None:
    fields = yaml.safe_load(uncommented(reference()))
    # Of those that exclude each other, one goes.
    (model,) = fields["models"].values()
    del fields["tenants"]["key"], fields["tiers"]["disk"]["encryption_key_file"]
    of_upstreams = ("upstreams", "routing", "vllm", "api_key")
    fields["models"]["hosted"] = {name: model.pop(name) for name in of_upstreams}
    model |= {"fallback": "hosted", "source": "Org/Model"}
    (tmp_path / "all.yaml").write_text(yaml.safe_dump(fields))
    upstreams = [UpstreamReport("http://u:8000", "10.0.0.1", 1.5, loading=True, foreign=3)]
    report = ModelReport("m", "r", {"m": "i"}, True, EngineState.READY, 1, None, upstreams)
    records = {"acme": TenantRecord(keys=("sha256:" + "0" * 64,), max_requests=3)}
    setup = Setup(1, load(tmp_path / "all.yaml"), records, [report], 2.5, 3, 4, [5, 6])
    assert Setup.read(BytesIO(setup.pickled())) == setup


def test_a_worker_has_options_that_json_does_not_hold() -> None:
    args = {"hf_overrides": {"id2label": {0: "a"}}, "a": inf, "b": 2**70}
    engine = {"args": args, "env": {"A": "\udcff"}}
    config = Config.model_validate({"models": {"m": {"source": "s", "engine": engine}}})
    setup = Setup(1, config, {}, [], 2.5, 3, 4, [5])
    assert Setup.read(BytesIO(setup.pickled())) == setup
    assert setup.config.models["m"].engine.args == args


def test_workers_are_told_of_tenants_with_any_limits() -> None:
    records = {"a": TenantRecord(requests_per_minute=10**20), "b": TenantRecord(scope="é")}
    assert load_records(orjson.dumps(dump_records(records))) == records


def test_an_address_is_in_use_before_workers_accept_at_it() -> None:
    bound = bind("127.0.0.1", 0, 2)
    with ExitStack() as stack:
        (port,) = {stack.enter_context(each).getsockname()[1] for (each,) in bound}
        with pytest.raises(OSError, match=f"can't listen at 127.0.0.1 port {port}: "):
            bind("127.0.0.1", port, 2)


@pytest.mark.parametrize(
    ("workers", "models", "build", "count"),
    [
        (3, {"m": {"source": "a"}}, "0.32.0", 3),
        ("auto", {"m": {"upstreams": ["http://gpu:8000"]}}, "0.32.0", 8),
        ("auto", {"m": {"source": "a"}}, "0.32.0", 5),
        (
            "auto",
            {"m": {"source": "a", "engine": {"args": {"tensor_parallel_size": 4}}}},
            "0.32.0",
            2,
        ),
        ("auto", {name: {"source": name} for name in "mno"}, "0.32.0", 1),
        ("auto", {"m": {"source": "a"}}, "0.32.0+cpu", 1),
    ],
)
def test_as_many_workers_as_engines_leave_cpus(monkeypatch, workers, models, build, count) -> None:
    monkeypatch.setattr(threads, "vllm_build", lambda: build)
    fields = {"server": {"workers": workers}, "models": models}
    assert threads.worker_count(Config.model_validate(fields), cpus=8) == count
