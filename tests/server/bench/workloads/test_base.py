"""Every workload is a function of its options, its seed and a session's number."""

import pickle
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.bench.workloads import Common, build
from server.bench.workloads.requests import PATHS, ROUTES
from tests.server.bench.workloads.asked import of_every

COMMON = Common("m")
ENDLESS = ["zipf:unique=0.3", "search", "prefix", "chat:repeat=0.5", "conversation", "agents"]
FILES = [
    "mtbench:turns=2",
    "tests/data/mooncake_synthetic_trace_end.jsonl,scale=0.05",
    "tests/data/azure_llm_code.csv,scale=0.05",
]
BUILT = {spec: build(spec, COMMON) for spec in ENDLESS + FILES}


@pytest.mark.parametrize("spec", BUILT)
@settings(max_examples=20)
@given(data=st.data())
def test_a_session_is_the_same_from_a_fresh_instance(spec: str, data: st.DataObject) -> None:
    workload = BUILT[spec]
    number = data.draw(st.integers(0, (workload.count or 10**15) - 1))
    session = workload.session(number)
    assert build(spec, COMMON).session(number) == session
    assert pickle.loads(pickle.dumps(workload)).session(number) == session
    assert workload.session(number) == session


def test_another_process_makes_the_same() -> None:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        for workload, made in zip(BUILT.values(), pool.map(of_every, BUILT.values()), strict=True):
            assert made == of_every(workload)


@pytest.mark.parametrize("spec", BUILT)
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("stream", [True, False])
def test_bodies_are_json_for_every_route(spec: str, route, stream: bool) -> None:
    workload = build(spec, Common("m", route=route, stream=stream, tag="t"))
    for step in workload.session(3).steps:
        body = orjson.loads(step.body)
        assert step.path == PATHS[route]
        assert step.stream == body.get("stream", False) == (stream and route != "embeddings")
        assert body["model"] == "m"
        assert body["cache"] == {"tags": ["t"]}
        assert step.think_s >= 0


@pytest.mark.parametrize("spec", BUILT)
def test_a_digest_tells_workloads_but_not_runs(spec: str) -> None:
    digest = BUILT[spec].digest()
    for same in ({"tag": "t"}, {"nonce": "n"}, {"first_session": 5}):
        assert build(spec, replace(COMMON, **same)).digest() == digest
    others = (
        {"model": "n"}, {"route": "completions"}, {"stream": False}, {"max_tokens": 1},
        {"temperature": 1.0}, {"seed": 1}, {"ignore_eos": True},
    )  # fmt: skip
    changed = [build(spec, replace(COMMON, **other)).digest() for other in others]
    assert len({digest, *changed}) == len(others) + 1


def test_a_digest_has_options_and_content(tmp_path) -> None:
    assert build("zipf:s=1.1", COMMON).digest() == build("zipf", COMMON).digest()
    assert build("zipf:s=1", COMMON).digest() != build("zipf", COMMON).digest()
    assert build("search:prompts=7", COMMON).digest() != build("zipf:prompts=7", COMMON).digest()
    one, same, other = (tmp_path / name for name in ("a.jsonl", "b.jsonl", "c.jsonl"))
    for file, text in ((one, "a"), (same, "a"), (other, "b")):
        file.write_bytes(orjson.dumps({"prompt": text}))
    digest = build(str(one), COMMON).digest()
    assert build(f"custom:{same}", COMMON).digest() == digest
    assert build(str(other), COMMON).digest() != digest


@pytest.mark.parametrize("spec", BUILT)
def test_a_nonce_keeps_runs_apart_and_no_requests_of_a_run(spec: str) -> None:
    runs = [build(spec, replace(COMMON, nonce=nonce)) for nonce in ("", "one", "two")]
    numbers = range(min(runs[0].count or 60, 60))
    steps = [[step.body for n in numbers for step in run.session(n).steps] for run in runs]
    assert len({*steps[0], *steps[1], *steps[2]}) == 3 * len({*steps[0]})
    assert len({*steps[1]}) == len({*steps[0]})
