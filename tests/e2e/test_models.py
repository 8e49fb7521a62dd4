"""Several real engines behind one endpoint, one with a LoRA adapter, and traced.

Run in the order written.
"""

import asyncio
import time
from collections.abc import Coroutine, Iterator
from contextlib import suppress
from threading import Thread
from typing import Any

import openai
import orjson
import psutil
import pytest

from server.config.load import load
from server.preparation.embedded_model import prepare
from tests.collector import Collector, attributes, context

from .adapter import make_adapter
from .conftest import Server, living, serving

pytestmark = pytest.mark.engine


class RunningCollector(Collector):
    """A collector on an event loop and a thread of its own."""

    def __init__(self) -> None:
        super().__init__()
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def close(self) -> None:
        self.run(self.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@pytest.fixture(scope="module")
def collector() -> Iterator[RunningCollector]:
    made = RunningCollector()
    made.run(made.start())
    yield made
    made.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory, collector: RunningCollector) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("models")
    engine = {
        "args": {
            "enforce_eager": True,
            "max_model_len": 1024,
            "otlp_traces_endpoint": f"{collector.endpoint}/v1/traces",
        },
        "env": {"VLLM_CPU_KVCACHE_SPACE": 1},
    }
    other = engine | {"args": engine["args"] | {"max_model_len": 512}}
    models = {
        "a": {
            "source": "embedded",
            "aliases": ["alias"],
            "adapters": {"poet": str(folder / "poet")},
            "engine": engine,
        },
        "b": {"source": "embedded", "engine": other, "fallback": "alias"},
    }
    config = folder / "config.yaml"
    config.write_bytes(
        orjson.dumps({"models": models, "tracing": {"endpoint": collector.endpoint}})
    )
    prepare(load(config))
    make_adapter(folder / "poet")
    variables = {
        "TIERSERVE__SERVER__SHUTDOWN_GRACE_S": "3600",
        "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
        "OTEL_BSP_SCHEDULE_DELAY": "200",
    }
    with serving(folder, config, **variables) as made:
        yield made


def ask(
    server: Server, model: str, text: str = "Name a river.", **cache: bool
) -> tuple[object, str]:
    """Return the parsed answer and the response's Cache-Status."""
    raw = server.client.chat.completions.with_raw_response.create(
        model=model,
        messages=[{"role": "user", "content": text}],
        temperature=0,
        max_tokens=12,
        extra_body={"cache": cache},
    )
    return raw.parse(), raw.headers["cache-status"]


def states(server: Server) -> dict[str, str]:
    return orjson.loads(server.get("/ready")[1])["models"]


def test_engines_load_one_after_another(server: Server) -> None:
    server.until(lambda: states(server)["a"] == "ready")
    assert ask(server, "a")[1] == "tierserve; fwd=miss"
    server.wait_ready()
    assert states(server) == {"a": "ready", "b": "ready"}


def test_all_are_listed_and_no_folder_is_told(server: Server) -> None:
    listed = server.client.models.list().data
    # What an engine doesn't tell in time is left out.
    while [card.max_model_len for card in listed].count(None) > 1:
        listed = server.client.models.list().data
    assert [(card.id, card.parent) for card in listed] == [
        ("a", None), ("alias", None), ("poet", "a"), ("b", None)
    ]  # fmt: skip
    assert [card.max_model_len for card in listed] == [1024, 1024, None, 512]
    assert "/" not in "".join(card.root for card in listed)
    assert server.client.models.retrieve("alias").root == "a"


def test_an_alias_gets_the_answers_of_its_model(server: Server) -> None:
    by_name, _ = ask(server, "a")
    by_alias, status = ask(server, "alias")
    assert "hit" in status
    assert by_alias.model == by_name.model == "a"
    assert by_alias.choices == by_name.choices
    missed, status = ask(server, "alias", "Name a lake.")
    assert (missed.model, status) == ("a", "tierserve; fwd=miss")


def test_each_model_and_adapter_has_answers_of_its_own(server: Server) -> None:
    said = {"a": ask(server, "a")[0]}
    for model in ("b", "poet"):
        first, status = ask(server, model)
        assert (first.model, status) == (model, "tierserve; fwd=miss")
        again, status = ask(server, model)
        assert "hit" in status
        assert (again.model, again.choices) == (model, first.choices)
        said[model] = first
    for model in ("a", "b"):
        # vLLM's own labels stand first.
        labels = f'{{engine="0",model_name="{model}",model="{model}",upstream="engine"}}'
        name = f"vllm:prompt_tokens_total{labels}"
        # An engine that doesn't tell its metrics in time is left out.
        server.until(lambda name=name: server.metric("/metrics/engine", name) > 0)
    texts = {model: answer.choices[0].message.content for model, answer in said.items()}
    assert texts["a"] == texts["b"] != texts["poet"]


def test_vllm_joins_the_trace(server: Server, collector: RunningCollector) -> None:
    trace, _, headers = context()
    server.client.chat.completions.create(
        model="a",
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        temperature=0,
        max_tokens=8,
        extra_body={"ignore_eos": True},
        extra_headers=headers,
    )
    route = "POST /v1/chat/completions"
    spans = collector.run(collector.trace(trace, "engine", "llm_request", route))
    assert spans["llm_request"].parent_span_id == spans["engine"].span_id
    ours, theirs = attributes(spans[route]), attributes(spans["llm_request"])
    assert ours["gen_ai.usage.output_tokens"] == theirs["gen_ai.usage.completion_tokens"] == 8
    assert ours["gen_ai.usage.input_tokens"] == theirs["gen_ai.usage.prompt_tokens"]


def test_an_unknown_model_is_refused_as_by_the_engine(server: Server) -> None:
    with pytest.raises(openai.NotFoundError, match="The model `no` does not exist") as caught:
        ask(server, "no")
    assert (caught.value.type, caught.value.param) == ("NotFoundError", "model")


def test_one_that_ends_leaves_the_other_serving(server: Server) -> None:
    _, session = server.sessions()
    for process in living(session):
        if process.pid != session:
            # One may end by the end of another.
            with suppress(psutil.NoSuchProcess):
                process.kill()
    server.until(lambda: states(server)["b"] != "ready")
    assert states(server)["a"] == "ready"
    assert ask(server, "poet", "Name a sea.")[1] == "tierserve; fwd=miss"
    assert "hit" in ask(server, "b")[1]
    with pytest.raises(openai.InternalServerError) as caught:
        ask(server, "b", "Name a sea.", fallback=False)
    assert caught.value.status_code == 503
    instead, status = ask(server, "b", "Name a sea.")
    assert (instead.model, status) == ("a", "tierserve; fwd=miss")
    assert "hit" in ask(server, "a", "Name a sea.")[1]
    assert server.metric("/metrics", 'tierserve_fallbacks_total{fallback="a",model="b"}') == 1


def test_a_stream_ends_whole_when_each_process_is_asked_to_end(server: Server) -> None:
    stream = server.client.chat.completions.create(
        model="a",
        messages=[{"role": "user", "content": "Count."}],
        max_tokens=100,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    events = [next(iter(stream))]
    sessions = server.sessions()
    # As who stops a whole service does, and it comes through to us at once.
    for process in [server.process, *(each for session in sessions for each in living(session))]:
        # The engine that loads again may have had it for a moment.
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    events += stream
    assert events[-1].choices[0].finish_reason == "length"
    assert server.process.wait() == 0
    # What was killed may take a moment to end.
    while [each for session in sessions for each in living(session)]:
        time.sleep(0.2)
