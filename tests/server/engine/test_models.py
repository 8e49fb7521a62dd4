"""Several models behind one endpoint, at its edge, HTTP, and what their names mean."""

import asyncio
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import aiohttp
import orjson
import pytest
import pytest_asyncio
from aiohttp import web
from prometheus_client.parser import text_string_to_metric_families

from server.config.base import ConfigError
from server.config.models import ModelConfig
from server.engine.models import Models
from server.handlers import model_list
from tests.server.conftest import CHAT, Front, Upstream, answer, held, nothing_listed, question
from tests.waiting import HANGS_S

pytestmark = pytest.mark.asyncio(loop_scope="module")

LARGE = "Org/Large"


class Both:
    """A front, and the upstreams of its models `m` and `Org/Large`."""

    def __init__(self, front: Front, m: Upstream, large: Upstream) -> None:
        self.front, self.m, self.large = front, m, large

    async def asked(self) -> list[tuple[str, dict]]:
        """Return which upstream was asked for what since the last time."""
        found = [(each, http) for each in (self.m, self.large) for http in each.asked]
        requests = []
        for upstream, http in found:
            body = await http.read()
            requests.append(
                ("m" if upstream is self.m else LARGE, orjson.loads(body) if body else {})
            )
            upstream.asked.remove(http)
        return requests


@asynccontextmanager
async def both(folder: Path, **of_m) -> AsyncIterator[Both]:
    async with Upstream() as m, Upstream() as large:
        models = {
            "m": {"upstreams": [m.url], "adapters": {"poet": "hub/poet"}} | of_m,
            LARGE: {"upstreams": [large.url], "aliases": ["large", "big"]},
        }
        async with Front(folder, models) as front:
            yield Both(front, m, large)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def _two(tmp_path_factory) -> AsyncIterator[Both]:
    async with both(tmp_path_factory.mktemp("two")) as made:
        yield made


@pytest_asyncio.fixture(loop_scope="module")
async def two(_two: Both) -> Both:
    for each in (_two.m, _two.large):
        each.handler, each.lists = read_and_answer, nothing_listed
        each.asked.clear()
    return _two


async def read_and_answer(http: web.Request) -> web.StreamResponse:
    # Its body can be read later too.
    await http.read()
    return await answer(http) if http.path == CHAT else web.Response(text="fine")


@pytest.mark.parametrize(
    ("asked_for", "who", "known_as"),
    [
        ("m", "m", "m"),
        (None, "m", "m"),
        ("", "m", "m"),
        ("poet", "m", "poet"),
        (LARGE, LARGE, LARGE),
        ("large", LARGE, LARGE),
        ("big", LARGE, LARGE),
    ],
)
@pytest.mark.parametrize("more", [{}, {"stream": True}, {"temperature": 1}])
async def test_a_request_goes_to_the_model_that_it_names(
    two: Both, asked_for: str | None, who: str, known_as: str, more: dict
) -> None:
    assert (await two.front.ask(question(model=asked_for, **more)))[0] == 200
    ((upstream, body),) = await two.asked()
    assert (upstream, body["model"]) == (who, known_as)


async def test_aliases_share_answers_and_models_do_not(two: Both) -> None:
    asked = question()
    for name, found in (
        ("m", "fwd=miss"), (LARGE, "fwd=miss"), ("poet", "fwd=miss"), ("large", "hit"),
        (LARGE, "hit"), ("big", "hit"), ("m", "hit"), ("poet", "hit"),
    ):  # fmt: skip
        assert found in (await two.front.ask_alone(asked | {"model": name}))[1], name
    assert "hit" in (await two.front.ask(asked))[1]
    assert len(await two.asked()) == 3


NO_MODEL = {
    "message": f"The model `no` does not exist. Valid aliases: m, poet, {LARGE}, large, big.",
    "type": "NotFoundError",
    "param": "model",
    "code": 404,
}


@pytest.mark.parametrize(
    ("method", "path", "asked"),
    [
        ("POST", CHAT, {"model": "no", "messages": []}),
        ("POST", "/v1/some/route", {"model": "no", "prompt": "x"}),
        ("GET", "/version?model=no", None),
        ("GET", "/metrics/engine?model=no", None),
        ("GET", "/v1/models/no", None),
    ],
)
async def test_an_unknown_model_is_refused_as_vllm_does(
    two: Both, method: str, path: str, asked: dict | None
) -> None:
    async with two.front.session.request(method, path, json=asked) as response:
        assert response.status == 404
        assert (await response.json())["error"] == NO_MODEL
    assert await two.asked() == []


async def test_whoever_needs_no_key_does_not_learn_which_models_there_are(two: Both) -> None:
    async with two.front.session.get("/ready?model=no") as response:
        assert response.status == 404
        error = (await response.json())["error"]
    assert (error["message"], error["param"]) == ("There is no such model.", "model")


async def test_an_unknown_model_is_refused_in_anthropics_shape(two: Both) -> None:
    for path in ("/v1/messages", "/v1/messages/count_tokens"):
        async with two.front.session.post(path, json={"model": "no"}) as response:
            assert response.status == 404
            error = {"type": "not_found_error", "message": NO_MODEL["message"]}
            assert await response.json() == {"type": "error", "error": error}


def form(*fields: tuple[str, str | bytes]) -> aiohttp.FormData:
    made = aiohttp.FormData()
    for name, value in fields:
        made.add_field(name, value, filename="a.wav" if name == "file" else None)
    return made


FILE = ("file", b"\r\n\r\nname=model\x00\xff" * 4500)


@pytest.mark.parametrize(
    ("sent", "who", "found"),
    [
        ({"json": {"model": "large", "n": [1.5, 10**30]}}, LARGE, rb'"model": ?"Org/Large"'),
        ({"json": {"model": "poet"}}, "m", rb'"model": ?"poet"'),
        ({"json": {"prompt": "x"}}, "m", rb'^{"prompt": ?"x"}$'),
        ({"json": {"model": 3}, "params": {"model": "big"}}, "m", rb'"model": ?3'),
        ({"json": {"prompt": "x"}, "params": {"model": "big"}}, LARGE, b"prompt"),
        ({"json": ["x"], "params": {"model": "big"}}, LARGE, b"x"),
        ({"data": b'{"model":"large","x":NaN}'}, LARGE, rb'"model": "Org/Large", "x": NaN'),
        ({"data": b"{no", "params": {"model": LARGE}}, LARGE, b"^{no$"),
        ({"data": form(FILE, ("model", "large"))}, LARGE, b"\r\nOrg/Large\r\n"),
        ({"data": form(("model", "poet"), FILE)}, "m", b"\r\npoet\r\n"),
        ({"data": form(FILE, ("other", "large"))}, "m", b"\r\nlarge\r\n"),
    ],
)  # fmt: skip
async def test_what_passes_through_goes_to_the_model_that_it_names(
    two: Both, sent: dict, who: str, found: bytes
) -> None:
    # Forms have a boundary there.
    is_form = isinstance(sent.get("data"), aiohttp.FormData)
    headers = {} if is_form else {"Content-Type": "application/json"}
    post = two.front.session.post("/v1/some/route", headers=headers, **sent)
    async with post as response:
        assert response.status == 200
    (asked,) = [*two.m.asked, *two.large.asked]
    assert (asked in two.large.asked) is (who == LARGE)
    body = await asked.read()
    assert re.search(found, body)
    if is_form:
        # All else is as it was.
        assert FILE[1] in body
        assert body.count(b"form-data") == 2
        assert body.endswith(b"--\r\n")
    elif b"1.5" in body:
        assert b"%d" % 10**30 in body


@pytest.mark.parametrize("odd", [b"[" * 1010 + b"]" * 1010, b"1" * 5000, b"[" * 50_000])
@pytest.mark.parametrize("model", [b"m", b"large"])
async def test_odd_bodies_are_no_failure_of_ours(two: Both, odd: bytes, model: bytes) -> None:
    data = b'{"model":"%s","x":%s}' % (model, odd)
    headers = {"Content-Type": "application/json"}
    async with two.front.session.post("/v1/some/route", data=data, headers=headers) as response:
        assert response.status in (200, 400)


async def test_halves_of_surrogates_are_the_engines_to_judge(two: Both) -> None:
    data = b'{"model":"large","x":"\\ud800"}'
    headers = {"Content-Type": "application/json"}
    async with two.front.session.post("/v1/some/route", data=data, headers=headers) as response:
        assert response.status == 200
    assert await two.large.asked[0].read() == b'{"model": "Org/Large", "x": "\\ud800"}'


async def test_a_websocket_goes_to_the_model_of_its_query(two: Both) -> None:
    async def greet(http: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(http)
        await socket.send_str("hi")
        await socket.close()
        return socket

    two.large.handler = greet
    async with two.front.session.ws_connect("/v1/realtime?model=large") as socket:
        assert await socket.receive_str() == "hi"


async def test_a_body_that_is_looked_into_has_a_bound_and_others_have_none(
    two: Both, tmp_path: Path
) -> None:
    many = bytes(200_000)
    async with two.front.session.post("/x", data=many) as response:
        assert response.status == 200
    asked = {"model": "m", "prompt": "x" * 200_000}
    async with two.front.session.post("/v1/some/route", json=asked) as response:
        assert response.status == 413
    two.m.asked.clear()
    async with (
        Front(tmp_path, {"m": {"upstreams": [two.m.url]}}) as front,
        front.session.post("/v1/some/route", json=asked) as response,
    ):
        assert response.status == 200


def cards(*names: str, **more) -> web.Response:
    listed = [{"id": name, "object": "model", "root": "/secret/folder"} | more for name in names]
    return web.json_response({"object": "list", "data": listed})


async def listed(two: Both, path: str = model_list.PATH, **options) -> tuple[int, str]:
    """Return status and body of a list of models; no engine was left out because it took long."""
    while True:
        began = time.monotonic()
        async with two.front.session.get(path, **options) as response:
            text = await response.text()
        if time.monotonic() - began < model_list._DEADLINE_S:
            return response.status, text


async def test_all_names_are_listed_and_no_folder(two: Both) -> None:
    async def of_m(_: web.Request) -> web.StreamResponse:
        return cards("m", "poet", "more", max_model_len=77, created=5, x="/secret/folder")

    two.m.lists = of_m
    _, text = await listed(two)
    assert "secret" not in text
    cards_listed = orjson.loads(text)
    assert cards_listed["object"] == "list"
    assert [card["id"] for card in cards_listed["data"]] == ["m", "poet", LARGE, "large", "big"]
    m, poet, large, alias, _ = cards_listed["data"]
    common = {"object": "model", "owned_by": "vllm", "permission": []}
    assert m == common | {
        "id": "m", "created": 5, "root": "m", "parent": None, "max_model_len": 77
    }  # fmt: skip
    assert (poet["root"], poet["parent"]) == ("poet", "m")
    assert (large["root"], large["parent"], large["max_model_len"]) == (LARGE, None, None)
    assert alias == large | {"id": "large"}
    for card in cards_listed["data"]:
        assert orjson.loads((await listed(two, f"/v1/models/{card['id']}"))[1]) == card


async def test_no_name_is_no_model(two: Both) -> None:
    async with two.front.session.get("/v1/models/") as response:
        assert await response.text() == "fine"
    assert two.m.asked[0].path == "/v1/models/"


@pytest.mark.parametrize("text", ["[]", "{", '{"data": [{}]}', '{"data": 3}', "x" * 2_000_000])
async def test_what_an_engine_lists_oddly_is_left_out(two: Both, text: str) -> None:
    async def odd(_: web.Request) -> web.StreamResponse:
        return web.Response(text=text)

    two.m.lists = odd
    async with two.front.session.get("/v1/models") as response:
        assert len((await response.json())["data"]) == 5


async def test_an_engine_that_does_not_list_is_not_waited_for(two: Both) -> None:
    never = asyncio.Event()

    async def hang(http: web.Request) -> web.StreamResponse:
        await never.wait()
        return await nothing_listed(http)

    two.large.lists = hang
    async with two.front.session.get("/v1/models") as response:
        assert len((await response.json())["data"]) == 5
    never.set()


async def test_who_may_not_ask_an_engine_gets_no_names(two: Both) -> None:
    async def refuse(http: web.Request) -> web.StreamResponse:
        if http.headers.get("Authorization") == "Bearer right":
            return cards("m")
        return web.json_response({"error": "Unauthorized"}, status=401)

    two.m.lists = two.large.lists = refuse
    for path in ("/v1/models", "/v1/models/large"):
        status, text = await listed(two, path)
        assert status == 401
        assert "large" not in text
        right = {"Authorization": "Bearer right"}
        assert (await listed(two, path, headers=right))[0] == 200


async def test_one_that_is_down_leaves_the_others_serving(two: Both) -> None:
    asked = question(model="large")
    await two.front.ask(asked)
    await two.large.stop()
    await two.front.until_ready(503)
    async with two.front.session.get("/ready") as response:
        assert int(response.headers["Retry-After"]) > 0
        state = await response.json()
    assert state["models"] == {"m": "ready", LARGE: "down"}
    assert state["error"]["message"] == f"Not ready: {LARGE}."
    for name, status in (("m", 200), ("poet", 200), ("large", 503)):
        async with two.front.session.get(f"/ready?model={name}") as response:
            assert response.status == status
        # A question that no tier has.
        async with two.front.post(question(model=name)) as response:
            assert response.status == status
            said = await response.json()
        if status == 503:
            assert int(response.headers["Retry-After"]) > 0
            assert said["error"]["type"] == "ServiceUnavailableError"
    assert "hit" in (await two.front.ask(asked))[1]
    assert await two.front.metric('tierserve_engine_state{model="m",state="ready"') == 1
    assert await two.front.metric('tierserve_engine_state{model="Org/Large",state="down"') == 1
    async with two.front.session.get("/v1/models") as response:
        assert len((await response.json())["data"]) == 5
    await two.large.start()
    await two.front.until_ready()
    async with two.front.session.get("/ready") as response:
        assert await response.json() == {"models": {"m": "ready", LARGE: "ready"}}


async def test_metrics_name_models_that_there_are(two: Both) -> None:
    counted = 'tierserve_requests_total{model="%s"'
    before = [await two.front.metric(counted % name) for name in (LARGE, "poet")]
    for name in ("large", "poet", "no"):
        async with two.front.post(question(model=name)) as response:
            assert response.status in (200, 404)
    async with two.front.session.post("/v1/some/route", json={"model": "big"}) as response:
        assert response.status == 200
        await response.read()
    after = [await two.front.metric(counted % name) for name in (LARGE, "poet")]
    assert [now - then for now, then in zip(after, before, strict=True)] == [2, 1]
    for name in ("no", "large", "big"):
        assert await two.front.metric(counted % name) == 0


async def engine_metrics(two: Both, query: str = "") -> tuple[int, dict[tuple[str, str], float]]:
    """Return the status, and the requests that run, by the labels of ours."""
    async with two.front.session.get(f"/metrics/engine{query}") as response:
        families = [*text_string_to_metric_families(await response.text())]
    samples = [each for family in families for each in family.samples]
    running = [each for each in samples if each.name == "vllm:num_requests_running"]
    return response.status, {(s.labels["model"], s.labels["upstream"]): s.value for s in running}


async def test_engines_metrics_are_given_together(two: Both) -> None:
    def telling(number: int):
        async def tell(http: web.Request) -> web.StreamResponse:
            assert http.headers["Accept"] == "text/plain; version=0.0.4"
            kind = "# TYPE vllm:num_requests_running gauge"
            return web.Response(text=f"{kind}\nvllm:num_requests_running {number}\n")

        return tell

    two.m.handler, two.large.handler = telling(1), telling(2)
    of_m, of_large = {("m", two.m.url): 1}, {(LARGE, two.large.url): 2}
    assert await engine_metrics(two) == (200, of_m | of_large)
    assert await engine_metrics(two, "?model=big") == (200, of_large)
    two.m.handler = nothing_listed
    two.large.handler = web.HTTPServiceUnavailable
    assert await engine_metrics(two) == (200, {})
    await two.m.stop()
    async with two.front.session.get("/metrics/engine") as response:
        assert response.status == 503
        assert "No engine tells" in (await response.json())["error"]["message"]
    await two.m.start()
    await two.front.until_ready()


@pytest.mark.parametrize("path", ["/v1/load_lora_adapter", "/v1/unload_lora_adapter"])
async def test_adapters_can_not_be_changed(two: Both, path: str) -> None:
    asked = {"lora_name": "poet", "lora_path": "/elsewhere", "load_inplace": True}
    async with two.front.session.post(path, json=asked) as response:
        assert response.status == 403
        assert (await response.json())["error"]["type"] == "ForbiddenError"
    assert await two.asked() == []


async def test_each_model_has_its_own_bound(tmp_path: Path) -> None:
    go, known = asyncio.Event(), question()
    async with both(tmp_path, max_requests=1) as two:
        await two.front.ask(known)
        two.m.asked.clear()
        two.m.handler = held(go)
        waiting = asyncio.create_task(two.front.ask(question(stream=True)))
        async with asyncio.timeout(HANGS_S):
            while not two.m.asked:
                await two.front.ready()
        for more in (question(model="poet"), question(temperature=1)):
            async with two.front.post(more) as response:
                assert response.status == 503
                assert int(response.headers["Retry-After"]) > 0
                assert "as many requests" in (await response.json())["error"]["message"]
        assert (await two.front.ask(question(model="large")))[0] == 200
        assert "hit" in (await two.front.ask(known))[1]
        go.set()
        assert (await waiting)[0] == 200
        two.m.handler = answer
        assert (await two.front.ask(question()))[0] == 200


async def test_what_depends_on_the_date_has_another_identity_each_day(
    tmp_path: Path, monkeypatch
) -> None:
    days = iter([date(2026, 1, 1), date(2026, 1, 1), date(2026, 1, 2)])
    monkeypatch.setattr("server.engine.models.date", SimpleNamespace(today=lambda: next(days)))
    for name in ("plain", "dated"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "dated/chat_template.jinja").write_text("{{ strftime_now('%d') }}")
    models = Models(
        {
            "plain": ModelConfig(source=str(tmp_path / "plain")),
            "dated": ModelConfig(source=str(tmp_path / "dated"), aliases=("d",)),
        }
    )
    first, again, next_day = (models.names() for _ in range(3))
    assert first is again
    assert first.resolve("plain") == next_day.resolve("plain")
    assert first.resolve("d") == first.resolve("dated") != next_day.resolve("dated")
    await models.close()


async def test_all_that_is_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError) as caught:
        Models(
            {
                "a": ModelConfig(source="./nowhere"),
                "b": ModelConfig(source=str(tmp_path), adapters={"poet": "./none"}),
                "c": ModelConfig(upstreams=("http://h",)),
            }
        )
    assert caught.value.mistakes == [
        "models.a.source: ./nowhere should be a folder with a config.json",
        "models.b.adapters.poet: ./none should be a folder with an adapter_config.json",
    ]


async def test_what_is_known_of_an_engine_is_part_of_what_its_names_mean() -> None:
    options = [None, {}, {"max_num_seqs": 4}, {"dtype": "float16"}, {"reasoning_parser": "qwen3"},
               {"enable_force_include_usage": True}, {"middleware": ["own.Middleware"]},
               {"tool_call_parser": "hermes"}, {"tool_call_parser": "qwen3_coder"}]  # fmt: skip
    models = Models(
        {
            str(number): ModelConfig(upstreams=("http://h",), vllm=vllm)
            for number, vllm in enumerate(options)
        }
    )
    found = [models.names().resolve(str(number)) for number in range(len(options))]
    unknown, plain, many, half, reasons, counts, wrapped, *calls = found
    assert (unknown.is_vllm, unknown.encodings_agree) == (False, False)
    assert not wrapped.is_vllm
    assert (plain.is_vllm, plain.encodings_agree) == (True, True)
    assert (reasons.is_vllm, reasons.encodings_agree) == (True, False)
    assert (plain.always_counts_tokens, counts.always_counts_tokens, counts.encodings_agree) == (
        0,
        1,
        0,
    )
    assert [each.encodings_agree for each in calls] == [True, False]
    # Their bodies differ in nothing that these options change.
    assert plain.identity == many.identity
    assert len({each.identity for each in (unknown, plain, half, reasons)}) == 4
    await models.close()
